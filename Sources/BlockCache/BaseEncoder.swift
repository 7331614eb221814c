// Makes base objects. Packing a slice is a pure function for worker threads; putting an object together is a copy.

/// One slice, packed for a base object.
public struct EncodedSlice: Sendable, Equatable {
    public let codec: SliceCodec
    /// Empty for a slice of zeroes.
    public let stored: [UInt8]
    /// Of the stored bytes; 0 for a slice of zeroes.
    public let checksum: UInt64

    public static let zero = EncodedSlice(codec: .zero, stored: [], checksum: 0)

    init(codec: SliceCodec, stored: [UInt8], checksum: UInt64) {
        self.codec = codec
        self.stored = stored
        self.checksum = checksum
    }
}

extension EncodedSlice {
    /// A slice that was packed elsewhere and is not all zeroes; nil when it cannot be one, or fails its checksum.
    public init?(checking codec: SliceCodec, stored: [UInt8], checksum sum: UInt64) {
        guard Self.fits(codec, storedBytes: stored.count),
            stored.withUnsafeBytes({ BlockCache.checksum($0) }) == sum
        else { return nil }
        self.init(codec: codec, stored: stored, checksum: sum)
    }

    /// Whether a slice that is not all zeroes can take so many bytes.
    public static func fits(_ codec: SliceCodec, storedBytes count: Int) -> Bool {
        switch codec {
        case .zero: false
        case .raw: count == Geometry.sliceBytes
        case .zstd: count > 0 && count < Geometry.sliceBytes
        }
    }

    /// Unpacks into the 512 KiB at `frame`; false when the stored bytes hold something else than a slice.
    public func unpack(into frame: UnsafeMutableRawPointer) -> Bool {
        stored.withUnsafeBytes {
            Codec.unpack(codec, $0, into: UnsafeMutableRawBufferPointer(start: frame, count: Geometry.sliceBytes))
        }
    }
}

/// Packs the 512 KiB at `slice`: about a millisecond of work, for a worker thread.
public func encodeSlice(_ slice: UnsafeRawPointer) -> EncodedSlice {
    let bytes = UnsafeRawBufferPointer(start: slice, count: Geometry.sliceBytes)
    if isZero(bytes) { return .zero }
    let (codec, stored) = Codec.pack(bytes)
    return EncodedSlice(codec: codec, stored: stored, checksum: stored.withUnsafeBytes { checksum($0) })
}

/// Collects the slices of one block and makes its base object. Slices not added are zeroes.
///
///     var encoder = BaseEncoder(id: id, location: 0)
///     encoder.add(encodeSlice(pointer), at: SliceIndex(3))
///     let (object, ref) = encoder.finish()   // put object under ref.id.blockKey
public struct BaseEncoder: Sendable {
    public let id: ObjectID
    public let location: UInt8
    private var slices: [EncodedSlice]

    public init(id: ObjectID, location: UInt8) {
        self.id = id
        self.location = location
        slices = Array(repeating: .zero, count: Geometry.slicesPerBlock)
    }

    /// Sets one slice; a later call for the same slice replaces it.
    public mutating func add(_ slice: EncodedSlice, at index: SliceIndex) { slices[index.value] = slice }

    /// Packs and sets one slice from 512 KiB at `slice`, on this thread.
    public mutating func add(from slice: UnsafeRawPointer, at index: SliceIndex) { add(encodeSlice(slice), at: index) }

    /// Every slice is zeroes: no object is needed.
    public var isZero: Bool { slices.allSatisfy { $0.codec == .zero } }

    /// Length of the object that `finish` makes.
    public var sizeBytes: Int { slices.reduce(BaseHeader.lengthBytes) { $0 + $1.stored.count } }

    /// The object's bytes, and what a manifest says of it. Copies up to 16 MiB: for a worker thread.
    public func finish() -> (object: [UInt8], ref: BaseRef) {
        let total = sizeBytes
        var offset = BaseHeader.lengthBytes
        let records = slices.map { slice -> StoredSlice in
            if slice.codec == .zero { return .zero }
            defer { offset += slice.stored.count }
            return StoredSlice(
                codec: slice.codec, offsetBytes: UInt32(offset), lengthBytes: UInt32(slice.stored.count),
                checksum: slice.checksum)
        }
        let header = BaseHeader(id: id, slices: records, objectLengthBytes: UInt64(total))
        let object = concatenated([header.encoded()] + slices.map(\.stored), total: total)
        let ref = BaseRef(
            id: id, location: location, lengthBytes: UInt32(total), nonzeroSlices: header.nonzeroSlices)
        return (object, ref)
    }
}

/// The parts one behind the other, in one allocation.
func concatenated(_ parts: [[UInt8]], total: Int) -> [UInt8] {
    [UInt8](unsafeUninitializedCapacity: total) { out, count in
        for part in parts {
            part.withUnsafeBytes { bytes in
                UnsafeMutableRawBufferPointer(out).baseAddress?.advanced(by: count)
                    .copyMemory(from: bytes.baseAddress ?? UnsafeRawPointer(out.baseAddress!), byteCount: bytes.count)
            }
            count += part.count
        }
        precondition(count == total)
    }
}
