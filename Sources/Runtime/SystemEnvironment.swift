// The real clock, the kernel's randomness, and threads for long computations.

import CLinux
import Synchronization

/// The environment of a daemon.
public final class SystemEnvironment: Environment {
    private let workers: WorkerPool
    private let random = Mutex(RandomWords())

    /// `workers` threads at most for `offload`, made when first needed.
    public init(workers: Int) {
        self.workers = WorkerPool(name: "worker", threads: workers)
    }

    deinit {
        // Nobody waits for a result any more: a waiting call would hold this object.
        workers.stop()
    }

    public var nowNs: UInt64 { mg_monotonic_ns() }
    public var wallMs: Int64 { mg_realtime_ms() }
    public func randomBits() -> UInt64 { random.withLock { $0.next() } }

    public func sleep(ns: UInt64) async {
        guard let loop = Loop.current else {
            try? await Task.sleep(nanoseconds: ns)
            return
        }
        await loop.sleep(ns: ns)
    }

    public func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        await withCheckedContinuation { continuation in
            workers.run { continuation.resume(returning: work()) }
        }
    }
}

/// Lets all threads share two heaps, so that memory which one has freed is had by the others: for commands that promise to do
/// with little, before they start threads.
package func shareHeaps() { mg_limit_heaps(2) }

/// Gives free memory of the heap back to the system. Takes milliseconds, so not on a loop.
package func trimHeap() { mg_trim_heap() }

extension Loop {
    /// Returns on this loop after at least `ns` nanoseconds, or when the task is cancelled. Loop only.
    func sleep(ns: UInt64) async {
        let sleeper = Sleeper()
        await withTaskCancellationHandler {
            await withCheckedContinuation { continuation in
                guard sleeper.begin(continuation) else { return }
                sleeper.timer = after(ns: ns) { sleeper.end() }
            }
        } onCancel: {
            sleeper.end()
            self.post { sleeper.timer?.cancel() }
        }
        sleeper.timer = nil
    }
}

/// One sleeping task: woken once, by its timer or by its cancellation, whichever is first.
private final class Sleeper: @unchecked Sendable {  // `state` is locked, `timer` owned by the loop
    private enum State {
        case new
        case sleeping(CheckedContinuation<Void, Never>)
        case over
    }
    private let state = Mutex<State>(.new)
    var timer: LoopTimer?

    /// false: cancelled already, and resumed.
    func begin(_ continuation: CheckedContinuation<Void, Never>) -> Bool {
        let mayBegin = state.withLock { state in
            guard case .new = state else { return false }
            state = .sleeping(continuation)
            return true
        }
        if !mayBegin { continuation.resume() }
        return mayBegin
    }

    func end() {
        let continuation = state.withLock { state -> CheckedContinuation<Void, Never>? in
            defer { state = .over }
            guard case .sleeping(let continuation) = state else { return nil }
            return continuation
        }
        continuation?.resume()
    }
}

/// Words from the kernel's random source, fetched a page's worth of calls at a time; each is given out once and wiped.
private struct RandomWords {
    private var words = [UInt64](repeating: 0, count: 64)
    private var left = 0

    mutating func next() -> UInt64 {
        if left == 0 {
            words.withUnsafeMutableBytes { mg_random($0.baseAddress, $0.count) }
            left = words.count
        }
        left -= 1
        defer { words[left] = 0 }
        return words[left]
    }
}
