// Lines for a descriptor that may be a pipe which nobody empties: whoever has something to say puts it into a ring and goes
// on, and one thread writes.
//
// Always holds: `add` never waits for the reader, and keeps at most `limitBytes`; a line is written whole or not at all;
// lines that found no room are counted, and how many there were is written where they are missing.

internal import Glibc
internal import Runtime
internal import Synchronization

package final class LineWriter: Sendable {
    private let descriptor: Int32
    private let limitBytes: Int
    private let state = Mutex(State())
    /// Wakes the thread, and what waits in `flush`.
    private let bell = Bell()

    fileprivate struct State {
        var lines: [[UInt8]] = []
        var next = 0
        var bytes = 0
        /// Lines that were dropped since the last that was kept.
        var lost = 0
        /// The thread has taken lines that are not written yet.
        var isWriting = false
        var hasThread = false
    }

    package static let threadName = "log"

    /// - Parameter limitBytes: how much may wait for the reader.
    package init(descriptor: Int32, limitBytes: Int = 1 << 20) {
        self.descriptor = descriptor
        self.limitBytes = limitBytes
    }

    /// Makes the thread now, so that writing never falls to whoever adds a line. False when the system has none to give.
    package func prepare() -> Bool {
        let starts = state.withLock { state in
            defer { state.hasThread = true }
            return !state.hasThread
        }
        guard starts, !startDetachedThread(name: Self.threadName, { self.writeForEver() }) else { return true }
        state.withLock { $0.hasThread = false }
        return false
    }

    /// Takes one line, without its end. Dropped and counted where no room is left.
    package func add(_ line: String) {
        let bytes = Array(line.utf8) + [UInt8(ascii: "\n")]
        state.withLock { state in
            guard state.bytes + bytes.count <= limitBytes else {
                state.lost += 1
                return
            }
            if state.lost > 0 { state.append(State.lostLine(state.lost)) }
            state.lost = 0
            state.append(bytes)
        }
        // Without a thread: what the reader takes at once. The next line tries for a thread again, also one that finds no room.
        if !prepare() { writeWhatIsTaken(untilNs: 0) }
        bell.ring()
    }

    /// Returns when all lines are written, or after `timeoutMs`: for the end of the process.
    package func flush(timeoutMs: Int) {
        let deadline = LineWriter.nowNs + UInt64(timeoutMs) * 1_000_000
        while true {
            let (isDone, hasThread) = state.withLock { state in
                if state.lost > 0, state.isEmpty {
                    state.append(State.lostLine(state.lost))
                    state.lost = 0
                }
                return (state.isEmpty && !state.isWriting, state.hasThread)
            }
            if isDone { return }
            if !hasThread { return writeWhatIsTaken(untilNs: deadline) }
            bell.ring()
            let now = LineWriter.nowNs
            if now >= deadline { return }
            usleep(min(1_000, UInt32(clamping: (deadline - now) / 1_000 + 1)))
        }
    }

    private static var nowNs: UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    // MARK: Writing

    private func writeForEver() {
        while true {
            guard let line = take() else {
                bell.wait()
                continue
            }
            write(line)
            state.withLock { $0.isWriting = false }
        }
    }

    private func take() -> [UInt8]? {
        state.withLock { state in
            if state.isEmpty, state.lost > 0 {
                state.append(State.lostLine(state.lost))
                state.lost = 0
            }
            let line = state.removeFirst()
            state.isWriting = line != nil
            return line
        }
    }

    /// Waits for the reader. What can't be written at all (a closed pipe) is gone.
    private func write(_ line: [UInt8]) {
        var written = 0
        while written < line.count {
            let count = line[written...].withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress, $0.count) }
            if count >= 0 {
                written += count
            } else if errno == EAGAIN {
                var ready = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
                _ = poll(&ready, 1, 1_000)
            } else if errno != EINTR {
                return
            }
        }
    }

    /// Writes on the caller's thread, as long as that does not wait for the reader beyond `untilNs`: up to PIPE_BUF bytes a
    /// call, which a pipe that polls writable takes at once.
    private func writeWhatIsTaken(untilNs: UInt64) {
        func isWritable() -> Bool {
            var ready = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
            let now = LineWriter.nowNs
            let waitMs = now >= untilNs ? 0 : Int32(clamping: (untilNs - now) / 1_000_000)
            return poll(&ready, 1, waitMs) == 1 && ready.revents & Int16(POLLOUT) != 0
        }
        // A line that was taken is lost when it can't be written.
        while isWritable(), let line = take() {
            defer { state.withLock { $0.isWriting = false } }
            var written = 0
            while written < line.count {
                guard isWritable() else { return }
                let part = line[written..<min(line.count, written + 4096)]
                let count = part.withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress, $0.count) }
                if count < 0, errno != EINTR { return }
                written += max(0, count)
            }
        }
    }
}

extension LineWriter.State {
    var isEmpty: Bool { next == lines.count }

    static func lostLine(_ count: Int) -> [UInt8] {
        Array("... \(count) \(count == 1 ? "line" : "lines") lost here: nobody read this fast enough\n".utf8)
    }

    mutating func append(_ line: [UInt8]) {
        lines.append(line)
        bytes += line.count
    }

    mutating func removeFirst() -> [UInt8]? {
        guard next < lines.count else { return nil }
        let line = lines[next]
        lines[next] = []
        next += 1
        bytes -= line.count
        if next == lines.count {
            lines.removeAll(keepingCapacity: next <= 1024)
            next = 0
        } else if next >= 1024 {
            lines.removeFirst(next)
            next = 0
        }
        return line
    }
}

/// A condition to wait for on one thread: rung before the wait, it is not waited for.
private final class Bell: @unchecked Sendable {  // `mutex` guards `isRung`
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var isRung = false

    init() {
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(condition, nil)
    }

    deinit {
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    func ring() {
        pthread_mutex_lock(mutex)
        isRung = true
        pthread_cond_signal(condition)
        pthread_mutex_unlock(mutex)
    }

    func wait() {
        pthread_mutex_lock(mutex)
        while !isRung { pthread_cond_wait(condition, mutex) }
        isRung = false
        pthread_mutex_unlock(mutex)
    }
}
