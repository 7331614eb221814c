// Reads a journal back after a restart and rebuilds the layers it stands for. What becomes of each place is in the table of
// JournalVerdict.swift; here is how its labels are found.
//
// Always holds:
// - nothing is changed here; what is not part of the journal is named, and removed before anything is written;
// - of segments that contradict each other, the newest and those it goes on from (by their ids) are the journal;
// - what had been synced, and without a loss of power whatever had been written, is read, or the journal is damaged.

internal import BlockCache
internal import Runtime

/// What a journal holds beyond the committed generation.
struct ReplayedJournal {
    /// Ascending.
    var segments: [Journal.Segment] = []
    /// Not part of the journal: to be removed.
    var dead: [Journal.Segment] = []
    /// Segments that end before their files do.
    var torn: [(segment: Journal.Segment, lengthBytes: UInt64)] = []
    /// The id of the segment that the next one follows; 0 for none.
    var lastID: UInt64 = 0
    /// Larger than the number of any segment found.
    var nextNumber: UInt32 = 1
    /// Everything up to the last safe point; nil when that is the committed generation itself.
    var waiting: Layer?
    var waitingKind: GenerationKind = .flush
    /// What was acknowledged after it.
    var active: Layer
    var lastSequence: UInt64
    /// Sums of the names of sessions that can't go on, which the head may not know yet.
    var lostSessions: Set<UInt64> = []
    /// Bytes that were cut off at the end.
    var tornBytes: UInt64 = 0
    /// Records found beyond the committed generation.
    var records = 0
}

/// The journal can't be trusted: something that must be there is gone or changed.
struct JournalDamage: Error, CustomStringConvertible {
    var description: String
}

struct JournalReplay {
    private let folder: String
    private let diskID: ObjectID
    private let base: UInt64
    private let past: JournalPast
    private let pages: DirtyPages
    private let scratch: any ScratchDisk
    private let fault: Fault?
    private var result: ReplayedJournal
    private var timeline = JournalTimeline(headers: [], base: 0)
    private var window: [UInt8] = []
    private var windowOffset: UInt64 = 0
    private var maxSynced: UInt64
    private var expected: UInt64?

    /// Replays `folder` over a generation that contains everything up to sequence `base`.
    ///
    /// - Throws: `JournalDamage`; else the scratch disk failed, and nothing is known.
    static func run(
        folder: String, diskID: ObjectID, base: UInt64, past: JournalPast, pages: DirtyPages, scratch: any ScratchDisk,
        fault: Fault? = nil
    ) async throws -> ReplayedJournal {
        var replay = JournalReplay(
            folder: folder, diskID: diskID, base: base, past: past, pages: pages, scratch: scratch, fault: fault)
        try await replay.readAll()
        return replay.result
    }

    private init(
        folder: String, diskID: ObjectID, base: UInt64, past: JournalPast, pages: DirtyPages, scratch: any ScratchDisk,
        fault: Fault?
    ) {
        self.folder = folder
        self.diskID = diskID
        self.base = base
        self.past = past
        self.pages = pages
        self.scratch = scratch
        self.fault = fault
        maxSynced = past.synced
        result = ReplayedJournal(active: Layer(pages: pages), lastSequence: base)
        result.active.lastSequence = base
    }

    /// Segment numbers in a journal folder, ascending.
    static func segmentNumbers(in folder: String, scratch: any ScratchDisk) throws(ScratchError) -> [UInt32] {
        try scratch.list(folder).compactMap { name in
            guard name.hasSuffix(".journal") else { return nil }
            return UInt32(name.dropLast(8))
        }.sorted()
    }

    // MARK: Segments

