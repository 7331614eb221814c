// The journal's bytes as Docs/Format.md has them, without a line of what reads them in the daemon.

import BlockCache

enum JournalBytes {
    static let disk = ObjectID(high: 0x1122_3344_5566_7788, low: 0x99aa_bbcc_ddee_ff00)
    static let headerBytes = 64
    static let pageBytes = 4096
    private static let magic = Array("MRGNJSG2".utf8)
    private static let oldMagic = Array("MRGNJSG1".utf8)
    private static let recordMagic = Array("MJR1".utf8)

    static func word(_ bytes: [UInt8], _ at: Int) -> UInt64 {
        var value: UInt64 = 0
        for index in 0..<8 { value |= UInt64(bytes[at + index]) << UInt64(8 * index) }
        return value
    }

    /// Whether a record may begin there.
    static func isMarked(_ bytes: [UInt8], _ at: Int) -> Bool {
        at + headerBytes <= bytes.count && bytes[at] == recordMagic[0] && bytes[at + 1] == recordMagic[1]
            && bytes[at + 2] == recordMagic[2] && bytes[at + 3] == recordMagic[3]
    }

    private static func put(_ value: UInt64, _ bytes: inout [UInt8], _ at: Int) {
        for index in 0..<8 { bytes[at + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
    }

    /// Cuts at each magic, at most three times.
    static func split(_ input: UnsafeRawBufferPointer) -> [[UInt8]] {
        var segments: [[UInt8]] = []
        var start = 0
        var at = 8
        while at + 8 <= input.count, segments.count < 3 {
            let here = input[at..<at + 8]
            if input[at] == magic[0], here.elementsEqual(magic) || here.elementsEqual(oldMagic) {
                segments.append(Array(input[start..<at]))
                start = at
                at += 8
            }
            at += 1
        }
        segments.append(Array(input[start...]))
        return segments
    }

    struct Header {
        var number: UInt64
        var epoch: UInt64
        var first: UInt64
        var id: UInt64
        /// nil in version 1.
        var follows: UInt64?
        var length: Int
    }

    /// How long its header is, by its magic; 0 for neither.
    static func headerLength(_ bytes: [UInt8]) -> Int {
        bytes.starts(with: magic) ? 96 : bytes.starts(with: oldMagic) ? 64 : 0
    }

    /// Whether the file ends before its header does.
    static func isShort(_ bytes: [UInt8]) -> Bool { bytes.count < 64 || bytes.count < headerLength(bytes) }

    static func header(_ bytes: [UInt8], number: UInt64) -> Header? {
        let length = headerLength(bytes)
        guard length > 0, bytes.count >= length, word(bytes, 8) == disk.high, word(bytes, 16) == disk.low,
            word(bytes, 32) == number, word(bytes, 40) < 1 << 62,
            word(bytes, length - 8) == sum(bytes, 0, length - 8)
        else { return nil }
        let isOld = length == 64
        return Header(
            number: number, epoch: word(bytes, 24), first: word(bytes, 40), id: word(bytes, isOld ? 56 : 48),
            follows: isOld ? nil : word(bytes, 56), length: length)
    }

    static func sum(_ bytes: [UInt8], _ start: Int, _ count: Int, seed: UInt64 = 0) -> UInt64 {
        bytes.withUnsafeBytes { xxh3(UnsafeRawBufferPointer(rebasing: $0[start..<start + count]), seed: seed) }
    }

    static func recordSum(_ bytes: [UInt8], _ at: Int, extra: Int) -> UInt64 {
        let head = sum(bytes, at, 56, seed: disk.high ^ disk.low)
        return extra == 0 ? head : sum(bytes, at + headerBytes, extra, seed: head)
    }

    /// Makes a segment this disk's, and all its sums right, as far as its records follow each other.
    static func seal(_ bytes: inout [UInt8], number: UInt64) {
        let length = headerLength(bytes)
        guard length > 0, bytes.count >= length else { return }
        put(disk.high, &bytes, 8)
        put(disk.low, &bytes, 16)
        put(number, &bytes, 32)
        put(sum(bytes, 0, length - 8), &bytes, length - 8)
        var at = length
        while isMarked(bytes, at) {
            let left = UInt64(bytes.count - at - headerBytes)
            var (extra, data) = (word(bytes, at + 40), word(bytes, at + 48))
            if extra > left || data > left - extra { (extra, data) = (0, 0) }
            let pages = at + headerBytes + Int(extra)
            for page in 0..<Int(min(extra / 4, data / UInt64(pageBytes))) {
                let low = UInt32(truncatingIfNeeded: sum(bytes, pages + page * pageBytes, pageBytes))
                for index in 0..<4 {
                    bytes[at + headerBytes + 4 * page + index] = UInt8(truncatingIfNeeded: low >> UInt32(8 * index))
                }
            }
            put(recordSum(bytes, at, extra: Int(extra)), &bytes, at + 56)
            at = pages + Int(data)
        }
    }
}

/// What a journal says, read straight from the format.
struct JournalReading {
    private enum Change {
        case data(page: UInt64, segment: UInt32, offset: UInt32)
        case zeroes(Range<UInt64>)
    }
    private struct Record {
        var kind: UInt8
        var sequence: UInt64
        var a: UInt64
        var b: UInt64
        var synced: UInt64
        var dataAt: Int
        var end: Int
    }

    private(set) var lastSequence: UInt64
    /// Up to here, records that can be read say, everything had been synced.
    private(set) var synced: UInt64 = 0
    private var records = 0
    private var waiting: [Change]?
    private var active: [Change] = []
    private var lostSessions: Set<UInt64> = []
    private let base: UInt64
    /// The machine still runs: all that was written must be there.
    private let isKept: Bool
    private var next: UInt64?
    /// Something that must be there is not.
    private(set) var isDamaged = false
    /// The headers of the segments that go on from each other, by number.
    private var members: [UInt64: JournalBytes.Header] = [:]
    private var lastID: UInt64 = 0

    init(_ segments: [[UInt8]], base: UInt64, isKept: Bool) {
        self.base = base
        self.isKept = isKept
        lastSequence = base
        let headers = segments.enumerated().compactMap { JournalBytes.header($1, number: UInt64($0 + 1)) }
        for newest in headers.reversed() where members.isEmpty {
            let line = JournalReading.line(to: newest, headers)
            if line.contains(where: { $0.first <= base + 1 }) { for one in line { members[one.number] = one } }
        }
        for (index, bytes) in segments.enumerated() where !isDamaged { read(bytes, number: UInt64(index + 1)) }
        if synced > lastSequence { isDamaged = true }
    }

    /// All that `newest` goes on from.
    private static func line(to newest: JournalBytes.Header, _ all: [JournalBytes.Header]) -> [JournalBytes.Header] {
        let before = all.filter { one in
            guard one.number < newest.number else { return false }
            guard let follows = newest.follows else { return true }
            return follows != 0 && one.id == follows && one.epoch <= newest.epoch
        }
        guard let parent = before.last else { return [newest] }
        return [newest] + line(to: parent, all)
    }

    private func isDue(_ sequence: UInt64) -> Bool {
        sequence == next || (sequence <= base + 1 && (next ?? 0) <= base + 1)
    }

    private mutating func read(_ bytes: [UInt8], number: UInt64) {
        guard let header = JournalBytes.header(bytes, number: number) else {
            if isKept, !JournalBytes.isShort(bytes) { isDamaged = true }
            return
        }
        let isMember = members[number] != nil
        let goesOn = header.first == next && (header.follows == nil || header.follows == lastID)
        guard isMember, goesOn || (header.first != next && isDue(header.first)) else {
            // Left behind by those that go on from each other, which nobody misses; or records before it are missing.
            if isKept, isMember || members.keys.allSatisfy({ $0 < number }) { isDamaged = true }
            if let first = record(bytes, header.length, whole: false) { synced = max(synced, first.synced) }
            return
        }
        lastID = header.id
        var at = header.length
        while at < bytes.count {
            guard let record = record(bytes, at, whole: true), isDue(record.sequence) else {
                return stop(bytes, at, header)
            }
            synced = max(synced, record.synced)
            apply(record, UInt32(number))
            next = record.sequence + 1
            at = record.end
        }
    }

    /// What stands at `at` can't be taken.
    private mutating func stop(_ bytes: [UInt8], _ at: Int, _ header: JournalBytes.Header) {
        let later = members.values.filter { $0.number > header.number }
        let wasCutBefore = later.contains {
            $0.first == next ?? header.first && ($0.follows == nil || $0.follows == header.id)
        }
        if isKept, !wasCutBefore, !(later.isEmpty && isCutShort(bytes, at)) { isDamaged = true }
        // Anything behind that looks like a record tells what had been synced.
        for later in stride(from: at + 4, through: bytes.count - JournalBytes.headerBytes, by: 4) {
            if let record = self.record(bytes, later, whole: false) { synced = max(synced, record.synced) }
        }
    }

    /// Whether a record begins there that is right as far as the file goes.
    private func isCutShort(_ bytes: [UInt8], _ at: Int) -> Bool {
        if let record = record(bytes, at, whole: false) { return record.end > bytes.count }
        let left = bytes.count - at
        if left < JournalBytes.headerBytes {
            return Array("MJR1".utf8).starts(with: bytes[at..<min(at + 4, bytes.count)])
        }
        func word(_ offset: Int) -> UInt64 { JournalBytes.word(bytes, at + offset) }
        let pages = word(24)
        return JournalBytes.isMarked(bytes, at) && bytes[at + 4..<at + 8].elementsEqual([1, 0, 0, 0])
            && word(8) < 1 << 62 && word(16) < 1 << 52 && (1...8194).contains(pages) && word(40) == 4 * pages
            && word(48) == 4096 * pages && left < 64 + 4 * Int(pages)
    }

    private mutating func apply(_ record: Record, _ number: UInt32) {
        if record.sequence <= base { return }
        records += 1
        lastSequence = max(lastSequence, record.sequence)
        switch record.kind {
        case 1:
            for page in 0..<record.b {
                let offset = UInt32(record.dataAt + Int(page) * JournalBytes.pageBytes)
                active.append(.data(page: record.a + page, segment: number, offset: offset))
            }
        case 2: if record.b > 0 { active.append(.zeroes(record.a..<record.a + record.b)) }
        case 3:
            if waiting != nil || !active.isEmpty { waiting = (waiting ?? []) + active }
            active = []
        case 4:
            active = []
            lostSessions.insert(record.a)
        case 5: lostSessions.insert(record.a)
        default: break
        }
    }

    /// `whole`: with its data, all of them right.
    private func record(_ bytes: [UInt8], _ at: Int, whole: Bool) -> Record? {
        guard JournalBytes.isMarked(bytes, at), bytes[at + 5] | bytes[at + 6] | bytes[at + 7] == 0 else { return nil }
        func word(_ offset: Int) -> UInt64 { JournalBytes.word(bytes, at + offset) }
        let record = Record(
            kind: bytes[at + 4], sequence: word(8), a: word(16), b: word(24), synced: word(32), dataAt: 0, end: 0)
        let (extra, data) = (word(40), word(48))
        guard extra <= 8194 * 4, at + 64 + Int(extra) <= bytes.count,
            word(56) == JournalBytes.recordSum(bytes, at, extra: Int(extra)), record.sequence < 1 << 62
        else { return nil }
        switch record.kind {
        case 1:
            guard (1...8194).contains(record.b), record.a < 1 << 52, extra == record.b * 4, data == record.b * 4096
            else {
                return nil
            }
        case 2:
            guard extra == 0, data == 0, record.a <= 1 << 52, record.b <= (1 << 52) - record.a else { return nil }
        case 3, 4, 5: guard extra == 0, data == 0 else { return nil }
        default: return nil
        }
        var result = record
        result.dataAt = at + 64 + Int(extra)
        result.end = result.dataAt + Int(data)
        if whole {
            guard result.end <= bytes.count else { return nil }
            for page in 0..<Int(data / 4096) {
                let sum = JournalBytes.sum(bytes, result.dataAt + page * 4096, 4096)
                let stored = bytes[at + 64 + page * 4..<at + 68 + page * 4].reversed().reduce(0) {
                    $0 << 8 | UInt32($1)
                }
                guard UInt32(truncatingIfNeeded: sum) == stored else { return nil }
            }
        }
        return result
    }

    /// Pages that tell most: those written, and those at and beside the edges of zeroes.
    var pages: [UInt64] {
        var pages: Set<UInt64> = []
        for change in (waiting ?? []) + active {
            switch change {
            case .data(let page, _, _): pages.insert(page)
            case .zeroes(let range):
                pages.formUnion([range.lowerBound, range.upperBound - 1, range.upperBound])
                if range.lowerBound > 0 { pages.insert(range.lowerBound - 1) }
            }
        }
        return pages.sorted()
    }

    func summary(of pages: [UInt64]) -> JournalSummary {
        func look(_ changes: [Change], _ page: UInt64) -> JournalPage {
            for change in changes.reversed() {
                switch change {
                case .data(let written, let segment, let offset): if written == page { return .data(segment, offset) }
                case .zeroes(let range): if range.contains(page) { return .zero }
                }
            }
            return .untouched
        }
        return JournalSummary(
            lastSequence: lastSequence, records: records,
            waiting: waiting.map { changes in pages.map { look(changes, $0) } } ?? [],
            active: pages.map { look(active, $0) }, hasWaiting: waiting != nil, lostSessions: lostSessions)
    }
}
