// The journal: any segments are replayed to what a plain reading of the format makes of them, twice the same, and the pages
// found are where their sums say.

import BlockCache
@testable import Margarine
@testable import Runtime

/// What a replay or a reading says of one page.
enum JournalPage: Hashable {
    case untouched
    case zero
    /// Segment and offset of its bytes.
    case data(UInt32, UInt32)
}

/// A replay, in values that can be compared.
struct JournalSummary: Equatable, Sendable {
    var lastSequence: UInt64 = 0
    var records = 0
    /// Answers for the pages asked about: what waits to be committed, and what came after.
    var waiting: [JournalPage] = []
    var active: [JournalPage] = []
    var hasWaiting = false
    /// Sums of names of sessions that can't go on.
    var lostSessions: Set<UInt64> = []
}

extension FuzzTarget {
    /// Segments of one journal, one behind the other; each begins with the magic of its header.
    static let journal = FuzzTarget(name: "journal", maxInputBytes: 12 << 10, allocationBaseBytes: 2 << 20) { input in
        var segments = JournalBytes.split(input)
        // What is as it was written is seldom met by chance, and a base counts for the first few records only.
        if input.count % 4 == 0 { for isKept in [false, true] { try replay(segments, base: 0, isKept: isKept) } }
        for index in segments.indices { JournalBytes.seal(&segments[index], number: UInt64(index + 1)) }
        try replay(segments, base: 0, isKept: false, again: true)
        try replay(segments, base: 0, isKept: true)
        if input.count % 2 == 1 { for isKept in [false, true] { try replay(segments, base: 2, isKept: isKept) } }
    }

    private static func replay(_ segments: [[UInt8]], base: UInt64, isKept: Bool, again: Bool = false) throws {
        let read = JournalReading(segments, base: base, isKept: isKept)
        let wanted = read.pages
        guard let first = try replayOnce(segments, base: base, isKept: isKept, pages: wanted) else {
            return try require(read.isDamaged, "called damaged, though nothing is missing")
        }
        try require(!read.isDamaged, "records up to \(read.synced), or some before, are missing, and nobody says so")
        let summary = read.summary(of: wanted)
        try require(first == summary, "replayed \(first), read \(summary)")
        if again {
            try require(
                try replayOnce(segments, base: base, isKept: isKept, pages: wanted) == first, "a second replay differs")
        }
    }

    /// nil: the journal is damaged.
    private static func replayOnce(_ segments: [[UInt8]], base: UInt64, isKept: Bool, pages wanted: [UInt64]) throws
        -> JournalSummary?
    {
        let here = HereExecutor()
        var names: [String: MemoryInode] = [:]
        for (index, bytes) in segments.enumerated() {
            let inode = MemoryInode()
            inode.current = bytes
            names[Journal.path("j", UInt32(index + 1))] = inode
        }
        let scratch = MemoryScratch(names: names, capacityBytes: nil) { here.post($0) }
        return try here.run {
            let pages = DirtyPages(arena: arena.value)
            let replayed: ReplayedJournal
            do {
                replayed = try await JournalReplay.run(
                    folder: "j", diskID: JournalBytes.disk, base: base,
                    past: JournalPast(trust: isKept ? .kept : .lost, survives: isKept), pages: pages, scratch: scratch)
            } catch is JournalDamage { return nil }
            var summary = JournalSummary(lastSequence: replayed.lastSequence, records: replayed.records)
            summary.hasWaiting = replayed.waiting != nil
            summary.lostSessions = replayed.lostSessions
            for page in wanted {
                if let waiting = replayed.waiting { summary.waiting.append(try look(waiting, page, pages, segments)) }
                summary.active.append(try look(replayed.active, page, pages, segments))
            }
            try require(
                (replayed.segments + replayed.dead).map(\.number).sorted() == segments.indices.map { UInt32($0 + 1) },
                "segments were lost")
            let held = replayed.active.dataPages + (replayed.waiting?.dataPages ?? 0)
            try require(pages.count == held, "\(pages.count) slots for \(held) pages")
            return summary
        }
    }

    private static func look(_ layer: Margarine.Layer, _ page: UInt64, _ pages: DirtyPages, _ segments: [[UInt8]])
        throws
        -> JournalPage
    {
        let per = UInt64(Geometry.pagesPerSlice)
        switch layer.page(Int(page % per), of: page / per) {
        case .untouched: return .untouched
        case .zero: return .zero
        case .data(let slot):
            let at = pages[slot].location
            let bytes = segments[Int(at.segment) - 1]
            let start = Int(at.offset)
            guard start + Geometry.pageBytes <= bytes.count else {
                throw Finding("page \(page) lies outside its segment")
            }
            let sum = bytes[start..<start + Geometry.pageBytes].withUnsafeBytes { xxh3($0) }
            try require(UInt32(truncatingIfNeeded: sum) == pages[slot].sum, "page \(page) is not what its sum says")
            return .data(at.segment, at.offset)
        }
    }

    /// One mapping for all inputs; nothing of a replay is in it.
    private static let arena = Arena()
    private final class Arena: @unchecked Sendable {  // targets run one at a time
        let value = FrameArena(budgetBytes: 1 << 20)
    }
}
