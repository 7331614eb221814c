// The recovery table: what was found in a journal, against what had to be there, gives what becomes of it. No switch here
// has a default, so a new label does not compile without its row; the tests go through every combination.

/// What must be there.
enum JournalTrust: CaseIterable {
    /// The machine has not been started anew since the journal was written: the page cache has everything that was written.
    /// Only the very last batch may be cut short, by the kill that interrupted it; nobody was told of that one.
    case kept
    /// Power may have been lost: what was not synced may be there, gone, or torn, in any order.
    case lost
}

/// What the header of a segment is, seen from the records before it.
enum SegmentFound: CaseIterable {
    /// It goes on from the segment before it, with the number that is due.
    case joins
    /// It begins within or right behind what the generation holds: nothing before it is needed.
    case begins
    /// Records between what was read and its first are missing.
    case gap
    /// Of no use: it lies beside the timeline, which other segments make up.
    case aside
    /// Its file ends before its header does.
    case short
    /// Its header is whole and wrong.
    case damaged
}

enum SegmentVerdict: Equatable {
    case read
    /// Not part of the journal. Removed, durably, before anything is written.
    case drop
    case damage
}

/// What stands at the next place of a segment.
enum RecordFound: CaseIterable {
    /// The record that is due, all its sums right.
    case due
    /// The file ends here.
    case end
    /// The file ends within a record.
    case partial
    /// Bytes that are no record, or whose sums are wrong.
    case damaged
    /// A record with another number.
    case stray
}

/// What lies behind a place where reading can't go on.
enum RecordBehind: CaseIterable {
    case nothing
    /// Segments of the timeline, none of which goes on from this place.
    case more
    /// A segment that goes on from this place: an earlier recovery has cut here already.
    case joined
}

enum RecordVerdict: Equatable {
    case take
    /// The segment is done.
    case leave
    /// What lies behind is not part of the journal.
    case cut
    case damage
}

enum JournalVerdict {
    static func segment(_ found: SegmentFound, _ trust: JournalTrust) -> SegmentVerdict {
        switch (found, trust) {
        case (.joins, .kept), (.joins, .lost): .read
        case (.begins, .kept), (.begins, .lost): .read
        case (.gap, .kept): .damage
        case (.gap, .lost): .drop
        case (.aside, .kept), (.aside, .lost): .drop
        // A kill came between its creation and its first batch.
        case (.short, .kept), (.short, .lost): .drop
        case (.damaged, .kept): .damage
        case (.damaged, .lost): .drop
        }
    }

    static func record(_ found: RecordFound, _ behind: RecordBehind, _ trust: JournalTrust) -> RecordVerdict {
        switch (found, behind, trust) {
        case (.due, .nothing, .kept), (.due, .more, .kept), (.due, .joined, .kept): .take
        case (.due, .nothing, .lost), (.due, .more, .lost), (.due, .joined, .lost): .take
        // Whether the next segment goes on from here, its own row says.
        case (.end, .nothing, .kept), (.end, .more, .kept), (.end, .joined, .kept): .leave
        case (.end, .nothing, .lost), (.end, .more, .lost), (.end, .joined, .lost): .leave
        case (.partial, .nothing, .kept): .cut
        case (.partial, .more, .kept): .damage
        case (.partial, .joined, .kept): .cut
        case (.partial, .nothing, .lost), (.partial, .more, .lost), (.partial, .joined, .lost): .cut
        case (.damaged, .nothing, .kept), (.damaged, .more, .kept): .damage
        case (.damaged, .joined, .kept): .cut
        case (.damaged, .nothing, .lost), (.damaged, .more, .lost), (.damaged, .joined, .lost): .cut
        case (.stray, .nothing, .kept), (.stray, .more, .kept): .damage
        case (.stray, .joined, .kept): .cut
        case (.stray, .nothing, .lost), (.stray, .more, .lost), (.stray, .joined, .lost): .cut
        }
    }

    /// Whatever was cut: what had been synced must have been read.
    static func isDamaged(synced: UInt64, read: UInt64) -> Bool { synced > read }
}
