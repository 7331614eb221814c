// The delta object: the pages that one commit changed, of many blocks. An index for whoever checks the whole object,
// then one segment for each block, which a reader fetches and decodes by itself. `Docs/Format.md` states every byte.
//
// Always holds for a decoded segment: patches in ascending order of slices, their masks disjoint and not both
// empty, their data one behind the other right behind the header up to the segment's end; so every byte is under
// one checksum.

import Glibc

/// What one segment does to one slice.
struct StoredPatch: Sendable, Equatable {
    var slice: SliceIndex
    var codec: SliceCodec
    /// Pages whose bytes are stored.
    var data: PageMask
    /// Pages that become zeroes.
    var zeroes: PageMask
    /// From the start of the segment; 0 when nothing is stored.
    var offsetBytes: UInt32
    var lengthBytes: UInt32
    /// Of the stored bytes; 0 when nothing is stored.
    var checksum: UInt64

    static let recordBytes = 56
    var range: Range<UInt64> { UInt64(offsetBytes)..<UInt64(offsetBytes) + UInt64(lengthBytes) }
}

/// The header of a segment: all that one commit changed in one block.
struct SegmentHeader: Sendable, Equatable {
    /// "MGSEGM" and two zero bytes.
    static let magic: UInt64 = 0x0000_4D47_4553_474D
    static let version: UInt32 = 1
    /// magic, version, patch count, id, block index, own offset and length.
    static let fixedBytes = 48
    static func lengthBytes(patches: Int) -> Int { fixedBytes + patches * StoredPatch.recordBytes + 8 }
    static let maxLengthBytes = lengthBytes(patches: Geometry.slicesPerBlock)
    static let minLengthBytes = lengthBytes(patches: 1)

    var id: ObjectID
    var block: BlockIndex
    /// Where the segment lies in its object.
    var offsetBytes: UInt32
    var segmentLengthBytes: UInt32
    var patches: [StoredPatch]

    var lengthBytes: Int { Self.lengthBytes(patches: patches.count) }
    var touchedSlices: UInt32 { patches.reduce(0) { $0 | 1 << UInt32($1.slice.value) } }
    var zeroedSlices: UInt32 { patches.reduce(0) { $1.zeroes.isAll ? $0 | 1 << UInt32($1.slice.value) : $0 } }
    func patch(_ slice: SliceIndex) -> StoredPatch? { patches.first { $0.slice == slice } }

    func encoded() -> [UInt8] {
        var out = ByteWriter(capacity: lengthBytes)
        out.put(Self.magic)
        out.put(Self.version)
        out.put(UInt32(patches.count))
        out.put(id)
        out.put(block.value)
        out.put(offsetBytes)
        out.put(segmentLengthBytes)
        for patch in patches {
            out.put(UInt32(patch.slice.value))
            out.put(patch.codec.rawValue)
            out.put(patch.data)
            out.put(patch.zeroes)
            out.put(patch.offsetBytes)
            out.put(patch.lengthBytes)
            out.put(patch.checksum)
        }
        out.putChecksum()
        precondition(out.bytes.count == lengthBytes)
        return out.bytes
    }

    init(id: ObjectID, block: BlockIndex, offsetBytes: UInt32, segmentLengthBytes: UInt32, patches: [StoredPatch]) {
        self.id = id
        self.block = block
        self.offsetBytes = offsetBytes
        self.segmentLengthBytes = segmentLengthBytes
        self.patches = patches
    }

