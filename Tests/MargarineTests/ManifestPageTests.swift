// What stands between a manifest and bytes that are not the ones that were written.

import BlockCache
@testable import Margarine
import ObjectStore
import Testing

struct ManifestPageTests {
    static func leaf(_ count: Int, using g: inout SeededGenerator) -> ManifestPage {
        let slots = Array(0..<512).shuffled(using: &g).prefix(count).sorted()
        return ManifestPage(
            leaf: ObjectID(high: g.next(), low: g.next()), index: g.next() >> 28, slots: slots,
            entries: ContiguousArray(slots.map { _ in BlockEntry.random(using: &g) }))
    }

    static func inner(_ count: Int, using g: inout SeededGenerator) -> ManifestPage {
        let slots = Array(0..<512).shuffled(using: &g).prefix(count).sorted()
        let level = Int.random(in: 1...4, using: &g)
        return ManifestPage(
            inner: ObjectID(high: g.next(), low: g.next()), level: level, index: 0, slots: slots,
            children: ContiguousArray(
                slots.map { _ in
                    PageRef(
                        id: ObjectID(high: g.next(), low: g.next()), location: UInt8(g.next() & 3),
                        lengthBytes: UInt32.random(in: 57...100_000, using: &g), usedBlocks: g.next() % 512 + 1,
                        storedBytes: g.next() >> 20)
                }))
    }

    static func equal(_ a: ManifestPage, _ b: ManifestPage) -> Bool {
        a.id == b.id && a.level == b.level && a.index == b.index && a.slots == b.slots && a.entries == b.entries
            && a.children == b.children && a.usedBlocks == b.usedBlocks && a.storedBytes == b.storedBytes
    }

    @Test func pagesComeBackAsTheyWere() throws {
        var g = SeededGenerator(seed: 1)
        for count in [1, 2, 3, 100, 511, 512] {
            for page in [Self.leaf(count, using: &g), Self.inner(count, using: &g)] {
                let bytes = page.encoded()
                #expect(Self.equal(try ManifestPage.decode(bytes, id: page.id), page))
            }
        }
    }

    @Test func aSharedDeltaObjectIsNamedOnce() {
        let shared = ObjectID(high: 1, low: 2)
        func page(_ id: (Int) -> ObjectID) -> ManifestPage {
            ManifestPage(
                leaf: ObjectID(high: 9, low: 9), index: 0, slots: Array(0..<512),
                entries: ContiguousArray(
                    (0..<512).map {
                        BlockEntry(
                            base: nil,
                            deltas: [
                                DeltaRef(
                                    id: id($0), location: 0, offsetBytes: 64, lengthBytes: 9, touchedSlices: 1,
                                    zeroedSlices: 0)
                            ])
                    }))
        }
        let one = page { _ in shared }.encoded().count
        #expect(one == 48 + 17 + 512 * (3 + 18) + 8)
        #expect(page { ObjectID(high: UInt64($0), low: 0) }.encoded().count == one + 511 * 17)
    }

