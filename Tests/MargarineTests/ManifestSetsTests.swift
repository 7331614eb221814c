// The sets that the manifest is made of, against plain ones.

import BlockCache
@testable import Margarine
import Testing

struct ManifestSetsTests {
    @Test func rangesEqualASetOfBlocks() {
        var g = SeededGenerator(seed: 1)
        for _ in 0..<300 {
            var ranges = BlockRanges()
            var model: Set<UInt64> = []
            for _ in 0..<Int.random(in: 0...12, using: &g) {
                let start = UInt64.random(in: 0..<24, using: &g)
                let range = start..<min(24, start + UInt64.random(in: 0...6, using: &g))
                ranges.insert(range)
                model.formUnion(range)
            }
            // Apart, ascending, as few as can be.
            for (a, b) in zip(ranges.ranges, ranges.ranges.dropFirst()) { #expect(a.upperBound < b.lowerBound) }
            #expect(Set(ranges.ranges.flatMap { Array($0) }) == model)
            #expect(ranges.isEmpty == model.isEmpty)
            for low in 0..<24 as Range<UInt64> {
                #expect(ranges.contains(low) == model.contains(low))
                for high in low + 1...24 {
                    #expect(ranges.overlaps(low..<high) == !model.isDisjoint(with: low..<high))
                    #expect(ranges.covers(low..<high) == model.isSuperset(of: low..<high))
                }
            }
        }
    }

    @Test func slotsEqualASetOfNumbers() {
        var g = SeededGenerator(seed: 2)
        for count in [0, 1, 2, 63, 64, 65, 300, 511, 512] {
            let slots = Array(0..<512).shuffled(using: &g).prefix(count).sorted()
            let set = SlotSet(ascending: slots)
            #expect(set.slots == slots && set.count == count)
            for slot in 0..<512 {
                #expect(set.rank(slot) == slots.firstIndex(of: slot))
                #expect(set.next(from: slot) == slots.first { $0 >= slot })
            }
            #expect(set.next(from: 512) == nil)
            if count > 0 { #expect(set != SlotSet(ascending: slots.dropLast())) }
        }
    }

    /// Ranges that end a block before, at, and a block behind the ends of pages.
    @Test func removalsAtTheEdgesOfPages() async throws {
        var g = SeededGenerator(seed: 3)
        let store = TestStore()
        let edges =
            [0, 1, 511, 512, 513, 1023, 1024, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 18) + 512] as [UInt64]
        var edit = ManifestEdit(.empty(sizeBytes: 1 << 50, cache: store.cache()))
        var model: [UInt64: BlockEntry] = [:]
        for edge in edges {
            for block in [edge, edge + 1] + (edge > 0 ? [edge - 1] : []) {
                model[block] = .random(using: &g)
                edit.set(BlockIndex(block), model[block])
            }
        }
        let full = try await store.write(edit)
        for low in edges {
            for high in edges where high > low {
                var edit = ManifestEdit(full)
                edit.removeAll(in: BlockIndex(low)..<BlockIndex(high))
                // One that is set again stays.
                edit.set(BlockIndex(high - 1), model.values.first)
                var rest = model.filter { !(low..<high).contains($0.key) }
                rest[high - 1] = model.values.first
                try await ManifestTests.compare(try await store.write(edit), rest, probes: edges)
            }
        }
    }

    @Test func depthsFollowFromSizes() {
        let block = UInt64(Geometry.blockBytes)
        for (size, blocks, depth) in [
            (512, 1, 1), (block, 1, 1), (block + 512, 2, 1), (512 * block, 512, 1), (512 * block + 512, 513, 2),
            (1 << 42, 1 << 18, 2), ((1 << 42) + 512, (1 << 18) + 1, 3), (1 << 51, 1 << 27, 3),
            ((1 << 51) + 512, (1 << 27) + 1, 4),
            (1 << 60, 1 << 36, 4), ((1 << 60) + 512, (1 << 36) + 1, 5), (ManifestShape.maxSizeBytes, (1 << 40) - 1, 5),
        ] as [(UInt64, UInt64, Int)] {
            #expect(ManifestShape.blocks(sizeBytes: size) == blocks)
            #expect(ManifestShape.depth(sizeBytes: size) == depth, "\(size)")
        }
    }
}