    /// Reads and checks the header at the front of `bytes`; nothing but the patch count, which is bounded, is used
    /// before its checksum is right.
    init(decoding bytes: UnsafeRawBufferPointer) throws(FormatError) {
        guard bytes.count >= Self.minLengthBytes else { throw .corrupt("delta segment of \(bytes.count) bytes") }
        var input = ByteReader(bytes)
        guard input.u64() == Self.magic else { throw .corrupt("not a delta segment (wrong magic)") }
        let version = input.u32()
        guard version == Self.version else { throw .version(version, known: Self.version, of: "delta segment") }
        let count = Int(input.u32())
        guard count >= 1, count <= Geometry.slicesPerBlock, bytes.count >= Self.lengthBytes(patches: count) else {
            throw .corrupt("delta segment with \(count) patches in \(bytes.count) bytes")
        }
        let length = Self.lengthBytes(patches: count)
        var tail = ByteReader(bytes.part(length - 8..<length))
        guard tail.u64() == checksum(bytes.part(0..<length - 8)) else {
            throw .corrupt("delta segment header fails its checksum")
        }
        id = input.id()
        block = BlockIndex(input.u64())
        offsetBytes = input.u32()
        segmentLengthBytes = input.u32()
        patches = []
        patches.reserveCapacity(count)
        var end = UInt64(length)
        for _ in 0..<count {
            let slice = input.u32()
            guard slice < Geometry.slicesPerBlock, patches.last.map({ $0.slice.value < slice }) ?? true else {
                throw .corrupt("delta segment patches slice \(slice) out of order")
            }
            guard let codec = SliceCodec(rawValue: input.u32()) else {
                throw .corrupt("patch of slice \(slice): unknown codec")
            }
            let patch = StoredPatch(
                slice: SliceIndex(Int(slice)), codec: codec, data: input.mask(), zeroes: input.mask(),
                offsetBytes: input.u32(), lengthBytes: input.u32(), checksum: input.u64())
            guard (patch.data & patch.zeroes).isEmpty, !(patch.data | patch.zeroes).isEmpty else {
                throw .corrupt("patch of slice \(slice): masks overlap or are empty")
            }
            let plain = patch.data.count * Geometry.pageBytes
            let fits =
                switch codec {
                case .zero: plain == 0 && patch.lengthBytes == 0 && patch.offsetBytes == 0 && patch.checksum == 0
                case .raw: plain > 0 && patch.lengthBytes == plain && patch.range.lowerBound == end
                case .zstd: patch.lengthBytes > 0 && patch.lengthBytes < plain && patch.range.lowerBound == end
                }
            guard fits else { throw .corrupt("patch of slice \(slice): stored bytes do not fit its masks") }
            if codec != .zero { end = patch.range.upperBound }
            patches.append(patch)
        }
        guard UInt64(segmentLengthBytes) == end else {
            throw .corrupt("delta segment of \(segmentLengthBytes) bytes ends at \(end)")
        }
    }

    /// Reads the header of the segment that a manifest names; it must be that one and agree with the manifest.
    init(decoding bytes: UnsafeRawBufferPointer, of ref: DeltaRef) throws(FormatError) {
        try self.init(decoding: bytes)
        guard id == ref.id, offsetBytes == ref.offsetBytes else {
            throw .corrupt("holds the segment at \(offsetBytes) of delta object \(id)")
        }
        guard
            segmentLengthBytes == ref.lengthBytes, touchedSlices == ref.touchedSlices, zeroedSlices == ref.zeroedSlices
        else { throw .corrupt("delta segment disagrees with its manifest about length or slices") }
    }

    /// Applies `patch` to a frame that holds the slice as it was below this segment. When it throws, the frame's bytes
    /// are of no use.
    static func apply(
        _ patch: StoredPatch, stored: UnsafeRawBufferPointer, to frame: UnsafeMutableRawPointer
    ) throws(FormatError) {
        let page = Geometry.pageBytes
        guard stored.count == Int(patch.lengthBytes) else {
            throw .corrupt("patch of slice \(patch.slice.value) is cut short")
        }
        if patch.codec != .zero {
            guard checksum(stored) == patch.checksum || trustsStoredBytes else {
                throw .corrupt("patch of slice \(patch.slice.value) fails its checksum")
            }
            let plainBytes = patch.data.count * page
            // Pages are written straight from the stored bytes where they are plain.
            if patch.codec == .raw {
                scatter(stored.baseAddress!, patch.data, to: frame)
            } else if patch.data.isAll {
                let out = UnsafeMutableRawBufferPointer(start: frame, count: Geometry.sliceBytes)
                guard Codec.unpack(.zstd, stored, into: out) else {
                    throw .corrupt("patch of slice \(patch.slice.value) does not unpack")
                }
            } else {
                let plain = UnsafeMutableRawBufferPointer.allocate(byteCount: plainBytes, alignment: 16)
                defer { plain.deallocate() }
                guard Codec.unpack(.zstd, stored, into: plain) else {
                    throw .corrupt("patch of slice \(patch.slice.value) does not unpack")
                }
                scatter(UnsafeRawPointer(plain.baseAddress!), patch.data, to: frame)
            }
        }
        patch.zeroes.forEach { memset(frame + $0 * page, 0, page) }
    }

