// The seeds of the corpus, from the real encoders. Written only when asked for, after a change of a format:
//
//     MARGARINE_FUZZ_SEEDS=1 swift test --filter CorpusSeeds

@testable import BlockCache
import Foundation
@testable import Margarine
import NBDProtocol
import Testing

@Suite(.enabled(if: ProcessInfo.processInfo.environment["MARGARINE_FUZZ_SEEDS"] != nil))
struct CorpusSeeds {
    private func write(_ target: String, _ name: String, _ bytes: [UInt8]) throws {
        let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
            .appendingPathComponent("corpus").appendingPathComponent(target)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        try Data(bytes).write(to: folder.appendingPathComponent("seed-" + name))
    }

    private static let id = ObjectID(high: 0x0123_4567_89ab_cdef, low: 0xfedc_ba98_7654_3210)

    /// 512 KiB that pack to little.
    private static func slice(_ seed: UInt8) -> [UInt8] {
        (0..<Geometry.sliceBytes).map { $0 % 4096 == 0 ? seed &+ UInt8(truncatingIfNeeded: $0 >> 12) : seed }
    }

    @Test func baseObjects() throws {
        for count in [0, 1, 3] {
            var encoder = BaseEncoder(id: Self.id, location: 0)
            for index in 0..<count {
                Self.slice(UInt8(index + 1)).withUnsafeBytes {
                    encoder.add(from: $0.baseAddress!, at: SliceIndex(index * 13))
                }
            }
            try write("base", "\(count)-slices", encoder.finish().object)
        }
    }

    @Test func streams() throws {
        let place = GenerationRecord.Origin(disk: "demo", diskID: Self.id, generation: 7)
        for from in [nil, GenerationRecord.Origin(disk: "demo", diskID: Self.id, generation: 3)] {
            var writer = StreamWriter()
            var bytes = writer.begin(
                StreamDescription(
                    generation: place, from: from, sizeBytes: 1 << 40, kind: .flush, committedAtMs: 1_800_000_000_000))
            let slices = (1...2).map { seed in Self.slice(UInt8(seed)).withUnsafeBytes { encodeSlice($0.baseAddress!) }
            }
            for block in [
                StreamBlock(block: BlockIndex(0), changed: 0b1101, zeroed: 0b100, slices: slices),
                StreamBlock(block: BlockIndex(9), changed: .max, zeroed: .max, slices: []),
            ] { for piece in writer.add(block) { bytes += piece } }
            try write("stream", from == nil ? "whole" : "part", bytes + writer.end())
        }
    }

    @Test func deltaObjects() throws {
        var encoder = DeltaEncoder(id: Self.id, location: 0)
        let page = [UInt8](repeating: 7, count: Geometry.pageBytes)
        for block: UInt64 in [3, 9] {
            encoder.begin(BlockIndex(block))
            Self.slice(5).withUnsafeBytes { slice in
                page.withUnsafeBytes { page in
                    encoder.add(
                        SliceIndex(0), data: PageMask(pages: 2..<3), zeroes: PageMask(pages: 9..<12),
                        pages: page.baseAddress!)
                    encoder.add(SliceIndex(4), data: .none, zeroes: .all, pages: nil)
                    encoder.add(SliceIndex(31), data: .all, zeroes: .none, pages: slice.baseAddress!)
                }
            }
        }
        let (object, refs) = encoder.finish()
        try write("delta", "object", object)
        let first = refs[0].ref
        try write(
            "delta", "segment", Array(object[Int(first.offsetBytes)..<Int(first.offsetBytes + first.lengthBytes)]))
    }

