// One collector at a time, whatever becomes of it; the grace period; and commits that take too long.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// Dies with its owner: after so many calls every call fails, and has no effect.
private final class DyingBucket: Bucket {
    private let next: any Bucket
    private let left: Mutex<Int>
    var name: String { next.name }
    init(_ next: any Bucket, after calls: Int) {
        self.next = next
        left = Mutex(calls)
    }
    var isDead: Bool { left.withLock { $0 < 0 } }

    private func live() throws(StoreError) {
        let isDead = left.withLock { left in
            left -= 1
            return left < 0
        }
        if isDead { throw StoreError(.unavailable, "gone") }
    }
    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try live()
        return try await next.get(key, range: range)
    }
    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try live()
        return try await next.put(key, bytes, if: condition)
    }
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try live()
        return try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }
    func delete(_ keys: [String]) async throws(StoreError) {
        try live()
        // Not all of them, if it is the last.
        try await next.delete(isDeadNext ? Array(keys.prefix(keys.count / 2)) : keys)
    }
    private var isDeadNext: Bool { left.withLock { $0 == 0 } }
}

struct CollectorRoleTests {
    static let grace = CollectionBed.grace

    @Test func aLiveCollectorIsNotRobbedAndADeadOneIsTakenOver() async throws {
        let bed = CollectionBed()
        try await bed.create("a")
        try await bed.commit("a", [0])
        try await bed.litter(5)
        bed.environment.pass(ms: Self.grace + 1)
        let first = try await CollectorRole.take(bed.store, bed.options())
        for _ in 0..<5 {
            let refused = await CatalogTests.kind { try await bed.collect() }
            #expect(refused == .owned)
            bed.environment.pass(ms: 20_000)
            // It is heard of.
            try await first.beat(.listing, done: 1, total: 0, isSure: false)
        }
        #expect(try await bed.store.collection()?.collector?.phase == .listing)
        // A dry run asks nobody.
        #expect(try await bed.collect { $0.isDryRun = true }.deleted == 5)
        bed.environment.pass(ms: 60_000)
        #expect(try await bed.collect().deleted == 5)
        let late = await CatalogTests.kind { try await first.beat(.deleting, done: 0, total: 0, isSure: true) }
        #expect(late == .conflict)
        // Nor can it give back what it does not have.
        await #expect(throws: CatalogError.self) { try await first.release(CollectionSummary()) }
        #expect(try await bed.store.collection()?.rounds == 2)
    }

    @Test func ofManyCollectorsOneWorks() async throws {
        let bed = CollectionBed()
        try await bed.create("a")
        for round in 0..<5 { try await bed.commit("a", [UInt64(round)]) }
        try await bed.litter(50)
        bed.environment.pass(ms: Self.grace + 1)
        let outcomes = await withTaskGroup(of: CatalogError.Kind?.self) { group in
            for number in 0..<6 {
                group.addTask {
                    await CatalogTests.kind { try await bed.collect { $0.folder = "gc\(number)" } }
                }
            }
            return await group.reduce(into: []) { $0.append($1) }
        }
        // One or more, one after the other.
        #expect(outcomes.contains(nil) && outcomes.allSatisfy { $0 == nil || $0 == .owned })
        try await bed.expectExactlyNamed()
    }

    /// Killed after each number of calls on the store, and taken over: nothing is lost, and in the end the garbage is gone.
    @Test func aCollectorMayDieAnywhere() async throws {
        var calls = 0
        var isWhole = false
        while !isWhole {
            let bed = CollectionBed(seed: 7)
            try await bed.create("a", density: 0)
            for round in 0..<4 { try await bed.commit("a", [UInt64(round), 9]) }
            try await bed.create("gone")
            try await bed.commit("gone", [1])
            try await bed.delete("gone")
            bed.environment.pass(ms: Self.grace + 1)
            try await bed.collect()
            bed.environment.pass(ms: Self.grace + 1)
            try await bed.litter(9)
            bed.environment.pass(ms: Self.grace + 1)
            let dying = DyingBucket(bed.memory, after: calls)
            let store = Store(id: bed.store.id, locations: Locations([dying]), environment: bed.environment)
            let killed = await CatalogTests.kind {
                _ = try await Collector(store: store, scratch: bed.scratch, options: bed.options()).run()
            }
            isWhole = killed == nil
            #expect(isWhole != dying.isDead, "after \(calls) calls")
            try await bed.expectNothingLost("after \(calls) calls")
            bed.environment.pass(ms: 60_000)
            try await bed.collect()
            try await bed.expectExactlyNamed("after \(calls) calls")
            #expect(bed.generations("a") == [1] && bed.generations("gone").isEmpty)
            calls += 1
        }
        #expect(calls > 30)
    }

