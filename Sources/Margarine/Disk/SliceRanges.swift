// A set of slice numbers as sorted, disjoint, non-adjacent ranges: how a layer remembers that a whole terabyte was trimmed
// in one entry. In chunks, so that a further range costs the same however many there are.
//
// Always holds: ranges ascend within and across chunks and never touch; no chunk is empty.

/// Numbers of 512 KiB slices of a disk, counted from its start.
struct SliceRanges {
    private static let maxRanges = 512
    private var chunks: [[Range<UInt64>]] = []
    /// Where the last range of each chunk ends.
    private var ends: [UInt64] = []
    private(set) var count = 0
    /// What the chunks take on the heap.
    private var chunkBytes = 0

    private struct Position {
        var chunk: Int
        var index: Int
    }

    var isEmpty: Bool { count == 0 }
    var bytes: Int {
        count == 0 ? 0 : chunkBytes + heapBytes(32 + ends.capacity * 8) + heapBytes(32 + chunks.capacity * 8)
    }
    /// All of them, for tests.
    var ranges: [Range<UInt64>] { chunks.flatMap { $0 } }

    /// The first range that ends after `value`.
    private func firstEnding(after value: UInt64) -> Position? {
        let chunk = SliceRanges.first(ends.count) { ends[$0] > value }
        if chunk == chunks.count { return nil }
        let ranges = chunks[chunk]
        return Position(chunk: chunk, index: SliceRanges.first(ranges.count) { ranges[$0].upperBound > value })
    }

    /// The first index below `count` for which `isThere`, which is true from some index on; `count` if for none.
    @inline(__always)
    private static func first(_ count: Int, _ isThere: (Int) -> Bool) -> Int {
        var low = 0
        var high = count
        while low < high {
            let mid = (low + high) / 2
            if isThere(mid) { high = mid } else { low = mid + 1 }
        }
        return low
    }

    func contains(_ slice: UInt64) -> Bool { range(after: slice).map { $0.lowerBound <= slice } ?? false }

    /// Whether all of `wanted` is in the set.
    func covers(_ wanted: Range<UInt64>) -> Bool {
        guard let found = range(after: wanted.lowerBound) else { return false }
        return found.lowerBound <= wanted.lowerBound && found.upperBound >= wanted.upperBound
    }

    /// The first range that ends after `slice`; it may begin before it.
    func range(after slice: UInt64) -> Range<UInt64>? { firstEnding(after: slice).map { chunks[$0.chunk][$0.index] } }

    func forEach(_ body: (Range<UInt64>) -> Void) { for chunk in chunks { chunk.forEach(body) } }

    mutating func insert(_ new: Range<UInt64>) {
        if new.isEmpty { return }
        // Ranges that touch or overlap the new one melt into it.
        guard let first = new.lowerBound == 0 ? firstEnding(after: 0) : firstEnding(after: new.lowerBound - 1) else {
            return append(new)
        }
        var merged = new
        var last = first
        while last.chunk < chunks.count, chunks[last.chunk][last.index].lowerBound <= merged.upperBound {
            let old = chunks[last.chunk][last.index]
            merged = min(merged.lowerBound, old.lowerBound)..<max(merged.upperBound, old.upperBound)
            count -= 1
            last.index += 1
            if last.index == chunks[last.chunk].count { last = Position(chunk: last.chunk + 1, index: 0) }
        }
        replace(first, last, with: merged)
    }

    private mutating func append(_ new: Range<UInt64>) {
        if chunks.isEmpty || chunks[chunks.count - 1].count == SliceRanges.maxRanges {
            chunks.append([])
            ends.append(0)
            chunkBytes += SliceRanges.bytes(chunks[chunks.count - 1])
        }
        change(chunks.count - 1) { $0.append(new) }
        count += 1
    }

    /// Puts one range in the place of those from `first` up to `last`, which may be in a later chunk.
    private mutating func replace(_ first: Position, _ last: Position, with merged: Range<UInt64>) {
        count += 1
        if first.chunk == last.chunk {
            change(first.chunk) { $0.replaceSubrange(first.index..<last.index, with: CollectionOfOne(merged)) }
        } else {
            if last.index > 0 { change(last.chunk) { $0.removeFirst(last.index) } }
            change(first.chunk) { $0.replaceSubrange(first.index..., with: CollectionOfOne(merged)) }
            let gone = first.chunk + 1..<last.chunk
            for c in gone { chunkBytes -= SliceRanges.bytes(chunks[c]) }
            chunks.removeSubrange(gone)
            ends.removeSubrange(gone)
        }
        if chunks[first.chunk].count > SliceRanges.maxRanges { split(first.chunk) }
    }

    private mutating func split(_ c: Int) {
        let behind = Array(chunks[c].suffix(SliceRanges.maxRanges / 2))
        change(c) { $0 = Array($0.dropLast(behind.count)) }
        chunks.insert(behind, at: c + 1)
        ends.insert(behind[behind.count - 1].upperBound, at: c + 1)
        chunkBytes += SliceRanges.bytes(behind)
    }

    private mutating func change(_ c: Int, _ body: (inout [Range<UInt64>]) -> Void) {
        chunkBytes -= SliceRanges.bytes(chunks[c])
        body(&chunks[c])
        chunkBytes += SliceRanges.bytes(chunks[c])
        ends[c] = chunks[c][chunks[c].count - 1].upperBound
    }

    private static func bytes(_ chunk: [Range<UInt64>]) -> Int { heapBytes(32 + chunk.capacity * 16) }
}
