// The owner of one kernel descriptor.

import Glibc
import Synchronization

/// A descriptor that is closed once: by `close`, or when the last reference goes.
public final class FileDescriptor: Sendable {
    private let number: Atomic<Int32>

    /// Takes over `raw`, which must be open and owned by nobody else.
    public init(owning raw: Int32) {
        precondition(raw >= 0)
        number = Atomic(raw)
    }

    /// The number for system calls; -1 once closed.
    public var raw: Int32 { number.load(ordering: .relaxed) }

    /// Closes now. Unwatch it first, and let no other thread be using it. Further calls do nothing.
    public func close() {
        let fd = number.exchange(-1, ordering: .acquiringAndReleasing)
        if fd >= 0 { _ = Glibc.close(fd) }
    }

    deinit { close() }
}
