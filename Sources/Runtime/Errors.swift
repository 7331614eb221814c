// How a failed system call reads.

import Glibc

/// The system's words for an errno.
package func errnoText(_ errno: Int32) -> String { String(cString: strerror(errno)) }

extension ScratchError {
    init(_ errno: Int32, _ call: String, _ subject: String) {
        self.init(errno: errno, description: "\(call) \(subject): \(errnoText(errno))\(ScratchError.advice(errno))")
    }

    private static func advice(_ errno: Int32) -> String {
        switch errno {
        case ENOSPC, EDQUOT: "; free some space there, or use another --scratch"
        case EMFILE, ENFILE: "; raise the limit of open files (ulimit -n)"
        case EROFS: "; the file system is mounted read-only"
        default: ""
        }
    }
}

/// Why a socket call failed: the errno, with the call and address for people.
public struct SocketError: Error, Sendable, CustomStringConvertible {
    public let errno: Int32
    public let description: String
    public init(errno: Int32, description: String) {
        self.errno = errno
        self.description = description
    }
    init(_ errno: Int32, _ call: String, _ subject: String) {
        self.init(errno: errno, description: "\(call) \(subject): \(errnoText(errno))")
    }
}
