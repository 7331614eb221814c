// Who waits for an admission, and may go away before he has it: then nothing waits for him any more.
//
// Always holds: what is under way for an asker who has gone is finished, and nothing is begun; he stands in no line.

internal import Runtime
internal import Synchronization

/// One client that asks for a disk. Any thread may call it.
final class Asker: Sendable {
    private struct State {
        var isGone = false
        var wake: (@Sendable () -> Void)?
    }
    private let state = Mutex(State())

    func leave() {
        let wake = state.withLock { state in
            state.isGone = true
            defer { state.wake = nil }
            return state.wake
        }
        wake?()
    }

    fileprivate var isGone: Bool { state.withLock { $0.isGone } }

    func check() throws(AttachError) {
        if isGone { throw AttachError(.unavailable, "the client went away") }
    }

    /// Calls `wake` when he goes away, or at once if he has; nil: he waits no longer.
    fileprivate func whenGone(_ wake: (@Sendable () -> Void)?) {
        let isGone = state.withLock { state in
            state.wake = state.isGone ? nil : wake
            return state.isGone
        }
        if isGone { wake?() }
    }
}

/// Askers that wait for the same thing, each until it comes or he goes away. Any thread may call it.
final class AskerLine: Sendable {
    private struct State {
        var waiting: [UInt64: CheckedContinuation<Void, Never>] = [:]
        var count: UInt64 = 0
        var isClosed = false
    }
    private let state = Mutex(State())

    /// Returns when it comes, or when the asker goes away.
    func wait(_ asker: Asker) async {
        let number = state.withLock { state in
            state.count += 1
            return state.count
        }
        // Before he stands in line: afterwards he may be elsewhere already.
        asker.whenGone { [weak self] in self?.wake(number) }
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            let isOver = state.withLock { state in
                if !state.isClosed { state.waiting[number] = continuation }
                return state.isClosed
            }
            if isOver { return continuation.resume() }
            if asker.isGone { wake(number) }
        }
        asker.whenGone(nil)
    }

    private func wake(_ number: UInt64) { state.withLock { $0.waiting.removeValue(forKey: number) }?.resume() }

    /// It has come; who asks later waits for the next time.
    func wakeAll() {
        let waiting = state.withLock { state in
            defer { state.waiting = [:] }
            return state.waiting
        }
        for (_, continuation) in waiting.sorted(by: { $0.key < $1.key }) { continuation.resume() }
    }

    /// It has come for good.
    func close() {
        state.withLock { $0.isClosed = true }
        wakeAll()
    }
}
