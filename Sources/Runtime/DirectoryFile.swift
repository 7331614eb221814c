// One open file of a scratch directory.
//
// Always holds: a sync covers every write that was begun before it; after a failed sync no later one succeeds, because
// the kernel forgets what it could not write.

import CLinux
import Glibc
import Synchronization

final class DirectoryFile: ScratchFile {
    private let descriptor: FileDescriptor
    private let path: String
    private let root: ScratchRoot
    private let state: Mutex<State>

    private struct State {
        var sizeBytes: UInt64
        /// Written and not yet covered by a completed sync.
        var unsyncedBytes: UInt64 = 0
        var nextTicket: UInt64 = 0
        /// Tickets of the writes that the ring has.
        var writesUnderWay: [UInt64] = []
        var waitingSyncs: [WaitingSync] = []
        var syncFailure: ScratchError?
    }

    private struct WaitingSync {
        /// Writes with lower tickets must complete first.
        var ticket: UInt64
        var loop: Loop?
        var done: @Sendable (ScratchError?) -> Void
    }

    /// Above this much unwritten data in the page cache, the kernel may make a writer wait.
    static let unsyncedLimitBytes: UInt64 = 256 << 20
    /// Longer writes would hold up the loop by their copying alone (about 1 ms a MiB). Room for 1 MiB and its record header.
    static let inlineLimitBytes = (1 << 20) + (64 << 10)

    init(_ descriptor: FileDescriptor, path: String, root: ScratchRoot) throws(ScratchError) {
        var status = stat()
        guard fstat(descriptor.raw, &status) == 0 else { throw ScratchError(errno, "stat", path) }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw ScratchError(errno: EINVAL, description: "open \(path): not a regular file")
        }
        self.descriptor = descriptor
        self.path = path
        self.root = root
        state = Mutex(State(sizeBytes: UInt64(status.st_size)))
    }

    deinit { root.close(descriptor) }

    var sizeBytes: UInt64 { state.withLock { $0.sizeBytes } }

    func write(
        _ buffers: UnsafeBufferPointer<UnsafeRawBufferPointer>, at offset: UInt64,
        done: @escaping @Sendable (ScratchError?) -> Void
    ) throws(ScratchError) -> Bool {
        let total = buffers.reduce(0) { $0 + $1.count }
        if total == 0 { return true }
        let end = offset + UInt64(total)
        precondition(end <= UInt64(Int64.max))

        let isInline = state.withLock { state in
            total <= DirectoryFile.inlineLimitBytes
                && state.unsyncedBytes + UInt64(total) <= DirectoryFile.unsyncedLimitBytes
        }
        if isInline {
            defer { wrote(total, end: end) }
            try writeInline(buffers, at: offset)
            return true
        }

        let ticket = state.withLock { state in
            state.writesUnderWay.append(state.nextTicket)
            state.nextTicket += 1
            return state.nextTicket - 1
        }
        let operation = DiskOperation(.write, descriptor, path: path, buffers: buffers, offset: offset) {
            [self] error in
            if error == nil { wrote(total, end: end) }
            completedWrite(ticket)
            done(error)
        }
        root.start(operation, on: root.callerLoop)
        return false
    }

    /// Counts `total` bytes up to `end`; also after a failure, when some of them may have been written.
    private func wrote(_ total: Int, end: UInt64) {
        state.withLock { state in
            state.sizeBytes = max(state.sizeBytes, end)
            state.unsyncedBytes += UInt64(total)
        }
    }

    private func writeInline(_ buffers: UnsafeBufferPointer<UnsafeRawBufferPointer>, at start: UInt64)
        throws(ScratchError)
    {
        var offset = start
        var first = 0
        while first < buffers.count {
            let count = min(buffers.count - first, DiskOperation.vectorsPerCall)
            let error = withUnsafeTemporaryAllocation(of: iovec.self, capacity: count) { vectors -> Int32 in
                for index in 0..<count { vectors.initializeElement(at: index, to: iovec(buffers[first + index])) }
                var next = vectors.consume(0, from: 0)
                while next < count {
                    let written = pwritev(
                        descriptor.raw, vectors.baseAddress! + next, Int32(count - next), off_t(offset))
                    if written < 0 {
                        if errno == EINTR { continue }
                        return errno
                    }
                    if written == 0 { return EIO }
                    offset += UInt64(written)
                    next = vectors.consume(written, from: next)
                }
                return 0
            }
            if error != 0 { throw ScratchError(error, "write", path) }
            first += count
        }
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, done: @escaping @Sendable (ScratchError?) -> Void
    ) {
        precondition(offset <= UInt64(Int64.max) - UInt64(buffer.count))
        let loop = root.callerLoop
        if buffer.isEmpty { return complete(on: loop, nil, done) }
        root.start(
            DiskOperation(
                .read, descriptor, path: path, buffers: CollectionOfOne(UnsafeRawBufferPointer(buffer)), offset: offset,
                done: done), on: loop)
    }

    func sync(done: @escaping @Sendable (ScratchError?) -> Void) {
        let loop = root.callerLoop
        let mayStart = state.withLock { state in
            if state.writesUnderWay.isEmpty { return true }
            state.waitingSyncs.append(WaitingSync(ticket: state.nextTicket, loop: loop, done: done))
            return false
        }
        if mayStart { startSync(on: loop, done: done) }
    }

    private func complete(on loop: Loop?, _ error: ScratchError?, _ done: @escaping @Sendable (ScratchError?) -> Void) {
        if let loop { loop.post { done(error) } } else { done(error) }
    }

    private func startSync(on loop: Loop?, done: @escaping @Sendable (ScratchError?) -> Void) {
        let (failure, covered) = state.withLock { ($0.syncFailure, $0.unsyncedBytes) }
        if let failure { return complete(on: loop, failure, done) }
        let operation = DiskOperation(.sync, descriptor, path: path) { [self] error in
            let result = state.withLock { state in
                if error == nil { state.unsyncedBytes -= min(covered, state.unsyncedBytes) }
                state.syncFailure = state.syncFailure ?? error
                return state.syncFailure
            }
            done(result)
        }
        root.start(operation, on: loop)
    }

    private func completedWrite(_ ticket: UInt64) {
        let ready = state.withLock { state in
            state.writesUnderWay.removeAll { $0 == ticket }
            // Tickets are in order, so the first is the oldest.
            let oldest = state.writesUnderWay.first ?? .max
            let count = state.waitingSyncs.prefix { $0.ticket <= oldest }.count
            defer { state.waitingSyncs.removeFirst(count) }
            return Array(state.waitingSyncs.prefix(count))
        }
        for sync in ready { startSync(on: sync.loop, done: sync.done) }
    }

    func truncate(to size: UInt64) throws(ScratchError) {
        precondition(size <= UInt64(Int64.max))
        while ftruncate(descriptor.raw, off_t(size)) < 0 {
            if errno != EINTR { throw ScratchError(errno, "truncate", path) }
        }
        state.withLock { $0.sizeBytes = size }
    }
}
