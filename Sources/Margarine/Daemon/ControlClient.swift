// The other end of the control socket, and what both ends share: an address, and lines with a limit on length and time.

import Foundation
import Glibc

/// Asks a running daemon over its control socket.
public final class ControlClient: Sendable {
    private let fd: Int32
    private let path: String

    /// - Throws: `DaemonError` when no daemon listens there.
    public init(path: String) throws(DaemonError) {
        self.path = path
        guard let address = UnixAddress(path) else {
            throw DaemonError("the control socket path '\(path)' is empty or longer than 107 bytes")
        }
        fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard fd >= 0 else { throw DaemonError("cannot make a socket: \(errnoText())") }
        // A daemon that stands still accepts nobody.
        _ = ControlLine(fd: fd, patienceSeconds: 5)
        guard address.connect(fd) == 0 else {
            // Closed by `deinit`, which runs though this is an error.
            let reason = errno
            switch reason {
            case ENOENT, ECONNREFUSED:
                throw DaemonError(
                    "no daemon listens on '\(path)': start one, or name its --scratch, --control or --config")
            case EACCES:
                throw DaemonError("no permission for '\(path)': ask as the user who runs the daemon, or as root")
            case EAGAIN:
                throw DaemonError("the daemon at '\(path)' does not answer: it stands still, or is asked by too many")
            default: throw DaemonError("cannot connect to '\(path)': \(errnoText(reason))")
            }
        }
    }

    deinit { Glibc.close(fd) }

    /// Sends one request and waits for its answer, up to half a minute.
    /// - Throws: `DaemonError` when the daemon refuses, or does not answer.
    public func ask(_ request: ControlRequest) throws(DaemonError) -> ControlAnswer {
        let line = ControlLine(fd: fd, patienceSeconds: 30)
        do {
            try line.send([UInt8](JSONEncoder().encode(request)))
            guard let bytes = try line.receive(limitBytes: ControlAnswer.limitBytes) else {
                throw DaemonError("the daemon at '\(path)' closed the connection without an answer: see its log")
            }
            let answer = try JSONDecoder().decode(ControlAnswer.self, from: Data(bytes))
            if let error = answer.error { throw DaemonError("the daemon at '\(path)' says: \(error)") }
            return answer
        } catch let error as DaemonError {
            throw error
        } catch {
            throw DaemonError(
                "the daemon at '\(path)' answers something else than this version understands: use its own margined")
        }
    }
}

/// Lines over a connected socket. Waits at most `patienceSeconds` for the other side at each step.
struct ControlLine {
    let fd: Int32

    init(fd: Int32, patienceSeconds: Int) {
        self.fd = fd
        var time = timeval(tv_sec: patienceSeconds, tv_usec: 0)
        for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
            setsockopt(fd, SOL_SOCKET, option, &time, socklen_t(MemoryLayout<timeval>.size))
        }
    }

    /// The next line without its end; nil when the other side closed before it was complete.
    /// - Throws: when it is too long, or the other side too slow.
    func receive(limitBytes: Int) throws(DaemonError) -> [UInt8]? {
        var line: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 64 << 10)
        while true {
            let count = recv(fd, &chunk, chunk.count, 0)
            if count == 0 { return nil }
            if count < 0 {
                if errno == EINTR { continue }
                throw DaemonError("no answer on the control socket: \(errnoText())")
            }
            // One request is answered before the next is sent: nothing follows the end of a line.
            if let end = chunk[..<count].firstIndex(of: UInt8(ascii: "\n")) {
                line += chunk[..<end]
                return line
            }
            line += chunk[..<count]
            if line.count > limitBytes {
                throw DaemonError("a line on the control socket is longer than \(limitBytes) bytes")
            }
        }
    }

    func send(_ bytes: [UInt8]) throws(DaemonError) {
        let line = bytes + [UInt8(ascii: "\n")]
        var sent = 0
        while sent < line.count {
            let count = line[sent...].withUnsafeBytes { Glibc.send(fd, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            if count < 0 {
                if errno == EINTR { continue }
                throw DaemonError("cannot write to the control socket: \(errnoText())")
            }
            sent += count
        }
    }
}

/// A path as a socket address.
struct UnixAddress {
    private var address = sockaddr_un()

    /// nil for a path that is empty or does not fit.
    init?(_ path: String) {
        let bytes = Array(path.utf8)
        let room = MemoryLayout.size(ofValue: address.sun_path)
        guard !bytes.isEmpty, bytes.count < room, !bytes.contains(0) else { return nil }
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
    }

    func connect(_ fd: Int32) -> Int32 { with { Glibc.connect(fd, $0, $1) } }

    private func with(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
        withUnsafePointer(to: address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
    }
}
