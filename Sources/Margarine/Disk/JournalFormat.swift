// Every byte of a journal segment. A segment is a header and then records, each with the next sequence number:
//
//   segment header, 96 bytes          record header, 64 bytes
//    0  magic "MRGNJSG2"               0  magic "MJR1"
//    8  disk id, high and low          4  kind, 1 byte; 3 bytes zero
//   24  epoch                          8  sequence number
//   32  segment number                16  a   (first page; safe-point kind; …)
//   40  first sequence number         24  b   (number of pages; …)
//   48  id: random, not 0             32  sequence number known to be synced when this was written
//   56  id of the segment before it   40  extra bytes, 4 bytes; 4 bytes zero
//       in the timeline; 0: none      48  data bytes
//   64  zero                          56  XXH3 of bytes 0..<56, continued over the extra bytes; its seed
//   88  XXH3 of bytes 0..<88              is the disk id, so that no data of a client is taken for a record
//
// Version 1 ("MRGNJSG1", still read) has no ids: zero at 48, XXH3 of 0..<56 at 56, records from 64 on. That checksum is its id.
//
// Extra bytes of a write: 4 bytes for each page, the low half of the page's XXH3. Then its pages, 4,096 bytes each.
// Always holds: pages are whole (a smaller write is merged before it gets here), so that replay is idempotent.

internal import BlockCache
internal import CLibraries

enum JournalFormat {
    static let segmentMagic: UInt64 = 0x3247_534a_4e47_524d  // "MRGNJSG2", little-endian
    static let oldSegmentMagic: UInt64 = 0x3147_534a_4e47_524d  // "MRGNJSG1"
    static let recordMagic: UInt32 = 0x3152_4a4d  // "MJR1"
    static let segmentHeaderBytes = 96
    static let oldSegmentHeaderBytes = 64
    static let recordHeaderBytes = 64
    /// A new segment begins once one is this long.
    static let segmentBytes = 64 << 20
    /// Most pages in one record: a 32 MiB request, and the partial pages at its ends.
    static let maxPages = 8194
    static let maxExtraBytes = maxPages * 4

    enum Kind: UInt8 {
        /// a: first page, b: pages. Data.
        case write = 1
        /// a: first page, b: pages. They are zeroes now.
        case zero = 2
        /// a: `GenerationKind`'s number. All before this record is a safe point.
        case safePoint = 3
        /// All after the last safe point is undone. a: of whose session (`sessionSum`), 0 for an unnamed one.
        case rollBack = 4
        /// a: the session that may never go on, for another client was served after it.
        case sessionReplaced = 5
    }

    struct Record: Equatable {
        var kind: Kind
        var sequence: UInt64
        var a: UInt64
        var b: UInt64
        var synced: UInt64
        var extraBytes: Int
        var dataBytes: Int
    }

    /// Stands for a session's name in a record; never 0.
    static func sessionSum(_ name: String) -> UInt64 {
        let bytes = Array(name.utf8)
        return max(1, mg_xxh3(bytes, bytes.count, 0))
    }

    static func pageSum(_ page: UnsafeRawPointer) -> UInt32 {
        UInt32(truncatingIfNeeded: mg_xxh3(page, Geometry.pageBytes, 0))
    }

    struct SegmentHeader: Equatable {
        var epoch: UInt64
        var number: UInt64
        var firstSequence: UInt64
        /// Names the segment for ever: numbers are used again.
        var id: UInt64
        /// The id of the segment that it goes on from, 0 for none; nil in version 1, which does not say.
        var follows: UInt64?
        /// Where its records begin.
        var lengthBytes: Int { follows == nil ? oldSegmentHeaderBytes : segmentHeaderBytes }
    }

    /// Writes a header of the present version, `segmentHeaderBytes` long.
    static func putSegmentHeader(_ out: UnsafeMutableRawPointer, _ header: SegmentHeader, of disk: ObjectID) {
        let words: [UInt64] = [
            segmentMagic, disk.high, disk.low, header.epoch, header.number, header.firstSequence, header.id,
            header.follows ?? 0, 0, 0, 0,
        ]
        for (i, w) in words.enumerated() { out.storeBytes(of: w.littleEndian, toByteOffset: i * 8, as: UInt64.self) }
        out.storeBytes(of: mg_xxh3(out, 88, 0).littleEndian, toByteOffset: 88, as: UInt64.self)
    }

    /// What the first `available` bytes of a file say of the segment.
    enum FoundHeader: Equatable {
        case header(SegmentHeader)
        /// Fewer bytes than a header has.
        case short
        /// As many, and they are no header of this disk's segment `number`.
        case damaged
    }

