// A set of slice numbers as sorted, disjoint, non-adjacent ranges: how a layer remembers that a whole terabyte was trimmed
// in one entry.

/// Numbers of 512 KiB slices of a disk, counted from its start.
struct SliceRanges: Equatable {
    private(set) var ranges: [Range<UInt64>] = []

    var isEmpty: Bool { ranges.isEmpty }
    var count: Int { ranges.count }

    /// Index of the first range that ends after `value`.
    private func firstEnding(after value: UInt64) -> Int {
        var low = 0
        var high = ranges.count
        while low < high {
            let mid = (low + high) / 2
            if ranges[mid].upperBound > value { high = mid } else { low = mid + 1 }
        }
        return low
    }

    func contains(_ slice: UInt64) -> Bool {
        let i = firstEnding(after: slice)
        return i < ranges.count && ranges[i].lowerBound <= slice
    }

    /// Whether all of `wanted` is in the set.
    func covers(_ wanted: Range<UInt64>) -> Bool {
        guard let found = range(after: wanted.lowerBound) else { return false }
        return found.lowerBound <= wanted.lowerBound && found.upperBound >= wanted.upperBound
    }

    /// The first range that ends after `slice`; it may begin before it.
    func range(after slice: UInt64) -> Range<UInt64>? {
        let i = firstEnding(after: slice)
        return i < ranges.count ? ranges[i] : nil
    }

    mutating func insert(_ new: Range<UInt64>) {
        if new.isEmpty { return }
        // Ranges that touch or overlap the new one melt into it.
        let first = new.lowerBound == 0 ? 0 : firstEnding(after: new.lowerBound - 1)
        var last = first
        var merged = new
        while last < ranges.count, ranges[last].lowerBound <= new.upperBound {
            merged = min(merged.lowerBound, ranges[last].lowerBound)..<max(merged.upperBound, ranges[last].upperBound)
            last += 1
        }
        ranges.replaceSubrange(first..<last, with: CollectionOfOne(merged))
    }
}
