// One read, write or sync of a scratch file, from its call to its completion.

import CLinux
import Glibc

/// Split into as many kernel calls as it takes: 1024 buffers a call, and again after a short one. Owned by the loop
/// that runs it (or by one worker, while that makes the blocking call).
final class DiskOperation: @unchecked Sendable {  // handed from thread to thread, never shared
    enum Kind {
        case read
        case write
        /// fdatasync: the data, and what is needed to read it.
        case sync
        /// fsync, of a directory.
        case syncDirectory
    }

    let kind: Kind
    let descriptor: FileDescriptor
    private let path: String
    private var vectors: UnsafeMutableBufferPointer<iovec>
    private var next = 0
    private var offset: UInt64
    private let lengthBytes: Int
    let done: @Sendable (ScratchError?) -> Void

    static let vectorsPerCall = 1024
    /// A longer read that the page cache can answer is copied by a kernel thread.
    private static let copiedOnLoopBytes = 1 << 20

    init(
        _ kind: Kind, _ descriptor: FileDescriptor, path: String,
        buffers: some Collection<UnsafeRawBufferPointer> = EmptyCollection(), offset: UInt64 = 0,
        done: @escaping @Sendable (ScratchError?) -> Void
    ) {
        self.kind = kind
        self.descriptor = descriptor
        self.path = path
        self.offset = offset
        self.done = done
        lengthBytes = buffers.reduce(0) { $0 + $1.count }
        vectors = .allocate(capacity: buffers.count)
        for (index, buffer) in buffers.enumerated() {
            vectors.initializeElement(at: index, to: iovec(buffer))
        }
    }

    deinit { vectors.deallocate() }

    /// The buffers of the next kernel call.
    private var batch: (UnsafeMutablePointer<iovec>?, Int) {
        (vectors.baseAddress.map { $0 + next }, min(vectors.count - next, DiskOperation.vectorsPerCall))
    }

    /// Puts the next kernel call on the ring; false when that is full.
    func prepare(on ring: OpaquePointer, data: UInt64) -> Bool {
        let (vectors, count) = batch
        return switch kind {
        case .read:
            mg_ring_readv(
                ring, descriptor.raw, vectors, UInt32(count), offset, lengthBytes > Self.copiedOnLoopBytes, data)
        // Writes come here when copying them, or waiting for the page cache, would hold up the loop.
        case .write: mg_ring_writev(ring, descriptor.raw, vectors, UInt32(count), offset, true, data)
        case .sync: mg_ring_fsync(ring, descriptor.raw, true, data)
        case .syncDirectory: mg_ring_fsync(ring, descriptor.raw, false, data)
        }
    }

    /// Makes the next kernel call and waits for it: bytes, or -errno.
    func perform() -> Int {
        let (vectors, count) = batch
        let result =
            switch kind {
            case .read: preadv(descriptor.raw, vectors, Int32(count), off_t(offset))
            case .write: pwritev(descriptor.raw, vectors, Int32(count), off_t(offset))
            case .sync: Int(fdatasync(descriptor.raw))
            case .syncDirectory: Int(fsync(descriptor.raw))
            }
        return result < 0 ? -Int(errno) : result
    }

    /// Makes all kernel calls here and waits for them.
    func performAll() {
        while true {
            if case .finished(let error) = advance(perform()) { return done(error) }
        }
    }

    enum Step {
        case again
        case finished(ScratchError?)
    }

    /// Takes in what a kernel call gave.
    func advance(_ result: Int) -> Step {
        if result == -Int(EINTR) || result == -Int(EAGAIN) { return .again }
        guard result >= 0 else { return .finished(ScratchError(Int32(-result), call, path)) }
        guard kind == .read || kind == .write else { return .finished(nil) }
        if result == 0 {
            return .finished(
                ScratchError(
                    errno: kind == .read ? ENODATA : EIO,
                    description: "\(call) \(path): the file ends at byte \(offset), before the end of the request"))
        }
        offset += UInt64(result)
        next = vectors.consume(result, from: next)
        return next == vectors.count ? .finished(nil) : .again
    }

    private var call: String {
        switch kind {
        case .read: "read"
        case .write: "write"
        case .sync: "fdatasync"
        case .syncDirectory: "fsync"
        }
    }
}

extension iovec {
    init(_ buffer: UnsafeRawBufferPointer) {
        self.init(iov_base: UnsafeMutableRawPointer(mutating: buffer.baseAddress), iov_len: buffer.count)
    }
}

extension UnsafeMutableBufferPointer<iovec> {
    /// Takes `count` bytes off the front, beginning at vector `first`; gives the first vector with bytes left.
    func consume(_ count: Int, from first: Int) -> Int {
        var left = count
        var index = first
        while index < self.count, left >= self[index].iov_len {
            left -= self[index].iov_len
            index += 1
        }
        precondition(index < self.count || left == 0, "the kernel took more bytes than it was given")
        if left > 0 {
            self[index].iov_base += left
            self[index].iov_len -= left
        }
        return index
    }
}
