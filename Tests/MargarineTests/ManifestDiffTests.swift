// What changed by the manifests, against two dictionaries compared block by block; and what it costs.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct ManifestDiffTests {
    /// Sizes with 1 to 5 levels.
    static let sizes: [UInt64] = [
        512, 3 << 24, (3 << 24) + 100_352, 512 << 24, (513 << 24) + 512, 1 << 42, (1 << 42) + 512, 1 << 50, 1 << 58,
        ManifestShape.maxSizeBytes,
    ]

    struct Side {
        var manifest: Manifest
        var model: [UInt64: BlockEntry] = [:]
    }

    /// A few random changes, perhaps of the size.
    static func changed(_ side: Side, _ store: TestStore, using g: inout SeededGenerator) async throws -> Side {
        var model = side.model
        var edit = ManifestEdit(side.manifest)
        if g.next() % 3 == 0 {
            edit.resize(to: sizes.randomElement(using: &g)!)
            let end = ManifestShape.blocks(sizeBytes: edit.sizeBytes)
            model = model.filter { $0.key < end }
        }
        let blocks = ManifestShape.blocks(sizeBytes: edit.sizeBytes)
        for _ in 0..<Int.random(in: 0...12, using: &g) {
            let near = model.keys.sorted().randomElement(using: &g) ?? 0
            let block = [
                UInt64.random(in: 0..<blocks, using: &g), blocks - 1, 0, near, min(near + 1, blocks - 1),
                g.next() % min(blocks, 2000),
            ].randomElement(using: &g)!
            switch Int.random(in: 0...5, using: &g) {
            case 0...2:
                model[block] = .random(using: &g)
                edit.set(BlockIndex(block), model[block])
            case 3:
                // As a commit of a few pages does it.
                guard var entry = model[block], entry.deltas.count < BlockEntry.maxDeltas else { continue }
                let touched = UInt32(1) << UInt32.random(in: 0..<32, using: &g)
                entry.deltas.append(
                    DeltaRef(
                        id: ObjectID(high: g.next(), low: 9), location: 0, offsetBytes: 64, lengthBytes: 100,
                        touchedSlices: touched, zeroedSlices: Bool.random(using: &g) ? touched : 0))
                model[block] = entry.nonzeroSlices == 0 ? nil : entry
                edit.set(BlockIndex(block), model[block])
            case 4:
                model[block] = nil
                edit.set(BlockIndex(block), nil)
            default:
                let other = [block + 1, block + g.next() % 1000, blocks].randomElement(using: &g)!
                let range = min(block, other)..<min(max(block, other), blocks)
                edit.removeAll(in: BlockIndex(range.lowerBound)..<BlockIndex(range.upperBound))
                model = model.filter { !range.contains($0.key) }
            }
        }
        var manifest = try await store.write(edit)
        if Bool.random(using: &g) {
            // As another process sees it.
            manifest = Manifest(sizeBytes: manifest.sizeBytes, root: manifest.root, cache: store.cache())
        }
        if g.next() % 4 == 0 {
            // Grown by its head alone: a tree of fewer levels than the size asks for.
            let size = sizes.filter { $0 >= manifest.sizeBytes }.randomElement(using: &g)!
            manifest = Manifest(
                sizeBytes: size, root: manifest.root, depth: manifest.depth, cache: manifest.cache)
        }
        return Side(manifest: manifest, model: model)
    }

    /// Slices of a disk that differ, by number, and whether they are zeroes in `new`.
    static func expected(_ old: Side, _ new: Side) -> [(slice: UInt64, isZeroes: Bool)] {
        var all: [(slice: UInt64, isZeroes: Bool)] = []
        for block in Set(old.model.keys).union(new.model.keys).sorted() {
            for index in 0..<Geometry.slicesPerBlock {
                let before = old.model[block]?.key(SliceIndex(index))
                let after = new.model[block]?.key(SliceIndex(index))
                if before != after { all.append((block * 32 + UInt64(index), after == nil)) }
            }
        }
        return all
    }

    static func compare(_ old: Side, _ new: Side) async throws {
        let wanted = expected(old, new)
        let diff = ManifestDiff(from: old.manifest, to: new.manifest)
        var found: [(slice: UInt64, isZeroes: Bool)] = []
        while let change = try await diff.next() {
            #expect(change.old == old.model[change.block.value] && change.new == new.model[change.block.value])
            #expect(change.changed != 0 && change.zeroed & ~change.changed == 0)
            for index in 0..<32 where change.changed & 1 << UInt32(index) != 0 {
                found.append((change.block.value * 32 + UInt64(index), change.zeroed & 1 << UInt32(index) != 0))
            }
        }
        #expect(found.elementsEqual(wanted, by: ==))

        // The same as ranges of bytes.
        let end = max(old.manifest.sizeBytes, new.manifest.sizeBytes)
        let ranges = ChangedRanges(ManifestDiff(from: old.manifest, to: new.manifest), endBytes: end)
        var slices: [(slice: UInt64, isZeroes: Bool)] = []
        var last: ChangedRange?
        let sliceBytes = UInt64(Geometry.sliceBytes)
        while let range = try await ranges.next() {
            #expect(!range.bytes.isEmpty && range.bytes.upperBound <= end && range.bytes.lowerBound % sliceBytes == 0)
            #expect(range.bytes.upperBound % sliceBytes == 0 || range.bytes.upperBound == end)
            if let last {
                #expect(last.bytes.upperBound <= range.bytes.lowerBound)
                #expect(last.bytes.upperBound < range.bytes.lowerBound || last.kind != range.kind)
            }
            last = range
            for at in stride(from: range.bytes.lowerBound, to: range.bytes.upperBound, by: Int(sliceBytes)) {
                slices.append((at / sliceBytes, range.kind == .zeroes))
            }
        }
        // A random entry may name slices behind the end of its disk; those are not told.
        #expect(slices.elementsEqual(wanted.filter { $0.slice * sliceBytes < end }, by: ==))
    }

    @Test(arguments: 1...12)
    func equalsABlockByBlockComparison(_ number: Int) async throws {
        var g = SeededGenerator(seed: UInt64(number))
        let store = TestStore(seed: UInt64(number))
        var sides = [
            Side(manifest: .empty(sizeBytes: Self.sizes.randomElement(using: &g)!, cache: store.cache()))
        ]
        for _ in 0..<12 {
            // A history with forks.
            sides.append(try await Self.changed(sides.randomElement(using: &g)!, store, using: &g))
            let new = sides[sides.count - 1]
            for old in [sides[0], sides.randomElement(using: &g)!, new] {
                try await Self.compare(old, new)
                try await Self.compare(new, old)
            }
        }
    }

    /// A disk with an entry in each of these blocks, as another process sees it.
    static func disk(_ blocks: some Sequence<UInt64>, sizeBytes: UInt64, _ store: TestStore) async throws -> Manifest {
        var edit = ManifestEdit(.empty(sizeBytes: sizeBytes, cache: store.cache()))
        for block in blocks {
            edit.set(
                BlockIndex(block),
                BlockEntry(
                    base: BaseRef(id: ObjectID(high: block, low: 1), location: 0, lengthBytes: 900, nonzeroSlices: 7),
                    deltas: []))
        }
        let root = try await store.write(edit).root
        return Manifest(sizeBytes: sizeBytes, root: root, cache: store.cache())
    }

    static func count(_ old: Manifest, _ new: Manifest, endBlock: UInt64? = nil) async throws -> Int {
        let diff = ManifestDiff(from: old, to: new, endBlock: endBlock)
        var count = 0
        while try await diff.next() != nil { count += 1 }
        return count
    }

    @Test func costsThePagesThatDiffer() async throws {
        let store = TestStore()
        let size: UInt64 = 1 << 44
        let old = try await Self.disk((0..<200_000).map { $0 * 5 }, sizeBytes: size, store)
        var edit = ManifestEdit(old)
        let entry = BlockEntry(
            base: BaseRef(id: ObjectID(high: 0, low: 2), location: 0, lengthBytes: 7, nonzeroSlices: 1), deltas: [])
        for block in [5, 500_000, 999_999] { edit.set(BlockIndex(UInt64(block)), entry) }
        let root = try await store.write(edit).root
        let new = Manifest(sizeBytes: size, root: root, cache: store.cache())
        let cold = Manifest(sizeBytes: size, root: old.root, cache: store.cache())
        var gets = store.gets
        #expect(try await Self.count(cold, new) == 3)
        // Both tops, both pages for each of three above the leaves or fewer, both leaves.
        #expect(store.gets - gets <= 2 * (1 + 3 + 3))
        gets = store.gets
        #expect(try await Self.count(new, new) == 0)
        #expect(
            try await Self.count(new, Manifest(sizeBytes: 1 << 50, root: root, depth: 3, cache: store.cache())) == 0)
        #expect(store.gets == gets)
        // What lies behind the end that is asked for is not looked at.
        #expect(try await Self.count(cold, new, endBlock: 5) == 0)
        #expect(try await Self.count(cold, new, endBlock: 500_001) == 2)
        #expect(store.gets - gets <= 2 * (3 + 5))
    }

    @Test func aSmallTreeIsAPartOfALargeOne() async throws {
        let store = TestStore()
        let small = try await Self.disk([0, 7, 511], sizeBytes: 512 << 24, store)
        #expect(small.depth == 1)
        var edit = ManifestEdit(small)
        edit.resize(to: ManifestShape.maxSizeBytes)
        edit.set(
            BlockIndex(1 << 39),
            BlockEntry(
                base: BaseRef(id: ObjectID(high: 0, low: 2), location: 0, lengthBytes: 7, nonzeroSlices: 1), deltas: [])
        )
        let root = try await store.write(edit).root
        let large = Manifest(sizeBytes: ManifestShape.maxSizeBytes, root: root, cache: store.cache())
        let gets = store.gets
        #expect(try await Self.count(small, large) == 1)
        // The five pages on the way to the new block; the leaf of the small one, and what it hangs under, are the same.
        #expect(store.gets - gets <= 5 + 3)
        #expect(try await Self.count(large, small) == 1)
    }

    @Test func aDamagedOrMissingPageIsAnError() async throws {
        let store = TestStore()
        let old = try await Self.disk([0, 7, 5000], sizeBytes: 1 << 42, store)
        let new = try await Self.disk([1, 5001], sizeBytes: 1 << 42, store)
        for fault in [StoreFault(.corrupt, verb: .get), StoreFault(.fail(.notFound), verb: .get)] {
            store.faulty.inject(fault)
            await #expect(throws: StoreError.self) { try await Self.count(old, new) }
            store.faulty.clearFaults()
        }
        #expect(try await Self.count(old, new) == 5)
    }
}
