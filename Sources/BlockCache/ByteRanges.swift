// Which bytes of an object are there.

/// A set of byte positions as sorted ranges that neither touch nor overlap.
struct ByteRanges: Sendable, Equatable {
    private(set) var ranges: [Range<UInt64>] = []

    init() {}
    init(_ range: Range<UInt64>) { insert(range) }

    mutating func insert(_ range: Range<UInt64>) {
        if range.isEmpty { return }
        // All ranges that touch the new one become one with it.
        let first = ranges.firstIndex { $0.upperBound >= range.lowerBound } ?? ranges.count
        let last = ranges[first...].firstIndex { $0.lowerBound > range.upperBound } ?? ranges.count
        if first == last {
            ranges.insert(range, at: first)
        } else {
            let merged =
                min(range.lowerBound, ranges[first].lowerBound)..<max(range.upperBound, ranges[last - 1].upperBound)
            ranges.replaceSubrange(first..<last, with: CollectionOfOne(merged))
        }
    }

    /// The range that holds `position`.
    func range(at position: UInt64) -> Range<UInt64>? { ranges.first { $0.contains(position) } }
    /// Where the first range beyond `position` begins.
    func nextStart(after position: UInt64) -> UInt64? { ranges.first { $0.lowerBound > position }?.lowerBound }
    func contains(_ range: Range<UInt64>) -> Bool {
        range.isEmpty || ranges.contains { $0.lowerBound <= range.lowerBound && $0.upperBound >= range.upperBound }
    }
    var count: UInt64 { ranges.reduce(0) { $0 + UInt64($1.count) } }
}
