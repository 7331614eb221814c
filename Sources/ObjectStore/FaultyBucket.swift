// Makes a bucket fail in chosen ways, for tests and the simulator: before or after the effect, late, with damaged
// bytes, or not until it is let go on.

public import Runtime
import Synchronization

/// A wrong that is done to some calls.
public struct StoreFault: Sendable {
    public enum Verb: Sendable { case get, put, list, delete }
    public enum Action: Sendable {
        /// The call fails and has no effect.
        case fail(StoreError.Kind)
        /// The call takes effect and fails all the same: the answer that is lost.
        case failAfterEffect(StoreError.Kind)
        /// The call goes on after so many nanoseconds.
        case delay(ns: UInt64)
        /// One bit of the bytes that come (of a get) is another one.
        case corrupt
        /// The last half of the bytes that come (of a get) is missing.
        case truncate
        /// The call waits at the gate before it has any effect.
        case hold(StoreGate)
        /// The call takes effect and then waits at the gate.
        case holdAfterEffect(StoreGate)
    }
    public var action: Action
    /// nil: all of them.
    public var verb: Verb?
    /// Calls whose key (or one of them, or prefix) contains this.
    public var keyContains: String
    /// How many calls it hits before it is used up.
    public var count: Int
    public var probability: Double

    public init(
        _ action: Action, verb: Verb? = nil, keyContains: String = "", count: Int = .max, probability: Double = 1
    ) {
        self.action = action
        self.verb = verb
        self.keyContains = keyContains
        self.count = count
        self.probability = probability
    }
}

/// Where held calls wait until it is opened.
public final class StoreGate: Sendable {
    private struct State {
        var isOpen = false
        var waiting: [UnsafeContinuation<Void, Never>] = []
        var arrived = 0
        var observers: [(count: Int, continuation: UnsafeContinuation<Void, Never>)] = []
    }
    private let state = Mutex(State())
    public init() {}

    /// How many calls have come to the gate, passed or not.
    public var arrived: Int { state.withLock { $0.arrived } }

    /// Returns when `count` calls have come to the gate.
    public func waitUntilArrived(_ count: Int = 1) async {
        await withUnsafeContinuation { continuation in
            let isThere = state.withLock { state in
                if state.arrived < count { state.observers.append((count, continuation)) }
                return state.arrived >= count
            }
            if isThere { continuation.resume() }
        }
    }

    /// Lets all go on that wait or will come.
    public func open() {
        let waiting = state.withLock { state in
            state.isOpen = true
            defer { state.waiting = [] }
            return state.waiting
        }
        for continuation in waiting { continuation.resume() }
    }

    func pass() async {
        await withUnsafeContinuation { continuation in
            var (reached, isOpen): ([UnsafeContinuation<Void, Never>], Bool) = state.withLock { state in
                state.arrived += 1
                let reached = state.observers.filter { $0.count <= state.arrived }.map { $0.continuation }
                state.observers.removeAll { $0.count <= state.arrived }
                if !state.isOpen { state.waiting.append(continuation) }
                return (reached, state.isOpen)
            }
            if isOpen { reached.append(continuation) }
            for continuation in reached { continuation.resume() }
        }
    }
}

/// Passes calls on, except for the faults it has been given. The first fault that fits a call is the one it suffers.
public final class FaultyBucket: Bucket {
    private struct State {
        var faults: [StoreFault] = []
        var suffered = 0
    }
    private let next: any Bucket
    private let environment: any Environment
    private let state = Mutex(State())
    public var name: String { next.name }

    public init(_ next: any Bucket, environment: any Environment) {
        self.next = next
        self.environment = environment
    }

    public func inject(_ fault: StoreFault) { state.withLock { $0.faults.append(fault) } }
    /// Forgets all faults; calls that are held stay held.
    public func clearFaults() { state.withLock { $0.faults = [] } }
    /// How many calls have suffered a fault.
    public var suffered: Int { state.withLock { $0.suffered } }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        let fault = pick(.get, [key])
        try await before(fault, "get \(key)")
        var object = try await next.get(key, range: range)
        try await after(fault, "get \(key)")
        switch fault {
        case .corrupt where !object.bytes.isEmpty:
            let bit = environment.randomBits()
            object.bytes[Int(bit >> 3) % object.bytes.count] ^= 1 << (bit & 7)
        case .truncate: object.bytes.removeLast((object.bytes.count + 1) / 2)
        default: break
        }
        return object
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        let fault = pick(.put, [key])
        try await before(fault, "put \(key)")
        let tag = try await next.put(key, bytes, if: condition)
        try await after(fault, "put \(key)")
        return tag
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        let fault = pick(.list, [prefix])
        try await before(fault, "list \(prefix)")
        let listing = try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
        try await self.after(fault, "list \(prefix)")
        return listing
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        let fault = pick(.delete, keys)
        try await before(fault, "delete")
        try await next.delete(keys)
        try await after(fault, "delete")
    }

    private func pick(_ verb: StoreFault.Verb, _ keys: [String]) -> StoreFault.Action? {
        state.withLock { state in
            for index in state.faults.indices {
                let fault = state.faults[index]
                guard fault.count > 0, fault.verb == nil || fault.verb == verb,
                    fault.keyContains.isEmpty || keys.contains(where: { $0.contains(fault.keyContains) })
                else { continue }
                if fault.probability < 1 {
                    let chance = Double(environment.randomBits() >> 11) / Double(1 << 53)
                    if chance >= fault.probability { continue }
                }
                if fault.count != .max { state.faults[index].count -= 1 }
                state.suffered += 1
                return fault.action
            }
            return nil
        }
    }

    private func before(_ fault: StoreFault.Action?, _ what: String) async throws(StoreError) {
        switch fault {
        case .fail(let kind): throw StoreError(kind, "\(name): injected fault in \(what)")
        case .delay(let ns): await environment.sleep(ns: ns)
        case .hold(let gate): await gate.pass()
        default: break
        }
    }

    private func after(_ fault: StoreFault.Action?, _ what: String) async throws(StoreError) {
        switch fault {
        case .failAfterEffect(let kind): throw StoreError(kind, "\(name): injected fault after \(what)")
        case .holdAfterEffect(let gate): await gate.pass()
        default: break
        }
    }
}
