// What differs between two manifests, told by the manifests alone: both trees are walked together, and where they name the
// same page nothing below it is looked at. So it costs what changed, not what there is.
//
// Always holds: no more than a few pages of each level are in memory; blocks come in ascending order, each once. What is
// told "changed" may hold the same bytes again; what is not told holds the same bytes.

package import BlockCache
package import ObjectStore

/// The blocks of `new` that may differ from those of `old`, one after the other. Of any two manifests, also of different
/// disks and sizes. Of no more use once it has thrown.
package final class ManifestDiff: @unchecked Sendable {  // used by one task at a time
    /// A block whose stored form differs.
    package struct Change: Sendable, Equatable {
        package var block: BlockIndex
        /// Stored form before; nil: all zeroes.
        package var old: BlockEntry?
        /// Stored form now; nil: all zeroes.
        package var new: BlockEntry?
        /// Bit i: slice i may hold other bytes than before; never 0.
        package var changed: UInt32
        /// Bit i: slice i is all zeroes now, and may have been something else. A part of `changed`.
        package var zeroed: UInt32
    }

    /// A page on one side, of `level`. Where the walk is higher than that, it hangs under slot 0.
    private struct Node {
        var ref: PageRef
        var level: Int
        var cache: ManifestCache
    }
    /// What the two sides have at one place, which is not the same page.
    private struct Pair {
        var index: UInt64
        var old: Node?
        var new: Node?
    }
    /// The pairs below one pair of pages.
    private struct Row {
        var level: Int
        var pairs: [Pair]
        var next = 0
        /// Pages of the pairs from `next` to `loaded`.
        var pages: [ObjectID: ManifestPage] = [:]
        var loaded = 0
    }
    /// Pairs whose pages are fetched at the same time, and are in memory then.
    private static let window = 8

    private var rows: [Row] = []
    private var ready: [Change] = []
    private var position = 0
    private let endBlock: UInt64

    /// - Parameter endBlock: only blocks before this one are compared; nil: all of both.
    package init(from old: Manifest, to new: Manifest, endBlock: UInt64? = nil) {
        self.endBlock = endBlock ?? max(old.blockCount, new.blockCount)
        let level = max(old.depth, new.depth) - 1
        let pair = Pair(
            index: 0, old: old.root.map { Node(ref: $0, level: old.depth - 1, cache: old.cache) },
            new: new.root.map { Node(ref: $0, level: new.depth - 1, cache: new.cache) })
        if differ(pair) { rows = [Row(level: level, pairs: [pair])] }
    }

    /// The next block that may differ; nil: there is none any more.
    package func next() async throws(StoreError) -> Change? {
        while true {
            if position < ready.count {
                position += 1
                return ready[position - 1]
            }
            guard var row = rows.popLast() else { return nil }
            if row.next == row.pairs.count { continue }
            if row.next == row.loaded {
                row.loaded = min(row.pairs.count, row.next + Self.window)
                row.pages = try await Self.load(row.pairs[row.next..<row.loaded], level: row.level)
            }
            let pair = row.pairs[row.next]
            row.next += 1
            rows.append(row)
            if row.level == 0 {
                (ready, position) = (compareLeaves(pair, row.pages), 0)
            } else {
                let pairs = pairsBelow(pair, level: row.level, row.pages)
                if !pairs.isEmpty { rows.append(Row(level: row.level - 1, pairs: pairs)) }
            }
        }
    }

    private func differ(_ pair: Pair) -> Bool { pair.old?.ref.id != pair.new?.ref.id }

    /// The pages of this level that the pairs name, by id.
    private static func load(_ pairs: ArraySlice<Pair>, level: Int) async throws(StoreError) -> [ObjectID: ManifestPage]
    {
        struct Wanted: Sendable {
            var ref: PageRef
            var index: UInt64
            var locations: Locations
        }
        var pages: [ObjectID: ManifestPage] = [:]
        var wanted: [Wanted] = []
        for pair in pairs {
            for node in [pair.old, pair.new] {
                guard let node, node.level == level else { continue }
                if let page = node.cache.resident(node.ref.id)?.page {
                    try page.check(node.ref, level: level, index: pair.index)
                    pages[page.id] = page
                } else {
                    wanted.append(Wanted(ref: node.ref, index: pair.index, locations: node.cache.locations))
                }
            }
        }
        // Past the caches: a page of a walk is wanted once.
        let fetched = try await inParallel(wanted, limit: 2 * window) {
            (one) async throws(StoreError) -> ManifestPage in
            try await ManifestCache.fetch(one.ref, level: level, index: one.index, one.locations).get()
        }
        for page in fetched { pages[page.id] = page }
        return pages
    }

    /// Where the children of two pages differ.
    private func pairsBelow(_ pair: Pair, level: Int, _ pages: [ObjectID: ManifestPage]) -> [Pair] {
        let old = children(pair.old, level: level, pages)
        let new = children(pair.new, level: level, pages)
        var pairs: [Pair] = []
        var (i, j) = (0, 0)
        while i < old.count || j < new.count {
            let slot = min(i < old.count ? old[i].slot : .max, j < new.count ? new[j].slot : .max)
            var below = Pair(index: pair.index << ManifestShape.slotBits | UInt64(slot))
            if i < old.count, old[i].slot == slot {
                below.old = old[i].node
                i += 1
            }
            if j < new.count, new[j].slot == slot {
                below.new = new[j].node
                j += 1
            }
            if below.index * ManifestShape.blocksUnder(level: level - 1) >= endBlock { break }
            if differ(below) { pairs.append(below) }
        }
        return pairs
    }

    private func children(_ node: Node?, level: Int, _ pages: [ObjectID: ManifestPage]) -> [(slot: Int, node: Node)] {
        guard let node else { return [] }
        // A smaller tree hangs under the leftmost pages of a larger one.
        if node.level < level { return [(0, node)] }
        let page = pages[node.ref.id]!
        return zip(page.slots.slots, page.children).map {
            ($0, Node(ref: $1, level: level - 1, cache: node.cache))
        }
    }

    private func compareLeaves(_ pair: Pair, _ pages: [ObjectID: ManifestPage]) -> [Change] {
        let old = pair.old.map { pages[$0.ref.id]! }
        let new = pair.new.map { pages[$0.ref.id]! }
        var changes: [Change] = []
        for slot in 0..<ManifestShape.slots {
            let block = pair.index << ManifestShape.slotBits | UInt64(slot)
            if block >= endBlock { break }
            if let change = Change(BlockIndex(block), from: old?.entry(slot), to: new?.entry(slot)) {
                changes.append(change)
            }
        }
        return changes
    }
}

