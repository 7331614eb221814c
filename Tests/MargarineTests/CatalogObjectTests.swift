// The control objects as bytes: what they look like, and what is refused.

import BlockCache
import Foundation
@testable import Margarine
import ObjectStore
import Testing

struct CatalogObjectTests {
    static func sample() -> Head {
        let test = TestStore()
        var head = Head(
            diskID: ObjectID(high: 0x0123_4567_89ab_cdef, low: 2), name: "disk", sizeBytes: ManifestShape.maxSizeBytes,
            options: DiskOptions(), createdAtMs: 5)
        head.epoch = 3
        head.owner = Head.Owner(server: "s/1", host: "h\"ö", sinceMs: 9)
        head.session = "vm"
        head.lose(session: "old")
        let manifest = Manifest(
            sizeBytes: 1 << 30,
            root: PageRef(
                id: ObjectID(high: 7, low: 8), location: 0, lengthBytes: 100, usedBlocks: 4, storedBytes: .max),
            cache: test.cache())
        head.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: 8, epoch: 3, kind: .btrfsLog, committedAtMs: 10,
                journalSequence: 1 << 60,
                newBytes: 1,
                manifest: manifest))
        return head
    }

    /// `body` under a right beginning and a right checksum.
    static func sealed(_ body: String, kind: String = "head", format: String = "2") -> [UInt8] {
        let rest = Array(body.utf8)
        let sum = ManifestPage.checksum(rest[...])
        let digits = String(sum, radix: 16)
        return Array(
            "{\"margarine\":\"\(kind)\",\"format\":\(format),\"checksum\":\"\(String(repeating: "0", count: 16 - digits.count))\(digits)\","
                .utf8) + rest
    }

    static func body(_ head: Head) -> String {
        let text = String(decoding: head.encoded(), as: UTF8.self)
        return String(text[text.range(of: "\"createdAtMs\"")!.lowerBound...])
    }

    @Test func headsAreJSONAndComeBack() throws {
        let head = Self.sample()
        let bytes = head.encoded()
        #expect(try Head.decode(bytes, name: "disk") == head)
        let json = try #require(try JSONSerialization.jsonObject(with: Data(bytes)) as? [String: Any])
        #expect(json["margarine"] as? String == "head" && json["format"] as? Int == 2)
        #expect(json["diskID"] as? String == "0123456789abcdef0000000000000002")
        #expect(json["sizeBytes"] as? UInt64 == ManifestShape.maxSizeBytes)
        #expect((json["record"] as? [String: Any])?["journalSequence"] as? UInt64 == 1 << 60)
        #expect((json["owner"] as? [String: Any])?["host"] as? String == "h\"ö")
        #expect(json["lostSessions"] as? [String] == ["old"])
        #expect(bytes == Self.sealed(Self.body(head)))
        #expect(throws: CatalogError.self) { try Head.decode(bytes, name: "other") }
        // A record is a part of it, and an object of its own.
        let record = head.record!
        #expect(try GenerationRecord.decode(record.encoded(), key: "k") == record)
        #expect(GenerationRecord.key(disk: "d", generation: 8) == "disks/d/generations/00000000000000000008")
        #expect(GenerationRecord.key(disk: "d", generation: .max) == "disks/d/generations/18446744073709551615")
        #expect(throws: CatalogError.self) { try GenerationRecord.decode(bytes, key: "k") }
    }

    @Test func everyFlippedBitIsFound() {
        let good = Self.sample().encoded()
        for bit in 0..<good.count * 8 {
            var bad = good
            bad[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(throws: CatalogError.self, "bit \(bit)") { try Head.decode(bad, name: "disk") }
        }
        for length in 0..<good.count {
            #expect(throws: CatalogError.self, "cut to \(length)") {
                try Head.decode(Array(good[..<length]), name: "disk")
            }
        }
        #expect(throws: CatalogError.self) { try Head.decode(good + [10], name: "disk") }
    }

    @Test func laterFormatsAndUnknownMembersAreRefusedByName() {
        let body = Self.body(Self.sample())
        func error(_ bytes: [UInt8]) -> String {
            do { _ = try Head.decode(bytes, name: "disk") } catch { return error.description }
            return ""
        }
        #expect(error(Self.sealed(body)) == "")
        #expect(error(Self.sealed(body, format: "4")).contains("format version 4"))
        // Format 3 is what says that lost sessions are elsewhere, and nothing else is.
        #expect(error(Self.sealed(body, format: "3")).contains("contradicts itself"))
        let forgetful = body.replacingOccurrences(
            of: "\"lostSessions\":", with: "\"forgotSessions\":true,\"lostSessions\":")
        #expect(error(Self.sealed(forgetful, format: "3")) == "")
        #expect(error(Self.sealed(forgetful)).contains("contradicts itself"))
        // What the first version wrote is read: without pins, and with the history of new disks.
        var old = body
        for member in [
            #""commitWanted":"[0-9a-f]*","#, #""pinned":\[\],"#, #","readOnly":false"#, #""historyDensity":2,"#,
        ] {
            old = old.replacingOccurrences(of: member, with: "", options: .regularExpression)
        }
        #expect(old != body && error(Self.sealed(old, format: "1")) == "")
        #expect(error(Self.sealed(body, kind: "store")).contains("not a head"))
        let more = body.replacingOccurrences(of: "\"deleted\":", with: "\"delay\":1,\"deleted\":")
        #expect(error(Self.sealed(more)).contains("unknown member 'delay'"))
        let deep = body.replacingOccurrences(of: "\"durability\":", with: "\"extra\":{},\"durability\":")
        #expect(error(Self.sealed(deep)).contains("unknown member 'options.extra'"))
        let inRecord = body.replacingOccurrences(of: "\"newBytes\":", with: "\"new\":null,\"newBytes\":")
        #expect(error(Self.sealed(inRecord)).contains("unknown member 'record.new'"))
        // The decoder calls itself at each level: what is deep is refused before it begins.
        for depth in [15, 16, 500, 100_000] {
            let brackets = "\"x\\\"[\":" + String(repeating: "[", count: depth) + String(repeating: "]", count: depth)
            let nested = body.replacingOccurrences(of: "\"deleted\":", with: "\(brackets),\"deleted\":")
            #expect(error(Self.sealed(nested)).contains(depth < 16 ? "unknown member" : "nested too deep"), "\(depth)")
        }
    }

    @Test(arguments: [
        ("\"epoch\":3,\"generation\":8", "\"epoch\":2,\"generation\":8"),
        ("\"generation\":8,\"lost", "\"generation\":9,\"lost"),
        ("\"sizeBytes\":1073741824", "\"sizeBytes\":1073741825"), ("\"sizeBytes\":1073741824", "\"sizeBytes\":0"),
        ("\"depth\":1", "\"depth\":2"), ("\"usedBlocks\":4", "\"usedBlocks\":5"),
        ("\"safePoints\":\"auto\"", "\"safePoints\":\"never\""),
        ("\"resumeWindowMs\":60000", "\"resumeWindowMs\":-1"), ("\"kind\":\"btrfsLog\"", "\"kind\":\"guess\""),
        ("0123456789abcdef", "0123456789ABCDEF"), ("\"epoch\":3", "\"epoch\":-3"), ("\"nonce\"", "\"once\""),
        ("\"createdAtMs\":5", "\"createdAtMs\":-5"), ("\"createdAtMs\":5", "\"createdAtMs\":9223372036854775807"),
        ("\"sinceMs\":9", "\"sinceMs\":253402300800000"), ("\"committedAtMs\":10", "\"committedAtMs\":-1"),
        ("\"journalSequence\":1152921504606846976", "\"journalSequence\":4611686018427387904"),
        ("\"epoch\":3,\"generation\":8,\"lost", "\"epoch\":4611686018427387904,\"generation\":8,\"lost"),
    ])
    func contradictionsAreRefused(_ change: (from: String, to: String)) throws {
        let body = Self.body(Self.sample())
        let range = try #require(body.range(of: change.from))
        let bad = body.replacingCharacters(in: range, with: change.to)
        #expect(throws: CatalogError.self) { try Head.decode(Self.sealed(bad), name: "disk") }
    }

    @Test func aStoreIsMadeOnceAndKnowsItsOwn() async throws {
        let test = TestStore()
        let missing = await CatalogTests.kind {
            _ = try await Store.open(bucket: test.faulty, environment: test.environment, readOnly: true)
        }
        #expect(missing == .notFound)
        #expect(test.memory.contents.isEmpty)
        async let one = Store.open(bucket: test.faulty, environment: test.environment)
        async let two = Store.open(bucket: test.faulty, environment: test.environment)
        let ids = try await (one.id, two.id)
        #expect(ids.0 == ids.1)
        let reader = try await Store.open(bucket: test.faulty, environment: test.environment, readOnly: true)
        #expect(reader.id == ids.0)

        for (bytes, part) in [
            (
                Self.sealed(
                    "\"blockBytes\":4194304,\"createdAtMs\":1,\"storeID\":\"\(ids.0)\"}", kind: "store", format: "1"),
                "4194304-byte blocks"
            ),
            (
                Self.sealed(
                    "\"blockBytes\":16777216,\"createdAtMs\":1,\"storeID\":\"\(ids.0)\"}", kind: "store", format: "2"),
                "format version 2"
            ),
            (Array("{}".utf8), "not a store"), ([], "not a store"),
        ] {
            let other = TestStore()
            _ = try await other.memory.put("store.json", bytes, if: .none)
            do {
                _ = try await Store.open(bucket: other.faulty, environment: test.environment)
                Issue.record("opened")
            } catch {
                #expect(error.description.contains(part), "\(error)")
            }
        }
        // A store that is away is not taken for one that is not there.
        let away = TestStore()
        away.faulty.inject(StoreFault(.fail(.unavailable), verb: .get))
        let kind = await CatalogTests.kind {
            _ = try await Store.open(bucket: away.faulty, environment: away.environment)
        }
        #expect(kind == .store(.unavailable) && away.memory.contents.isEmpty)
    }
}
