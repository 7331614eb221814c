// Bytes on their way from a store or a scratch file to a worker: immutable, shared without copying.

/// A part of an immutable run of bytes that lives as long as the view.
struct ByteView: Sendable {
    private let storage: ByteStorage
    /// Within the storage.
    private let range: Range<Int>

    init(_ bytes: [UInt8]) {
        storage = ByteStorage(bytes)
        range = 0..<bytes.count
    }
    init(_ storage: ByteStorage) {
        self.storage = storage
        range = 0..<storage.bytes.count
    }
    private init(_ storage: ByteStorage, _ range: Range<Int>) {
        self.storage = storage
        self.range = range
    }

    var count: Int { range.count }

    /// The bytes of `part`, counted from the view's start, within it.
    func part(_ part: Range<Int>) -> ByteView {
        precondition(part.upperBound <= count)
        return ByteView(storage, range.lowerBound + part.lowerBound..<range.lowerBound + part.upperBound)
    }

    func withBytes<R, E: Error>(_ body: (UnsafeRawBufferPointer) throws(E) -> R) throws(E) -> R {
        defer { withExtendedLifetime(storage) {} }
        return try body(storage.bytes.part(range))
    }

    static func joined(_ views: [ByteView]) -> ByteView {
        if views.count == 1 { return views[0] }
        let whole = ByteStorage(count: views.reduce(0) { $0 + $1.count })
        var at = 0
        for view in views {
            view.withBytes { whole.writable.part(at..<at + $0.count).copyMemory(from: $0) }
            at += view.count
        }
        return ByteView(whole)
    }
}

/// The memory behind views.
final class ByteStorage: @unchecked Sendable {  // written by its maker only, before it is shared
    let bytes: UnsafeRawBufferPointer
    /// Empty when the memory is an array's.
    let writable: UnsafeMutableRawBufferPointer
    /// An array's elements stay where they are while somebody holds the array and nobody changes it.
    private let array: [UInt8]

    init(_ array: [UInt8]) {
        self.array = array
        bytes = self.array.withUnsafeBytes { $0 }
        writable = UnsafeMutableRawBufferPointer(start: nil, count: 0)
    }

    /// Memory for the maker to fill.
    init(count: Int) {
        array = []
        writable = .allocate(byteCount: count, alignment: 64)
        bytes = UnsafeRawBufferPointer(writable)
    }

    deinit { if writable.baseAddress != nil { writable.deallocate() } }
}

extension UnsafeMutableRawBufferPointer {
    /// The bytes of `range`, which lies within.
    func part(_ range: Range<Int>) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(rebasing: self[range])
    }
}

/// A pointer that is handed to a worker and not used by anybody else until the worker is done.
struct Lent: @unchecked Sendable {
    let pointer: UnsafeMutableRawPointer
}
