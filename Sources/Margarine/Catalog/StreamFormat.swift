// The stream of `disk send` as bytes (Docs/Format.md, "Stream"): a description, the blocks that changed, an end.
//
// Always holds: what a reader gives was written whole by a writer, in this order: the checksum of every record begins with
// that of the record before, so the last one stands for all bytes.

import BlockCache
import CLibraries

/// What a stream says of the generation in it.
struct StreamDescription: Sendable, Equatable, Codable {
    /// The generation that was sent.
    var generation: GenerationRecord.Origin
    /// The generation that the stream goes over; nil: over zeroes.
    var from: GenerationRecord.Origin?
    /// Size of the disk.
    var sizeBytes: UInt64
    var kind: GenerationKind
    var committedAtMs: Int64

    static let format = 1

    /// What must hold for any.
    func check() throws(CatalogError) {
        func isSound(_ place: GenerationRecord.Origin) -> Bool {
            DiskName.isValid(place.disk) && place.generation >= 1 && place.generation < ControlObject.countLimit
        }
        guard isSound(generation), from.map(isSound) ?? true, DiskSize.isStorable(sizeBytes),
            ControlObject.times.contains(committedAtMs)
        else { throw CatalogError(.corrupt, "the stream's description contradicts itself") }
    }
}

/// One block of a stream.
struct StreamBlock: Sendable {
    var block: BlockIndex
    /// Bit i: slice i is in the stream; at least one is.
    var changed: UInt32
    /// Bit i: slice i is all zeroes. A part of `changed`.
    var zeroed: UInt32
    /// The other changed ones, ascending.
    var slices: [EncodedSlice]

    /// The slices of a mask, ascending.
    static func slices(_ mask: UInt32) -> [SliceIndex] {
        (0..<Geometry.slicesPerBlock).filter { mask & 1 << UInt32($0) != 0 }.map { SliceIndex($0) }
    }
}

private enum StreamLayout {
    /// "MGSEND" and two zero bytes.
    static let magic: UInt64 = 0x0000_444E_4553_474D
    static let version: UInt32 = 1
    static let maxDescriptionBytes = 64 << 10
    /// "BLCK"
    static let blockTag: UInt32 = 0x4B43_4C42
    /// "END\0"
    static let endTag: UInt32 = 0x0044_4E45
    /// Of a block's record up to its slices, and of the end's up to its checksum.
    static let fixedBytes = 32
    static let sliceBytes = 16

    static func checksum(_ bytes: [UInt8], after previous: UInt64) -> UInt64 {
        bytes.withUnsafeBytes { mg_xxh3($0.baseAddress, $0.count, previous) }
    }

    static func put<T: FixedWidthInteger>(_ value: T, to bytes: inout [UInt8]) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }

    static func get<T: FixedWidthInteger>(_: T.Type, _ bytes: [UInt8], at offset: Int) -> T {
        precondition(offset + MemoryLayout<T>.size <= bytes.count)
        return T(littleEndian: bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: T.self) })
    }
}

/// Makes the bytes of a stream, record by record.
struct StreamWriter: Sendable {
    private var sum: UInt64 = 0
    private var blocks: UInt64 = 0
    private var dataBytes: UInt64 = 0
    private var lengthBytes: UInt64 = 0

    /// The beginning.
    mutating func begin(_ description: StreamDescription) -> [UInt8] {
        let text = ControlObject.seal(description, kind: "stream", format: StreamDescription.format)
        precondition(text.count <= StreamLayout.maxDescriptionBytes)
        var out: [UInt8] = []
        StreamLayout.put(StreamLayout.magic, to: &out)
        StreamLayout.put(StreamLayout.version, to: &out)
        StreamLayout.put(UInt32(text.count), to: &out)
        out += text
        return seal(out)
    }

    /// The record of a block, in pieces; blocks come in ascending order.
    mutating func add(_ block: StreamBlock) -> [[UInt8]] {
        let stored = block.slices.reduce(0) { $0 + $1.stored.count }
        var out: [UInt8] = []
        StreamLayout.put(StreamLayout.blockTag, to: &out)
        StreamLayout.put(UInt32(stored), to: &out)
        StreamLayout.put(blocks, to: &out)
        StreamLayout.put(block.block.value, to: &out)
        StreamLayout.put(block.changed, to: &out)
        StreamLayout.put(block.zeroed, to: &out)
        for slice in block.slices {
            StreamLayout.put(slice.codec.rawValue, to: &out)
            StreamLayout.put(UInt32(slice.stored.count), to: &out)
            StreamLayout.put(slice.checksum, to: &out)
        }
        blocks += 1
        dataBytes += UInt64(stored)
        lengthBytes += UInt64(stored)
        return [seal(out)] + block.slices.map(\.stored)
    }

    /// The end.
    mutating func end() -> [UInt8] {
        var out: [UInt8] = []
        StreamLayout.put(StreamLayout.endTag, to: &out)
        StreamLayout.put(UInt32(0), to: &out)
        StreamLayout.put(blocks, to: &out)
        StreamLayout.put(dataBytes, to: &out)
        StreamLayout.put(lengthBytes + UInt64(StreamLayout.fixedBytes + 8), to: &out)
        return seal(out)
    }

    private mutating func seal(_ bytes: [UInt8]) -> [UInt8] {
        sum = StreamLayout.checksum(bytes, after: sum)
        lengthBytes += UInt64(bytes.count + 8)
        var out = bytes
        StreamLayout.put(sum, to: &out)
        return out
    }
}

