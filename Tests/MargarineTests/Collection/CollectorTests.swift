// What goes and what stays, one rule after the other.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct CollectorTests {
    static let grace = CollectionBed.grace

    @Test func whatNobodyNamesGoesOnceItIsOld() async throws {
        let bed = CollectionBed()
        try await bed.create("a")
        try await bed.commit("a", [0, 1, 600, 4000])
        let old = try await bed.litter(30)
        _ = try await bed.memory.put("blocks/README", [1], if: .none)
        bed.environment.pass(ms: Self.grace)
        let young = try await bed.litter(7)
        // Exactly as old as the grace period is not older.
        var summary = try await bed.collect()
        #expect(summary.deleted == 0 && bed.objects().isSuperset(of: old))
        bed.environment.pass(ms: 1)
        let before = bed.objects().count - 1
        summary = try await bed.collect()
        #expect(bed.objects().isDisjoint(with: old))
        #expect(bed.objects().isSuperset(of: young))
        #expect(bed.keys("blocks/README").count == 1, "what is not an object's is left alone")
        try await bed.expectNothingLost()
        #expect(summary.blocks.deleted + summary.pages.deleted == 30 && summary.pages.deleted == 10)
        #expect(summary.blocks.scanned + summary.pages.scanned == UInt64(before))
        #expect(summary.blocks.kept == 4 && summary.pages.kept == 4, "a root and three leaves")
        #expect(summary.blocks.young + summary.pages.young == 7)
        #expect(summary.blocks.deletedBytes == 7 * 8 + 13 * 9 && summary.disks == 1 && summary.graceMs == Self.grace)
        #expect(try await bed.store.collection()?.last == summary)
        #expect(try await bed.store.collection()?.collector == nil)
        // Nothing of it is left on scratch.
        #expect(try bed.scratch.list("gc").isEmpty)
    }

    @Test func aGenerationLeavesInTwoSteps() async throws {
        let bed = CollectionBed()
        try await bed.create("a", density: 0)
        for round in 0..<4 { try await bed.commit("a", [UInt64(round)]) }
        try await bed.commit("a", [0, 1, 2, 3])
        bed.environment.pass(ms: 10 * Self.grace)
        // The first is pinned, the fifth is current: 2, 3 and 4 are to go.
        var summary = try await bed.collect()
        #expect(bed.generations("a") == [1, 2, 3, 4])
        #expect(summary.generations.retired == 3 && summary.generations.kept == 2 && summary.deleted == 0)
        try await bed.expectExactlyNamed()
        bed.environment.pass(ms: Self.grace)
        summary = try await bed.collect()
        #expect(
            summary.generations.waiting == 3 && summary.generations.removed == 0 && summary.generations.retired == 0)
        bed.environment.pass(ms: 1)
        // Somebody pinned one of them just before it was retired.
        try await bed.change("a") { $0.pin(3) }
        let before = bed.objects().count
        summary = try await bed.collect()
        #expect(summary.generations.removed == 2 && summary.deleted > 0)
        #expect(bed.generations("a") == [1, 3] && bed.objects().count < before)
        #expect(bed.keys("disks/a/retired/").isEmpty)
        try await bed.expectExactlyNamed()
        // Nor is it retired again while it is pinned.
        summary = try await bed.collect()
        #expect(summary.generations.retired == 0 && summary.generations.kept == 3)
    }

    @Test func historyOfTenThousandGenerationsKeepsWhatTheRuleSays() async throws {
        let bed = CollectionBed()
        var head = try await bed.create("a")
        let count: UInt64 = 10_000
        let cache = ManifestCache(bed.store.locations)
        for number in 1...count {
            head.advance(
                to: GenerationRecord(
                    diskID: head.diskID, generation: number, epoch: 0, kind: .flush, committedAtMs: 1,
                    journalSequence: 0, newBytes: 0, manifest: .empty(sizeBytes: head.sizeBytes, cache: cache)))
            if number < count { try await bed.heads().archive(head) }
        }
        let etag = try #require(try await bed.heads().load("a")).etag
        guard case .won = try await bed.heads().swap(head, expecting: etag) else { fatalError("not won") }
        // Independently: a generation with t ones at the end of its number lives for less than 2^(t + 2) further ones.
        let expected = (1..<count).filter { number in
            var ones: UInt64 = 0
            while number >> ones & 1 == 1 { ones += 1 }
            return number == 1 || count - number < 1 << (ones + 2)
        }
        var summary = try await bed.collect()
        #expect(summary.generations.retired == count - 1 - UInt64(expected.count))
        bed.environment.pass(ms: Self.grace + 1)
        summary = try await bed.collect()
        #expect(bed.generations("a") == expected)
        #expect(summary.generations.removed == count - 1 - UInt64(expected.count))
        // The bound of the rule: 2^(d-1) for each bit of the number, and the pinned one.
        #expect(expected.count + 1 <= 2 * 14 + 1)
    }

    @Test func aDeletedDiskGoesAndTheNextOfItsNameStays() async throws {
        let bed = CollectionBed()
        try await bed.create("a")
        for round in 0..<6 { try await bed.commit("a", [UInt64(round), 9]) }
        try await bed.delete("a")
        bed.environment.pass(ms: Self.grace + 1)
        var summary = try await bed.collect()
        #expect(summary.generations.retired == 6 && summary.disks == 0)
        // The name is used again before the old ones have gone, and twice.
        try await bed.create("a")
        try await bed.commit("a", [1])
        try await bed.delete("a")
        try await bed.create("a")
        for _ in 0..<3 { try await bed.commit("a", [2]) }
        summary = try await bed.collect()
        #expect(summary.generations.retired == 1, "the one of the second disk")
        bed.environment.pass(ms: Self.grace + 1)
        summary = try await bed.collect()
        #expect(bed.generations("a") == [8, 9] && summary.generations.removed == 7)
        try await bed.expectExactlyNamed()
        #expect(bed.keys("disks/a/head").count == 1)
        // Of a disk that is gone for good nothing is left but its tombstone.
        try await bed.delete("a")
        for _ in 0..<2 {
            try await bed.collect()
            bed.environment.pass(ms: Self.grace + 1)
        }
        try await bed.collect()
        #expect(bed.objects().isEmpty && bed.keys("disks/") == ["disks/a/head"])
    }

    @Test func generationsThatAreReadStay() async throws {
        let bed = CollectionBed()
        try await bed.create("a", density: 0)
        for round in 0..<5 { try await bed.commit("a", [UInt64(round)]) }
        try await bed.collect()
        bed.environment.pass(ms: Self.grace + 1)
        func beat(_ id: String, _ reading: [String]) async throws {
            try await bed.store.heads.beat(
                ServerRecord(
                    id: id, host: "h", bootID: "", pid: 1, pidNamespace: "", startTicks: 1, addresses: [],
                    timeMs: 5, reading: reading))
        }
        try await beat("s1", ["a@3", "b@4"])
        var summary = try await bed.collect()
        #expect(bed.generations("a") == [1, 3] && summary.generations.held == 1)
        #expect(summary.generations.removed == 2)
        try await bed.expectExactlyNamed()
        // A heartbeat that names more than it can holds everything, and so does one that can't be read.
        try await bed.commit("a", [9])
        bed.environment.pass(ms: Self.grace + 1)
        try await beat("s1", (0...ServerRecord.maxReading).map { "x@\($0)" })
        try await bed.collect()
        bed.environment.pass(ms: Self.grace / 2)
        try await beat("s1", (0...ServerRecord.maxReading).map { "x@\($0)" })
        bed.environment.pass(ms: Self.grace / 2 + 1)
        summary = try await bed.collect()
        #expect(bed.generations("a") == [1, 3, 5] && summary.generations.held == 2)
        _ = try await bed.memory.put("servers/s1", Array("{\"margarine\":\"server\",\"format\":9".utf8), if: .none)
        #expect(try await bed.collect().generations.held == 2)
        // One that has not been heard of for as long holds nothing.
        bed.environment.pass(ms: Self.grace + 1)
        try await beat("s2", [])
        summary = try await bed.collect()
        #expect(bed.generations("a") == [1] && summary.generations.removed == 2)
    }

    /// Whatever can't be read: nothing is deleted, and the error says what it was.
    @Test(arguments: [
        "page", "lost page", "head", "no head", "record", "retirement", "stray", "listing", "location", "clock",
    ])
    func inDoubtNothingIsDeleted(_ what: String) async throws {
        let bed = CollectionBed(locations: 2)
        try await bed.create("a")
        try await bed.create("b", at: 1)
        for round in 0..<3 {
            try await bed.commit("a", [UInt64(round)])
            try await bed.commit("b", at: 1, [UInt64(round), 3000])
        }
        try await bed.litter(10)
        try await bed.litter(10, at: 1)
        bed.environment.pass(ms: Self.grace + 1)
        let memory = bed.memories[1]
        func damage(_ key: String) async throws {
            var bytes = try #require(memory.contents[key])
            bytes[bytes.count / 2] ^= 1
            _ = try await memory.put(key, bytes, if: .none)
        }
        let page = try #require(
            bed.keys("manifests/", at: 1).sorted().first { memory.contents[$0]!.starts(with: Array("MGPAGE".utf8)) })
        switch what {
        case "page": try await damage(page)
        case "lost page": try await memory.delete([page])
        case "head": try await damage("disks/b/head")
        case "no head": try await memory.delete(["disks/b/head"])
        case "record": try await damage(GenerationRecord.key(disk: "b", generation: 1))
        case "retirement": _ = try await memory.put("disks/b/retired/x", [1, 2, 3], if: .none)
        case "stray": _ = try await memory.put("disks/b/generations/17", [1, 2, 3], if: .none)
        case "listing":
            bed.faults[1].inject(StoreFault(.fail(.unavailable), verb: .list, keyContains: "manifests/", count: 1))
        case "location": bed.faults[1].inject(StoreFault(.fail(.unavailable)))
        default: bed.faults[1].inject(StoreFault(.fail(.refused), verb: .put, keyContains: "clock", count: 1))
        }
        let before = [bed.objects(), bed.objects(at: 1)]
        let records = bed.generations("a") + bed.generations("b", at: 1)
        await #expect(throws: CatalogError.self) { try await bed.collect() }
        #expect([bed.objects(), bed.objects(at: 1)] == before)
        #expect(bed.generations("a") + bed.generations("b", at: 1) == records)
        // And the role is free again at once.
        #expect(try await bed.store.collection()?.collector == nil)
    }

    @Test func aDryRunWritesNothingAndSaysWhatWouldBe() async throws {
        let bed = CollectionBed()
        try await bed.create("a", density: 0)
        for round in 0..<5 { try await bed.commit("a", [UInt64(round % 2), 100]) }
        bed.environment.pass(ms: Self.grace + 1)
        try await bed.collect()
        bed.environment.pass(ms: Self.grace + 1)
        try await bed.litter(20)
        bed.environment.pass(ms: Self.grace + 1)
        let before = bed.memory.contents
        bed.faults[0].inject(StoreFault(.fail(.refused), verb: .put))
        bed.faults[0].inject(StoreFault(.fail(.refused), verb: .delete))
        var dry = try await bed.collect { $0.isDryRun = true }
        #expect(bed.memory.contents == before && bed.faults[0].suffered == 0)
        bed.faults[0].clearFaults()
        var real = try await bed.collect()
        #expect(dry.isDryRun && dry.generations.removed == 3 && dry.deleted > 20)
        for phase in [\CollectionSummary.phaseMs] {
            dry[keyPath: phase] = [:]
            real[keyPath: phase] = [:]
        }
        (dry.isDryRun, dry.durationMs, real.durationMs) = (false, 0, 0)
        #expect(dry == real)
        try await bed.expectExactlyNamed()
    }

    @Test func everyLocationIsLookedAt() async throws {
        let bed = CollectionBed(locations: 3)
        try await bed.create("a")
        let record = try await bed.commit("a", [0, 1, 2])
        // A fork in another region: its head and new blocks are there, the old ones where they were.
        var fork = try await bed.create("fork", at: 2)
        fork.sizeBytes = record.sizeBytes
        var root = record
        root.diskID = fork.diskID
        root.generation = 1
        let whole = root
        try await bed.change("fork", at: 2) { $0.advance(to: whole) }
        try await bed.commit("fork", at: 2, [1])
        try await bed.delete("a")
        let litter = try await bed.litter(12, at: 1)
        for _ in 0..<3 {
            bed.environment.pass(ms: Self.grace + 1)
            try await bed.collect()
            try await bed.expectNothingLost()
        }
        #expect(bed.objects(at: 1).isDisjoint(with: litter))
        // The block that the fork has overwritten is held by its pinned first generation.
        try await bed.expectExactlyNamed()
        #expect(!bed.objects().isEmpty && !bed.objects(at: 2).isEmpty)
    }

    @Test func aCopyOfWhatIsInUseStays() async throws {
        let bed = CollectionBed(locations: 2)
        try await bed.create("a")
        try await bed.commit("a", [0])
        let key = try #require(bed.keys("blocks/").first)
        _ = try await bed.memories[1].put(key, try #require(bed.memory.contents[key]), if: .none)
        bed.environment.pass(ms: Self.grace + 1)
        try await bed.collect()
        #expect(bed.keys("blocks/", at: 1) == [key])
        // Where it is named it is not: then the copy is all there is.
        let bytes = try #require(bed.memory.contents[key])
        try await bed.memory.delete([key])
        try await bed.collect { $0.dropsCopies = true }
        #expect(bed.keys("blocks/", at: 1) == [key])
        _ = try await bed.memory.put(key, bytes, if: .none)
        bed.environment.pass(ms: Self.grace + 1)
        #expect(try await bed.collect().blocks.copies == 1)
        #expect(try await bed.collect { $0.dropsCopies = true }.blocks.deleted == 1)
        #expect(bed.keys("blocks/", at: 1).isEmpty && bed.keys("blocks/") == [key])
        _ = try await bed.memories[1].put(key, bytes, if: .none)
        bed.environment.pass(ms: Self.grace + 1)
        try await bed.delete("a")
        for _ in 0..<2 {
            try await bed.collect()
            bed.environment.pass(ms: Self.grace + 1)
        }
        try await bed.collect()
        #expect(bed.objects().isEmpty && bed.objects(at: 1).isEmpty)
    }

    @Test func deletingKeepsToItsRate() async throws {
        let bed = CollectionBed()
        try await bed.litter(2500)
        bed.environment.pass(ms: Self.grace + 1)
        let began = bed.environment.wallMs
        let summary = try await bed.collect { $0.deletesPerSecond = 100 }
        #expect(summary.deleted == 2500 && bed.objects().isEmpty)
        #expect((24_000...26_000).contains(bed.environment.wallMs - began))
    }

    /// Each broken rule costs something that is in use; the same story with the rule kept costs nothing.
    @Test(arguments: [
        nil, Fault.collectionSkipsTombstone, .collectionIgnoresGrace, .collectionScansFirst, .collectionSkipsLocation,
    ])
    func aBrokenRuleCostsData(_ fault: Fault?) async throws {
        let bed = CollectionBed(locations: 2)
        try await bed.create("a", density: 0)
        try await bed.create("b", at: 1)
        for round in 0..<4 { try await bed.commit("a", [UInt64(round)]) }
        try await bed.commit("b", at: 1, [7])
        bed.environment.pass(ms: Self.grace + 1)
        // A commit, and a fork of generation 2, are under way while the collection goes on.
        let (head, etag) = try #require(try await bed.heads().load("a"))
        let record = try #require(try await RootScan(heads: bed.heads(), requests: 1).record("a", 2))
        var edit = ManifestEdit(head.manifest(cache: ManifestCache(bed.store.locations)))
        edit.set(BlockIndex(50), BlockEntry(base: try await bed.block(), deltas: []))
        let manifest = try await edit.write(to: bed.memory, location: 0, environment: bed.environment)
        bed.environment.pass(ms: 1)
        let gate = StoreGate()
        if fault == .collectionScansFirst {
            // Between its two scans: before it asks the second time what time it is, for which it has the role by then.
            bed.faults[0].inject(StoreFault(.delay(ns: 0), verb: .put, keyContains: "clock", count: 2))
            bed.faults[0].inject(StoreFault(.hold(gate), verb: .put, keyContains: "clock", count: 1))
        }
        let collection = Task { try await bed.collect(fault) }
        if fault == .collectionScansFirst {
            await gate.waitUntilArrived()
        } else {
            _ = try await collection.value
        }
        var next = head
        try await bed.heads().archive(head)
        next.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .flush,
                committedAtMs: 1, journalSequence: 0, newBytes: 0, manifest: manifest))
        guard case .won = try await bed.heads().swap(next, expecting: etag) else { fatalError("not won") }
        // The fork has read its generation before; the retirement would make it fail, its absence lets it go on.
        var fork = try await bed.create("fork")
        if try await !bed.heads().isRetired("a", generation: 2) {
            var first = record
            first.diskID = fork.diskID
            first.generation = 1
            fork.advance(to: first)
            let forked = fork
            try await bed.change("fork") { $0 = forked }
        }
        if fault == .collectionScansFirst {
            // The commit has come to its end in time, and the collection takes long.
            bed.environment.pass(ms: Self.grace + 1)
            gate.open()
            _ = try await collection.value
        }
        let lost = try await bed.lostKeys()
        #expect(lost.isEmpty == (fault == nil), "\(lost)")
    }
}

extension CollectionBed {
    /// What is named and gone; a manifest page that is gone counts for all below it.
    func lostKeys() async throws -> Set<String> {
        do {
            var lost: Set<String> = []
            for (location, keys) in try await named().enumerated() {
                lost.formUnion(keys.subtracting(memories[location].contents.keys))
            }
            return lost
        } catch let error as StoreError {
            return [error.description]
        }
    }
}
