// What a connection still has to send: a line of memory segments for sendmsg.
//
// Always holds:
// - Small replies are written one behind the other into a pack buffer of 64 KiB; neighbours are one segment.
// - A segment that ends a buffer owns it: when it has been sent the buffer goes back to the pool.
// - An empty queue holds no buffer.

import Glibc

/// Owned by its connection's loop; lives behind a pointer so that its use costs no exclusivity check.
struct SendQueue: ~Copyable {
    static let packBytes = 64 << 10

    private struct Segment {
        var base: UnsafeMutableRawPointer
        var count: Int
        /// What to give back once this segment is sent.
        var buffer: UnsafeMutableRawPointer?
        var bufferBytes: Int
    }

    private var segments: UnsafeMutablePointer<Segment>?
    private var capacity = 0
    private var head = 0
    private var tail = 0
    private var pack: UnsafeMutableRawPointer?
    private var packUsed = 0
    /// Bytes not sent yet.
    private(set) var byteCount = 0

    var isEmpty: Bool { byteCount == 0 }

    deinit {
        precondition(pack == nil && head == tail, "a queue is cleared before it goes")
        segments?.deallocate()
    }

    // MARK: Writing

    /// Whether `reserve(count)` needs another pack buffer.
    @inline(__always) func needsPack(for count: Int) -> Bool { pack == nil || packUsed + count > Self.packBytes }

    /// Where the next `count` bytes (a pack buffer's worth at most) may be written. They count only once committed.
    @inline(__always) mutating func reserve(_ count: Int, _ pool: inout BufferPool) -> UnsafeMutableRawPointer {
        if needsPack(for: count) { openPack(&pool) }
        return pack.unsafelyUnwrapped + packUsed
    }

    /// The first `count` bytes of what was reserved are to be sent.
    @inline(__always) mutating func commit(_ count: Int) {
        let base = pack.unsafelyUnwrapped + packUsed
        packUsed += count
        byteCount += count
        if tail > head {
            let last = segments.unsafelyUnwrapped + (tail - 1)
            if last.pointee.buffer == nil && last.pointee.base + last.pointee.count == base {
                last.pointee.count += count
                return
            }
        }
        append(Segment(base: base, count: count, buffer: nil, bufferBytes: 0))
    }

    /// Sends `count` bytes of `buffer`; with `owned` it goes back to the pool, as one of `bufferBytes`, after that.
    mutating func append(
        _ base: UnsafeMutableRawPointer, _ count: Int, owned buffer: UnsafeMutableRawPointer?, bufferBytes: Int
    ) {
        byteCount += count
        append(Segment(base: base, count: count, buffer: buffer, bufferBytes: bufferBytes))
    }

    private mutating func openPack(_ pool: inout BufferPool) {
        retirePack()
        pack = pool.takeSmall(Self.packBytes)
        packUsed = 0
    }

    /// The pack buffer goes back when all that was written to it is sent.
    private mutating func retirePack() {
        guard let old = pack else { return }
        pack = nil
        append(Segment(base: old, count: 0, buffer: old, bufferBytes: Self.packBytes))
    }

    private mutating func append(_ segment: Segment) {
        if tail == capacity { makeRoom() }
        (segments.unsafelyUnwrapped + tail).initialize(to: segment)
        tail += 1
    }

    private mutating func makeRoom() {
        let count = tail - head
        if let segments, head >= capacity / 2, head > 0 {
            segments.update(from: segments + head, count: count)
        } else {
            let grown = UnsafeMutablePointer<Segment>.allocate(capacity: max(16, capacity * 2))
            if let segments {
                grown.moveInitialize(from: segments + head, count: count)
                segments.deallocate()
            }
            segments = grown
            capacity = max(16, capacity * 2)
        }
        head = 0
        tail = count
    }

    // MARK: Sending

    /// Fills `vectors` with what comes next; gives how many.
    func fill(_ vectors: UnsafeMutableBufferPointer<iovec>) -> (count: Int, bytes: Int) {
        var count = 0
        var bytes = 0
        var index = head
        while index < tail && count < vectors.count {
            let segment = segments.unsafelyUnwrapped[index]
            if segment.count > 0 {
                vectors[count] = iovec(iov_base: segment.base, iov_len: segment.count)
                count += 1
                bytes += segment.count
            }
            index += 1
        }
        return (count, bytes)
    }

    /// The first `count` bytes are sent. Gives the bytes of buffers that went back to the pool.
    mutating func advance(_ count: Int, _ pool: inout BufferPool) -> Int {
        precondition(count <= byteCount)
        byteCount -= count
        var left = count
        var returned = 0
        while head < tail {
            let segment = segments.unsafelyUnwrapped + head
            if segment.pointee.count > left {
                segment.pointee.base += left
                segment.pointee.count -= left
                break
            }
            left -= segment.pointee.count
            if let buffer = segment.pointee.buffer {
                pool.give(buffer, bytes: segment.pointee.bufferBytes)
                returned += BufferPool.cost(segment.pointee.bufferBytes)
            }
            head += 1
        }
        if byteCount == 0 { returned += clear(&pool) }
        return returned
    }

    /// Forgets everything; gives the bytes of buffers that went back to the pool.
    mutating func clear(_ pool: inout BufferPool) -> Int {
        var returned = 0
        while head < tail {
            let segment = segments.unsafelyUnwrapped[head]
            if let buffer = segment.buffer {
                pool.give(buffer, bytes: segment.bufferBytes)
                returned += BufferPool.cost(segment.bufferBytes)
            }
            head += 1
        }
        if let pack {
            pool.give(pack, bytes: Self.packBytes)
            returned += Self.packBytes
            self.pack = nil
        }
        packUsed = 0
        head = 0
        tail = 0
        byteCount = 0
        if capacity > 128 {
            segments?.deallocate()
            segments = nil
            capacity = 0
        }
        return returned
    }
}
