// The pages of a new manifest out of those of an old one and a set of changes: a pure function, for a worker thread.

import BlockCache
import Runtime

struct ManifestBuilder: Sendable {
    /// What is to change.
    struct Changes: Sendable {
        var sizeBytes: UInt64
        /// Blocks that get an entry (or none); they stand over `removed`.
        var sets: [UInt64: BlockEntry?] = [:]
        var removed = BlockRanges()
        /// What lies elsewhere than it did.
        var relocation: Relocation?
        init(sizeBytes: UInt64) { self.sizeBytes = sizeBytes }
    }

    /// Objects of which there are copies at another location, and the blocks that are to name those.
    struct Relocation: Sendable {
        var blocks: Range<UInt64>
        var ids: Set<ObjectID>
        var location: UInt8

        func apply(_ entry: BlockEntry) -> BlockEntry {
            var entry = entry
            if let base = entry.base, ids.contains(base.id) { entry.base!.location = location }
            for i in entry.deltas.indices where ids.contains(entry.deltas[i].id) { entry.deltas[i].location = location }
            return entry
        }
    }

    /// A page that is to be written.
    struct New: Sendable {
        var page: ManifestPage
        var bytes: [UInt8]
    }

    struct Built: Sendable {
        var root: PageRef?
        var pages: [New]
    }

    let changes: Changes
    /// The old tree, whose top is of level `rootLevel`.
    let root: PageRef?
    let rootLevel: Int
    /// Levels of the new tree; at least those of the old.
    let depth: Int
    /// The old pages that the changes reach.
    let pages: [ObjectID: ManifestPage]
    let location: UInt8
    let environment: any Environment

    func build() -> Built {
        var build = Build(input: self, blocks: changes.sets.keys.sorted(), pages: [])
        let top = build.page(root, level: depth - 1, index: 0)
        return Built(root: top, pages: build.pages)
    }

    /// One run of `build`.
    private struct Build {
        let input: ManifestBuilder
        /// The blocks that are set, ascending.
        let blocks: [UInt64]
        var pages: [New]

        /// The new reference of one page, nil if nothing is left under it. `old` is the page's old form; above the old
        /// tree's top it is that top.
        mutating func page(_ old: PageRef?, level: Int, index: UInt64) -> PageRef? {
            let span = ManifestShape.blocksUnder(level: level)
            let range = index * span..<(index + 1) * span
            let isAboveOld = level > input.rootLevel
            let removed = input.changes.removed
            let isMoved = input.changes.relocation?.blocks.overlaps(range) ?? false
            if !isAboveOld, !isMoved, !removed.overlaps(range), !blocks.hasElement(in: range) { return old }
            let isCleared = removed.covers(range)
            if level == 0 { return leaf(isCleared ? nil : old, index: index, range: range) }

            var slots: [Int] = []
            var refs: ContiguousArray<PageRef> = []
            if isAboveOld {
                if let old {
                    // The old tree hangs under slot 0 of what is above it.
                    slots = [0]
                    refs = [old]
                }
            } else if !isCleared, let old {
                let page = input.pages[old.id]!
                slots = page.slots.slots
                refs = page.children
            }
            var newSlots: [Int] = []
            var newRefs: ContiguousArray<PageRef> = []
            var position = 0
            var slot = 0
            while let next = nextSlot(from: slot, slots, position, level: level, range: range) {
                let child = position < slots.count && slots[position] == next ? refs[position] : nil
                if child != nil { position += 1 }
                if let ref = page(child, level: level - 1, index: index << ManifestShape.slotBits | UInt64(next)) {
                    newSlots.append(next)
                    newRefs.append(ref)
                }
                slot = next + 1
            }
            if newSlots.isEmpty { return nil }
            if !isAboveOld, !isCleared, newSlots == slots, newRefs == refs, !isMoved || old?.location == input.location
            {
                return old
            }
            return note(
                ManifestPage(
                    inner: input.environment.objectID(), level: level, index: index, slots: newSlots, children: newRefs)
            )
        }

        /// The next slot from `slot` on that has an old child or a block that is set.
        private func nextSlot(from slot: Int, _ slots: [Int], _ position: Int, level: Int, range: Range<UInt64>) -> Int?
        {
            let from = range.lowerBound + UInt64(slot) << (ManifestShape.slotBits * UInt64(level))
            let i = blocks.firstIndex(notBelow: from)
            let set =
                i < blocks.count && blocks[i] < range.upperBound ? ManifestShape.slot(blocks[i], level: level) : nil
            let old = position < slots.count ? slots[position] : nil
            guard let set else { return old }
            return min(set, old ?? set)
        }

        private mutating func leaf(_ base: PageRef?, index: UInt64, range: Range<UInt64>) -> PageRef? {
            var entries: [BlockEntry?] = Array(repeating: nil, count: ManifestShape.slots)
            if let base {
                let page = input.pages[base.id]!
                for (slot, entry) in zip(page.slots.slots, page.entries)
                where !input.changes.removed.contains(range.lowerBound + UInt64(slot)) {
                    entries[slot] = entry
                }
            }
            var i = blocks.firstIndex(notBelow: range.lowerBound)
            while i < blocks.count, blocks[i] < range.upperBound {
                entries[Int(blocks[i] - range.lowerBound)] = input.changes.sets[blocks[i]]!
                i += 1
            }
            var isMoved = false
            if let relocation = input.changes.relocation {
                for slot in entries.indices where relocation.blocks.contains(range.lowerBound + UInt64(slot)) {
                    isMoved = true
                    entries[slot] = entries[slot].map { relocation.apply($0) }
                }
            }
            let slots = entries.indices.filter { entries[$0] != nil }
            if slots.isEmpty { return nil }
            let kept = ContiguousArray(slots.map { entries[$0]! })
            if let base, let page = input.pages[base.id], page.slots.slots == slots, page.entries == kept,
                !isMoved || base.location == input.location
            {
                return base
            }
            return note(ManifestPage(leaf: input.environment.objectID(), index: index, slots: slots, entries: kept))
        }

        private mutating func note(_ page: ManifestPage) -> PageRef {
            let bytes = page.encoded()
            pages.append(New(page: page, bytes: bytes))
            return PageRef(
                id: page.id, location: input.location, lengthBytes: UInt32(bytes.count), usedBlocks: page.usedBlocks,
                storedBytes: page.storedBytes)
        }
    }
}
