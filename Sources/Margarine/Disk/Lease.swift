// What a server may answer from memory, and acknowledge: only what it owned a short while ago, for certain.
//
// Always holds (Docs/Decisions/0013):
// - A lease runs from the instant at which the last renewal that was won was *sent*, by a clock that counts suspension, and
//   for less time than others must have watched before they take over.
// - Only a renewal that was won prolongs it. A disk that the record gave away is lost before that.
// - A disk is claimed before the swap that makes it ours is sent, and only while the lease stands: so whatever is noted in
//   the record meanwhile finds it.

import BlockCache
import Synchronization

/// Proof of ownership at one location. Safe to use from anywhere.
package final class Lease: Sendable {
    package let location: UInt8
    /// Monotonic time at which it is over. The only thing that the path of a request looks at.
    private let untilNs = Atomic<UInt64>(0)
    private let state = Mutex(State())

    private struct State {
        var claims: [ObjectID: Claim] = [:]
        var waiting: [@Sendable () -> Void] = []
    }

    package init(location: UInt8) { self.location = location }

    /// For a server that others watch for `deadAfterMs`: three quarters of that. With clocks whose rates differ by a tenth
    /// either way it is over before nine tenths of theirs.
    static func lengthNs(deadAfterMs: Int64) -> UInt64 { UInt64(max(0, deadAfterMs)) * 750_000 }

    /// Whether the disks of this location are this server's at `nowNs`, but for those that were given away (`Claim.stands`).
    @inline(__always)
    package func stands(atNs nowNs: UInt64) -> Bool { nowNs < untilNs.load(ordering: .acquiring) }

    /// The renewal that was sent at `sentNs` was won. Wakes who waits.
    package func prove(sentNs: UInt64, deadAfterMs: Int64) {
        let waiting = state.withLock { state in
            let until = sentNs.addingReportingOverflow(Lease.lengthNs(deadAfterMs: deadAfterMs))
            untilNs.store(until.overflow ? .max : until.partialValue, ordering: .releasing)
            defer { state.waiting = [] }
            return state.waiting
        }
        for wake in waiting { wake() }
    }

    /// A renewal that states `deadAfterMs` is about to be sent. Others may go by it from then on, though no answer comes.
    func announce(sentNs: UInt64, deadAfterMs: Int64) {
        let until = sentNs.addingReportingOverflow(Lease.lengthNs(deadAfterMs: deadAfterMs))
        guard !until.overflow else { return }
        untilNs.min(until.partialValue, ordering: .releasing)
    }

    /// Calls `wake` at the next proof, from wherever that comes.
    func whenProven(_ wake: @escaping @Sendable () -> Void) { state.withLock { $0.waiting.append(wake) } }

    /// Before the swap that takes a disk under `epoch`. nil: nothing may be taken now.
    func claim(_ diskID: ObjectID, epoch: UInt64, nowNs: UInt64) -> Claim? {
        state.withLock { state in
            guard stands(atNs: nowNs) else { return nil }
            let claim = Claim(self, diskID, epoch)
            state.claims[diskID] = claim
            return claim
        }
    }

    fileprivate func end(_ claim: Claim) {
        state.withLock { if $0.claims[claim.diskID] === claim { $0.claims[claim.diskID] = nil } }
    }

    /// The record says that these were taken.
    package func giveAway(_ taken: [TakenDisk]) {
        if taken.isEmpty { return }
        let lost = state.withLock { state in
            taken.compactMap { one in
                guard let claim = state.claims[one.diskID], claim.epoch < one.epoch else { return nil as Claim? }
                state.claims[one.diskID] = nil
                claim.markGone()
                return claim
            }
        }
        for claim in lost { claim.lose("it was taken from this server by force", isStillOurs: true) }
    }

    /// The record says that this server is dead: it has nothing here any more. Returns how many disks it lost.
    ///
    /// - Parameter isStillOurs: heads may name this server still.
    @discardableResult
    package func fence(_ reason: String, isStillOurs: Bool) -> Int {
        let lost = state.withLock { state in
            untilNs.store(0, ordering: .releasing)
            for claim in state.claims.values { claim.markGone() }
            defer { state.claims = [:] }
            return Array(state.claims.values)
        }
        for claim in lost { claim.lose(reason, isStillOurs: isStillOurs) }
        return lost.count
    }
}

/// One disk under a lease.
package final class Claim: Sendable {
    let diskID: ObjectID
    let epoch: UInt64
    let lease: Lease
    private let isGone = Atomic<Bool>(false)
    private let state = Mutex(State())

    private struct State {
        var reason: String?
        var isStillOurs = false
        var tell: (@Sendable (String, Bool) -> Void)?
    }

    fileprivate init(_ lease: Lease, _ diskID: ObjectID, _ epoch: UInt64) {
        self.lease = lease
        self.diskID = diskID
        self.epoch = epoch
    }

    /// Whether the disk is this server's at `nowNs`, for certain.
    @inline(__always)
    func stands(atNs nowNs: UInt64) -> Bool { lease.stands(atNs: nowNs) && !isGone.load(ordering: .acquiring) }

    /// Why the disk was lost, if it was.
    var lostReason: String? { state.withLock { $0.reason } }

    /// Calls `tell` when the disk is lost, or at once if it is. From anywhere. It is told why, and whether the head may name
    /// this server still.
    func whenLost(_ tell: @escaping @Sendable (_ reason: String, _ isStillOurs: Bool) -> Void) {
        let (reason, isStillOurs) = state.withLock { state in
            state.tell = tell
            return (state.reason, state.isStillOurs)
        }
        if let reason { tell(reason, isStillOurs) }
    }

    fileprivate func markGone() { isGone.store(true, ordering: .releasing) }

    fileprivate func lose(_ reason: String, isStillOurs: Bool) {
        let tell = state.withLock { state in
            if state.reason == nil { (state.reason, state.isStillOurs) = (reason, isStillOurs) }
            return state.tell
        }
        tell?(reason, isStillOurs)
    }

    /// The disk is done for here.
    func end() {
        markGone()
        lease.end(self)
        state.withLock { $0.tell = nil }
    }
}

/// One lease for each location of a store.
package struct Leases: Sendable {
    private let all: [UInt8: Lease]
    package init(_ locations: [UInt8]) {
        all = Dictionary(uniqueKeysWithValues: locations.map { ($0, Lease(location: $0)) })
    }

    /// - Precondition: a location that is configured.
    package subscript(_ location: UInt8) -> Lease {
        guard let lease = all[location] else { preconditionFailure("no lease at location \(location)") }
        return lease
    }
}