    private mutating func readAll() async throws {
        var found: [(segment: Journal.Segment, header: JournalFormat.FoundHeader)] = []
        for number in try JournalReplay.segmentNumbers(in: folder, scratch: scratch) {
            found.append(try await open(number))
        }
        timeline = JournalTimeline(
            headers: found.compactMap { if case .header(let header) = $0.header { header } else { nil } }, base: base)
        if fault == .replayIgnoresTimeline { timeline.takeAll() }
        var troubles: [String] = []
        for (segment, header) in found {
            let label = label(header)
            switch JournalVerdict.segment(label, past.trust) {
            case .read:
                guard case .header(let header) = header else { preconditionFailure("read without a header") }
                if let cut = try await read(segment, header) { troubles.append(cut) }
                result.segments.append(segment)
                result.lastID = header.id
            case .drop:
                try await lookAtDead(segment, header)
                troubles.append("\(segment.path): \(label)")
            case .damage:
                throw JournalDamage(
                    description: "\(segment.path): \(describe(label, header)); \(JournalReplay.mustBeWhole)")
            }
        }
        if JournalVerdict.isDamaged(synced: maxSynced, read: result.lastSequence) {
            let places = troubles.isEmpty ? "" : " (\(troubles.prefix(3).joined(separator: "; ")))"
            throw JournalDamage(
                description:
                    "\(folder): records up to \(maxSynced) had been synced, but only those up to \(result.lastSequence) can be read\(places)"
            )
        }
        for segment in result.segments { segment.lastSequence = min(segment.lastSequence, result.lastSequence) }
    }

    private static let mustBeWhole =
        "the machine has not been started anew since this was written, so all of it must be there"

    private func describe(_ label: SegmentFound, _ header: JournalFormat.FoundHeader) -> String {
        if case .header(let header) = header {
            return "begins with record \(header.firstSequence) where \(expected ?? base + 1) was due"
        }
        return "its header is \(label)"
    }

    private mutating func open(_ number: UInt32) async throws -> (Journal.Segment, JournalFormat.FoundHeader) {
        result.nextNumber = max(result.nextNumber, number &+ 1)
        let path = Journal.path(folder, number)
        let file = try scratch.open(path, create: false)
        let segment = Journal.Segment(
            number: number, file: file, path: path, lengthBytes: file.sizeBytes, lastSequence: result.lastSequence)
        window = []
        let count = Int(min(file.sizeBytes, UInt64(JournalFormat.segmentHeaderBytes)))
        let head = try await bytes(at: 0, count: count, of: file)
        let header = head.withUnsafeBytes { p in
            p.baseAddress.map {
                JournalFormat.segmentHeader($0, available: count, disk: diskID, number: UInt64(number))
            }
        }
        window = []
        return (segment, header ?? .short)
    }

    private func label(_ found: JournalFormat.FoundHeader) -> SegmentFound {
        switch found {
        case .short: return .short
        case .damaged: return .damaged
        case .header(let header):
            guard timeline.contains(header.number) else { return timeline.isBehind(header.number) ? .gap : .aside }
            if header.firstSequence == expected, goesOn(header, from: result.lastID) { return .joins }
            return isDue(header.firstSequence) && header.firstSequence != expected ? .begins : .gap
        }
    }

    private func goesOn(_ header: JournalFormat.SegmentHeader, from id: UInt64) -> Bool {
        header.follows == nil || header.follows == id || fault == .replayIgnoresTimeline
    }

    /// Whether no record that is needed is missing before `sequence`.
    private func isDue(_ sequence: UInt64) -> Bool {
        sequence == expected || (sequence <= base + 1 && (expected ?? 0) <= base + 1)
    }

    /// A segment that is not part of the journal still tells what had been synced.
    private mutating func lookAtDead(_ segment: Journal.Segment, _ found: JournalFormat.FoundHeader) async throws {
        window = []
        if case .header(let header) = found { try await lookBeyond(UInt64(header.lengthBytes) - 4, of: segment) }
        result.tornBytes += segment.lengthBytes
        guard fault == .replayIgnoresTimeline else { return result.dead.append(segment) }
        segment.lastSequence = result.lastSequence
        result.segments.append(segment)
    }

    // MARK: Records

