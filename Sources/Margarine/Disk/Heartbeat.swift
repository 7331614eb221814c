// Renewing this server's record at one location, which proves what it owns there. It waits for nothing else: not for the
// heads of disks, not for another location, not for what users want.
//
// Always holds: a renewal is a compare-and-swap upon the record as this server last wrote or read it; what others wrote
// into it meanwhile is acted upon before it is written over.

internal import BlockCache
package import Logging
import ObjectStore
import Runtime
import Synchronization

/// `begin`, then `run` until the end; one task at a time.
package final class Heartbeat: Sendable {
    /// What a renewal says besides what the protocol needs.
    package typealias Content = @Sendable () -> ServerRecord

    private struct State {
        /// Of the record as this server last wrote or read it; nil: there was none.
        var etag: ETag?
        var incarnation: String
        /// Nothing of an earlier incarnation is ours any more.
        var hasBegun = false
        var isOver = false
    }
    package let lease: Lease
    private let heads: HeadStore
    private let environment: any Environment
    private let log: Logger
    private let content: Content
    /// Milliseconds.
    private let interval: @Sendable () -> Int64
    private let state: Mutex<State>

    /// - Parameters:
    ///   - heads: of the lease's location. Calls on its bucket should not be repeated for longer than an interval.
    ///   - content: asked for each renewal.
    package init(
        lease: Lease, heads: HeadStore, log: Logger, interval: @escaping @Sendable () -> Int64,
        content: @escaping Content
    ) {
        self.lease = lease
        self.heads = heads
        environment = heads.environment
        self.log = log
        self.interval = interval
        self.content = content
        state = Mutex(State(incarnation: heads.environment.objectID().description))
    }

    /// One renewal.
    ///
    /// - Throws: it is not known to have been won. Nothing was lost by that.
    package func renew() async throws(CatalogError) {
        for _ in 0..<16 {
            let (etag, incarnation, isOver) = state.withLock { ($0.etag, $0.incarnation, $0.isOver) }
            if isOver { return }
            var record = content()
            record.incarnation = incarnation
            // Whenever it takes effect, it does so after this.
            let sentNs = environment.bootNs
            lease.announce(sentNs: sentNs, deadAfterMs: record.deadAfterMs)
            switch try await heads.swap(record, expecting: etag) {
            case .won(let etag):
                state.withLock {
                    $0.etag = etag
                    $0.hasBegun = true
                }
                lease.prove(sentNs: sentNs, deadAfterMs: record.deadAfterMs)
                return
            case .lost(let found):
                // It was under way when the server ended in order, and its record was removed.
                if state.withLock({ $0.isOver }) { return }
                learn(found, id: record.id)
            }
        }
        throw CatalogError(.conflict, "the record of this server was changed by others again and again")
    }

    /// What another one wrote, or an earlier renewal of ours whose answer was lost.
    private func learn(_ found: StoredServer?, id: String) {
        let (incarnation, hasBegun) = state.withLock { ($0.incarnation, $0.hasBegun) }
        var reason: String?
        // Whose they are can't be told where the record is gone, or two processes have the same id.
        var isStillOurs = false
        if let record = found?.record, record.incarnation == incarnation {
            if let by = record.fencedBy {
                isStillOurs = true
                reason =
                    "\(by) saw no renewal of this server's record for \(record.deadAfterMs) ms and declared it dead"
            } else {
                lease.giveAway(record.taken)
            }
        } else if hasBegun {
            reason =
                found == nil
                ? "this server's record was removed from the store"
                : "another process with this server's id (\(id)) writes its record: no two may use copies of one scratch directory"
        }
        // Only after this is the record written over.
        if let reason {
            let count = lease.fence(
                "\(reason); whoever still needs the disk attaches again", isStillOurs: isStillOurs)
            log.error(
                "\(heads.bucket.name): \(reason); \(count) disks are no longer served here, and attaching begins anew")
        }
        state.withLock { state in
            state.etag = found?.etag
            if reason != nil {
                state.incarnation = environment.objectID().description
                state.hasBegun = false
            }
        }
    }

    /// Renews until `isOver` says so (asked before each renewal), or `end` is called.
    ///
    /// - Parameter before: nil but for `Fault.heartbeatWaits`.
    package func run(
        before: (@Sendable () async -> Void)? = nil, isOver: @Sendable () -> Bool
    ) async {
        var isAway = false
        while !isOver(), !state.withLock({ $0.isOver }) {
            await before?()
            let began = environment.nowNs
            var pauseMs = interval()
            do throws(CatalogError) {
                try await renew()
                if isAway { log.notice("\(heads.bucket.name): the heartbeat is written again") }
                isAway = false
            } catch {
                if state.withLock({ $0.isOver }) { return }
                if !isAway {
                    log.warning(
                        "the heartbeat could not be written: \(error); it is tried again, and without it requests wait")
                }
                isAway = true
                pauseMs = max(1, min(pauseMs, 1000))
            }
            let spentMs = Int64((environment.nowNs - began) / 1_000_000)
            await environment.sleep(ns: UInt64(max(1, pauseMs - spentMs)) * 1_000_000)
        }
    }

    /// No renewal is sent any more.
    package func end() { state.withLock { $0.isOver = true } }
}