    static func segmentHeader(_ p: UnsafeRawPointer, available: Int, disk: ObjectID, number: UInt64) -> FoundHeader {
        func word(_ i: Int) -> UInt64 { UInt64(littleEndian: p.loadUnaligned(fromByteOffset: i * 8, as: UInt64.self)) }
        guard available >= oldSegmentHeaderBytes else { return .short }
        let isOld = word(0) == oldSegmentMagic
        guard isOld || available >= segmentHeaderBytes else { return word(0) == segmentMagic ? .short : .damaged }
        let sumAt = isOld ? 7 : 11
        guard isOld || word(0) == segmentMagic, word(sumAt) == mg_xxh3(p, sumAt * 8, 0), word(1) == disk.high,
            word(2) == disk.low, word(4) == number, word(5) < ControlObject.countLimit
        else { return .damaged }
        return .header(
            SegmentHeader(
                epoch: word(3), number: number, firstSequence: word(5), id: isOld ? word(7) : word(6),
                follows: isOld ? nil : word(7)))
    }

    /// Writes the record's header; its `extraBytes` already stand behind it, at `out + 64`.
    static func putRecordHeader(_ out: UnsafeMutableRawPointer, _ r: Record, of disk: ObjectID) {
        out.storeBytes(of: recordMagic.littleEndian, toByteOffset: 0, as: UInt32.self)
        out.storeBytes(of: UInt32(r.kind.rawValue).littleEndian, toByteOffset: 4, as: UInt32.self)
        out.storeBytes(of: r.sequence.littleEndian, toByteOffset: 8, as: UInt64.self)
        out.storeBytes(of: r.a.littleEndian, toByteOffset: 16, as: UInt64.self)
        out.storeBytes(of: r.b.littleEndian, toByteOffset: 24, as: UInt64.self)
        out.storeBytes(of: r.synced.littleEndian, toByteOffset: 32, as: UInt64.self)
        out.storeBytes(of: UInt64(r.extraBytes).littleEndian, toByteOffset: 40, as: UInt64.self)
        out.storeBytes(of: UInt64(r.dataBytes).littleEndian, toByteOffset: 48, as: UInt64.self)
        out.storeBytes(of: sum(out, extraBytes: r.extraBytes, disk).littleEndian, toByteOffset: 56, as: UInt64.self)
    }

    /// The record whose header is at `p`, with `available` bytes from there on. nil: not a record, or not whole.
    static func record(_ p: UnsafeRawPointer, available: Int, of disk: ObjectID) -> Record? {
        guard available >= recordHeaderBytes else { return nil }
        func word(_ at: Int) -> UInt64 { UInt64(littleEndian: p.loadUnaligned(fromByteOffset: at, as: UInt64.self)) }
        let start = word(0)
        guard UInt32(truncatingIfNeeded: start) == recordMagic, start >> 40 == 0,
            let kind = Kind(rawValue: UInt8(truncatingIfNeeded: start >> 32)),
            word(8) < ControlObject.countLimit,
            word(40) <= UInt64(maxExtraBytes), word(48) <= UInt64(maxPages * Geometry.pageBytes)
        else { return nil }
        let r = Record(
            kind: kind, sequence: word(8), a: word(16), b: word(24), synced: word(32), extraBytes: Int(word(40)),
            dataBytes: Int(word(48)))
        guard available >= recordHeaderBytes + r.extraBytes, word(56) == sum(p, extraBytes: r.extraBytes, disk) else {
            return nil
        }
        switch kind {
        case .write:
            guard r.b >= 1, r.b <= UInt64(maxPages), r.extraBytes == Int(r.b) * 4,
                r.dataBytes == Int(r.b) * Geometry.pageBytes,
                r.a < 1 << 52
            else { return nil }
        case .zero:
            guard r.extraBytes == 0, r.dataBytes == 0, r.a <= 1 << 52, r.b <= (1 << 52) - r.a else { return nil }
        case .safePoint, .rollBack, .sessionReplaced:
            guard r.extraBytes == 0, r.dataBytes == 0 else { return nil }
        }
        return r
    }

    /// Whether the `available` bytes from `p` on, of which `count` (64 where there are) can be looked at, are the first part
    /// of a record that a file cuts off within its header or extra bytes. What can be checked is.
    static func isBeginning(_ p: UnsafeRawPointer, count: Int, available: UInt64) -> Bool {
        let magic = withUnsafeBytes(of: recordMagic.littleEndian) { Array($0) }
        for i in 0..<min(4, count) where p.load(fromByteOffset: i, as: UInt8.self) != magic[i] { return false }
        if count < recordHeaderBytes { return true }
        func word(_ at: Int) -> UInt64 { UInt64(littleEndian: p.loadUnaligned(fromByteOffset: at, as: UInt64.self)) }
        // Only writes have extra bytes; their lengths say the same thing three times.
        let pages = word(24)
        return word(0) >> 32 == UInt64(Kind.write.rawValue) && word(8) < ControlObject.countLimit && pages >= 1
            && pages <= UInt64(maxPages) && word(16) < 1 << 52 && word(40) == pages * 4
            && word(48) == pages * UInt64(Geometry.pageBytes) && available < UInt64(recordHeaderBytes) + word(40)
    }

    private static func sum(_ p: UnsafeRawPointer, extraBytes: Int, _ disk: ObjectID) -> UInt64 {
        let head = mg_xxh3(p, 56, disk.high ^ disk.low)
        return extraBytes == 0 ? head : mg_xxh3(p + recordHeaderBytes, extraBytes, head)
    }
}
