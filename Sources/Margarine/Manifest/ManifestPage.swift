// One page of a manifest, decoded. Immutable, so generations, forks and loops may share it.

package import BlockCache

/// A leaf (block entries) or an inner page (references to pages below).
package final class ManifestPage: Sendable {
    package let id: ObjectID
    /// 0: a leaf.
    package let level: Int
    /// Which page of its level: its first block is `index << (9 * (level + 1))`.
    package let index: UInt64
    let slots: SlotSet
    /// A leaf's entries, in the order of its used slots.
    let entries: ContiguousArray<BlockEntry>
    /// An inner page's children, in the order of its used slots.
    let children: ContiguousArray<PageRef>
    /// Blocks with an entry under this page.
    package let usedBlocks: UInt64
    /// Stored bytes that those entries name.
    package let storedBytes: UInt64
    /// What it costs in memory, about.
    let residentBytes: Int

    init(leaf id: ObjectID, index: UInt64, slots: [Int], entries: ContiguousArray<BlockEntry>) {
        precondition(slots.count == entries.count && !slots.isEmpty)
        self.id = id
        level = 0
        self.index = index
        self.slots = SlotSet(ascending: slots)
        self.entries = entries
        children = []
        usedBlocks = UInt64(entries.count)
        storedBytes = entries.reduce(0) { $0 &+ $1.storedBytes }
        let deltas = entries.reduce(0) {
            $0 + ($1.deltas.isEmpty ? 0 : 32 + $1.deltas.count * MemoryLayout<DeltaRef>.stride)
        }
        residentBytes = Self.overheadBytes + entries.count * MemoryLayout<BlockEntry>.stride + deltas
    }

    init(inner id: ObjectID, level: Int, index: UInt64, slots: [Int], children: ContiguousArray<PageRef>) {
        precondition(slots.count == children.count && !slots.isEmpty && level > 0)
        self.id = id
        self.level = level
        self.index = index
        self.slots = SlotSet(ascending: slots)
        entries = []
        self.children = children
        usedBlocks = children.reduce(0) { $0 &+ $1.usedBlocks }
        storedBytes = children.reduce(0) { $0 &+ $1.storedBytes }
        residentBytes = Self.overheadBytes + children.count * MemoryLayout<PageRef>.stride
    }

    /// Headers of the objects and the cache's own account of a page, about.
    private static let overheadBytes = 512

    /// A leaf's entry in `slot`.
    @inline(__always) func entry(_ slot: Int) -> BlockEntry? {
        guard let rank = slots.rank(slot) else { return nil }
        return entries[rank]
    }

    /// An inner page's child in `slot`.
    @inline(__always) func child(_ slot: Int) -> PageRef? {
        guard let rank = slots.rank(slot) else { return nil }
        return children[rank]
    }

    /// The first block under this page.
    var firstBlock: UInt64 { index << (ManifestShape.slotBits * UInt64(level + 1)) }
}
