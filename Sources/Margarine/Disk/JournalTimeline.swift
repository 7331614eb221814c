// Which segments of a folder make up the journal. Each names the one it goes on from, by an id that is never used again, so
// the way back from the newest tells them from what an earlier recovery cut off, should that come back from the dead.

/// Of the segments with good headers; empty where none of them can be reached from what the generation holds.
struct JournalTimeline {
    private let all: [JournalFormat.SegmentHeader]
    /// Ascending.
    private var members: [JournalFormat.SegmentHeader] = []

    /// - Parameter headers: by number, ascending.
    /// - Parameter base: what the generation holds; what lies before it is not needed.
    init(headers: [JournalFormat.SegmentHeader], base: UInt64) {
        all = headers
        for tip in headers.indices.reversed() {
            let path = way(backFrom: tip)
            // A newest one that something is missing before is no use, and no proof against the others.
            if path.contains(where: { all[$0].firstSequence <= base + 1 }) {
                members = path.reversed().map { all[$0] }
                return
            }
        }
    }

    private func way(backFrom tip: Int) -> [Int] {
        var path = [tip]
        while let last = path.last, last > 0 {
            let header = all[last]
            let before: Int?
            if let follows = header.follows {
                before = follows == 0 ? nil : all[..<last].lastIndex { $0.id == follows && $0.epoch <= header.epoch }
            } else {
                // Version 1 does not say: whatever lies before it may be.
                before = last - 1
            }
            guard let before else { break }
            path.append(before)
        }
        return path
    }

    /// For `Fault.replayIgnoresTimeline`.
    mutating func takeAll() { members = all }

    func contains(_ number: UInt64) -> Bool { members.contains { $0.number == number } }

    /// Whether `number` is newer than all that can be reached.
    func isBehind(_ number: UInt64) -> Bool { members.last.map { number > $0.number } ?? true }

    /// What lies behind a place of `header`'s segment where record `sequence` is due; nil: its first.
    func behind(_ header: JournalFormat.SegmentHeader, expecting sequence: UInt64?) -> RecordBehind {
        let later = members.filter { $0.number > header.number }
        if later.isEmpty { return .nothing }
        let due = sequence ?? header.firstSequence
        return later.contains { $0.firstSequence == due && ($0.follows == nil || $0.follows == header.id) }
            ? .joined : .more
    }
}
