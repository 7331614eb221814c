// Forks, pins and roll-backs on the store: what they cost, what they name, and what they refuse because it is about to leave.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// A bucket that lets something else happen just before a put of some key.
private final class Meddling: Bucket {
    private let next: any Bucket
    private let meddler = Mutex<(keyContains: String, act: @Sendable () async throws -> Void)?>(nil)
    var name: String { next.name }
    init(_ next: any Bucket) { self.next = next }

    /// Once.
    func beforePut(_ keyContains: String, _ act: @escaping @Sendable () async throws -> Void) {
        meddler.withLock { $0 = (keyContains, act) }
    }
    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try await next.get(key, range: range)
    }
    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        let act = meddler.withLock { slot -> (@Sendable () async throws -> Void)? in
            guard let found = slot, key.contains(found.keyContains) else { return nil }
            slot = nil
            return found.act
        }
        do { try await act?() } catch { throw StoreError(.refused, "the meddler failed: \(error)") }
        return try await next.put(key, bytes, if: condition)
    }
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }
    func delete(_ keys: [String]) async throws(StoreError) { try await next.delete(keys) }
}

struct ForkTests {
    /// Commits generations to a disk that has them made of chance. Gives their entries of block 3.
    @discardableResult
    static func commit(
        _ count: Int, to name: String, _ catalog: Catalog, _ test: TestStore, kind: GenerationKind = .flush,
        seed: UInt64 = 7, blocks: UInt64 = 1
    ) async throws -> [BlockEntry] {
        var g = SeededGenerator(seed: seed)
        var entries: [BlockEntry] = []
        for _ in 0..<count {
            let found = try await catalog.load(name)
            var head = found.head
            var edit = ManifestEdit(head.manifest(cache: test.cache()))
            entries.append(.random(using: &g))
            for block in 0..<blocks { edit.set(BlockIndex(3 + block), entries.last!) }
            let manifest = try await test.write(edit)
            try await found.heads.archive(head)
            head.advance(
                to: GenerationRecord(
                    diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: kind,
                    committedAtMs: catalog.store.environment.wallMs, journalSequence: head.journalSequence + 1,
                    newBytes: manifest.bytesWritten, manifest: manifest))
            guard case .won = try await found.heads.swap(head, expecting: found.etag) else {
                throw CatalogError(.conflict, "not won")
            }
        }
        return entries
    }

    static func retire(_ generations: [UInt64], of name: String, _ test: TestStore) async throws {
        _ = try await test.memory.put(
            Retirement.key(disk: name, id: test.environment.objectID()),
            Retirement(generations: generations).encoded(), if: .absent)
    }

    private func entry(_ name: String, _ catalog: Catalog, _ test: TestStore) async throws -> BlockEntry? {
        try await catalog.load(name).head.manifest(cache: test.cache()).find(BlockIndex(3))
    }

    @Test func aForkCostsTheSameWhateverTheDisk() async throws {
        var costs: [[UInt64]] = []
        for (size, blocks) in [(1 << 30, 10), (16 << 40, 100_000)] as [(UInt64, UInt64)] {
            let test = TestStore()
            let catalog = try await CatalogTests.open(test)
            _ = try await catalog.create("base", sizeBytes: size)
            try await Self.commit(2, to: "base", catalog, test, blocks: blocks)
            let before = test.counters.snapshot
            let fork = try await catalog.fork("base", as: "fork")
            let after = test.counters.snapshot
            #expect(fork.blocks == blocks && fork.size == size && fork.origin == "base@2" && fork.generation == 1)
            costs.append([
                after.get.started - before.get.started, after.put.started - before.put.started,
                after.list.started - before.list.started, after.get.bytes - before.get.bytes,
            ])
        }
        #expect(costs[0][..<3] == costs[1][..<3])
        #expect(costs[1][1] == 1 && costs[1][2] == 0)
        #expect(costs[1][3] < costs[0][3] + 100, "a fork reads heads, and no page")
    }

