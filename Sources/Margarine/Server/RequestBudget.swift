// The memory that the connections of all loops share, beyond what each has of its own.
//
// Always holds:
// - While anybody waits, nobody overtakes: those who are in the middle of a payload come first (they hold memory that
//   only its end sets free), then the others, each in the order of their coming.
// - Whoever holds memory can go on without more of it, but for those in the middle of a payload; of these one at a time
//   may overdraw. So there is always somebody who can finish, unless his client stalls: then he is cut.
// - The budget is overdrawn by that one payload, and by what `force` takes for replies already owed; no more.

import Synchronization

/// A counter of bytes with a waiting line. Called from any loop; loops take and give in large steps.
final class RequestBudget: Sendable {
    private struct Waiter {
        var id: UInt64
        var bytes: Int
        var granted: @Sendable (_ isOverdraft: Bool) -> Void
    }

    private struct State {
        var available: Int
        var finishing: [Waiter] = []
        var waiting: [Waiter] = []
        var nextID: UInt64 = 1
        var isOverdrawn = false

        var isEmpty: Bool { finishing.isEmpty && waiting.isEmpty }
    }

    private let state: Mutex<State>
    /// Written under the lock, read anywhere.
    private let contended = Atomic<Bool>(false)
    /// Called when the first one has to wait, on his thread.
    private let onContention: @Sendable () -> Void

    init(bytes: Int, onContention: @escaping @Sendable () -> Void) {
        state = Mutex(State(available: bytes))
        self.onContention = onContention
    }

    /// Whether anybody waits.
    var isContended: Bool { contended.load(ordering: .relaxed) }
    /// For tests and figures; negative while overdrawn.
    var availableBytes: Int { state.withLock { $0.available } }

    /// Takes `bytes` if they are there and nobody waits for them.
    func take(_ bytes: Int) -> Bool {
        state.withLock { state in
            guard state.isEmpty, state.available >= bytes else { return false }
            state.available -= bytes
            return true
        }
    }

    /// Takes `bytes` whether they are there or not: small things that replies already owed need.
    func force(_ bytes: Int) {
        state.withLock { $0.available -= bytes }
    }

    /// Puts `bytes` back and lets those who wait have them. `endsOverdraft`: they end a payload granted as an overdraft.
    func give(_ bytes: Int, endsOverdraft: Bool = false) {
        settle { state in
            state.available += bytes
            if endsOverdraft { state.isOverdrawn = false }
        }
    }

    /// Stands in line for `bytes`; `granted` is called once, when they are the caller's, on any thread, perhaps before
    /// this returns. With `finishing` they complete a payload, and may come as an overdraft: then the caller ends it by
    /// `give(_:endsOverdraft:)` once that request's memory comes back.
    func wait(_ bytes: Int, finishing: Bool, granted: @escaping @Sendable (_ isOverdraft: Bool) -> Void) -> UInt64 {
        var id: UInt64 = 0
        var isFirst = false
        settle { state in
            isFirst = state.isEmpty
            id = state.nextID
            state.nextID += 1
            let waiter = Waiter(id: id, bytes: bytes, granted: granted)
            if finishing { state.finishing.append(waiter) } else { state.waiting.append(waiter) }
        }
        if isFirst { onContention() }
        return id
    }

    /// Leaves the line. False if the grant is on its way already: it has to be given back.
    func cancel(_ id: UInt64) -> Bool {
        var found = false
        settle { state in
            let before = state.finishing.count + state.waiting.count
            state.finishing.removeAll { $0.id == id }
            state.waiting.removeAll { $0.id == id }
            found = state.finishing.count + state.waiting.count < before
        }
        return found
    }

    private func settle(_ change: (inout State) -> Void) {
        var granted: [(waiter: Waiter, isOverdraft: Bool)] = []
        state.withLock { state in
            change(&state)
            while let first = state.finishing.first {
                let isOverdraft = state.available < first.bytes
                if isOverdraft && state.isOverdrawn { break }
                if isOverdraft { state.isOverdrawn = true }
                state.available -= first.bytes
                granted.append((state.finishing.removeFirst(), isOverdraft))
            }
            while state.finishing.isEmpty, let first = state.waiting.first, state.available >= first.bytes {
                state.available -= first.bytes
                granted.append((state.waiting.removeFirst(), false))
            }
            contended.store(!state.isEmpty, ordering: .relaxed)
        }
        for (waiter, isOverdraft) in granted { waiter.granted(isOverdraft) }
    }
}