    @Test func manifestPages() throws {
        let base = BaseRef(id: Self.id, location: 0, lengthBytes: 900, nonzeroSlices: 5)
        let delta = { (n: UInt64) in
            DeltaRef(
                id: ObjectID(high: 1, low: n), location: 0, offsetBytes: 200, lengthBytes: 300, touchedSlices: 7,
                zeroedSlices: 2)
        }
        let entries: ContiguousArray = [
            BlockEntry(base: base, deltas: []), BlockEntry(base: nil, deltas: [delta(1)]),
            BlockEntry(base: base, deltas: (1...8).map { delta($0) }),
        ]
        let leaf = ManifestPage(leaf: Self.id, index: 3, slots: [0, 5, 511], entries: entries)
        try write("page", "leaf", leaf.encoded())
        let child = { (n: UInt64) in
            PageRef(id: ObjectID(high: 2, low: n), location: 0, lengthBytes: 400, usedBlocks: n, storedBytes: n << 20)
        }
        let inner = ManifestPage(inner: Self.id, level: 2, index: 1, slots: [1, 2], children: [child(1), child(300)])
        try write("page", "inner", inner.encoded())
    }

    @Test func headsAndRecords() throws {
        var head = Head(
            diskID: Self.id, name: "demo", sizeBytes: 10 << 30, options: DiskOptions(), createdAtMs: 1_700_000_000_000)
        try write("head", "new", head.encoded())
        head.epoch = 4
        head.owner = .init(server: "0123456789abcdef0123456789abcdef", host: "host", sinceMs: 1_700_000_000_001)
        head.session = "boot1"
        head.lose(session: "boot0")
        try write("head", "owned", head.encoded())
        let record = """
            "committedAtMs":1700000000002,"depth":2,"diskID":"\(Self.id)","epoch":4,"generation":7,"journalSequence":99,\
            "kind":"btrfsFull","newBytes":4096,"root":{"id":"\(Self.id)","lengthBytes":400,"location":0,\
            "storedBytes":8192,"usedBlocks":3},"sizeBytes":10737418240,"storedBytes":8192,"usedBlocks":3}
            """
        // The target makes the checksum right.
        let bytes =
            Array(#"{"margarine":"generation","format":1,"checksum":"0000000000000000","#.utf8) + Array(record.utf8)
        try write("record", "full", bytes)
    }

    @Test func journals() throws {
        func segment(_ number: UInt64, first: UInt64, epoch: UInt64 = 4, follows: UInt64 = 0) -> [UInt8] {
            var bytes = [UInt8](repeating: 0, count: JournalFormat.segmentHeaderBytes)
            bytes.withUnsafeMutableBytes {
                JournalFormat.putSegmentHeader(
                    $0.baseAddress!,
                    .init(epoch: epoch, number: number, firstSequence: first, id: 100 + number, follows: follows),
                    of: JournalBytes.disk)
            }
            return bytes
        }
        func record(_ kind: JournalFormat.Kind, _ sequence: UInt64, _ a: UInt64, _ b: UInt64) -> [UInt8] {
            let pages = kind == .write ? Int(b) : 0
            var bytes = [UInt8](repeating: 0, count: JournalFormat.recordHeaderBytes + 4 * pages)
            let data = (0..<pages).flatMap {
                [UInt8](repeating: UInt8(sequence) &+ UInt8($0), count: Geometry.pageBytes)
            }
            bytes.withUnsafeMutableBytes { head in
                data.withUnsafeBytes { data in
                    for page in 0..<pages {
                        head.storeBytes(
                            of: JournalFormat.pageSum(data.baseAddress! + page * Geometry.pageBytes).littleEndian,
                            toByteOffset: 64 + 4 * page, as: UInt32.self)
                    }
                }
                JournalFormat.putRecordHeader(
                    head.baseAddress!,
                    .init(
                        kind: kind, sequence: sequence, a: a, b: b, synced: sequence / 2, extraBytes: 4 * pages,
                        dataBytes: data.count), of: JournalBytes.disk)
            }
            return bytes + data
        }
        let marks =
            segment(1, first: 1) + record(.zero, 1, 5, 300) + record(.safePoint, 2, 1, 0) + record(.zero, 3, 0, 1)
            + record(.sessionReplaced, 4, 77, 0) + record(.rollBack, 5, 0, 0) + record(.zero, 6, 1 << 40, 1 << 50)
        try write("journal", "marks", marks)
        let write1 = record(.write, 1, 127, 2)
        try write("journal", "writes", segment(1, first: 1) + write1 + record(.zero, 2, 127, 1))
        let torn = segment(1, first: 1) + record(.zero, 1, 9, 9) + write1.prefix(200)
        let on =
            segment(2, first: 2, follows: 101) + record(.write, 2, 10, 1) + record(.safePoint, 3, 3, 0)
            + record(.zero, 4, 10, 1)
        try write("journal", "two-starts", torn + on)
        // The second segment was cut off by a recovery, and has come back.
        let dead = segment(2, first: 3, follows: 101) + record(.zero, 3, 1, 1) + record(.zero, 4, 2, 1)
        let later = segment(3, first: 2, epoch: 5, follows: 101) + record(.zero, 2, 3, 1) + record(.rollBack, 3, 9, 0)
        try write("journal", "dead-branch", segment(1, first: 1) + record(.zero, 1, 9, 9) + dead + later)
    }

    @Test func sessions() throws {
        func option(_ code: UInt32, _ data: [UInt8] = []) -> [UInt8] {
            var bytes: [UInt8] = []
            bytes.appendWire(NBD.Magic.option)
            bytes.appendWire(code)
            bytes.appendWire(UInt32(data.count))
            return bytes + data
        }
        func string(_ text: String) -> [UInt8] { [0, 0, 0, UInt8(text.utf8.count)] + Array(text.utf8) }
        func request(_ type: UInt16, _ flags: UInt16, _ offset: UInt64, _ length: UInt32, _ data: [UInt8] = [])
            -> [UInt8]
        {
            var bytes: [UInt8] = []
            bytes.appendWire(NBD.Magic.request)
            bytes.appendWire(flags)
            bytes.appendWire(type)
            bytes.appendWire(UInt64(0))
            bytes.appendWire(offset)
            bytes.appendWire(length)
            return bytes + data
        }
        let context = string("mem") + [0, 0, 0, 1] + string("base:allocation")
        let asking = option(3) + option(8) + option(6, string("ro") + [0, 2, 0, 1, 0, 3]) + option(9, context)
        let flags: [UInt8] = [0, 0, 0, 3]
        let read = request(0, 0, 0, 100)
        try write(
            "handshake", "go", [0] + flags + asking + option(10, context) + option(7, string("mem") + [0, 0]) + read)
        try write("handshake", "export-name", [0] + [0, 0, 0, 1] + option(5) + option(1, Array("ro".utf8)) + read)
        try write(
            "handshake", "lapsed",
            [32] + flags + option(7, string("lapsed") + [0, 1, 0, 2]) + option(3, [1]) + option(2))
        try write("handshake", "long", [16] + flags + option(6, [UInt8](repeating: 0, count: 100)) + option(77))

        let all =
            request(1, 0, 1000, 64, [UInt8](repeating: 5, count: 64)) + request(0, 0, 1024, 512)
            + request(1, 1, 2, 4, [1, 2, 3, 4]) + request(4, 0, 1010, 20) + request(6, 2, 0, 5000)
            + request(5, 0, 0, 80000) + request(7, 0, 0, 70000) + request(7, 8, 20000, 70000) + request(3, 0, 0, 0)
            + request(0, 0, 0, 81920) + request(0, 4, 1, 70000) + request(1, 0, 1 << 40, 3, [9, 9, 9])
            + request(99, 0, 0, 0)
            + request(0, 0, 0, 0) + request(2, 0, 0, 0)
        for mode: UInt8 in [0, 1, 3, 7, 11, 27, 63, 139] { try write("requests", "all-\(mode)", [mode] + all) }
    }
}