/// Reads and checks a stream. Its calls wait for the input: they are made on worker threads.
final class StreamReader: @unchecked Sendable {  // used by one task at a time
    private let input: StreamInput
    private var sum: UInt64 = 0
    private var blocks: UInt64 = 0
    private var dataBytes: UInt64 = 0
    private var lengthBytes: UInt64 = 0
    private var nextBlock: UInt64 = 0
    private var endBlock: UInt64 = 0

    init(_ input: @escaping StreamInput) { self.input = input }

    /// The beginning, which is read first.
    func begin() throws(CatalogError) -> StreamDescription {
        let head = try read(16)
        guard StreamLayout.get(UInt64.self, head, at: 0) == StreamLayout.magic else {
            throw CatalogError(.corrupt, "the input is no stream of 'margined disk send'")
        }
        let version = StreamLayout.get(UInt32.self, head, at: 8)
        guard version == StreamLayout.version else {
            throw CatalogError(
                .corrupt,
                "the stream has format version \(version), this Margarine reads version \(StreamLayout.version): use a later one"
            )
        }
        let count = Int(StreamLayout.get(UInt32.self, head, at: 12))
        guard count <= StreamLayout.maxDescriptionBytes else { throw damaged("at its start") }
        let text = try read(count)
        try checkSum(head + text, "at its start")
        let description = try ControlObject.open(
            StreamDescription.self, text, kind: "stream", format: StreamDescription.format, what: "the stream")
        try description.check()
        endBlock = ManifestShape.blocks(sizeBytes: description.sizeBytes)
        return description
    }

    /// The next block; nil: the stream is at its end, and was whole.
    func next() throws(CatalogError) -> StreamBlock? {
        let place = "at byte \(lengthBytes)"
        let fixed = try read(StreamLayout.fixedBytes)
        let number = StreamLayout.get(UInt64.self, fixed, at: 8)
        switch StreamLayout.get(UInt32.self, fixed, at: 0) {
        case StreamLayout.blockTag: return try block(fixed, number: number, place)
        case StreamLayout.endTag:
            try checkSum(fixed, place)
            guard StreamLayout.get(UInt32.self, fixed, at: 4) == 0, number == blocks,
                StreamLayout.get(UInt64.self, fixed, at: 16) == dataBytes,
                StreamLayout.get(UInt64.self, fixed, at: 24) == lengthBytes
            else { throw damaged(place) }
            guard try input(1).isEmpty else {
                throw CatalogError(.corrupt, "something follows the end of the stream, at byte \(lengthBytes)")
            }
            return nil
        default: throw damaged(place)
        }
    }

    private func block(_ fixed: [UInt8], number: UInt64, _ place: String) throws(CatalogError) -> StreamBlock {
        let stored = Int(StreamLayout.get(UInt32.self, fixed, at: 4))
        let index = StreamLayout.get(UInt64.self, fixed, at: 16)
        let changed = StreamLayout.get(UInt32.self, fixed, at: 24)
        let zeroed = StreamLayout.get(UInt32.self, fixed, at: 28)
        let count = (changed & ~zeroed).nonzeroBitCount
        let records = try read(count * StreamLayout.sliceBytes)
        try checkSum(fixed + records, place)
        guard number == blocks, index >= nextBlock, index < endBlock, changed != 0, zeroed & ~changed == 0 else {
            throw damaged(place)
        }
        var slices: [EncodedSlice] = []
        var rest = stored
        for i in 0..<count {
            let at = i * StreamLayout.sliceBytes
            let length = Int(StreamLayout.get(UInt32.self, records, at: at + 4))
            guard let codec = SliceCodec(rawValue: StreamLayout.get(UInt32.self, records, at: at)),
                EncodedSlice.fits(codec, storedBytes: length), length <= rest
            else { throw damaged(place) }
            let bytes = try read(length)
            let sum = StreamLayout.get(UInt64.self, records, at: at + 8)
            guard let slice = EncodedSlice(checking: codec, stored: bytes, checksum: sum) else {
                throw damaged(place)
            }
            slices.append(slice)
            rest -= length
        }
        guard rest == 0 else { throw damaged(place) }
        blocks += 1
        dataBytes += UInt64(stored)
        nextBlock = index + 1
        return StreamBlock(block: BlockIndex(index), changed: changed, zeroed: zeroed, slices: slices)
    }

    private func damaged(_ place: String) -> CatalogError {
        CatalogError(.corrupt, "the stream is damaged in the record \(place); send it again")
    }

    private func checkSum(_ bytes: [UInt8], _ place: String) throws(CatalogError) {
        sum = StreamLayout.checksum(bytes, after: sum)
        let told = StreamLayout.get(UInt64.self, try read(8), at: 0)
        guard told == sum else { throw damaged(place) }
    }

    /// Exactly `count` bytes.
    private func read(_ count: Int) throws(CatalogError) -> [UInt8] {
        if count == 0 { return [] }
        var bytes = try input(count)
        while bytes.count < count {
            let more = bytes.isEmpty ? [] : try input(count - bytes.count)
            guard !more.isEmpty else {
                throw CatalogError(
                    .corrupt,
                    "the stream ends after \(lengthBytes + UInt64(bytes.count)) bytes, before its end; send it again")
            }
            bytes += more
        }
        lengthBytes += UInt64(count)
        return bytes
    }
}
