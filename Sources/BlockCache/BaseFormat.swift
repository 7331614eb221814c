// The base object: one whole block, each slice packed and checked by itself. `Docs/Format.md` states every byte.
//
// Always holds for a decoded header: 32 records, stored slices lie one behind the other in ascending order right
// behind the header, without gaps, up to the length of the object; so every byte is under one checksum.

/// Where one slice lies in its object and how it is packed.
struct StoredSlice: Sendable, Equatable {
    var codec: SliceCodec
    /// From the start of the object; 0 when nothing is stored.
    var offsetBytes: UInt32
    var lengthBytes: UInt32
    /// Of the stored bytes; 0 when nothing is stored.
    var checksum: UInt64

    static let zero = StoredSlice(codec: .zero, offsetBytes: 0, lengthBytes: 0, checksum: 0)
    var range: Range<UInt64> { UInt64(offsetBytes)..<UInt64(offsetBytes) + UInt64(lengthBytes) }
}

/// The header of a base object.
struct BaseHeader: Sendable, Equatable {
    /// "MGBASE" and two zero bytes.
    static let magic: UInt64 = 0x0000_4553_4142_474D
    static let version: UInt32 = 1
    /// magic, version, header length, id, slice size, slice count, object length; the records; the checksum.
    static let lengthBytes = 48 + 24 * Geometry.slicesPerBlock + 8
    /// The longest base object there can be.
    static let maxObjectBytes = lengthBytes + Geometry.blockBytes

    var id: ObjectID
    var slices: [StoredSlice]
    var objectLengthBytes: UInt64

    var nonzeroSlices: UInt32 {
        slices.indices.reduce(0) { slices[$1].codec == .zero ? $0 : $0 | 1 << UInt32($1) }
    }

    func encoded() -> [UInt8] {
        var out = ByteWriter(capacity: Self.lengthBytes)
        out.put(Self.magic)
        out.put(Self.version)
        out.put(UInt32(Self.lengthBytes))
        out.put(id)
        out.put(UInt32(Geometry.sliceBytes))
        out.put(UInt32(Geometry.slicesPerBlock))
        out.put(objectLengthBytes)
        for slice in slices {
            out.put(slice.codec.rawValue)
            out.put(slice.offsetBytes)
            out.put(slice.lengthBytes)
            out.put(UInt32(0))
            out.put(slice.checksum)
        }
        out.putChecksum()
        precondition(out.bytes.count == Self.lengthBytes)
        return out.bytes
    }

    /// Reads and checks the header at the front of `bytes`; nothing of it is used before its checksum is right.
    init(decoding bytes: UnsafeRawBufferPointer) throws(FormatError) {
        guard bytes.count >= Self.lengthBytes else {
            throw .corrupt("base object of \(bytes.count) bytes is shorter than its header")
        }
        var input = ByteReader(bytes)
        guard input.u64() == Self.magic else { throw .corrupt("not a base object (wrong magic)") }
        let version = input.u32()
        guard version == Self.version else { throw .version(version, known: Self.version, of: "base object") }
        let body = Self.lengthBytes - 8
        var tail = ByteReader(bytes.part(body..<Self.lengthBytes))
        guard tail.u64() == checksum(bytes.part(0..<body)) else { throw .corrupt("base header fails its checksum") }
        guard input.u32() == UInt32(Self.lengthBytes) else { throw .corrupt("base header of another length") }
        id = input.id()
        guard input.u32() == UInt32(Geometry.sliceBytes), input.u32() == UInt32(Geometry.slicesPerBlock) else {
            throw .corrupt("base object of another geometry")
        }
        objectLengthBytes = input.u64()
        slices = []
        slices.reserveCapacity(Geometry.slicesPerBlock)
        var end = UInt64(Self.lengthBytes)
        for index in 0..<Geometry.slicesPerBlock {
            guard let codec = SliceCodec(rawValue: input.u32()) else { throw .corrupt("slice \(index): unknown codec") }
            let (offset, length, reserved) = (input.u32(), input.u32(), input.u32())
            guard reserved == 0 else { throw .corrupt("slice \(index): a reserved field is used") }
            let slice = StoredSlice(codec: codec, offsetBytes: offset, lengthBytes: length, checksum: input.u64())
            switch codec {
            case .zero: guard slice == .zero else { throw .corrupt("slice \(index): zeroes that take bytes") }
            case .raw, .zstd:
                guard slice.range.lowerBound == end, slice.lengthBytes > 0 else {
                    throw .corrupt("slice \(index): lies at \(slice.offsetBytes), expected \(end)")
                }
                let fits =
                    codec == .raw
                    ? slice.lengthBytes == Geometry.sliceBytes : slice.lengthBytes < Geometry.sliceBytes
                guard fits else { throw .corrupt("slice \(index): \(slice.lengthBytes) stored bytes") }
                end = slice.range.upperBound
            }
            slices.append(slice)
        }
        guard objectLengthBytes == end else {
            throw .corrupt("base object of \(objectLengthBytes) bytes ends at \(end)")
        }
    }

    init(id: ObjectID, slices: [StoredSlice], objectLengthBytes: UInt64) {
        precondition(slices.count == Geometry.slicesPerBlock)
        self.id = id
        self.slices = slices
        self.objectLengthBytes = objectLengthBytes
    }

    /// Reads the header of the object that a manifest names; it must be that one and agree with what the manifest says.
    init(decoding bytes: UnsafeRawBufferPointer, of ref: BaseRef) throws(FormatError) {
        try self.init(decoding: bytes)
        guard id == ref.id else { throw .corrupt("holds base object \(id)") }
        guard objectLengthBytes == UInt64(ref.lengthBytes), nonzeroSlices == ref.nonzeroSlices else {
            throw .corrupt("base object disagrees with its manifest about length or zero slices")
        }
    }

    /// Unpacks slice `index` out of its stored bytes into a frame.
    func unpack(_ index: SliceIndex, stored: UnsafeRawBufferPointer, into frame: UnsafeMutableRawPointer)
        throws(FormatError)
    {
        let record = slices[index.value]
        guard stored.count == Int(record.lengthBytes) else { throw .corrupt("slice \(index.value) is cut short") }
        if record.codec != .zero, checksum(stored) != record.checksum, !trustsStoredBytes {
            throw .corrupt("slice \(index.value) fails its checksum")
        }
        let out = UnsafeMutableRawBufferPointer(start: frame, count: Geometry.sliceBytes)
        guard Codec.unpack(record.codec, stored, into: out) else {
            throw .corrupt("slice \(index.value) does not unpack to \(Geometry.sliceBytes) bytes")
        }
    }
}