    @Test func aForkIsADiskOfItsOwn() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        _ = try await catalog.create("base", sizeBytes: 1 << 30)
        let entries = try await Self.commit(3, to: "base", catalog, test)
        _ = try await catalog.fork("base", generation: 2, as: "old")
        _ = try await catalog.fork("base", as: "new")
        try await Self.commit(2, to: "base", catalog, test, seed: 8)
        let own = try await Self.commit(1, to: "old", catalog, test, seed: 9)
        #expect(try await entry("new", catalog, test) == entries[2])
        #expect(try await entry("old", catalog, test) == own[0])
        #expect(try await catalog.generations("old").map(\.kind) == [.forked, .flush])
        #expect(try await catalog.show("base").generation == 5)
        // Of a fork, of a name that had a disk before, and of what is not there.
        _ = try await catalog.fork("old", generation: 1, as: "older")
        #expect(try await entry("older", catalog, test) == entries[1])
        try await catalog.delete("older")
        #expect(try await catalog.fork("base", as: "older").generation == 2)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", as: "new") } == .exists)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", generation: 6, as: "x") } == .notFound)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("none", as: "x") } == .notFound)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", as: "a/b") } == .invalid)
        // One of a disk that grew since its last commit has the new size.
        _ = try await catalog.resize("base", to: 2 << 30)
        #expect(try await catalog.fork("base", as: "larger").size == 2 << 30)
        #expect(try await catalog.fork("base", generation: 4, as: "smaller").size == 1 << 30)
        // And of a disk that was never written.
        _ = try await catalog.create("empty", sizeBytes: 512)
        #expect(try await catalog.fork("empty", as: "none").generation == 0)
    }

    @Test func whatIsAboutToLeaveIsNeitherForkedNorPinnedNorGoneBackTo() async throws {
        let test = TestStore()
        let bucket = Meddling(test.faulty)
        let catalog = try await CatalogTests.open(test, bucket)
        _ = try await catalog.create("base", sizeBytes: 1 << 30)
        try await Self.commit(5, to: "base", catalog, test)
        // Seen to be kept, and retired before the fork is there.
        bucket.beforePut("disks/fork/head") { try await Self.retire([2], of: "base", test) }
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", generation: 2, as: "fork") } == .notFound)
        #expect(await CatalogTests.kind { _ = try await catalog.show("fork") } == .notFound)
        bucket.beforePut("disks/base/head") { try await Self.retire([3], of: "base", test) }
        #expect(await CatalogTests.kind { _ = try await catalog.pin("base", generation: 3) } == .notFound)
        #expect(try await catalog.show("base").pinned == [1])
        bucket.beforePut("disks/base/head") { try await Self.retire([4], of: "base", test) }
        #expect(await CatalogTests.kind { _ = try await catalog.rollBack("base", to: 4) } == .notFound)
        #expect(try await catalog.show("base").generation == 5)
        // Removed altogether.
        bucket.beforePut("disks/fork/head") {
            try await test.memory.delete([GenerationRecord.key(disk: "base", generation: 1)])
        }
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", generation: 1, as: "fork") } == .notFound)
        // The current one that is current no more: its record is there, so the fork is.
        bucket.beforePut("disks/fork/head") { try await Self.commit(1, to: "base", catalog, test, seed: 3) }
        #expect(try await catalog.fork("base", as: "fork").origin == "base@5")
        // The same of a disk that is deleted meanwhile.
        bucket.beforePut("disks/last/head") { try await catalog.delete("base") }
        #expect(try await catalog.fork("base", as: "last").origin == "base@6")
    }

    @Test func aReadOnlyForkIsOneThatMountsWithoutWriting() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        _ = try await catalog.create("base", sizeBytes: 1 << 30)
        try await Self.commit(1, to: "base", catalog, test, kind: .btrfsLog)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("base", as: "ro", readOnly: true) } == .notFound)
        try await Self.commit(1, to: "base", catalog, test, kind: .btrfsFull)
        try await Self.commit(2, to: "base", catalog, test, kind: .btrfsLog)
        let fork = try await catalog.fork("base", as: "ro", readOnly: true)
        #expect(fork.origin == "base@2" && fork.readOnly)
        #expect(
            await CatalogTests.kind { _ = try await catalog.fork("base", generation: 4, as: "x", readOnly: true) }
                == .invalid)
        #expect(await CatalogTests.kind { _ = try await catalog.resize("ro", to: 2 << 30) } == .invalid)
        #expect(await CatalogTests.kind { _ = try await catalog.rollBack("ro", to: 1) } == .invalid)
        // It can be forked like any other, also for writing.
        #expect(try await !catalog.fork("ro", as: "rw").readOnly)
    }

    @Test func goingBackMakesAGeneration() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        let entries = try await Self.commit(3, to: "disk", catalog, test)
        _ = try await catalog.resize("disk", to: 4 << 30)
        try await Self.commit(1, to: "disk", catalog, test, seed: 8)
        let back = try await catalog.rollBack("disk", to: 3)
        #expect(back.generation == 5 && back.size == 1 << 30 && back.origin == "disk@3" && back.pinned == [1])
        #expect(try await entry("disk", catalog, test) == entries[2])
        #expect(try await catalog.generations("disk").map(\.generation) == [1, 2, 3, 4, 5])
        // And forth again, what was undone included.
        #expect(try await catalog.rollBack("disk", to: 4).size == 4 << 30)
        // A server that has it must be asked, or robbed.
        _ = try await CatalogTests.own(catalog, "disk", server: "s1", alive: true, session: "mine")
        #expect(await CatalogTests.kind { _ = try await catalog.rollBack("disk", to: 3) } == .owned)
        let epoch = try await catalog.show("disk").epoch
        let forced = try await catalog.rollBack("disk", to: 3, force: true)
        #expect(forced.epoch > epoch && forced.owner == nil && forced.session == nil)
        #expect(try await catalog.load("disk").head.lostSessions == ["mine"])
        #expect(try await catalog.load("disk").head.journalSequence >= 4)
        // A dead one may come back with what it acknowledged.
        _ = try await CatalogTests.own(catalog, "disk", server: "s2", alive: false)
        #expect(await CatalogTests.kind { _ = try await catalog.rollBack("disk", to: 3) } == .owned)
    }

    @Test func pinsHoldAgainstTheRule() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        var options = DiskOptions()
        options.historyDensity = 1
        _ = try await catalog.create("disk", sizeBytes: 1 << 30, options: options)
        try await Self.commit(4, to: "disk", catalog, test)
        _ = try await catalog.pin("disk", generation: 3)
        try await Self.commit(60, to: "disk", catalog, test, seed: 2)
        let kept = try await catalog.generations("disk").map(\.generation)
        #expect(kept == Self.independent(current: 64, density: 1, pinned: [1, 3]))
        #expect(await CatalogTests.kind { _ = try await catalog.pin("disk", generation: 4) } == .notFound)
        #expect(await CatalogTests.kind { _ = try await catalog.fork("disk", generation: 4, as: "x") } == .notFound)
        #expect(await CatalogTests.kind { _ = try await catalog.unpin("disk", generation: 2) } == .notFound)
        #expect(try await catalog.unpin("disk", generation: 1).pinned == [3])
        #expect(await CatalogTests.kind { _ = try await catalog.fork("disk", generation: 1, as: "x") } == .notFound)
        _ = try await catalog.set("disk", .init(historyDensity: 0))
        #expect(try await catalog.generations("disk").map(\.generation) == [3, 64])
        #expect(await CatalogTests.kind { _ = try await catalog.set("disk", .init(historyDensity: 17)) } == .invalid)
    }

    // MARK: The rule

    /// What is kept, by walking forward and dropping what goes out of its window, bit by bit.
    static func independent(current n: UInt64, density: Int, pinned: [UInt64]) -> [UInt64] {
        var kept: [UInt64] = []
        for now in 1...n {
            kept.append(now)
            kept.removeAll { s in
                if s == now || pinned.contains(s) { return false }
                var trailingOnes = 0
                while (s >> UInt64(trailingOnes)) & 1 == 1 { trailingOnes += 1 }
                var window: UInt64 = density == 0 ? 0 : 1
                for _ in 0..<trailingOnes + density where density > 0 { window *= 2 }
                return now - s >= window
            }
        }
        return kept
    }

    @Test(arguments: 0...5) func theRuleKeepsWhatItSaysWithinItsBound(_ density: Int) {
        for n in [1, 2, 3, 17, 255, 256, 1000, 10_000] as [UInt64] {
            let kept = (1...n).filter { History.keeps($0, current: n, density: density) }
            #expect(kept == Self.independent(current: n, density: density, pinned: []))
            if density == 0 { #expect(kept == [n]) }
            if density >= 2 { #expect(kept.count <= 1 << (density - 1) * (64 - n.leadingZeroBitCount)) }
            // The gap at an age is at most 2/(2^d - 1) of it.
            for (older, newer) in zip(kept, kept.dropFirst()) where density > 0 {
                let gap = Double(newer - older)
                let age = Double(n - older)
                #expect(gap <= max(1, 2 / Double(1 << density - 1) * age))
            }
        }
        #expect(!History.keeps(5, current: 4, density: density))
    }

    @Test func whatWasOnceLetGoIsNeverKeptAgain() {
        for density in 1...4 {
            for s in 1...300 as ClosedRange<UInt64> {
                var isKept = true
                for n in s...2000 {
                    let now = History.keeps(s, current: n, density: density)
                    #expect(isKept || !now)
                    isKept = now
                }
            }
        }
    }

    /// A disk of a live server that is written, and what the server's record says was taken from it.
    private func owned(_ catalog: Catalog, _ test: TestStore) async throws -> () async throws -> Int? {
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        try await Self.commit(3, to: "disk", catalog, test)
        _ = try await CatalogTests.own(catalog, "disk", server: "s1", alive: true)
        let heads = HeadStore(bucket: test.memory, environment: test.environment)
        var record = OwnerWatchTests.record("s1", test.environment)
        record.incarnation = "1"
        let old = try await heads.storedServer("s1")
        _ = try await heads.swap(record, expecting: old?.etag)
        return { try await heads.server("s1")?.taken.count }
    }

    @Test("a roll-back by force that fails is not told to the disk's server")
    func aFailedRollBackIsNotTold() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let taken = try await owned(catalog, test)
        test.faulty.inject(StoreFault(.fail(.denied), verb: .put, keyContains: "generations/"))
        await #expect(throws: CatalogError.self) { _ = try await catalog.rollBack("disk", to: 2, force: true) }
        #expect(try await taken() == 0)
        test.faulty.clearFaults()
        _ = try await catalog.rollBack("disk", to: 2, force: true)
        #expect(try await taken() == 1)
    }

    @Test("a disk that is to be made smaller by force, and took too long, is not told to its server")
    func aFailedShrinkIsNotTold() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let taken = try await owned(catalog, test)
        test.faulty.inject(
            StoreFault(.delay(ns: 30 * 86_400_000_000_000), verb: .put, keyContains: "generations/", count: 1))
        let kind = await CatalogTests.kind {
            _ = try await catalog.resize("disk", to: 512 << 20, shrink: true, force: true)
        }
        #expect(kind == .tooSlow)
        #expect(try await taken() == 0)
        _ = try await catalog.resize("disk", to: 512 << 20, shrink: true, force: true)
        #expect(try await taken() == 1)
    }
}