    private enum Place {
        case due(JournalFormat.Record, headBytes: Int, sums: [UInt32])
        case other(RecordFound)

        /// What lies behind does not matter.
        var isGood: Bool { label == .due || label == .end }

        var label: RecordFound {
            switch self {
            case .due: .due
            case .other(let label): label
            }
        }
    }

    /// Reads all records of a segment. Returns where and why it was cut, nil when it is whole.
    private mutating func read(_ segment: Journal.Segment, _ header: JournalFormat.SegmentHeader) async throws
        -> String?
    {
        window = []
        // Also one without a record is needed as long as what it goes on from: the next segment follows it.
        segment.lastSequence = result.lastSequence
        var offset = UInt64(header.lengthBytes)
        while true {
            let place = try await place(at: offset, of: segment)
            let behind = place.isGood ? .nothing : timeline.behind(header, expecting: expected)
            switch JournalVerdict.record(place.label, behind, past.trust) {
            case .take:
                guard case .due(let record, let headBytes, let sums) = place else {
                    preconditionFailure("taken without a record")
                }
                maxSynced = max(maxSynced, record.synced)
                apply(record, sums: sums, dataAt: offset + UInt64(headBytes), segment: segment)
                expected = record.sequence + 1
                segment.lastSequence = max(segment.lastSequence, record.sequence)
                offset += UInt64(headBytes + record.dataBytes)
            case .leave:
                return nil
            case .cut:
                result.tornBytes += segment.lengthBytes - offset
                if fault != .replayIgnoresTimeline { result.torn.append((segment, offset)) }
                try await lookBeyond(offset, of: segment)
                return "\(segment.path) at byte \(offset): \(place.label)"
            case .damage:
                throw JournalDamage(
                    description:
                        "\(segment.path), at byte \(offset): the record is \(place.label); \(JournalReplay.mustBeWhole)"
                )
            }
        }
    }

    private mutating func place(at offset: UInt64, of segment: Journal.Segment) async throws -> Place {
        if offset == segment.lengthBytes { return .other(.end) }
        guard let (record, headBytes) = try await record(at: offset, of: segment) else {
            return .other(try await isBeginning(at: offset, of: segment) ? .partial : .damaged)
        }
        if offset + UInt64(headBytes + record.dataBytes) > segment.lengthBytes { return .other(.partial) }
        guard let sums = try await verified(record, at: offset, headBytes: headBytes, of: segment) else {
            return .other(.damaged)
        }
        return isDue(record.sequence) ? .due(record, headBytes: headBytes, sums: sums) : .other(.stray)
    }

    /// Whether the file ends within the header of what may well be a record.
    private mutating func isBeginning(at offset: UInt64, of segment: Journal.Segment) async throws -> Bool {
        let count = Int(min(segment.lengthBytes - offset, UInt64(JournalFormat.recordHeaderBytes)))
        let left = segment.lengthBytes - offset
        return try await bytes(at: offset, count: count, of: segment.file).withUnsafeBytes {
            JournalFormat.isBeginning($0.baseAddress!, count: count, available: left)
        }
    }

    /// Looks for records behind a cut: they tell whether what is missing had been synced. Records lie at multiples of 4.
    private mutating func lookBeyond(_ cut: UInt64, of segment: Journal.Segment) async throws {
        var offset = cut + 4
        while offset + UInt64(JournalFormat.recordHeaderBytes) <= segment.lengthBytes {
            let count = min(1 << 20, Int(segment.lengthBytes - offset)) & ~3
            let found = try await bytes(at: offset, count: count, of: segment.file).withUnsafeBytes { p in
                stride(from: 0, to: count - 3, by: 4).filter {
                    UInt32(littleEndian: p.loadUnaligned(fromByteOffset: $0, as: UInt32.self))
                        == JournalFormat.recordMagic
                }
            }
            for at in found {
                guard let (record, _) = try await record(at: offset + UInt64(at), of: segment) else { continue }
                maxSynced = max(maxSynced, record.synced)
            }
            offset += UInt64(count)
        }
    }