    private static func scatter(_ pages: UnsafeRawPointer, _ mask: PageMask, to frame: UnsafeMutableRawPointer) {
        var source = pages
        mask.forEach {
            memcpy(frame + $0 * Geometry.pageBytes, source, Geometry.pageBytes)
            source += Geometry.pageBytes
        }
    }
}

/// The index at the front of a delta object, for whoever checks it whole.
struct DeltaIndex: Sendable, Equatable {
    struct Segment: Sendable, Equatable {
        var block: BlockIndex
        var offsetBytes: UInt32
        var lengthBytes: UInt32
    }
    /// "MGDELT" and two zero bytes.
    static let magic: UInt64 = 0x0000_544C_4544_474D
    static let version: UInt32 = 1
    /// magic, version, segment count, id, object length.
    static let fixedBytes = 40
    static func lengthBytes(segments: Int) -> Int { fixedBytes + segments * 16 + 8 }

    var id: ObjectID
    var objectLengthBytes: UInt64
    var segments: [Segment]

    init(id: ObjectID, objectLengthBytes: UInt64, segments: [Segment]) {
        self.id = id
        self.objectLengthBytes = objectLengthBytes
        self.segments = segments
    }

    func encoded() -> [UInt8] {
        var out = ByteWriter(capacity: Self.lengthBytes(segments: segments.count))
        out.put(Self.magic)
        out.put(Self.version)
        out.put(UInt32(segments.count))
        out.put(id)
        out.put(objectLengthBytes)
        for segment in segments {
            out.put(segment.block.value)
            out.put(segment.offsetBytes)
            out.put(segment.lengthBytes)
        }
        out.putChecksum()
        return out.bytes
    }

    /// Reads and checks the index of a whole delta object: its segments lie one behind the other and fill it.
    init(decoding object: UnsafeRawBufferPointer) throws(FormatError) {
        guard object.count >= Self.lengthBytes(segments: 1) else {
            throw .corrupt("delta object of \(object.count) bytes")
        }
        var input = ByteReader(object)
        guard input.u64() == Self.magic else { throw .corrupt("not a delta object (wrong magic)") }
        let version = input.u32()
        guard version == Self.version else { throw .version(version, known: Self.version, of: "delta object") }
        let count = Int(input.u32())
        guard count >= 1, count <= object.count / 16, object.count >= Self.lengthBytes(segments: count) else {
            throw .corrupt("delta object with \(count) segments in \(object.count) bytes")
        }
        let length = Self.lengthBytes(segments: count)
        var tail = ByteReader(object.part(length - 8..<length))
        guard tail.u64() == checksum(object.part(0..<length - 8)) else {
            throw .corrupt("delta index fails its checksum")
        }
        id = input.id()
        objectLengthBytes = input.u64()
        segments = []
        segments.reserveCapacity(count)
        var end = UInt64(length)
        for _ in 0..<count {
            let segment = Segment(block: BlockIndex(input.u64()), offsetBytes: input.u32(), lengthBytes: input.u32())
            guard UInt64(segment.offsetBytes) == end, segment.lengthBytes >= SegmentHeader.minLengthBytes else {
                throw .corrupt(
                    "segment of block \(segment.block.value) lies at \(segment.offsetBytes), expected \(end)")
            }
            end += UInt64(segment.lengthBytes)
            segments.append(segment)
        }
        guard objectLengthBytes == end, objectLengthBytes == UInt64(object.count) else {
            throw .corrupt("delta object of \(object.count) bytes ends at \(end)")
        }
    }
}
