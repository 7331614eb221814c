// A few threads for work that computes long or blocks in the kernel.

import CLinux
import Glibc

/// At most `threads` threads, made when first needed, that run closures in the order given. While the system has not even
/// one thread to give, the caller's thread does the work: late, but done.
///
/// The queue is as long as its callers make it: each caller waits for its result before it gives the next.
package final class WorkerPool: @unchecked Sendable {  // `mutex` guards all stored variables
    private let name: String
    private let limit: Int
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var queue: [@Sendable () -> Void] = []
    private var next = 0
    private var threads: [UInt] = []
    private var idle = 0
    private var isStopping = false

    private static let stackBytes = 1 << 20

    package init(name: String, threads: Int) {
        precondition(threads > 0)
        self.name = name
        limit = threads
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(condition, nil)
    }

    deinit {
        precondition(threads.isEmpty)
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    /// Makes the first thread, so that no caller ever has to do the work itself.
    /// - Throws: when the system has none to give.
    package func prepare() throws(ScratchError) {
        pthread_mutex_lock(mutex)
        let error = threads.isEmpty ? startThread() : 0
        pthread_mutex_unlock(mutex)
        if error != 0 { throw .noThread(error, for: "the \(name) pool") }
    }

    /// Runs `work` on one of the threads.
    package func run(_ work: @escaping @Sendable () -> Void) {
        pthread_mutex_lock(mutex)
        precondition(!isStopping, "work for a stopped pool")
        queue.append(work)
        if idle < queue.count - next, threads.count < limit, startThread() != 0, threads.isEmpty {
            // Without a thread nothing else is queued.
            queue.removeLast()
            pthread_mutex_unlock(mutex)
            return work()
        }
        pthread_cond_signal(condition)
        pthread_mutex_unlock(mutex)
    }

    /// Runs what is queued, then ends the threads. Returns when they have ended, but for one that calls this itself.
    package func stop() {
        pthread_mutex_lock(mutex)
        isStopping = true
        pthread_cond_broadcast(condition)
        let ending = threads
        threads = []
        pthread_mutex_unlock(mutex)
        for thread in ending {
            if thread == pthread_self() {
                _ = mg_thread_detach(thread)
            } else {
                _ = mg_thread_join(thread)
            }
        }
    }

    /// 0, or the errno: the threads that are there do the work then.
    private func startThread() -> Int32 {
        var thread: UInt = 0
        let pool = Unmanaged.passRetained(self)
        let error = Threads.start(
            { argument in
                Unmanaged<WorkerPool>.fromOpaque(argument!).takeRetainedValue().work()
                return nil
            }, pool.toOpaque(), stackBytes: WorkerPool.stackBytes, name: name, &thread)
        if error == 0 { threads.append(thread) } else { pool.release() }
        return error
    }

    private func work() {
        pthread_mutex_lock(mutex)
        while true {
            if next < queue.count {
                let work = queue[next]
                next += 1
                if next == queue.count || next >= 1024 {
                    queue.removeFirst(next)
                    next = 0
                }
                pthread_mutex_unlock(mutex)
                work()
                pthread_mutex_lock(mutex)
            } else if isStopping {
                break
            } else {
                idle += 1
                pthread_cond_wait(condition, mutex)
                idle -= 1
            }
        }
        pthread_mutex_unlock(mutex)
    }
}
