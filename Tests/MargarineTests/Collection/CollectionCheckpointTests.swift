// A round that is cut off while it lists goes on there, unless what it knows may not be true any more.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// Tells which listings of objects were asked for, and fails one of them.
private final class ListingBucket: Bucket {
    private let next: any Bucket
    private let state = Mutex((calls: [String](), failing: Int?.none))
    var name: String { next.name }
    init(_ next: any Bucket) { self.next = next }

    /// The calls since the last time, as PREFIX or PREFIX>KEY.
    func takeCalls() -> [String] {
        state.withLock { state in
            defer { state.calls = [] }
            return state.calls
        }
    }
    /// The call after so many will fail, once.
    func fail(after calls: Int) { state.withLock { $0.failing = calls } }

    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try await next.get(key, range: range)
    }
    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try await next.put(key, bytes, if: condition)
    }
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        if prefix == "blocks/" || prefix == "manifests/" {
            let fails = state.withLock { state in
                state.calls.append(prefix + (after.map { ">\($0)" } ?? ""))
                guard let left = state.failing else { return false }
                state.failing = left > 0 ? left - 1 : nil
                return left == 0
            }
            if fails { throw StoreError(.unavailable, "cut off") }
        }
        return try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }
    func delete(_ keys: [String]) async throws(StoreError) { try await next.delete(keys) }
}

struct CollectionCheckpointTests {
    private static let grace = CollectionBed.grace

    /// A store whose listing takes five pages, and a collector that keeps each of them.
    private struct Listed {
        let bed = CollectionBed()
        let bucket: ListingBucket
        let store: Store
        var garbage: Set<String> = []

        init() async throws {
            bucket = ListingBucket(bed.faults[0])
            store = Store(
                id: bed.store.id, locations: Locations([bucket as any Bucket]), environment: bed.environment)
            try await bed.create("a")
            try await bed.commit("a", [0, 1, 600, 4000])
            garbage = try await bed.litter(4000)
            bed.environment.pass(ms: CollectionCheckpointTests.grace + 1)
        }

        @discardableResult
        func collect(_ change: (inout CollectionOptions) -> Void = { _ in }) async throws -> CollectionSummary {
            let options = bed.options {
                $0.checkpointMs = 0
                change(&$0)
            }
            return try await Collector(store: store, scratch: bed.scratch, options: options).run()
        }

        /// Cuts a round off in its listing, after so many pages.
        func cut(after pages: Int) async {
            bucket.fail(after: pages)
            await #expect(throws: CatalogError.self) { try await collect() }
            #expect(bucket.takeCalls().count == pages + 1)
        }

        func expectAllDone(_ summary: CollectionSummary, _ comment: Comment? = nil) async throws {
            #expect(bed.objects().isDisjoint(with: garbage), comment)
            try await bed.expectNothingLost(comment)
            #expect(summary.deleted == 4000, comment)
            #expect(summary.blocks.scanned == 2671 && summary.blocks.kept == 4, comment)
            #expect(summary.pages.kept == 4, comment)
            #expect(try bed.scratch.list("gc").isEmpty, comment)
        }
    }

