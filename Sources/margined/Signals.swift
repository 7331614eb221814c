// Signals as a stream. The handler writes the number to a pipe and does nothing else; a thread reads it.

import Glibc
import Runtime

enum Signals {
    /// The pipe's write end. Set once, before the first handler is installed.
    nonisolated(unsafe) private static var writeEnd: Int32 = -1

    /// Calls `handler` for each of `numbers` that arrives, on a thread of its own, from now on.
    static func watch(_ numbers: [Int32], _ handler: @escaping @Sendable (Int32) -> Void) throws {
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw Failure("cannot make a pipe for signals") }
        for fd in ends { _ = fcntl(fd, F_SETFD, FD_CLOEXEC) }
        // A full pipe means that signals are already waiting to be read.
        _ = fcntl(ends[1], F_SETFL, O_NONBLOCK)
        writeEnd = ends[1]
        let readEnd = ends[0]
        let isWatched = startDetachedThread(name: "signals") {
            var number: UInt8 = 0
            while true {
                let count = read(readEnd, &number, 1)
                if count == 1 { handler(Int32(number)) }
                if count == 0 || (count < 0 && errno != EINTR) { return }
            }
        }
        guard isWatched else { throw Failure("no thread for signals: raise the limit of threads (pids, ulimit -u)") }
        for number in numbers {
            signal(number) { number in
                let saved = errno
                var byte = UInt8(truncatingIfNeeded: number)
                _ = write(Signals.writeEnd, &byte, 1)
                errno = saved
            }
        }
    }
}
