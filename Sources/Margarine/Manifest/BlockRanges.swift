// A set of blocks kept as ranges: what trims of any size add up to.

/// Disjoint, non-adjacent ranges in ascending order.
struct BlockRanges: Sendable {
    private(set) var ranges: [Range<UInt64>] = []

    var isEmpty: Bool { ranges.isEmpty }

    mutating func insert(_ range: Range<UInt64>) {
        if range.isEmpty { return }
        // All ranges that touch the new one melt into it.
        let first = firstIndex { $0.upperBound >= range.lowerBound }
        let end = firstIndex { $0.lowerBound > range.upperBound }
        if first == end {
            ranges.insert(range, at: first)
        } else {
            let merged =
                min(range.lowerBound, ranges[first].lowerBound)..<max(range.upperBound, ranges[end - 1].upperBound)
            ranges.replaceSubrange(first..<end, with: CollectionOfOne(merged))
        }
    }

    func overlaps(_ range: Range<UInt64>) -> Bool {
        let i = firstIndex { $0.upperBound > range.lowerBound }
        return i < ranges.count && ranges[i].lowerBound < range.upperBound
    }

    func covers(_ range: Range<UInt64>) -> Bool {
        let i = firstIndex { $0.upperBound > range.lowerBound }
        return i < ranges.count && ranges[i].lowerBound <= range.lowerBound && ranges[i].upperBound >= range.upperBound
    }

    func contains(_ block: UInt64) -> Bool { overlaps(block..<block + 1) }

    /// The first range for which `isBehind` holds; it holds for all ranges from some point on.
    private func firstIndex(where isBehind: (Range<UInt64>) -> Bool) -> Int {
        var low = 0
        var high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if isBehind(ranges[middle]) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}
