// Nearly all that is stored stands under checksums, and mutated bytes never get past them. So each target looks at an input
// as it is, and then at a copy whose checksums were made right.

import CLibraries

/// A copy of an input, to be made right; exactly as long, so that a read behind it is noticed.
struct Sealed: ~Copyable {
    private let bytes: UnsafeMutableRawBufferPointer

    init(copying input: UnsafeRawBufferPointer) {
        bytes = .allocate(byteCount: input.count, alignment: 1)
        bytes.copyMemory(from: input)
    }

    deinit { bytes.deallocate() }

    /// Calls `body` with the bytes, which are gone with this value.
    borrowing func read(_ body: (UnsafeRawBufferPointer) throws -> Void) rethrows {
        try body(UnsafeRawBufferPointer(bytes))
    }

    /// The little-endian integer at `at`; nil where there is none.
    func get<T: FixedWidthInteger & BitwiseCopyable>(_ at: Int, as type: T.Type = T.self) -> T? {
        guard at >= 0, at <= bytes.count - MemoryLayout<T>.size else { return nil }
        return T(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: T.self))
    }

    /// Sets it, where there is room.
    func put<T: FixedWidthInteger & BitwiseCopyable>(_ value: T, at: Int) {
        guard at >= 0, at <= bytes.count - MemoryLayout<T>.size else { return }
        bytes.storeBytes(of: value.littleEndian, toByteOffset: at, as: T.self)
    }

    /// Puts the checksum of a range at `at`.
    func seal(_ start: Int, _ count: Int, at: Int) {
        guard start >= 0, count >= 0, start <= bytes.count, count <= bytes.count - start else { return }
        put(xxh3(UnsafeRawBufferPointer(rebasing: bytes[start..<start + count])), at: at)
    }
}

/// XXH3-64, the checksum of all stored formats.
func xxh3(_ bytes: UnsafeRawBufferPointer, seed: UInt64 = 0) -> UInt64 {
    mg_xxh3(bytes.baseAddress, bytes.count, seed)
}
