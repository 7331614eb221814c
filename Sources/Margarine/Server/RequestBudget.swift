// The memory that the connections of all loops share, beyond what each has of its own.
//
// Always holds:
// - A connection takes more only while what it then holds is at most half of what its group may still take; a group only
//   while what it then holds is at most what stays free. So n greedy connections get the n-th parts, something is left for
//   whoever comes next, and who is slow has his own share full and waits for himself: others pass him by.
// - Two exceptions, each for one connection at a time, so that every request is served however large: the oldest who waits
//   may exceed his share once so much is free; one who is in the middle of a payload (he holds memory that only its end sets
//   free) may overdraw the budget. An exception is over when as much was given back as it was granted.
// - While the oldest waits for memory to come free that his exception needs, only those who hold nothing are given any.
// - Whoever holds memory can go on without more of it, but for those in the middle of a payload. So there is always
//   somebody who can finish, unless his client stalls: then he is cut.
// - The budget is overdrawn by one payload, and by what `force` takes for replies already owed; no more.

import Synchronization

/// A counter of bytes with a waiting line. Called from any loop.
final class RequestBudget: Sendable {
    /// What the connections of one client address hold.
    fileprivate final class Group {
        let name: String
        var held = 0
        var accounts = 0
        init(_ name: String) { self.name = name }
    }

    /// What one connection holds. Everything in it is guarded by the lock of its budget.
    final class Account: @unchecked Sendable {
        fileprivate let group: Group
        fileprivate var held = 0
        /// Of an exception: what has to be given back until it is over.
        fileprivate var exempt = 0
        fileprivate init(_ group: Group) { self.group = group }
    }

    private struct Waiter {
        var id: UInt64
        var bytes: Int
        var account: Account
        var granted: @Sendable () -> Void
    }

    private struct State {
        var available: Int
        var groups: [String: Group] = [:]
        var finishing: [Waiter] = []
        var waiting: [Waiter] = []
        var nextID: UInt64 = 1
        /// Who exceeds his share, and who overdraws.
        var exceeding: Account?
        var overdrawing: Account?
        var prefersOldest = false

        var isEmpty: Bool { finishing.isEmpty && waiting.isEmpty }

        /// The oldest one's exception waits for memory.
        var isCollecting: Bool {
            guard exceeding == nil, let oldest = waiting.first else { return false }
            return oldest.bytes > available
        }

        func fits(_ bytes: Int, _ account: Account) -> Bool {
            guard bytes <= available else { return false }
            if account.held > 0, isCollecting { return false }
            // Exceptions are in nobody's way: they count as if they were not there.
            let free = available + (exceeding?.exempt ?? 0) + (overdrawing?.exempt ?? 0)
            let group = account.group
            let ofGroup = group.held - exempt(exceeding, in: group) - exempt(overdrawing, in: group)
            let room = (free - ofGroup) / 2
            return account.held + bytes <= room - bytes
        }

        private func exempt(_ account: Account?, in group: Group) -> Int {
            guard let account, account.group === group else { return 0 }
            return account.exempt
        }

        mutating func take(_ bytes: Int, _ account: Account) {
            available -= bytes
            account.held += bytes
            account.group.held += bytes
        }

        mutating func give(_ bytes: Int, _ account: Account) {
            take(-bytes, account)
            guard account.exempt > 0 else { return }
            account.exempt -= bytes
            if account.exempt > 0, account.held > 0 { return }
            account.exempt = 0
            if exceeding === account { exceeding = nil }
            if overdrawing === account { overdrawing = nil }
        }

        /// By turns the oldest, and the one whose group (then which itself) holds least: clients that stall, each of which keeps
        /// the exception until it is cut, do not all come before one from elsewhere.
        private mutating func nextToOverdraw() -> Int? {
            // Who exceeds his share may need this too to come to an end: nobody else's end would help him.
            let places = finishing.indices.filter {
                finishing[$0].account.exempt == 0 || finishing[$0].account === exceeding
            }
            if places.isEmpty { return nil }
            prefersOldest.toggle()
            return prefersOldest
                ? places[0]
                : places.min {
                    let (a, b) = (finishing[$0].account, finishing[$1].account)
                    return (a.group.held, a.held) < (b.group.held, b.held)
                }
        }

        /// Those who can have now what they wait for.
        mutating func grant() -> [Waiter] {
            var granted: [Waiter] = []
            finishing = finishing.filter { waiter in
                guard fits(waiter.bytes, waiter.account) else { return true }
                take(waiter.bytes, waiter.account)
                granted.append(waiter)
                return false
            }
            // Before the next overdraft, which would take what it has waited for.
            if let oldest = waiting.first, exceeding == nil, oldest.account.exempt == 0, oldest.bytes <= available,
                !fits(oldest.bytes, oldest.account)
            {
                take(oldest.bytes, oldest.account)
                exceeding = oldest.account
                oldest.account.exempt = oldest.bytes
                granted.append(waiting.removeFirst())
            }
            if overdrawing == nil, let place = nextToOverdraw() {
                let waiter = finishing.remove(at: place)
                take(waiter.bytes, waiter.account)
                overdrawing = waiter.account
                waiter.account.exempt += waiter.bytes
                granted.append(waiter)
            }
            waiting = waiting.filter { waiter in
                guard fits(waiter.bytes, waiter.account) else { return true }
                take(waiter.bytes, waiter.account)
                granted.append(waiter)
                return false
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
    /// For tests and figures; negative while overdrawn.
    var availableBytes: Int { state.withLock { $0.available } }

    /// For a connection of a client address.
    func open(_ group: String) -> Account {
        state.withLock { state in
            let found = state.groups[group] ?? Group(group)
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
    /// this returns. With `finishing` they complete a payload. An account waits for one thing at a time.
    func wait(_ bytes: Int, _ account: Account, finishing: Bool, granted: @escaping @Sendable () -> Void) -> UInt64 {
        var id: UInt64 = 0
        var isFirst = false
        settle { state in
            isFirst = state.isEmpty
            id = state.nextID
            state.nextID += 1
            let waiter = Waiter(id: id, bytes: bytes, account: account, granted: granted)
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
        let granted = state.withLock { state -> [Waiter] in
            change(&state)
            if state.isEmpty {
                contended.store(false, ordering: .relaxed)
                return []
            }
            let granted = state.grant()
            contended.store(!state.isEmpty, ordering: .relaxed)
            return granted
        }
        for waiter in granted { waiter.granted() }
    }
}
