// What is left of a disk that has ended: memory of its loop, which only the loop may take apart.
//
// Always holds: nothing is let go of before nobody else holds it. The thread on which the disk ended lets go of its own
// references after it has handed these over, and must not be the last.

internal import Runtime

/// Owned by the loop that it was handed to.
final class DiskParts {
    private var layers: [Layer]
    private var pages: DirtyPages?
    private var journal: Journal?

    private static let firstPauseNs: UInt64 = 1_000_000
    private static let longestPauseNs: UInt64 = 1_000_000_000

    init(layers: [Layer], pages: DirtyPages, journal: Journal) {
        self.layers = layers
        self.pages = pages
        self.journal = journal
    }

    /// Lets go of them, of some now and of others once nobody else holds them. On the loop.
    static func letGo(_ parts: Unmanaged<DiskParts>, _ loop: Loop, pauseNs: UInt64 = firstPauseNs) {
        if parts._withUnsafeGuaranteedRef({ $0.isGone() }) { return parts.release() }
        nonisolated(unsafe) let parts = parts  // stays on this loop
        loop.after(ns: pauseNs) { letGo(parts, loop, pauseNs: min(pauseNs * 2, longestPauseNs)) }
    }

    /// The journal and the layers hold the pages.
    private func isGone() -> Bool {
        while let last = layers.indices.last, isKnownUniquelyReferenced(&layers[last]) { layers.removeLast() }
        if isKnownUniquelyReferenced(&journal) { journal = nil }
        guard layers.isEmpty, journal == nil, isKnownUniquelyReferenced(&pages) else { return false }
        pages = nil
        return true
    }
}