    private mutating func apply(
        _ record: JournalFormat.Record, sums: [UInt32], dataAt: UInt64, segment: Journal.Segment
    ) {
        if record.sequence <= base { return }
        result.records += 1
        result.lastSequence = max(result.lastSequence, record.sequence)
        let perSlice = UInt64(Geometry.pagesPerSlice)
        switch record.kind {
        case .write:
            for (i, sum) in sums.enumerated() {
                let page = record.a + UInt64(i)
                let at = JournalLocation(
                    segment: segment.number, offset: UInt32(dataAt) + UInt32(i * Geometry.pageBytes))
                result.active.put(pages.recover(at: at, sum: sum), page: Int(page % perSlice), of: page / perSlice)
            }
        case .zero:
            result.active.zero(pages: record.a..<record.a + record.b)
        case .safePoint:
            result.active.lastSequence = record.sequence
            result.waitingKind = GenerationKind(journalNumber: record.a) ?? .flush
            if let waiting = result.waiting {
                waiting.merge(result.active)
            } else if !result.active.isEmpty {
                result.waiting = result.active
            }
            result.waiting?.lastSequence = record.sequence
            result.active = Layer(pages: pages)
        case .rollBack:
            result.active = Layer(pages: pages)
            result.lostSessions.insert(record.a)
        case .sessionReplaced:
            result.lostSessions.insert(record.a)
        }
        result.active.lastSequence = record.sequence
    }

    // MARK: Bytes

    /// The record at `offset`, and how long its header with extra bytes is.
    private mutating func record(at offset: UInt64, of segment: Journal.Segment) async throws -> (
        JournalFormat.Record, Int
    )? {
        let left = Int(segment.lengthBytes - min(offset, segment.lengthBytes))
        let count = min(left, JournalFormat.recordHeaderBytes + JournalFormat.maxExtraBytes)
        if count < JournalFormat.recordHeaderBytes { return nil }
        let slice = try await bytes(at: offset, count: count, of: segment.file)
        return slice.withUnsafeBytes { p in
            JournalFormat.record(p.baseAddress!, available: p.count, of: diskID)
                .map { ($0, JournalFormat.recordHeaderBytes + $0.extraBytes) }
        }
    }

    /// The sums of the record's pages, if its data is all there and matches them.
    private mutating func verified(
        _ record: JournalFormat.Record, at offset: UInt64, headBytes: Int, of segment: Journal.Segment
    ) async throws -> [UInt32]? {
        let length = headBytes + record.dataBytes
        guard offset + UInt64(length) <= segment.lengthBytes else { return nil }
        if record.dataBytes == 0 { return [] }
        let all = try await bytes(at: offset, count: length, of: segment.file)
        return all.withUnsafeBytes { p in
            var sums: [UInt32] = []
            for i in 0..<Int(record.b) {
                let sum = UInt32(
                    littleEndian: p.loadUnaligned(
                        fromByteOffset: JournalFormat.recordHeaderBytes + i * 4, as: UInt32.self))
                guard JournalFormat.pageSum(p.baseAddress! + headBytes + i * Geometry.pageBytes) == sum else {
                    return nil
                }
                sums.append(sum)
            }
            return sums
        }
    }

    /// `count` bytes at `offset`, through a window of at least 4 MiB.
    private mutating func bytes(at offset: UInt64, count: Int, of file: any ScratchFile) async throws -> ArraySlice<
        UInt8
    > {
        if offset < windowOffset || offset + UInt64(count) > windowOffset + UInt64(window.count) {
            let length = min(UInt64(max(count, 4 << 20)), file.sizeBytes - offset)
            let fresh = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(length), alignment: 16)
            defer { fresh.deallocate() }
            try await file.read(into: fresh, at: offset)
            window = Array(fresh)
            windowOffset = offset
        }
        let start = Int(offset - windowOffset)
        return window[start..<start + count]
    }
}
