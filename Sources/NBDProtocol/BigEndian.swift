// Integers as they stand on the wire.

extension UnsafeRawPointer {
    /// The big-endian integer at `offset` bytes from here, at any alignment.
    @inlinable @inline(__always)
    package func wire<T: FixedWidthInteger & BitwiseCopyable>(_ offset: Int, as type: T.Type = T.self) -> T {
        T(bigEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }
}

extension UnsafeMutableRawPointer {
    /// Stores `value` big-endian at `offset` bytes from here, at any alignment.
    @inlinable @inline(__always)
    package func putWire<T: FixedWidthInteger & BitwiseCopyable>(_ value: T, at offset: Int) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: T.self)
    }
}

extension Array where Element == UInt8 {
    /// Appends `value` big-endian.
    package mutating func appendWire<T: FixedWidthInteger>(_ value: T) {
        var shift = T.bitWidth
        while shift > 0 {
            shift -= 8
            append(UInt8(truncatingIfNeeded: value >> T(shift)))
        }
    }
}
