// Little-endian integers in and out of headers. Headers are small and rare; data never passes here.

/// Appends little-endian integers.
struct ByteWriter {
    private(set) var bytes: [UInt8] = []

    init(capacity: Int) { bytes.reserveCapacity(capacity) }

    mutating func put(_ value: UInt32) {
        for shift in stride(from: UInt32(0), to: 32, by: 8) { bytes.append(UInt8(truncatingIfNeeded: value >> shift)) }
    }
    mutating func put(_ value: UInt64) {
        for shift in stride(from: UInt64(0), to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: value >> shift)) }
    }
    mutating func put(_ id: ObjectID) {
        put(id.high)
        put(id.low)
    }
    mutating func put(_ mask: PageMask) {
        put(mask.low)
        put(mask.high)
    }
    /// The checksum of everything put so far.
    mutating func putChecksum() { put(bytes.withUnsafeBytes { checksum($0) }) }
}

/// Takes little-endian integers off the front. The caller has checked that they are there.
struct ByteReader {
    private let bytes: UnsafeRawBufferPointer
    private var position = 0

    init(_ bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

    mutating func u32() -> UInt32 {
        defer { position += 4 }
        return UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: UInt32.self))
    }
    mutating func u64() -> UInt64 {
        defer { position += 8 }
        return UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: UInt64.self))
    }
    mutating func id() -> ObjectID { ObjectID(high: u64(), low: u64()) }
    mutating func mask() -> PageMask { PageMask(low: u64(), high: u64()) }
}

extension UnsafeRawBufferPointer {
    /// The bytes of `range`, which lies within.
    func part(_ range: Range<Int>) -> UnsafeRawBufferPointer { UnsafeRawBufferPointer(rebasing: self[range]) }
}
