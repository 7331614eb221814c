// The daemon's ear for its operator: a unix socket that only its own user (and root) can open. It shares nothing with
// the data path: a thread of its own accepts, a thread for each connection reads and writes with time limits, and what
// is asked runs as a task.
//
// Always holds: at most `connectionLimit` connections are open, no line longer than `ControlRequest.limitBytes` is
// kept, and nobody who stops reading or writing stays longer than `patienceSeconds`.

import Dispatch
import Foundation
import Glibc
internal import Runtime
import Synchronization

package final class ControlSocket: Sendable {
    package typealias Handler = @Sendable (ControlRequest) async -> ControlAnswer

    private static let connectionLimit = 16
    private static let patienceSeconds = 10
    static let threadName = "control"
    private static let stackBytes = 4 << 20

    package let path: String
    private let listener: FileDescriptor
    private let file: SocketFile
    /// Closing its write end ends the accepting thread.
    private let stopRead: Int32
    private let stopWrite: Int32
    private let state = Mutex(State())
    private struct State {
        var connections = 0
        var isClosed = false
    }

    /// Listens on `path`. A socket file that nobody listens on any more is replaced.
    /// - Throws: `DaemonError` when the path is taken, too long, or cannot be made.
    package init(path: String, handler: @escaping Handler) throws(DaemonError) {
        self.path = path
        (listener, file) = try Self.listen(on: path)
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else {
            let reason = errno
            file.remove()
            throw DaemonError("cannot make a pipe for the control socket: \(errnoText(reason))")
        }
        stopRead = ends[0]
        stopWrite = ends[1]
        for fd in ends { _ = fcntl(fd, F_SETFD, FD_CLOEXEC) }
        guard startDetachedThread(name: Self.threadName, stackBytes: Self.stackBytes, { [self] in accept(handler) })
        else {
            file.remove()
            for fd in ends { Glibc.close(fd) }
            throw DaemonError(
                "the system has no thread for the control socket: raise the limit of threads (pids, ulimit -u)")
        }
    }

    /// Takes no more connections and removes the socket file. Connections that are being answered end by themselves.
    package func close() {
        let first = state.withLock { state in
            defer { state.isClosed = true }
            return !state.isClosed
        }
        guard first else { return }
        file.remove()
        Glibc.close(stopWrite)
    }

    private func accept(_ handler: @escaping Handler) {
        defer {
            listener.close()
            Glibc.close(stopRead)
        }
        while true {
            var waiting = [
                pollfd(fd: listener.raw, events: Int16(POLLIN), revents: 0),
                pollfd(fd: stopRead, events: Int16(POLLIN), revents: 0),
            ]
            if poll(&waiting, 2, -1) < 0 {
                if errno == EINTR { continue }
                return
            }
            if waiting[1].revents != 0 { return }
            let fd = Glibc.accept(listener.raw, nil, nil)
            if fd < 0 {
                // Out of descriptors or the like: no more than a few tries a second.
                if errno != EINTR && errno != ECONNABORTED { usleep(200_000) }
                continue
            }
            _ = fcntl(fd, F_SETFD, FD_CLOEXEC)
            let admitted = state.withLock { state in
                guard state.connections < Self.connectionLimit else { return false }
                state.connections += 1
                return true
            }
            guard admitted else {
                Glibc.close(fd)
                continue
            }
            let end: @Sendable () -> Void = { [self] in
                Glibc.close(fd)
                state.withLock { $0.connections -= 1 }
            }
            let isServed = startDetachedThread(name: Self.threadName, stackBytes: Self.stackBytes) {
                Self.serve(fd, handler)
                end()
            }
            if !isServed { end() }
        }
    }

    /// Answers the requests of one connection until it ends, errs, or is too slow.
    private static func serve(_ fd: Int32, _ handler: @escaping Handler) {
        let line = ControlLine(fd: fd, patienceSeconds: patienceSeconds)
        while let bytes = try? line.receive(limitBytes: ControlRequest.limitBytes) {
            let answer: ControlAnswer
            if let request = try? JSONDecoder().decode(ControlRequest.self, from: Data(bytes)) {
                answer = wait { await handler(request) }
            } else {
                answer = ControlAnswer(
                    error: "not a request: send one JSON object a line, such as {\"command\":\"status\"}")
            }
            guard let encoded = try? JSONEncoder().encode(answer), (try? line.send([UInt8](encoded))) != nil else {
                return
            }
        }
    }

    /// Runs `work` as a task while this thread (one of the control socket's own) waits.
    private static func wait(_ work: @escaping @Sendable () async -> ControlAnswer) -> ControlAnswer {
        final class Box: Sendable { let answer = Mutex<ControlAnswer?>(nil) }
        let box = Box()
        let done = DispatchSemaphore(value: 0)
        Task {
            let answer = await work()
            box.answer.withLock { $0 = answer }
            done.signal()
        }
        done.wait()
        guard let answer = box.answer.withLock({ $0 }) else { preconditionFailure("signalled without an answer") }
        return answer
    }

    private static func listen(on path: String) throws(DaemonError) -> (FileDescriptor, SocketFile) {
        guard UnixAddress(path) != nil else {
            throw DaemonError(
                "the control socket path '\(path)' is empty or longer than 107 bytes: give a shorter one with --control"
            )
        }
        if let other = try? ControlClient(path: path) {
            _ = other
            throw DaemonError(
                "another daemon answers on the control socket '\(path)': stop it, or give another path with --control")
        }
        var existing = stat()
        if lstat(path, &existing) == 0 {
            guard existing.st_mode & S_IFMT == S_IFSOCK else {
                throw DaemonError(
                    "'\(path)' exists and is no socket: move it away, or give another path with --control")
            }
        }
        // Replaces one that is dead, and nobody else's.
        do throws(SocketError) { return try Sockets.listen(unix: path, backlog: 16) } catch {
            throw DaemonError("cannot make the control socket '\(path)': \(error)")
        }
    }
}
