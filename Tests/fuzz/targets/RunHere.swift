// Async code on the thread that wants its result.

import Runtime
import Synchronization

/// Runs jobs one after the other on the thread that calls `run`.
final class HereExecutor: TaskExecutor, @unchecked Sendable {  // the queue is locked
    private enum Step {
        case job(UnownedJob)
        case work(@Sendable () -> Void)
    }
    private let steps = Mutex<[Step]>([])

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        steps.withLock { $0.append(.job(job)) }
    }

    /// For completions of scratch files.
    func post(_ work: @escaping @Sendable () -> Void) { steps.withLock { $0.append(.work(work)) } }

    /// The result of `work`, which must not wait for any other thread.
    func run<T: Sendable>(_ work: @escaping @Sendable () async throws -> T) throws -> T {
        let result = Mutex<Result<T, any Error>?>(nil)
        Task(executorPreference: self) {
            let outcome: Result<T, any Error>
            do { outcome = .success(try await work()) } catch { outcome = .failure(error) }
            result.withLock { $0 = outcome }
        }
        while let step = steps.withLock({ $0.isEmpty ? nil : $0.removeFirst() }) {
            switch step {
            case .job(let job): job.runSynchronously(on: asUnownedTaskExecutor())
            case .work(let work): work()
            }
        }
        guard let outcome = result.withLock({ $0 }) else { throw Finding("it waits for something that does not come") }
        return try outcome.get()
    }
}
