// Making threads. The system may have none to give (a limit of the container or the user, or no memory for a stack), at
// any time: that is an error for whoever asked, or the work falls to a thread that is there. It never ends the process.

import CLinux
import Glibc
import Synchronization

package enum Threads {
    /// Names that get no thread, or how these begin: for tests of what happens then.
    private static let refused = Mutex<[String]>([])

    /// Makes all threads whose name begins with `prefix` fail with EAGAIN while `body` runs. For tests.
    package static func refusing<T>(_ prefix: String, _ body: () async throws -> T) async rethrows -> T {
        refused.withLock { $0.append(prefix) }
        defer { refused.withLock { $0.removeAll { $0 == prefix } } }
        return try await body()
    }

    /// Starts a thread that runs `body` with `argument`; it must be joined or detached. 0, or the errno.
    static func start(
        _ body: @convention(c) (UnsafeMutableRawPointer?) -> UnsafeMutableRawPointer?,
        _ argument: UnsafeMutableRawPointer, stackBytes: Int, name: String, _ thread: inout UInt
    ) -> Int32 {
        if refused.withLock({ $0.contains { name.hasPrefix($0) } }) { return EAGAIN }
        return -mg_thread_start(body, argument, stackBytes, name, &thread)
    }
}

/// Starts a thread that nobody waits for, which runs `body` and then ends; false when the system has none to give.
package func startDetachedThread(name: String, stackBytes: Int = 256 << 10, _ body: @escaping @Sendable () -> Void)
    -> Bool
{
    let box = Unmanaged.passRetained(ThreadBody(body))
    var thread: UInt = 0
    let error = Threads.start(
        { argument in
            Unmanaged<ThreadBody>.fromOpaque(argument!).takeRetainedValue().run()
            return nil
        }, box.toOpaque(), stackBytes: stackBytes, name: name, &thread)
    guard error == 0 else {
        box.release()
        return false
    }
    _ = mg_thread_detach(thread)
    return true
}

private final class ThreadBody {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
}

extension ScratchError {
    /// The system has no thread to give.
    static func noThread(_ error: Int32, for subject: String) -> ScratchError {
        ScratchError(
            errno: error,
            description: "no thread for \(subject): \(errnoText(error)); "
                + "raise the limit of threads (pids of the container, TasksMax of the service, ulimit -u)")
    }
}
