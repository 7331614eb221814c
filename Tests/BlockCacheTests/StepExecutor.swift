// A world of one thread for tests: tasks, completions and a clock that move only when told to, in an order that a
// seed decides.

import Runtime
import Synchronization

/// Runs jobs one by one on the thread that asks for it: nothing else may be needed to get on.
final class StepExecutor: TaskExecutor, @unchecked Sendable {  // the queue is locked
    private enum Step {
        case job(UnownedJob)
        case work(@Sendable () -> Void)
    }
    private let steps = Mutex<[Step]>([])
    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        steps.withLock { $0.append(.job(job)) }
    }
    func post(_ work: @escaping @Sendable () -> Void) { steps.withLock { $0.append(.work(work)) } }

    /// Takes up to `limit` steps, picked among what is ready; how many were taken.
    func run(_ random: inout Random, limit: Int = .max) -> Int {
        var count = 0
        while count < limit,
            let step = steps.withLock({
                $0.isEmpty ? nil : $0.remove(at: Int.random(in: 0..<$0.count, using: &random))
            })
        {
            count += 1
            switch step {
            case .job(let job): job.runSynchronously(on: asUnownedTaskExecutor())
            case .work(let work): work()
            }
        }
        return count
    }
}

final class StepEnvironment: Environment {
    private let time = Mutex<UInt64>(1)
    /// How far each look at the clock moves it.
    private let tickNs: UInt64
    init(tickNs: UInt64 = 1) { self.tickNs = tickNs }
    var nowNs: UInt64 {
        time.withLock {
            $0 += tickNs
            return $0
        }
    }
    var wallMs: Int64 { 0 }
    func randomBits() -> UInt64 { nowNs &* 0x9E37_79B9_7F4A_7C15 }
    func sleep(ns: UInt64) async { await Task.yield() }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        await Task.yield()
        return work()
    }
}

final class Counter: Sendable {
    private let count = Mutex(0)
    var value: Int { count.withLock { $0 } }
    func add(_ n: Int) { count.withLock { $0 += n } }
}