    @Test func everyFlippedBitIsFound() {
        var g = SeededGenerator(seed: 2)
        for page in [Self.leaf(3, using: &g), Self.inner(3, using: &g)] {
            let good = page.encoded()
            for bit in 0..<good.count * 8 {
                var bad = good
                bad[bit / 8] ^= 1 << UInt8(bit % 8)
                #expect(throws: StoreError.self, "bit \(bit)") { try ManifestPage.decode(bad, id: page.id) }
            }
            for length in 0..<good.count {
                #expect(throws: StoreError.self, "cut to \(length)") {
                    try ManifestPage.decode(Array(good[..<length]), id: page.id)
                }
            }
            #expect(throws: StoreError.self) { try ManifestPage.decode(good + [0], id: page.id) }
            #expect(throws: StoreError.self) { try ManifestPage.decode([], id: page.id) }
            #expect(throws: StoreError.self) { try ManifestPage.decode(good, id: ObjectID(high: 1, low: 1)) }
        }
    }

    /// Bytes that are wrong under a right checksum: refused, or (where the change made another valid page) read for what
    /// they say, which is shown by writing them again.
    @Test(arguments: 1...4)
    func nothingIsReadButWhatWouldBeWritten(_ seed: Int) throws {
        var g = SeededGenerator(seed: UInt64(seed))
        var taken = 0
        var refused = 0
        for round in 0..<2500 {
            let page =
                round % 2 == 0
                ? Self.leaf(Int.random(in: 1...6, using: &g), using: &g)
                : Self.inner(Int.random(in: 1...6, using: &g), using: &g)
            var bytes = page.encoded()
            for _ in 0..<Int.random(in: 1...3, using: &g) {
                let at = Int.random(in: 0..<bytes.count - 8, using: &g)
                switch Int.random(in: 0...3, using: &g) {
                case 0: bytes[at] ^= 1 << UInt8(g.next() & 7)
                case 1: bytes[at] = UInt8(truncatingIfNeeded: g.next())
                case 2: bytes.insert(UInt8(truncatingIfNeeded: g.next()), at: at)
                default: if bytes.count > 60 { bytes.remove(at: at) }
                }
            }
            // A length and a checksum that fit.
            if Bool.random(using: &g) {
                withUnsafeBytes(of: UInt32(bytes.count).littleEndian) { bytes.replaceSubrange(12..<16, with: $0) }
            }
            let sum = ManifestPage.checksum(bytes[..<(bytes.count - 8)])
            withUnsafeBytes(of: sum.littleEndian) { bytes.replaceSubrange((bytes.count - 8)..<bytes.count, with: $0) }
            do {
                let read = try ManifestPage.decode(bytes, id: page.id)
                #expect(read.encoded() == bytes, "seed \(seed) round \(round)")
                taken += 1
            } catch {
                #expect(error.kind == .corrupt)
                refused += 1
            }
        }
        #expect(taken > 40 && refused > 400)
    }

    @Test func aPageInAnotherPlaceIsRefused() async throws {
        let store = TestStore()
        var g = SeededGenerator(seed: 3)
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 40, cache: store.cache()))
        edit.set(BlockIndex(0), .random(using: &g))
        edit.set(BlockIndex(5000), .random(using: &g))
        let root = try await store.write(edit).root!
        let top = try await ManifestCache.fetch(root, level: 1, index: 0, Locations([store.memory])).get()
        let (first, second) = (top.children[0], top.children[1])
        // What lies under the first slot, as if it were under the second.
        let swapped = ManifestPage(
            inner: ObjectID(high: 5, low: 5), level: 1, index: 0, slots: top.slots.slots,
            children: [second, first])
        // Sums that do not fit what is below.
        var lying = first
        lying.usedBlocks += 1
        let wrong = ManifestPage(
            inner: ObjectID(high: 6, low: 6), level: 1, index: 0, slots: top.slots.slots, children: [lying, second])
        for page in [swapped, wrong] {
            let bytes = page.encoded()
            _ = try await store.memory.put(page.id.manifestKey, bytes, if: .none)
            let manifest = Manifest(
                sizeBytes: 1 << 40,
                root: PageRef(
                    id: page.id, location: 0, lengthBytes: UInt32(bytes.count), usedBlocks: page.usedBlocks,
                    storedBytes: page.storedBytes),
                cache: store.cache())
            await #expect { try await manifest.load(BlockIndex(0)) } throws: { ($0 as? StoreError)?.kind == .corrupt }
            #expect(manifest.entry(BlockIndex(0)) == .notLoaded)
        }
        // A page that is gone, one that is damaged under way, and a location that nobody knows.
        try await store.memory.delete([first.id.manifestKey])
        let manifest = Manifest(sizeBytes: 1 << 40, root: root, cache: store.cache())
        await #expect { try await manifest.load(BlockIndex(0)) } throws: { ($0 as? StoreError)?.kind == .notFound }
        store.faulty.inject(StoreFault(.corrupt, verb: .get, keyContains: second.id.manifestKey, count: 2))
        await #expect { try await manifest.load(BlockIndex(5000)) } throws: { ($0 as? StoreError)?.kind == .corrupt }
        // Damage under way is no lasting one, and once is not told.
        store.faulty.inject(StoreFault(.corrupt, verb: .get, keyContains: second.id.manifestKey, count: 1))
        try await manifest.load(BlockIndex(5000))
        #expect(store.faulty.suffered == 3)
        guard case .entry(.some) = manifest.entry(BlockIndex(5000)) else {
            Issue.record("not loaded")
            return
        }
        var far = root
        far.location = 3
        let elsewhere = Manifest(sizeBytes: 1 << 40, root: far, cache: store.cache())
        await #expect { try await elsewhere.load(BlockIndex(0)) } throws: { ($0 as? StoreError)?.kind == .refused }
    }
}