    @Test func theGracePeriodGrowsAtOnceAndShrinksInTime() async throws {
        let hour = CollectionBed.hour
        var state = CollectionState()
        state.setGrace(48 * hour, nowMs: 0, isUnused: false)
        #expect(state.graceMs == 48 * hour && state.effectiveGraceMs(nowMs: 0) == 48 * hour)
        state.setGrace(hour, nowMs: 10, isUnused: false)
        #expect(state.graceMs == hour && state.effectiveGraceMs(nowMs: 10) == 48 * hour)
        // Changed again meanwhile: the longest that a writer may go by counts.
        state.setGrace(2 * hour, nowMs: 20, isUnused: false)
        #expect(state.effectiveGraceMs(nowMs: 9 + 48 * hour) == 48 * hour)
        #expect(state.effectiveGraceMs(nowMs: 10 + 48 * hour) == 2 * hour)
        state.setGrace(hour, nowMs: 30, isUnused: false)
        #expect(state.effectiveGraceMs(nowMs: 29 + 48 * hour) == 48 * hour)
        #expect(state.effectiveGraceMs(nowMs: 30 + 48 * hour) == hour)
        #expect(try CollectionState.decode(state.encoded()) == state)
        state.setGrace(7, nowMs: 40, isUnused: true)
        #expect(state.effectiveGraceMs(nowMs: 40) == 7)

        // As a store has it: nobody writes to an empty one, so there it holds at once.
        let empty = CollectionBed()
        #expect(try await empty.store.grace() == 24 * hour)
        #expect(try await empty.collect { $0.graceMs = hour }.graceMs == hour)
        let used = CollectionBed()
        try await used.create("a")
        #expect(try await used.collect { $0.graceMs = hour }.graceMs == 24 * hour)
        #expect(try await used.store.grace() == hour)
        used.environment.pass(ms: 24 * hour)
        #expect(try await used.collect().graceMs == hour)
        #expect(try await used.collect { $0.graceMs = 30 * hour }.graceMs == 30 * hour)
    }