extension ManifestDiff.Change {
    /// nil: every slice holds the same bytes in both forms.
    init?(_ block: BlockIndex, from old: BlockEntry?, to new: BlockEntry?) {
        if old == new { return nil }
        var changed: UInt32 = 0
        var zeroed: UInt32 = 0
        for index in 0..<Geometry.slicesPerBlock {
            let slice = SliceIndex(index)
            let key = new?.key(slice)
            if key == old?.key(slice) { continue }
            changed |= 1 << UInt32(index)
            if key == nil { zeroed |= 1 << UInt32(index) }
        }
        if changed == 0 { return nil }
        self.init(block: block, old: old, new: new, changed: changed, zeroed: zeroed)
    }
}

/// Bytes of a disk that may differ from what they were. Made of slices of 512 KiB.
package struct ChangedRange: Sendable, Equatable {
    package enum Kind: String, Sendable, Encodable {
        /// They may hold anything now.
        case data
        /// They are all zeroes now.
        case zeroes
    }
    package var bytes: Range<UInt64>
    package var kind: Kind
    package init(bytes: Range<UInt64>, kind: Kind) {
        self.bytes = bytes
        self.kind = kind
    }
}

/// The changes of a diff as ranges of bytes, ascending; neighbours are of different kinds, or apart.
package final class ChangedRanges: @unchecked Sendable {  // used by one task at a time
    private let diff: ManifestDiff
    private let endBytes: UInt64
    private var change: ManifestDiff.Change?
    private var slice = 0
    private var pending: ChangedRange?

    /// - Parameter endBytes: where the larger of the two disks ends.
    package init(_ diff: ManifestDiff, endBytes: UInt64) {
        self.diff = diff
        self.endBytes = endBytes
    }

    /// The next range; nil: there is none any more.
    package func next() async throws(StoreError) -> ChangedRange? {
        while true {
            guard let piece = try await nextRun() else {
                let last = pending
                pending = nil
                return last
            }
            guard let before = pending else {
                pending = piece
                continue
            }
            if before.kind == piece.kind, before.bytes.upperBound == piece.bytes.lowerBound {
                pending = ChangedRange(bytes: before.bytes.lowerBound..<piece.bytes.upperBound, kind: piece.kind)
                continue
            }
            pending = piece
            return before
        }
    }

    /// Slices of one block that are alike.
    private func nextRun() async throws(StoreError) -> ChangedRange? {
        while true {
            if change == nil {
                change = try await diff.next()
                slice = 0
            }
            guard let change else { return nil }
            let rest = change.changed >> UInt32(slice)
            if slice >= Geometry.slicesPerBlock || rest == 0 {
                self.change = nil
                continue
            }
            slice += rest.trailingZeroBitCount
            let kind: ChangedRange.Kind = change.zeroed & 1 << UInt32(slice) != 0 ? .zeroes : .data
            let alike = (kind == .zeroes ? change.zeroed : change.changed & ~change.zeroed) >> UInt32(slice)
            let count = (~alike).trailingZeroBitCount
            let start = change.block.value * UInt64(Geometry.blockBytes) + UInt64(slice * Geometry.sliceBytes)
            slice += count
            // Behind the end of both there is nothing to tell of.
            if start >= endBytes { continue }
            return ChangedRange(bytes: start..<min(start + UInt64(count * Geometry.sliceBytes), endBytes), kind: kind)
        }
    }
}
