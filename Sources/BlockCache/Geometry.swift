// Sizes and positions on a disk. A block index, a slice index and a byte offset are not the same kind of number,
// and the compiler knows.

/// The fixed sizes of Margarine's store format, in bytes.
public enum Geometry {
    /// 16 MiB: the unit of the manifest and of the object store.
    public static let blockBytes = 16 << 20
    /// 512 KiB: the unit of the memory cache, of compression and of checksums.
    public static let sliceBytes = 512 << 10
    /// 4 KiB: the unit of dirtiness.
    public static let pageBytes = 4096
    public static let slicesPerBlock = blockBytes / sliceBytes  // 32
    public static let pagesPerSlice = sliceBytes / pageBytes  // 128
    public static let pagesPerBlock = blockBytes / pageBytes  // 4096
}

/// Which 16 MiB block of a disk; the first is 0, the last of a 16 EiB disk 2^40 - 1.
public struct BlockIndex: Hashable, Comparable, Sendable {
    public var value: UInt64
    public init(_ value: UInt64) { self.value = value }
    public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
}

/// Which 512 KiB slice of a block: 0 to 31.
public struct SliceIndex: Hashable, Comparable, Sendable {
    public var value: Int
    public init(_ value: Int) {
        precondition(value >= 0 && value < Geometry.slicesPerBlock)
        self.value = value
    }
    public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
}

/// A 128-bit set: one bit for each 4 KiB page of a slice, page 0 the lowest bit of `low`.
public struct PageMask: Hashable, Sendable {
    public var low: UInt64
    public var high: UInt64
    public init(low: UInt64 = 0, high: UInt64 = 0) {
        self.low = low
        self.high = high
    }
    public static let none = PageMask()
    public static let all = PageMask(low: .max, high: .max)
    public var isEmpty: Bool { low | high == 0 }
    public var isAll: Bool { low & high == .max }
    public var count: Int { low.nonzeroBitCount + high.nonzeroBitCount }
    @inlinable public func contains(_ page: Int) -> Bool {
        page < 64 ? low & (1 << UInt64(page)) != 0 : high & (1 << UInt64(page - 64)) != 0
    }
    @inlinable public mutating func insert(_ page: Int) {
        if page < 64 { low |= 1 << UInt64(page) } else { high |= 1 << UInt64(page - 64) }
    }
    @inlinable public mutating func remove(_ page: Int) {
        if page < 64 { low &= ~(1 << UInt64(page)) } else { high &= ~(1 << UInt64(page - 64)) }
    }
    /// The pages `range` (within 0..<128).
    @inlinable public init(pages range: Range<Int>) {
        self.init()
        let l = min(range.lowerBound, 64)..<min(range.upperBound, 64)
        let h = max(range.lowerBound, 64) - 64..<max(range.upperBound, 64) - 64
        low = PageMask.bits(l)
        high = PageMask.bits(h)
    }
    @usableFromInline static func bits(_ r: Range<Int>) -> UInt64 {
        if r.isEmpty { return 0 }
        let width = r.count == 64 ? UInt64.max : (1 << UInt64(r.count)) - 1
        return width << UInt64(r.lowerBound)
    }
    /// Calls `body` with each page of the set, ascending.
    @inlinable @inline(__always) public func forEach(_ body: (Int) -> Void) {
        var bits = low
        while bits != 0 {
            body(bits.trailingZeroBitCount)
            bits &= bits - 1
        }
        bits = high
        while bits != 0 {
            body(64 + bits.trailingZeroBitCount)
            bits &= bits - 1
        }
    }
    public static func | (a: Self, b: Self) -> Self { PageMask(low: a.low | b.low, high: a.high | b.high) }
    public static func & (a: Self, b: Self) -> Self { PageMask(low: a.low & b.low, high: a.high & b.high) }
    public static prefix func ~ (a: Self) -> Self { PageMask(low: ~a.low, high: ~a.high) }
}