    @Test func whatTakesTooLongIsGivenUp() async throws {
        let bed = CollectionBed()
        let environment = bed.environment
        func limit() async throws -> CommitLimit { try await CommitLimit.begin(bed.store) }
        var one = try await limit()
        environment.pass(ms: Self.grace / 2 - 1)
        try await one.check(what: "it")
        environment.pass(ms: 1)
        #expect(await CatalogTests.kind { try await one.check(what: "it") } == .tooSlow)
        // Of a period that was changed meanwhile the shorter one counts, before and after.
        one = try await limit()
        environment.pass(ms: Self.grace / 3)
        try await bed.collect { $0.graceMs = Self.grace / 2 }
        #expect(await CatalogTests.kind { try await one.check(asking: true, what: "it") } == .tooSlow)
        one = try await limit()
        try await bed.collect { $0.graceMs = 4 * Self.grace }
        environment.pass(ms: Self.grace / 3)
        #expect(await CatalogTests.kind { try await one.check(asking: true, what: "it") } == .tooSlow)
        // What was heard long ago is asked anew, and no answer is no leave.
        let gauge = GraceGauge()
        try await gauge.refresh(bed.faults[0], environment: environment)
        environment.pass(ms: 3 * Self.grace)
        one = CommitLimit(gauge, bucket: bed.faults[0], environment: environment)
        try await one.check(what: "it")
        environment.pass(ms: 4 * Self.grace / 3)
        // What is known is good for a while without the store, and then no more.
        bed.faults[0].inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "collection"))
        try await one.check(what: "it")
        gauge.forget()
        one = CommitLimit(gauge, bucket: bed.faults[0], environment: environment)
        #expect(await CatalogTests.kind { try await one.check(what: "it") } == .store(.unavailable))
        bed.faults[0].clearFaults()
        try await one.check(what: "it")
    }

    @Test func aSlowImportIsGivenUpAndChangesNothing() async throws {
        let bed = CollectionBed()
        let catalog = Catalog(bed.store) { _ in .outOfSight }
        let folder = TestFolder()
        var g = SeededGenerator(seed: 3)
        folder.write("image", size: 1 << 20, [(0, CatalogImageTests.noise(4096, &g))])
        bed.faults[0].inject(
            StoreFault(
                .delay(ns: UInt64(Self.grace / 2) * 1_000_000), verb: .put, keyContains: "manifests/", count: 1))
        let image = try ImageInput(path: folder.file("image"))
        let kind = await CatalogTests.kind { _ = try await catalog.import(image, as: "d") }
        #expect(kind == .tooSlow && bed.keys("disks/").isEmpty)
        _ = try await catalog.import(image, as: "d")
        #expect(try await catalog.show("d").generation == 1)
    }

    /// A commit that hangs for longer than half of the grace period begins anew, with new objects, and loses nothing.
    @Test func aSlowCommitIsTriedAnewWithNewObjects() async throws {
        let bed = try DiskBed()
        var state = CollectionState()
        state.setGrace(600, nowMs: 0, isUnused: true)
        _ = try await bed.store.put(CollectionState.key, state.encoded(), if: .none)
        try await bed.context.grace.refresh(bed.store, environment: bed.environment)
        try await bed.create()
        bed.faults.inject(StoreFault(.delay(ns: 400_000_000), verb: .put, keyContains: "manifests/", count: 1))
        let client = try await bed.attach()
        let bytes = pattern(8192, 5)
        try await client.write(bytes, at: 4096)
        try await client.flush()
        try await bed.waitForGeneration(1)
        let pages = bed.store.contents.keys.filter { $0.hasPrefix("manifests/") }
        #expect(pages.count == 2, "one of each try")
        #expect(try await bed.head().record?.root.map { pages.contains($0.id.manifestKey) } == true)
        #expect(try await client.read(8192, at: 4096) == bytes)
        await client.leave(clean: true)
        bed.kill()
    }

    @Test func heartbeatsOfBothFormatsAreRead() async throws {
        let bed = CollectionBed()
        let body =
            "\"addresses\":[],\"bootID\":\"\",\"freshForMs\":1,\"host\":\"h\",\"id\":\"s\",\"pid\":1,\"pidNamespace\":\"\",\"startTicks\":1,\"timeMs\":7}"
        _ = try await bed.memory.put(
            ServerRecord.key("s"), CatalogObjectTests.sealed(body, kind: "server", format: "1"), if: .none)
        #expect(try await bed.store.heads.server("s")?.reading == [])
        var server = try #require(try await bed.store.heads.server("s"))
        server.reading = ["a@1"]
        try await bed.store.heads.beat(server)
        #expect(try await bed.store.heads.server("s") == server)
        // The longest one is far from too long.
        let name = String(repeating: "n", count: 128)
        server.reading = (0..<UInt64(ServerRecord.maxReading)).map { "\(name)@\(UInt64.max - $0)" }
        try await bed.store.heads.beat(server)
        #expect(try await bed.store.heads.server("s") == server)
        #expect(bed.memory.contents[ServerRecord.key("s")]!.count < 200 << 10)
    }

    @Test func theStateIsCheckedWhenItIsRead() {
        for body in [
            "\"graceMs\":0,\"nonce\":\"00000000000000000000000000000000\",\"rounds\":1}",
            "\"graceMs\":5,\"formerGraceMs\":7,\"nonce\":\"00000000000000000000000000000000\",\"rounds\":1}",
            "\"graceMs\":5,\"nonce\":\"x\",\"rounds\":1}", "\"graceMs\":5,\"rounds\":1}",
            "\"graceMs\":5,\"more\":1,\"nonce\":\"00000000000000000000000000000000\",\"rounds\":1}",
        ] {
            #expect(throws: CatalogError.self, "\(body)") {
                try CollectionState.decode(CatalogObjectTests.sealed(body, kind: "collection", format: "1"))
            }
        }
        let good = "\"graceMs\":5,\"nonce\":\"00000000000000000000000000000000\",\"rounds\":1}"
        #expect(
            (try? CollectionState.decode(CatalogObjectTests.sealed(good, kind: "collection", format: "1")))?.graceMs
                == 5)
    }
}
