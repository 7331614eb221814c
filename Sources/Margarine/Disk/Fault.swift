// Deliberate mistakes, one at a time, to show that the tests would see them. Nothing outside tests sets one; each case names
// the rule that it breaks, where that rule is kept.

package enum Fault: String, Sendable, CaseIterable {
    /// Journal: a flush does not wait for fdatasync.
    case journalSyncSkipped
    /// Journal: a write is acknowledged before its record is in the file.
    case acknowledgedBeforeAppend
    /// BlockCache: a slice is not held against its checksum. Set for all loaders of the process: `trustsStoredBytes`.
    case unverifiedSlice
    /// Commit: the journal is freed before the head names the generation.
    case journalFreedEarly
    /// Commit: what was written since the safe point goes into the generation too.
    case commitPastSafePoint
    /// Safe points: a flush is taken for one where only super blocks are.
    case flushTakenForSafePoint
    /// Safe points: a super block is committed without what was written before it.
    case superBlockOvertakes
    /// Commit: the newer of two merged layers loses.
    case layersMergedWrongly
    /// Commit: zeroed pages are left out.
    case zeroesNotCommitted
    /// Head: a swap that another server won is taken for won.
    case lostSwapTakenForWon
    /// Head: another server's epoch is taken for one's own.
    case epochIgnored
    /// Sessions: a request of a connection that has left still takes effect.
    case deadWriteLands
    /// Sessions: the writes of a lost session stay when the disk goes back to its last safe point.
    case rollBackSkipped
    /// Sessions: a client that was rolled back may go on.
    case lostSessionResumes
    /// Write: the rest of a page that is written in part is taken for zeroes.
    case partialPageMergedWithZeroes
    /// Read: pages that a commit is working on are not looked at.
    case committingLayerNotRead
    /// Collection: records of generations that history does not keep are removed at once, without a retirement.
    case collectionSkipsTombstone
    /// Collection: what was stored or retired a moment ago counts as old.
    case collectionIgnoresGrace
    /// Collection: manifests are traced before objects are listed, and what is old is decided at the listing.
    case collectionScansFirst
    /// Collection: the disks of the last of several locations are not looked at.
    case collectionSkipsLocation
    /// Tenure: an idle disk is given back though somebody is being admitted.
    case releaseIgnoresAdmission
    /// Sessions: one that was away without a loss may go on after somebody else was served.
    case replacedSessionResumes
    /// Sessions: the session that is away ends as soon as another client asks, whatever comes of that.
    case failedAttachReplaces
    /// Snapshots: the last reader that leaves takes the generation's name away from one that is being admitted.
    case snapshotGoneWhileAdmitting
    /// View: block status looks at a generation of before an await, and at the layers of after it.
    case statusReadsTwice
    /// Memory: what is held for clients has no bound. Layers are not held against the dirty memory, requests do not stand in
    /// line, and what a client asked for does not end with it.
    case memoryNotBounded
    /// Heartbeat: the next renewal waits until every disk's head was looked at.
    case heartbeatWaits
    /// Ownership: an owner is dead when its record is old by the clock of whoever looks at it.
    case livenessByClock
    /// Lease: requests are served and acknowledged however old the last proof of ownership is.
    case leaseNotAsked
    /// Journal: what an earlier recovery cut off is taken up again when it comes back, and is not removed for good.
    case replayIgnoresTimeline
    /// Commit: a generation goes past a roll-back that is not in the journal.
    case commitPassesRollBack
    /// Safe points: under `auto` a flush makes none while something like a btrfs super block stands at 64 KiB.
    case flushWithoutSafePoint
}

#if MARGARINE_FAULTS
    internal import Glibc
    package import Logging

    // For Scripts/chaos-tcpkill.sh --break: a daemon whose rule is broken. No build for users defines MARGARINE_FAULTS.
    extension Fault {
        /// The rule that the variable MARGARINE_FAULT names; said loudly. A name that is none ends the process.
        package static func ofEnvironment(_ log: Logger) -> Fault? {
            guard let text = getenv("MARGARINE_FAULT").map({ String(cString: $0) }), !text.isEmpty else { return nil }
            guard let fault = Fault(rawValue: text) else {
                log.critical(
                    "MARGARINE_FAULT: no rule '\(text)'; known are \(allCases.map(\.rawValue).joined(separator: ", "))")
                exit(64)
            }
            log.critical("this build breaks the rule '\(text)' on purpose: data will be lost")
            return fault
        }
    }
#endif
