// Request and reply buffers of one loop, in powers of two from 4 KiB to 32 MiB.
//
// Always holds:
// - Buffers are page-aligned. Those of 128 KiB and more are mapped when taken and become memory only as bytes arrive;
//   what is kept for reuse has been touched, and never exceeds the bound.
// - Where the system has no memory for one, there is none, and whoever asked fails alone.
// - Free buffers are linked through their own first bytes: taking and giving back allocates nothing.

import Glibc

/// Owned by its loop.
struct BufferPool: ~Copyable {
    static let smallestBytes = 4 << 10
    static let largestBytes = 32 << 20
    private static let classes = 14
    private static let mappedFrom = 128 << 10

    private struct FreeList {
        var first: UnsafeMutableRawPointer?
        var count = 0
        /// The fewest free ones since the last `trim`: that many were not needed.
        var spare = 0
    }

    private let lists: UnsafeMutablePointer<FreeList>
    private let limitBytes: Int
    /// Larger ones the system refuses: for tests.
    private let mapsAtMostBytes: Int
    /// Bytes kept for reuse.
    private(set) var freeBytes = 0

    init(limitBytes: Int, mapsAtMostBytes: Int = .max) {
        self.limitBytes = limitBytes
        self.mapsAtMostBytes = mapsAtMostBytes
        lists = .allocate(capacity: Self.classes)
        lists.initialize(repeating: FreeList(), count: Self.classes)
    }

    deinit {
        for index in 0..<Self.classes {
            while let buffer = lists[index].first {
                lists[index].first = buffer.load(as: UnsafeMutableRawPointer?.self)
                Self.release(buffer, bytes: Self.smallestBytes << index)
            }
        }
        lists.deallocate()
    }

    /// What a buffer for `bytes` is counted as: what may be touched of it.
    @inline(__always) static func cost(_ bytes: Int) -> Int { max(bytes, smallestBytes) }

    @inline(__always) private static func classIndex(_ bytes: Int) -> Int {
        precondition(bytes <= largestBytes)
        let pages = (bytes + smallestBytes - 1) >> 12
        return pages <= 1 ? 0 : Int.bitWidth - (pages - 1).leadingZeroBitCount
    }

    /// A buffer of at least `bytes`, less than is mapped; its content means nothing.
    mutating func takeSmall(_ bytes: Int) -> UnsafeMutableRawPointer {
        precondition(bytes < Self.mappedFrom)
        guard let buffer = take(bytes) else { preconditionFailure("malloc gives memory or ends the process") }
        return buffer
    }

    /// A buffer of at least `bytes`, nil where the system has no memory for it; its content means nothing.
    mutating func take(_ bytes: Int) -> UnsafeMutableRawPointer? {
        let index = Self.classIndex(bytes)
        if let buffer = lists[index].first {
            lists[index].first = buffer.load(as: UnsafeMutableRawPointer?.self)
            lists[index].count -= 1
            lists[index].spare = min(lists[index].spare, lists[index].count)
            freeBytes -= Self.smallestBytes << index
            return buffer
        }
        let size = Self.smallestBytes << index
        return size <= mapsAtMostBytes ? Self.allocate(bytes: size) : nil
    }

    /// Takes back what `take(bytes)` gave.
    mutating func give(_ buffer: UnsafeMutableRawPointer, bytes: Int) {
        let index = Self.classIndex(bytes)
        let size = Self.smallestBytes << index
        if freeBytes + size > limitBytes {
            Self.release(buffer, bytes: size)
            return
        }
        buffer.storeBytes(of: lists[index].first, as: UnsafeMutableRawPointer?.self)
        lists[index].first = buffer
        lists[index].count += 1
        freeBytes += size
    }

    /// Frees what was not needed since the last call. True while anything is kept.
    mutating func trim() -> Bool {
        for index in 0..<Self.classes {
            for _ in 0..<lists[index].spare {
                guard let buffer = lists[index].first else { break }
                lists[index].first = buffer.load(as: UnsafeMutableRawPointer?.self)
                lists[index].count -= 1
                freeBytes -= Self.smallestBytes << index
                Self.release(buffer, bytes: Self.smallestBytes << index)
            }
            lists[index].spare = lists[index].count
        }
        return freeBytes > 0
    }

    private static func allocate(bytes: Int) -> UnsafeMutableRawPointer? {
        if bytes < mappedFrom { return .allocate(byteCount: bytes, alignment: smallestBytes) }
        let mapped = mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        return mapped == MAP_FAILED ? nil : mapped
    }

    private static func release(_ buffer: UnsafeMutableRawPointer, bytes: Int) {
        if bytes < mappedFrom { buffer.deallocate() } else { munmap(buffer, bytes) }
    }
}