    @Test(arguments: 0..<5) func aRoundGoesOnWhereItWasCutOff(_ pages: Int) async throws {
        let test = try await Listed()
        await test.cut(after: pages)
        // What has come since is nobody's garbage.
        try await test.bed.commit("a", [7])
        let summary = try await test.collect()
        let calls = test.bucket.takeCalls()
        #expect(calls.count == 5 - pages, "\(calls)")
        if pages == 3 { #expect(calls.first == "manifests/") } else if pages > 0 { #expect(calls[0].contains(">")) }
        #expect(test.bed.objects().isDisjoint(with: test.garbage))
        try await test.bed.expectExactlyNamed()
        #expect(summary.deleted == 4000)
        // The next one begins anew.
        #expect(try await test.collect().deleted == 0)
        #expect(test.bucket.takeCalls().count == 2)
    }

    @Test func whatIsListedIsNotListedAgain() async throws {
        let test = try await Listed()
        // Everything is listed, and then a manifest page can't be read.
        test.bed.faults[0].inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "manifests/", count: 1))
        await #expect(throws: CatalogError.self) { try await test.collect() }
        #expect(test.bucket.takeCalls().count == 5)
        let summary = try await test.collect()
        #expect(test.bucket.takeCalls().isEmpty)
        try await test.expectAllDone(summary)
    }

    @Test func cutOffMoreThanOnce() async throws {
        let test = try await Listed()
        await test.cut(after: 2)
        await test.cut(after: 1)
        // Before it lists at all.
        test.bed.faults[0].inject(StoreFault(.fail(.unavailable), verb: .list, keyContains: "disks/", count: 1))
        await #expect(throws: CatalogError.self) { try await test.collect() }
        let summary = try await test.collect()
        // That one's number came between, and what it did is not known.
        #expect(test.bucket.takeCalls().count == 5)
        try await test.expectAllDone(summary)
    }

    @Test func aStoppedRoundKeepsWhatItHas() async throws {
        let test = try await Listed()
        let gate = StoreGate()
        test.bed.faults[0].inject(StoreFault(.hold(gate), verb: .list, keyContains: "manifests/", count: 1))
        let round = Task { try await test.collect { $0.checkpointMs = 1_000_000 } }
        await gate.waitUntilArrived()
        round.cancel()
        gate.open()
        await #expect(throws: CatalogError.self) { try await round.value }
        #expect(test.bucket.takeCalls().count == 4)
        let summary = try await test.collect()
        #expect(test.bucket.takeCalls().count == 1)
        try await test.expectAllDone(summary)
    }

    @Test(arguments: [
        "another round", "another grace period", "a damaged file", "a missing file", "a damaged checkpoint",
        "another store", "no role",
    ])
    func whatMayNotBeTrueAnyMoreIsNotUsed(_ what: String) async throws {
        let test = try await Listed()
        await test.cut(after: 3)
        var graceMs: Int64?
        let path = "gc/blocks.found"
        switch what {
        case "another round":
            test.bed.faults[0].inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "manifests/", count: 1))
            let other = Collector(store: test.store, scratch: MemoryScratch(), options: test.bed.options())
            await #expect(throws: CatalogError.self) { try await other.run() }
        case "another grace period": graceMs = Self.grace * 2
        case "a damaged file": test.bed.scratch.flipBit(path, at: 5000)
        case "a missing file": try test.bed.scratch.remove(path)
        case "a damaged checkpoint": test.bed.scratch.flipBit("gc/round", at: 200)
        case "another store":
            let checkpoint = try #require(await CollectionCheckpoint.load(test.bed.scratch, "gc"))
            var other = checkpoint
            other.storeID = ObjectID(high: 5, low: 5).description
            try await other.write(test.bed.scratch, "gc")
        default:
            // A look does not take it up, nor does it take it away.
            _ = test.bucket.takeCalls()
            try await test.collect {
                $0.isDryRun = true; $0.folder = "look"
            }
            #expect(test.bucket.takeCalls().count == 5)
            let summary = try await test.collect()
            #expect(test.bucket.takeCalls().count == 2)
            return try await test.expectAllDone(summary)
        }
        _ = test.bucket.takeCalls()
        if let graceMs { test.bed.environment.pass(ms: graceMs) }
        let summary = try await test.collect { $0.graceMs = graceMs }
        #expect(test.bucket.takeCalls().count == 5)
        try await test.expectAllDone(summary)
    }

    /// What was deleted may have been put back since: by a restored backup, with the same names.
    @Test func nothingIsKeptOnceSomethingWasDeleted() async throws {
        let test = try await Listed()
        test.bed.faults[0].inject(
            StoreFault(.failAfterEffect(.unavailable), verb: .delete, keyContains: "manifests/", count: 1))
        let before = test.bed.memory.contents
        await #expect(throws: CatalogError.self) { try await test.collect() }
        let deleted = Set(before.keys).subtracting(test.bed.memory.contents.keys).filter { $0.hasPrefix("manifests/") }
        #expect(!deleted.isEmpty && test.bed.scratch.contents("gc/round") == nil)
        for key in deleted { _ = try await test.bed.memory.put(key, before[key]!, if: .absent) }
        _ = test.bucket.takeCalls()
        try await test.collect()
        #expect(test.bucket.takeCalls().count >= 2)
        #expect(test.bed.objects().isSuperset(of: deleted), "what is young stays")
    }
}
