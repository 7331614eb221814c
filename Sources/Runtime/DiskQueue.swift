// The disk requests of one loop: on its io_uring, or on a few threads where there is none.
//
// Always holds: at most `limit` requests are with the kernel, the others wait in order; a completion runs on the loop,
// never within the call that made the request; a request keeps its descriptor open until then.

import CLinux
import Glibc

/// Owned by its loop.
final class DiskQueue: @unchecked Sendable {  // owned by its loop's thread once that runs
    /// Set by the loop that owns this.
    unowned(unsafe) var loop: Loop!
    private var ring: OpaquePointer?
    let ringRefusal: String?

    private var underWay = 0
    private var unsubmitted = 0
    private var waiting: [DiskOperation] = []
    private var nextWaiting = 0
    private let completions = UnsafeMutablePointer<mg_completion>.allocate(capacity: DiskQueue.limit)
    private(set) var mustRetrySubmit = false

    /// Requests with the kernel at once.
    static let limit = 128
    private static let pool = WorkerPool(name: "scratch", threads: 4)

    init(ring wanted: Bool) {
        var ring: OpaquePointer?
        let error = wanted ? mg_ring_create(UInt32(DiskQueue.limit), &ring) : -ENOSYS
        self.ring = error == 0 ? ring : nil
        ringRefusal = error == 0 ? nil : DiskQueue.refusal(-error)
    }

    deinit {
        close()
        completions.deallocate()
    }

    private static func refusal(_ errno: Int32) -> String {
        let remedy =
            errno == ENOMEM
            ? "raise the limit of locked memory (ulimit -l)"
            : "allow it in the container's seccomp profile and set sysctl kernel.io_uring_disabled=0"
        return "io_uring can't be used (\(errnoText(errno))), so scratch I/O goes to threads and costs more CPU: "
            + remedy
    }

    /// Polls readable while completions wait; nil without a ring.
    var ringDescriptor: Int32? { ring.map { mg_ring_fd($0) } }
    var isIdle: Bool { underWay == 0 && nextWaiting == waiting.count }

    func close() {
        precondition(isIdle)
        if let ring { mg_ring_destroy(ring) }
        ring = nil
    }

    /// Begins `operation` with the end of this turn.
    func start(_ operation: DiskOperation) {
        if underWay < DiskQueue.limit {
            issue(operation)
        } else {
            waiting.append(operation)
        }
    }

    private func issue(_ operation: DiskOperation) {
        underWay += 1
        let reference = Unmanaged.passRetained(operation)
        if let ring {
            let queued = operation.prepare(on: ring, data: UInt64(UInt(bitPattern: reference.toOpaque())))
            precondition(queued, "the ring has a place for each request under way")
            unsubmitted += 1
        } else {
            performOnThread(reference)
        }
    }

    private func performOnThread(_ reference: Unmanaged<DiskOperation>) {
        DiskQueue.pool.run { [loop = loop!] in
            let result = reference._withUnsafeGuaranteedRef { $0.perform() }
            loop.post { loop.disk.completed(reference.takeRetainedValue(), result) }
        }
    }

    private func completed(_ operation: DiskOperation, _ result: Int) {
        // Nobody here cancels: the kernel does when it can make no thread for a call that has to wait.
        if result == -Int(ECANCELED) { return performOnThread(Unmanaged.passRetained(operation)) }
        underWay -= 1
        switch operation.advance(result) {
        case .again: issue(operation)
        case .finished(let error): operation.done(error)
        }
        while underWay < DiskQueue.limit, nextWaiting < waiting.count {
            let next = waiting[nextWaiting]
            nextWaiting += 1
            if nextWaiting == waiting.count || nextWaiting >= 1024 {
                waiting.removeFirst(nextWaiting)
                nextWaiting = 0
            }
            issue(next)
        }
    }

    /// Runs the completions that are there.
    func reap() {
        guard let ring, underWay > 0 else { return }
        let count = Int(mg_ring_reap(ring, completions, UInt32(DiskQueue.limit)))
        for index in 0..<count {
            let completion = completions[index]
            let reference = UnsafeRawPointer(bitPattern: UInt(completion.data))!
            completed(Unmanaged<DiskOperation>.fromOpaque(reference).takeRetainedValue(), Int(completion.result))
        }
    }

    /// Hands this turn's requests to the kernel, in one call.
    func submit() {
        guard let ring, unsubmitted > 0 else { return }
        let taken = mg_ring_submit(ring)
        if taken >= 0 {
            unsubmitted -= Int(taken)
        } else {
            precondition(
                [EAGAIN, EBUSY, EINTR, ENOMEM, ENOBUFS].contains(-taken), "io_uring_enter: \(errnoText(-taken))")
        }
        mustRetrySubmit = unsubmitted > 0
    }
}
