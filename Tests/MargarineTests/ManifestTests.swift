// The manifest tree against a dictionary, and what it costs.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct ManifestTests {
    /// Everything that can be asked of `manifest` agrees with `model`.
    static func compare(_ manifest: Manifest, _ model: [UInt64: BlockEntry], probes: [UInt64]) async throws {
        #expect(manifest.usedBlocks == UInt64(model.count))
        #expect(
            manifest.storedBytes
                == model.values.reduce(UInt64(0)) { sum, entry in
                    sum + UInt64(entry.base?.lengthBytes ?? 0) + entry.deltas.reduce(0) { $0 + UInt64($1.lengthBytes) }
                })
        var walked: [UInt64] = []
        var from = BlockIndex(0)
        while let block = try await manifest.nextUsed(from: from) {
            if manifest.cache.budgetBytes > 1 { #expect(manifest.nextUsedLoaded(from: from) == .block(block)) }
            walked.append(block.value)
            from = BlockIndex(block.value + 1)
        }
        #expect(walked == model.keys.sorted())
        for block in walked + probes {
            try await manifest.load(BlockIndex(block))
            let lookup = manifest.entry(BlockIndex(block))
            #expect(lookup == .entry(model[block]), "block \(block)")
            let found = try await manifest.find(BlockIndex(block))
            #expect(found == model[block])
        }
    }

    @Test(arguments: 1...8)
    func equalsADictionaryThroughRandomEditsAndSizes(_ number: Int) async throws {
        let seed = UInt64(number)
        var g = SeededGenerator(seed: seed)
        let store = TestStore(seed: seed)
        // Sizes with 1 to 5 levels.
        let sizes: [UInt64] = [
            512, 3 << 24, 512 << 24, (513 << 24) + 512, 1 << 42, (1 << 42) + 512, 1 << 50, 1 << 58,
            ManifestShape.maxSizeBytes,
        ]
        var size = sizes.randomElement(using: &g)!
        var model: [UInt64: BlockEntry] = [:]
        var manifest = Manifest.empty(sizeBytes: size, cache: store.cache())
        for round in 0..<40 {
            var edit = ManifestEdit(manifest)
            for _ in 0..<Int.random(in: 0...20, using: &g) {
                let blocks = ManifestShape.blocks(sizeBytes: size)
                // Near the ends, near each other, or anywhere.
                let near = model.keys.sorted().randomElement(using: &g) ?? 0
                let block = [
                    UInt64.random(in: 0..<blocks, using: &g), blocks - 1, 0, min(near + g.next() % 3, blocks - 1),
                    g.next() % min(blocks, 2000),
                ].randomElement(using: &g)!
                switch Int.random(in: 0...9, using: &g) {
                case 0...6:
                    let entry = BlockEntry.random(using: &g)
                    edit.set(BlockIndex(block), entry)
                    model[block] = entry
                case 7:
                    edit.set(BlockIndex(block), nil)
                    model[block] = nil
                case 8:
                    let other = [block + 1, block + g.next() % 1000, UInt64.random(in: 0...blocks, using: &g), blocks]
                        .randomElement(using: &g)!
                    let range = min(block, other)..<min(max(block, other), blocks)
                    edit.removeAll(in: BlockIndex(range.lowerBound)..<BlockIndex(range.upperBound))
                    model = model.filter { !range.contains($0.key) }
                default:
                    size = sizes.randomElement(using: &g)!
                    edit.resize(to: size)
                    let end = ManifestShape.blocks(sizeBytes: size)
                    model = model.filter { $0.key < end }
                }
            }
            manifest = try await store.write(edit)
            #expect(manifest.sizeBytes == size)
            // Now and then as after a restart.
            if round % 5 == 4 { manifest = Manifest(sizeBytes: size, root: manifest.root, cache: store.cache()) }
            // And with next to no memory.
            if round % 7 == 6 {
                manifest = Manifest(sizeBytes: size, root: manifest.root, cache: store.cache(budgetBytes: 1))
            }
            if round % 4 == 3 {
                let probes = (0..<20).map { _ in UInt64.random(in: 0..<ManifestShape.blocks(sizeBytes: size), using: &g)
                }
                try await Self.compare(manifest, model, probes: probes)
            }
            if manifest.cache.budgetBytes == 1 {
                manifest = Manifest(sizeBytes: size, root: manifest.root, cache: store.cache())
            }
        }
        try await Self.compare(manifest, model, probes: [0, ManifestShape.blocks(sizeBytes: size) - 1])
    }

    @Test func anOldGenerationStaysAsItWas() async throws {
        var g = SeededGenerator(seed: 11)
        let store = TestStore()
        let cache = store.cache()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 44, cache: cache))
        var old: [UInt64: BlockEntry] = [:]
        for block in stride(from: UInt64(0), to: 1 << 20, by: 40_000) {
            old[block] = .random(using: &g)
            edit.set(BlockIndex(block), old[block])
        }
        let first = try await store.write(edit)
        var second = ManifestEdit(first)
        second.removeAll(in: BlockIndex(0)..<BlockIndex(500_000))
        for block in old.keys { second.set(BlockIndex(block + 1), .random(using: &g)) }
        _ = try await store.write(second)
        try await Self.compare(first, old, probes: old.keys.map { $0 + 1 })
        try await Self.compare(Manifest(sizeBytes: 1 << 44, root: first.root, cache: store.cache()), old, probes: [])
    }

    @Test func oneBlockOfAMillionCostsAPagePerLevel() async throws {
        let store = TestStore()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 44, cache: store.cache()))
        for block in 0..<UInt64(1_000_000) {
            edit.set(
                BlockIndex(block),
                BlockEntry(
                    base: BaseRef(id: ObjectID(high: block, low: 1), location: 0, lengthBytes: 100, nonzeroSlices: 1),
                    deltas: []))
        }
        let full = try await store.write(edit)
        #expect(full.depth == 3)
        #expect(full.usedBlocks == 1_000_000)
        // 1954 leaves, 4 above them, 1 on top.
        #expect(store.puts == 1959)
        #expect(full.pagesWritten == 1959)

        // As another server would, with nothing in memory.
        let cold = Manifest(sizeBytes: 1 << 44, root: full.root, cache: store.cache())
        let (puts, gets) = (store.puts, store.gets)
        var one = ManifestEdit(cold)
        one.set(
            BlockIndex(777_777),
            BlockEntry(
                base: BaseRef(id: ObjectID(high: 0, low: 2), location: 0, lengthBytes: 7, nonzeroSlices: 1), deltas: [])
        )
        let next = try await store.write(one)
        #expect(store.puts - puts == 3)
        #expect(store.gets - gets == 3)
        #expect(next.pagesWritten == 3)
        #expect(next.usedBlocks == 1_000_000)
        #expect(next.storedBytes == 1_000_000 * 100 - 93)

        // Setting what is there already writes nothing.
        var same = ManifestEdit(next)
        same.set(BlockIndex(777_777), try await next.find(BlockIndex(777_777)))
        same.removeAll(in: BlockIndex(1_000_000)..<BlockIndex(1 << 20))
        let unchanged = try await store.write(same)
        #expect(store.puts - puts == 3)
        #expect(unchanged.root == next.root)
    }

    @Test func trimmingEverythingCostsNothing() async throws {
        var g = SeededGenerator(seed: 5)
        let store = TestStore()
        let size = ManifestShape.maxSizeBytes
        let end = ManifestShape.blocks(sizeBytes: size)
        var edit = ManifestEdit(.empty(sizeBytes: size, cache: store.cache()))
        for _ in 0..<300 { edit.set(BlockIndex(UInt64.random(in: 0..<end, using: &g)), .random(using: &g)) }
        let full = try await store.write(edit)
        let cold = Manifest(sizeBytes: size, root: full.root, cache: store.cache())
        let (puts, gets) = (store.puts, store.gets)
        var all = ManifestEdit(cold)
        all.removeAll(in: BlockIndex(0)..<BlockIndex(end))
        let empty = try await store.write(all)
        #expect(empty.root == nil)
        #expect(store.puts == puts && store.gets == gets)
        // All but the first and the last block: the pages at the two ends.
        var most = ManifestEdit(cold)
        most.removeAll(in: BlockIndex(1)..<BlockIndex(end - 1))
        let rest = try await store.write(most)
        #expect(store.gets - gets <= 10)
        #expect(store.puts - puts <= 10)
        #expect(rest.usedBlocks <= 2)
    }

    @Test func openingAndLookingCostsWhatIsOnTheWay() async throws {
        let store = TestStore()
        for size in [1 << 30, ManifestShape.maxSizeBytes] as [UInt64] {
            let empty = Manifest.empty(sizeBytes: size, cache: store.cache())
            #expect(empty.entry(BlockIndex(0)) == .entry(nil))
            #expect(empty.entry(BlockIndex(ManifestShape.blocks(sizeBytes: size) - 1)) == .entry(nil))
            #expect(empty.nextUsedLoaded(from: BlockIndex(0)) == .block(nil))
            let none = try await empty.nextUsed(from: BlockIndex(0))
            #expect(none == nil)
        }
        #expect(store.gets == 0)
        var g = SeededGenerator(seed: 3)
        var edit = ManifestEdit(.empty(sizeBytes: ManifestShape.maxSizeBytes, cache: store.cache()))
        edit.set(BlockIndex(1 << 39), .random(using: &g))
        let written = try await store.write(edit)
        #expect(written.depth == 5)
        let cold = Manifest(sizeBytes: ManifestShape.maxSizeBytes, root: written.root, cache: store.cache())
        #expect(cold.entry(BlockIndex(5)) == .notLoaded)
        #expect(cold.nextUsedLoaded(from: BlockIndex(0)) == .notLoaded)
        try await cold.load(BlockIndex(5))
        // Known to be absent by the top page alone.
        #expect(store.gets == 1)
        #expect(cold.entry(BlockIndex(5)) == .entry(nil))
        let next = try await cold.nextUsed(from: BlockIndex(6))
        #expect(next == BlockIndex(1 << 39))
        #expect(store.gets == 5)
        let last = try await cold.nextUsed(from: BlockIndex(1 << 39 + 1))
        #expect(last == nil)
        // Beyond the tree, and beyond the disk.
        #expect(cold.entry(BlockIndex(.max)) == .entry(nil))
        try await cold.load(BlockIndex(.max))
        #expect(store.gets == 5)
    }

    @Test func shrinkingForgetsForGood() async throws {
        var g = SeededGenerator(seed: 9)
        let store = TestStore()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 50, cache: store.cache()))
        let kept = BlockEntry.random(using: &g)
        edit.set(BlockIndex(3), kept)
        edit.set(BlockIndex(1 << 20), .random(using: &g))
        edit.set(BlockIndex(600), .random(using: &g))
        var manifest = try await store.write(edit)
        for size in [(4 << 24) - 512, 1 << 50] as [UInt64] {
            var resize = ManifestEdit(manifest)
            resize.resize(to: size)
            manifest = try await store.write(resize)
        }
        #expect(manifest.depth == 3)
        try await Self.compare(manifest, [3: kept], probes: [600, 1 << 20])
        // Both in one edit.
        var both = ManifestEdit(manifest)
        both.resize(to: 512)
        both.resize(to: 1 << 50)
        let gone = try await store.write(both)
        #expect(gone.root == nil && gone.depth == 3)
    }

    @Test func memoryStaysWithinItsBudget() async throws {
        var g = SeededGenerator(seed: 21)
        let store = TestStore()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 46, cache: store.cache()))
        var blocks: [UInt64] = []
        for _ in 0..<3000 {
            let block = g.next() % (1 << 22)
            blocks.append(block)
            edit.set(BlockIndex(block), .random(using: &g))
        }
        let root = try await store.write(edit).root
        let small = store.cache(budgetBytes: 100_000)
        let manifest = Manifest(sizeBytes: 1 << 46, root: root, cache: small)
        for block in blocks {
            try await manifest.load(BlockIndex(block))
            #expect(small.residentBytes <= 100_000 + 30_000)
            guard case .entry(.some) = manifest.entry(BlockIndex(block)) else {
                Issue.record("block \(block) is not there right after it was loaded")
                return
            }
        }
        #expect(small.residentBytes > 50_000)
        small.evict(to: 0)
        #expect(small.residentBytes == 0)
        #expect(manifest.entry(BlockIndex(blocks[0])) == .notLoaded)
    }

    @Test func aPageIsFetchedOnceForManyWhoWait() async throws {
        var g = SeededGenerator(seed: 31)
        let store = TestStore()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 30, cache: store.cache()))
        edit.set(BlockIndex(1), .random(using: &g))
        let root = try await store.write(edit).root
        let cold = Manifest(sizeBytes: 1 << 30, root: root, cache: store.cache())
        let gate = StoreGate()
        store.faulty.inject(StoreFault(.hold(gate), verb: .get))
        // On one loop, as the manifest is not for several threads.
        let loop = try Loop(name: "test")
        try loop.start()
        defer { loop.stop() }
        let loads = (0..<8).map { _ in
            Task(executorPreference: loop) { try await cold.load(BlockIndex(1)) }
        }
        await gate.waitUntilArrived()
        await Task(executorPreference: loop) { for _ in 0..<20 { await Task.yield() } }.value
        gate.open()
        for load in loads { try await load.value }
        #expect(cold.cache.fetches == 1)
        #expect(store.gets == 1)
        guard case .entry(.some) = cold.entry(BlockIndex(1)) else {
            Issue.record("not loaded")
            return
        }
    }

    @Test func aFailedWriteLeavesTheEditFitForAnother() async throws {
        var g = SeededGenerator(seed: 41)
        let store = TestStore()
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 44, cache: store.cache()))
        var model: [UInt64: BlockEntry] = [:]
        for _ in 0..<100 {
            let block = g.next() % (1 << 20)
            model[block] = .random(using: &g)
            edit.set(BlockIndex(block), model[block])
        }
        store.faulty.inject(StoreFault(.fail(.unavailable), verb: .put, count: 1, probability: 0.1))
        await #expect(throws: StoreError.self) {
            for _ in 0..<20 { _ = try await store.write(edit) }
        }
        store.faulty.clearFaults()
        try await Self.compare(try await store.write(edit), model, probes: [])
    }
}
