// How bytes are packed and checked: zstd level 1 where it pays, as they are where it does not, nothing at all for
// zeroes (Docs/Decisions: codec). Pure functions, called on worker threads; they share only a pool of zstd contexts.

import CLibraries
import CZstd
import Glibc
import Synchronization

/// How the stored bytes of a slice or of a patch are packed. The numbers are part of the format.
public enum SliceCodec: UInt32, Sendable {
    /// No stored bytes: all zeroes.
    case zero = 0
    /// As they are.
    case raw = 1
    /// One zstd frame.
    case zstd = 2
}

/// XXH3-64 with seed 0: the checksum of everything this room stores.
/// A deliberate mistake, to show that tests would see it: checksums of stored slices are not looked at.
nonisolated(unsafe) package var trustsStoredBytes = false

func checksum(_ bytes: UnsafeRawBufferPointer) -> UInt64 { mg_xxh3(bytes.baseAddress, bytes.count, 0) }

/// Whether all bytes are zero. As fast as the C library's vectorised comparison; stops at the first other byte.
public func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
    guard let base = bytes.baseAddress, bytes.count > 0 else { return true }
    // Equal to itself moved by one, and the first is zero: then all are.
    return base.load(as: UInt8.self) == 0 && memcmp(base, base + 1, bytes.count - 1) == 0
}

enum Codec {
    private static let level: Int32 = 1

    /// Packs what is not all zeroes: zstd, or raw where that does not save a sixteenth.
    static func pack(_ bytes: UnsafeRawBufferPointer) -> (codec: SliceCodec, stored: [UInt8]) {
        let limit = bytes.count - bytes.count / 16
        let context = Contexts.takeCompressor()
        defer { Contexts.give(compressor: context) }
        var packed = false
        let stored = [UInt8](unsafeUninitializedCapacity: limit) { out, count in
            let size = ZSTD_compressCCtx(
                context, UnsafeMutableRawPointer(out.baseAddress), limit, bytes.baseAddress, bytes.count, level)
            packed = ZSTD_isError(size) == 0
            count = packed ? size : 0
        }
        return packed ? (.zstd, stored) : (.raw, [UInt8](bytes))
    }

    /// Unpacks exactly `out.count` bytes; false when the stored ones do not hold that.
    static func unpack(_ codec: SliceCodec, _ stored: UnsafeRawBufferPointer, into out: UnsafeMutableRawBufferPointer)
        -> Bool
    {
        switch codec {
        case .zero:
            if let base = out.baseAddress { memset(base, 0, out.count) }
            return stored.isEmpty
        case .raw:
            guard stored.count == out.count else { return false }
            out.copyMemory(from: stored)
            return true
        case .zstd:
            let context = Contexts.takeDecompressor()
            defer { Contexts.give(decompressor: context) }
            let size = ZSTD_decompressDCtx(context, out.baseAddress, out.count, stored.baseAddress, stored.count)
            return ZSTD_isError(size) == 0 && size == out.count
        }
    }
}

/// zstd contexts are dear to make (a compressor has about 1 MiB) and free to use again.
private enum Contexts {
    private struct Idle: @unchecked Sendable {  // touched under the lock only
        var compressors: [OpaquePointer] = []
        var decompressors: [OpaquePointer] = []
    }
    private static let idle = Mutex(Idle())
    /// More threads than that at once make and free their own.
    private static let maxIdle = 16

    static func takeCompressor() -> OpaquePointer {
        if let context = idle.withLock({ Box($0.compressors.popLast()) }).value { return context }
        guard let context = ZSTD_createCCtx() else { fatalError("out of memory for a zstd context") }
        return context
    }
    static func takeDecompressor() -> OpaquePointer {
        if let context = idle.withLock({ Box($0.decompressors.popLast()) }).value { return context }
        guard let context = ZSTD_createDCtx() else { fatalError("out of memory for a zstd context") }
        return context
    }
    static func give(compressor: OpaquePointer) {
        let box = Box(compressor)
        let kept = idle.withLock {
            guard $0.compressors.count < maxIdle, let context = box.value else { return false }
            $0.compressors.append(context)
            return true
        }
        if !kept { ZSTD_freeCCtx(compressor) }
    }
    static func give(decompressor: OpaquePointer) {
        let box = Box(decompressor)
        let kept = idle.withLock {
            guard $0.decompressors.count < maxIdle, let context = box.value else { return false }
            $0.decompressors.append(context)
            return true
        }
        if !kept { ZSTD_freeDCtx(decompressor) }
    }

    /// Carries a context in or out of the lock; it has one owner at any time.
    private struct Box: @unchecked Sendable {
        let value: OpaquePointer?
        init(_ value: OpaquePointer?) { self.value = value }
    }
}
