// One daemon for one scratch directory. The lock is the kernel's (flock), so it goes with the process however that ends.

import Glibc

/// Why the daemon could not start or go on: what, where and what to do, in one line.
public struct DaemonError: Error, Sendable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// Holds a scratch directory for this process until it is closed or the process ends.
package final class ScratchLock: Sendable {
    private let fd: Int32

    /// Makes the directory where missing and takes it.
    /// - Throws: `DaemonError` when another live daemon has it, or it cannot be made.
    package init(directory: String) throws(DaemonError) {
        try Self.makeDirectories(directory)
        let path = directory + "/lock"
        // From here on closed by `deinit`, which runs though there be an error.
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o600)
        guard fd >= 0 else {
            throw DaemonError(
                "cannot use the scratch directory '\(directory)': \(errnoText()); give a writable one with --scratch")
        }
        guard flock(fd, LOCK_EX | LOCK_NB) == 0 else {
            let reason = errno
            var buffer = [UInt8](repeating: 0, count: 32)
            let count = max(0, pread(fd, &buffer, buffer.count, 0))
            let owner = String(decoding: buffer[..<count].prefix { $0 >= 48 && $0 <= 57 }, as: UTF8.self)
            guard reason == EWOULDBLOCK else {
                throw DaemonError("cannot lock the scratch directory '\(directory)': \(errnoText(reason))")
            }
            throw DaemonError(
                "the scratch directory '\(directory)' is in use by another daemon (pid \(owner.isEmpty ? "unknown" : owner)): "
                    + "stop that one, or give another directory with --scratch")
        }
        let pid = Array("\(getpid())\n".utf8)
        if ftruncate(fd, 0) != 0 || pwrite(fd, pid, pid.count, 0) != pid.count {
            let reason = errno
            throw DaemonError("cannot write '\(path)': \(errnoText(reason))")
        }
    }

    deinit { close(fd) }

    /// `mkdir -p`, for the daemon's user alone.
    private static func makeDirectories(_ path: String) throws(DaemonError) {
        var made = path.hasPrefix("/") ? "/" : ""
        for part in path.split(separator: "/") {
            made += part
            if mkdir(made, 0o700) != 0 && errno != EEXIST {
                throw DaemonError(
                    "cannot make the directory '\(made)': \(errnoText()); give a writable one with --scratch")
            }
            made += "/"
        }
    }
}

/// The kernel's text for an errno.
package func errnoText(_ code: Int32 = errno) -> String {
    var buffer = [CChar](repeating: 0, count: 128)
    guard strerror_r(code, &buffer, buffer.count) == 0 else { return "error \(code)" }
    return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
}
