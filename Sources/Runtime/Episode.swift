// A trouble that comes again and again, told in few lines: when it begins, when its cause changes, and when it is over.
//
// Always holds: of one episode each cause is told once, and no more than `causes` of them; the end is told only of an
// episode whose beginning was.

/// One thing that works or does not. Owned by whoever looks at it.
package struct Episode: Sendable {
    /// How an episode was.
    package struct Over: Sendable, Equatable {
        package var durationMs: Int64
        /// How often it failed.
        package var count: UInt64
    }

    private var sinceNs: UInt64 = 0
    private var lastNs: UInt64 = 0
    private var count: UInt64 = 0
    private var told: Set<String> = []
    private static let causes = 8

    package init() {}

    /// It failed. True: tell it.
    ///
    /// - Parameter afterNs: what passes sooner than this is not worth a line.
    package mutating func failed(_ cause: String, nowNs: UInt64, afterNs: UInt64 = 0) -> Bool {
        if count == 0 { sinceNs = nowNs }
        count += 1
        lastNs = nowNs
        guard nowNs &- sinceNs >= afterNs, told.count < Self.causes else { return false }
        return told.insert(cause).inserted
    }

    /// It worked. Gives what is to be told: once, and not before it has worked for `quietNs`, so that what fails every other
    /// time is one episode.
    package mutating func worked(nowNs: UInt64, quietNs: UInt64 = 0) -> Over? {
        guard count > 0, told.isEmpty || nowNs &- lastNs >= quietNs else { return nil }
        defer { self = Episode() }
        return told.isEmpty ? nil : Over(durationMs: Int64((nowNs &- sinceNs) / 1_000_000), count: count)
    }
}
