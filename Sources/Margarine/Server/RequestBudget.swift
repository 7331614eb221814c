// The memory that the connections of all loops share, beyond what each has of its own.
//
// Always holds:
// - A connection takes more only while what it then holds is at most half of what its group may still take; a group only
//   while what it then holds is at most what stays free. So n greedy connections get the n-th parts, something is left for
//   whoever comes next, and who is slow has his own share full and waits for himself: others pass him by.
// - Who waits holds little: a request takes all that it needs at once, a write when the beginning of its payload has come.
//   Those who hold much go on without more, unless their clients stall; then they are cut, all at once.
// - One exception at a time, so that every request is served however large: one of those who wait gets what he needs beside
//   the budget, so it takes nothing from others. It holds for the whole of a request, also where the rest of its payload is
//   asked for later, and is over when as much was given back. Groups take turns at it, so whoever stalls with it is in the
//   way of his own.
// - The budget is exceeded by one request, and by what `force` takes for replies already owed; no more.

import Synchronization

/// A counter of bytes with a waiting line. Called from any loop.
final class RequestBudget: Sendable {
    /// What the connections of one client address hold.
    fileprivate final class Group {
        let name: String
        var held = 0
        var accounts = 0
        /// The number of its last exception. Who is new comes before the last that had one, and behind those who wait already.
        var turn: UInt64
        init(_ name: String, turn: UInt64) {
            self.name = name
            self.turn = turn
        }
    }

    /// What one connection holds. Everything in it is guarded by the lock of its budget.
    final class Account: @unchecked Sendable {
        fileprivate let group: Group
        fileprivate var held = 0
        /// What it has beside the budget, and gives back first.
        fileprivate var exempt = 0
        /// What it may still have beside the budget for the request that has the exception.
        fileprivate var allowance = 0
        fileprivate init(_ group: Group) { self.group = group }
    }

    private struct Waiter {
        var id: UInt64
        var bytes: Int
        /// What the same request will ask for later.
        var later: Int
        var account: Account
        var granted: @Sendable () -> Void
    }

    private struct State {
        /// Of the budget, without the exception.
        var available: Int
        var groups: [String: Group] = [:]
        /// In the order of their coming.
        var waiting: [Waiter] = []
        var nextID: UInt64 = 1
        /// Who has the exception.
        var exception: Account?
        var turns: UInt64 = 0

        func fits(_ bytes: Int, _ account: Account) -> Bool {
            guard bytes <= available else { return false }
            let group = account.group
            let exempt = exception?.group === group ? exception?.exempt ?? 0 : 0
            let room = (available - (group.held - exempt)) / 2
            return account.held + bytes <= room - bytes
        }

        mutating func take(_ bytes: Int, _ account: Account) {
            available -= bytes
            account.held += bytes
            account.group.held += bytes
        }

        mutating func give(_ bytes: Int, _ account: Account) {
            take(-bytes, account)
            guard account.exempt > 0 else { return }
            let repaid = min(bytes, account.exempt)
            available -= repaid
            account.exempt -= repaid
            if account.exempt == 0 {
                account.allowance = 0
                exception = nil
            }
        }

        /// Takes what the waiter at `place` needs beside the budget.
        private mutating func except(_ place: Int) -> Waiter {
            let waiter = waiting.remove(at: place)
            take(waiter.bytes, waiter.account)
            available += waiter.bytes
            waiter.account.exempt += waiter.bytes
            return waiter
        }

        /// Whose turn it is: the oldest of the group that had the exception longest ago.
        private func nextInTurn() -> Int? {
            waiting.indices.min {
                (waiting[$0].account.group.turn, $0) < (waiting[$1].account.group.turn, $1)
            }
        }

        /// Those who can have now what they wait for.
        mutating func grant() -> [Waiter] {
            var granted: [Waiter] = []
            waiting = waiting.filter { waiter in
                guard fits(waiter.bytes, waiter.account) else { return true }
                take(waiter.bytes, waiter.account)
                granted.append(waiter)
                return false
            }
            if let holder = exception {
                // He has the beginning of a payload; nobody gets the exception before he has the rest.
                if let place = waiting.firstIndex(where: { $0.account === holder && $0.bytes <= holder.allowance }) {
                    holder.allowance = 0
                    granted.append(except(place))
                }
            } else if let place = nextInTurn() {
                let waiter = except(place)
                turns += 1
                waiter.account.group.turn = turns
                waiter.account.allowance = waiter.later
                exception = waiter.account
                granted.append(waiter)
            }
            return granted
        }
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
    /// For tests and figures; negative while exceeded.
    var availableBytes: Int { state.withLock { $0.available - ($0.exception?.exempt ?? 0) } }

    /// For a connection of a client address.
    func open(_ group: String) -> Account {
        state.withLock { state in
            let found = state.groups[group] ?? Group(group, turn: max(state.turns, 1) - 1)
            state.groups[group] = found
            found.accounts += 1
            return Account(found)
        }
    }

    /// The connection is over; what it was granted too late may still come back.
    func close(_ account: Account) {
        state.withLock { state in
            account.group.accounts -= 1
            if account.group.accounts == 0, state.groups[account.group.name] === account.group {
                state.groups[account.group.name] = nil
            }
        }
    }

    /// Takes `bytes` if its share allows it.
    func take(_ bytes: Int, _ account: Account) -> Bool {
        state.withLock { state in
            guard state.fits(bytes, account) else { return false }
            state.take(bytes, account)
            return true
        }
    }

    /// Takes `bytes` whether they are there or not: small things that replies already owed need.
    func force(_ bytes: Int, _ account: Account) {
        state.withLock { $0.take(bytes, account) }
    }

    /// Puts `bytes` back and lets those who wait have them.
    func give(_ bytes: Int, _ account: Account) {
        settle { $0.give(bytes, account) }
    }

    /// Stands in line for `bytes`; `granted` is called once, when they are the caller's, on any thread, perhaps before
    /// this returns. An account waits for one thing at a time. `later` bytes more will be asked for by the same request.
    func wait(_ bytes: Int, later: Int = 0, _ account: Account, granted: @escaping @Sendable () -> Void) -> UInt64 {
        var id: UInt64 = 0
        var isFirst = false
        settle { state in
            isFirst = state.waiting.isEmpty
            id = state.nextID
            state.nextID += 1
            state.waiting.append(Waiter(id: id, bytes: bytes, later: later, account: account, granted: granted))
        }
        if isFirst, isContended { onContention() }
        return id
    }

    /// Leaves the line. False if the grant is on its way already: it has to be given back.
    func cancel(_ id: UInt64) -> Bool {
        var found = false
        settle { state in
            let before = state.waiting.count
            state.waiting.removeAll { $0.id == id }
            found = state.waiting.count < before
        }
        return found
    }

    private func settle(_ change: (inout State) -> Void) {
        let granted = state.withLock { state -> [Waiter] in
            change(&state)
            if state.waiting.isEmpty {
                contended.store(false, ordering: .relaxed)
                return []
            }
            let granted = state.grant()
            contended.store(!state.waiting.isEmpty, ordering: .relaxed)
            return granted
        }
        for waiter in granted { waiter.granted() }
    }
}
