// What a session's writes tell of a btrfs on its disk: where its transactions end, and which mirrors of the super block are
// still to come. It names and times safe points. Under `auto` no promise rests on it; under `btrfs` all do.
//
// Always holds: `missingMirrors` is empty unless the last super block ended a full commit and no flush came since.

struct SuperBlockWatch {
    /// What a write of the primary super block means.
    enum Meaning: Equatable {
        /// No safe point: no flush came before it, or it goes back.
        case none
        case full
        case log
    }

    /// A flush was answered since the last super block.
    var isFlushed: Bool
    /// Of the last super block of this session; nil: there was none, or something else is at its place now.
    private(set) var generation: UInt64?
    /// Super blocks follow flushes, as btrfs does it.
    private(set) var isFollowed = false
    /// Flushes that covered writes since the last super block.
    private(set) var unfollowed = 0
    /// Pages of the mirrors that belong to the last super block and have not come yet, ascending.
    private(set) var missingMirrors: [UInt64] = []

    /// btrfs flushes before a super block, on some devices after it too, and under load once more in between.
    static let mostUnfollowed = 4

    /// - Parameter isFlushed: the first super block counts though no flush was seen, for it may have come before a restart.
    init(isFlushed: Bool) { self.isFlushed = isFlushed }

    /// A flush, or FUA write, that covers writes came.
    mutating func flushCame() {
        unfollowed += 1
        if unfollowed > Self.mostUnfollowed { isFollowed = false }
    }

    /// A primary super block was written. What was due of the one before is due no more.
    mutating func superBlockCame(_ found: SuperBlock) -> Meaning {
        // mkfs on a used disk begins again at a low generation, after a super block that was none.
        let counts = isFlushed && found.generation >= generation ?? 0
        generation = found.generation
        missingMirrors = []
        guard counts else { return .none }
        isFlushed = false
        isFollowed = true
        unfollowed = 0
        return found.logRoot != 0 ? .log : .full
    }

    /// Something else is now where the primary super block was.
    mutating func superBlockWent() { generation = nil }

    mutating func expectMirrors(_ pages: [UInt64]) { missingMirrors = pages }

    /// A super block was written to `page`. true: it is a mirror that was due.
    mutating func mirrorCame(_ found: SuperBlock, page: UInt64) -> Bool {
        guard found.generation == generation, let place = missingMirrors.firstIndex(of: page) else { return false }
        missingMirrors.remove(at: place)
        return true
    }
}
