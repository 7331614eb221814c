// Reads a journal back after a restart and rebuilds the layers it stands for. A torn tail is cut at the first record that
// does not check out; nothing before it is lost. A cut that would drop what had been synced is damage, and is refused.

internal import BlockCache
internal import Runtime

/// What a journal holds beyond the committed generation.
struct ReplayedJournal {
    /// Ascending; the last may have a torn tail, which is never appended to.
    var segments: [Journal.Segment] = []
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

/// The journal can't be trusted: something that had been synced is gone or changed.
struct JournalDamage: Error, CustomStringConvertible {
    var description: String
}

struct JournalReplay {
    private let folder: String
    private let diskID: ObjectID
    private let base: UInt64
    private let pages: DirtyPages
    private let scratch: any ScratchDisk
    private var result: ReplayedJournal
    private var window: [UInt8] = []
    private var windowOffset: UInt64 = 0
    private var maxSynced: UInt64 = 0
    private var expected: UInt64?

    /// Replays `folder` over a generation that contains everything up to sequence `base`.
    static func run(
        folder: String, diskID: ObjectID, base: UInt64, pages: DirtyPages, scratch: any ScratchDisk
    ) async throws -> ReplayedJournal {
        var replay = JournalReplay(folder: folder, diskID: diskID, base: base, pages: pages, scratch: scratch)
        try await replay.readAll()
        return replay.result
    }

    private init(folder: String, diskID: ObjectID, base: UInt64, pages: DirtyPages, scratch: any ScratchDisk) {
        self.folder = folder
        self.diskID = diskID
        self.base = base
        self.pages = pages
        self.scratch = scratch
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

    private mutating func readAll() async throws {
        var cut: String?
        for number in try JournalReplay.segmentNumbers(in: folder, scratch: scratch) {
            let path = Journal.path(folder, number)
            let file = try scratch.open(path, create: false)
            let segment = Journal.Segment(
                number: number, file: file, path: path, lengthBytes: file.sizeBytes, lastSequence: result.lastSequence)
            window = []
            guard file.sizeBytes >= UInt64(JournalFormat.segmentHeaderBytes) else {
                cut = cut ?? "\(path) has no header"
                result.segments.append(segment)
                continue
            }
            let head = try await bytes(at: 0, count: JournalFormat.segmentHeaderBytes, of: file)
            guard
                let header = head.withUnsafeBytes({
                    JournalFormat.segmentHeader($0.baseAddress!, disk: diskID, number: UInt64(number))
                })
            else {
                cut = cut ?? "\(path) has no valid header"
                result.segments.append(segment)
                continue
            }
            if let gap = gap(before: header.firstSequence) {
                cut = cut ?? "\(path) begins \(gap)"
            } else {
                // After a torn tail a later start of the daemon went on here, with the next number.
                cut = nil
            }
            if cut == nil {
                cut = try await read(segment)
            } else {
                // Only looked at for what it says of the past.
                if let (record, _) = try await record(at: UInt64(JournalFormat.segmentHeaderBytes), of: segment) {
                    maxSynced = max(maxSynced, record.synced)
                }
                result.tornBytes += segment.lengthBytes
            }
            result.segments.append(segment)
        }
        if maxSynced > result.lastSequence {
            throw JournalDamage(
                description:
                    "\(folder): records up to \(maxSynced) had been synced, but only those up to \(result.lastSequence) can be read"
                    + (cut.map { " (\($0))" } ?? ""))
        }
        for segment in result.segments { segment.lastSequence = min(segment.lastSequence, result.lastSequence) }
    }

    /// Text, if records between what was read and `sequence` are missing.
    private func gap(before sequence: UInt64) -> String? {
        if let expected { if sequence == expected { return nil } }
        if sequence <= base + 1 && (expected ?? 0) <= base + 1 { return nil }
        return "with record \(sequence) where \(expected ?? base + 1) was due"
    }

    /// Reads all records of a segment. Returns where and why it was cut, nil when it is whole.
    private mutating func read(_ segment: Journal.Segment) async throws -> String? {
        var offset = UInt64(JournalFormat.segmentHeaderBytes)
        while offset < segment.lengthBytes {
            guard let (record, headBytes) = try await record(at: offset, of: segment),
                gap(before: record.sequence) == nil,
                let sums = try await verified(record, at: offset, headBytes: headBytes, of: segment)
            else {
                result.tornBytes += segment.lengthBytes - offset
                try await lookBeyond(offset, of: segment)
                return "\(segment.path) at byte \(offset)"
            }
            maxSynced = max(maxSynced, record.synced)
            apply(record, sums: sums, dataAt: offset + UInt64(headBytes), segment: segment)
            expected = record.sequence + 1
            segment.lastSequence = max(segment.lastSequence, record.sequence)
            offset += UInt64(headBytes + record.dataBytes)
        }
        return nil
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
