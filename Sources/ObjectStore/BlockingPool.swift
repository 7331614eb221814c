// Threads for calls that block (files) or compute long (digests), so that neither a loop nor the cooperative pool
// ever does. The queue holds at most one piece of work for each call in flight.

import CLinux
import Glibc

/// A bounded number of threads, made when there is work for them and ended with the pool.
final class BlockingPool: Sendable {
    private let core: Core

    /// - Parameter threads: how many pieces of work run at once at most.
    init(name: String, threads: Int) {
        precondition(threads > 0)
        core = Core(name: name, limit: threads)
    }

    deinit { core.stop() }

    /// Runs `work` on a thread of the pool and returns what it gives on the caller's executor.
    func run<T: Sendable>(_ work: @escaping @Sendable () throws(StoreError) -> T) async throws(StoreError) -> T {
        let result: Result<T, StoreError> = await withUnsafeContinuation { continuation in
            core.submit { continuation.resume(returning: Result { () throws(StoreError) -> T in try work() }) }
        }
        return try result.get()
    }

    /// Runs `work` on a thread of the pool, some time.
    func submit(_ work: @escaping @Sendable () -> Void) { core.submit(work) }
}

/// What the pool's threads share; they keep it alive until they end.
private final class Core: @unchecked Sendable {
    // Everything below is guarded by `mutex`.
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var queue: [@Sendable () -> Void] = []
    private var head = 0
    private var threads = 0
    private var idle = 0
    private var stopping = false
    private let limit: Int
    private let name: String

    init(name: String, limit: Int) {
        self.name = name
        self.limit = limit
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(condition, nil)
    }

    deinit {
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    func submit(_ work: @escaping @Sendable () -> Void) {
        pthread_mutex_lock(mutex)
        queue.append(work)
        let startThread = idle < queue.count - head && threads < limit
        if startThread { threads += 1 }
        pthread_cond_signal(condition)
        pthread_mutex_unlock(mutex)
        if startThread { startThreadOrSay() }
    }

    func stop() {
        pthread_mutex_lock(mutex)
        stopping = true
        pthread_cond_broadcast(condition)
        pthread_mutex_unlock(mutex)
    }

    private func startThreadOrSay() {
        let started = startDetachedThread(name: name, stackBytes: 512 << 10) { self.serve() }
        if started { return }
        pthread_mutex_lock(mutex)
        threads -= 1
        // With at least one thread the queue still moves; without any there is nothing left to serve it.
        precondition(threads > 0, "the first thread of \(name) cannot be made: errno \(errno)")
        pthread_mutex_unlock(mutex)
    }

    private func serve() {
        pthread_mutex_lock(mutex)
        while true {
            if head < queue.count {
                let work = queue[head]
                head += 1
                if head == queue.count {
                    queue.removeAll(keepingCapacity: true)
                    head = 0
                } else if head >= 1024 {
                    queue.removeFirst(head)
                    head = 0
                }
                pthread_mutex_unlock(mutex)
                work()
                pthread_mutex_lock(mutex)
            } else if stopping {
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

/// Starts a thread that runs `body` and then ends; false when the system has none to give.
func startDetachedThread(name: String, stackBytes: Int, _ body: @escaping @Sendable () -> Void) -> Bool {
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    pthread_attr_setstacksize(&attributes, stackBytes)
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    let box = Unmanaged.passRetained(ThreadBody(name: name, run: body))
    var thread = pthread_t()
    let failed = pthread_create(
        &thread, &attributes,
        { argument in
            let body = Unmanaged<ThreadBody>.fromOpaque(argument!).takeRetainedValue()
            mg_name_thread(body.name)
            // Signals are for the program's own threads; and a peer that hangs up is an error, not a SIGPIPE.
            var all = sigset_t()
            sigfillset(&all)
            pthread_sigmask(SIG_BLOCK, &all, nil)
            body.run()
            return nil
        }, box.toOpaque())
    if failed != 0 { box.release() }
    return failed == 0
}

private final class ThreadBody {
    let name: String
    let run: @Sendable () -> Void
    init(name: String, run: @escaping @Sendable () -> Void) {
        self.name = String(name.prefix(15))
        self.run = run
    }
}
