// No disk is larger than what NBD clients can hold in a signed number; what is stored all the same traps nobody.

import BlockCache
import Glibc
@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct DiskSizeTests {
    /// 2^63 - 1, rounded down to a block.
    private static let most: UInt64 = (1 << 63 - 1) / (16 << 20) * (16 << 20)

    private func refused(_ body: () async throws -> Void) async -> Bool {
        do { try await body() } catch let error as CatalogError {
            return error.kind == .invalid && error.description.contains("signed 64-bit")
        } catch {}
        return false
    }

    private func stream(_ sizeBytes: UInt64) -> [UInt8] {
        var writer = StreamWriter()
        let origin = GenerationRecord.Origin(disk: "d", diskID: ObjectID(high: 1, low: 2), generation: 3)
        return writer.begin(
            StreamDescription(generation: origin, from: nil, sizeBytes: sizeBytes, kind: .flush, committedAtMs: 0))
            + writer.end()
    }

    @Test("row 18: every way to make or grow a disk ends at 2^63 - 2^24 bytes")
    func largest() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        #expect(try await catalog.create("largest", sizeBytes: Self.most).size == Self.most)
        _ = try await catalog.create("grown", sizeBytes: 512)
        #expect(try await catalog.resize("grown", to: Self.most).size == Self.most)
        #expect(try await StreamTests.receive(catalog, "received", stream(Self.most)).size == Self.most)
        for size in [Self.most + 512, 1 << 63, 0 &- (16 << 20)] as [UInt64] {
            #expect(await refused { _ = try await catalog.create("x", sizeBytes: size) })
            #expect(await refused { _ = try await catalog.resize("grown", to: size) })
            #expect(await refused { _ = try await StreamTests.receive(catalog, "y", stream(size)) })
        }
    }

    @Test("row 18: a disk that an earlier version made larger is refused with the reason, and can be made smaller")
    func larger() async throws {
        let bed = try DiskBed()
        let size: UInt64 = 0 &- (16 << 20)
        try await bed.create("d", size: size)
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        var first = try #require(try await heads.load("d"))
        first.head.advance(
            to: GenerationRecord(
                diskID: first.head.diskID, generation: 1, epoch: first.head.epoch, kind: .imported, committedAtMs: 1,
                journalSequence: 0, newBytes: 0, manifest: .empty(sizeBytes: size, cache: bed.context.manifests)))
        _ = try await heads.swap(first.head, expecting: first.etag)
        await #expect {
            _ = try await bed.attach("d")
        } throws: {
            ($0 as? AttachError)?.kind == .refused && "\($0)".contains("signed 64-bit") && "\($0)".contains("--shrink")
        }
        var head = try await bed.head()
        head.isReadOnly = true
        _ = try await heads.swap(head, expecting: try #require(try await heads.load("d")).etag)
        await #expect {
            _ = try await bed.attach("d")
        } throws: {
            "\($0)".contains("signed 64-bit")
        }
        head.isReadOnly = false
        _ = try await heads.swap(head, expecting: try #require(try await heads.load("d")).etag)
        let catalog = Catalog(try await Store.open(bucket: bed.store, environment: bed.environment)) { _ in .outOfSight
        }
        #expect(await refused { _ = try await catalog.fork("d", as: "fork") })
        _ = try await catalog.resize("d", to: Self.most, shrink: true)
        #expect(await refused { _ = try await catalog.rollBack("d", to: 1) })
        let client = try await bed.attach("d")
        try await client.write(pattern(4096, 1), at: Self.most - 4096)
        #expect(try await client.read(4096, at: Self.most - 4096) == pattern(4096, 1))
    }
}
