// Which generations a disk keeps: logarithmically spaced ones, so that the gap between two is a fraction of their age. The
// rule needs no state but the two numbers; Docs/Operations.md says what follows from it.
//
// Always holds: for a density d of at least 2 at most 2^(d-1) times the bits of `current` are kept besides pinned ones, and
// what the rule has once let go it never keeps again.

package enum History {
    /// Whether the rule keeps `generation` when `current` is the newest. Pinned ones are kept besides.
    package static func keeps(_ generation: UInt64, current: UInt64, density: Int) -> Bool {
        if generation >= current { return generation == current }
        if density <= 0 { return false }
        let firstZeroBit = (generation &+ 1) & ~generation
        return current - generation < firstZeroBit << UInt64(min(density, DiskOptions.maxHistoryDensity))
    }
}

extension Head {
    /// Whether the disk keeps this generation now: what it does not keep can't be gone back to, forked or attached.
    package func keeps(_ number: UInt64) -> Bool {
        number <= generation && record != nil
            && (pinned.contains(number)
                || History.keeps(number, current: generation, density: options.historyDensity))
    }
}
