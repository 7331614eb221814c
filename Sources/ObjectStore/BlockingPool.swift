// Threads for calls that block (files) or compute long (digests), so that neither a loop nor the cooperative pool
// ever does. The queue holds at most one piece of work for each call in flight.

import Runtime

/// A bounded number of threads, made when there is work for them and ended with the pool.
final class BlockingPool: Sendable {
    private let workers: WorkerPool

    /// - Parameter threads: how many pieces of work run at once at most.
    init(name: String, threads: Int) { workers = WorkerPool(name: name, threads: threads) }

    deinit { workers.stop() }

    /// Makes the first thread.
    /// - Throws: when the system has none to give.
    func prepare() throws(StoreError) {
        do throws(ScratchError) { try workers.prepare() } catch { throw StoreError(.unavailable, error.description) }
    }

    /// Runs `work` on a thread of the pool and returns what it gives on the caller's executor.
    func run<T: Sendable>(_ work: @escaping @Sendable () throws(StoreError) -> T) async throws(StoreError) -> T {
        let result: Result<T, StoreError> = await withUnsafeContinuation { continuation in
            workers.run { continuation.resume(returning: Result { () throws(StoreError) -> T in try work() }) }
        }
        return try result.get()
    }
}
