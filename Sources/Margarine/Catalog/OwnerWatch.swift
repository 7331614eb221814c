// Whether the server that has a disk is alive, and what must be written before its disk may be taken.
//
// Always holds (Docs/Decisions/0013):
// - A server is taken for dead only when its record was seen unchanged for as long as that record says, by the monotonic
//   clock of whoever watches; or when its process is known to be gone from this very machine. No wall clock is asked.
// - `.gone` is said only of a record that is not there by the store's own word, or that is fenced. Both mean: nothing that a
//   head read *before* the question names this server for is served by it any more. So read the head first, then ask.
// - Before a disk is taken from a server that may be alive, its record says so.

import BlockCache
import ObjectStore
package import Runtime
import Synchronization

/// What is known of a server.
package enum OwnerState: Sendable, Equatable {
    /// It serves nothing of what a head said before this was asked. How that is known, for people.
    case gone(String)
    /// By which sign, for people.
    case alive(String)
    /// Its record was seen unchanged for so long, of the time that it takes to call it dead.
    case unknown(unchangedMs: Int64, ofMs: Int64)
}

/// Remembers what it saw of other servers' records, for all who ask. Safe to use from anywhere.
package final class OwnerWatch: Sendable {
    private struct Key: Hashable {
        var server: String
        var location: UInt8
    }
    private struct Seen {
        /// Which renewal it is.
        var mark: String
        /// Monotonic time at which this renewal was first seen.
        var sinceNs: UInt64
        /// Another one was seen before: the record was renewed at `sinceNs` or a little earlier.
        var hasChanged: Bool
        var deadAfterMs: Int64
        var lookedNs: UInt64
        var isLooking = false

        func unchangedMs(_ nowNs: UInt64) -> Int64 { Int64((nowNs - min(sinceNs, nowNs)) / 1_000_000) }
    }
    /// Servers that are remembered; beyond, the one that was looked at longest ago is forgotten, and watched anew.
    private static let maxSeen = 4096

    private let environment: any Environment
    private let process: ProcessProbe
    /// Who asks, as it is to stand in a record that it fences.
    private let name: String
    private let fault: Fault?
    private let seen = Mutex<[Key: Seen]>([:])
    private let isStopped = Atomic<Bool>(false)

    package init(
        name: String, environment: any Environment, process: @escaping ProcessProbe, fault: Fault? = nil
    ) {
        self.name = name
        self.environment = environment
        self.process = process
        self.fault = fault
    }

    // MARK: Waiting

    /// Watches the owner's record until it is known whether the owner lives; fences it when it is dead.
    ///
    /// - Parameter told: called each time that it is not known yet.
    package func settle(
        _ server: String, _ heads: HeadStore, told: (_ unchangedMs: Int64, _ ofMs: Int64) -> Void = { _, _ in }
    ) async throws(CatalogError) -> OwnerState {
        while true {
            let state = try await look(server, heads)
            guard case .unknown(let unchangedMs, let ofMs) = state else { return state }
            if isStopped.load(ordering: .relaxed) {
                throw CatalogError(.conflict, "this server is shutting down")
            }
            told(unchangedMs, ofMs)
            // While somebody else's look hangs, the time may be up and nothing be known: no faster for that.
            let left = max(20, ofMs - unchangedMs)
            await environment.sleep(ns: UInt64(min(left, Self.pauseMs(ofMs))) * 1_000_000)
        }
    }

    /// Nobody waits any more.
    package func stop() { isStopped.store(true, ordering: .relaxed) }

    /// Between two looks at a record that may be dead after `deadAfterMs`.
    private static func pauseMs(_ deadAfterMs: Int64) -> Int64 { min(max(deadAfterMs / 20, 20), 1000) }

    /// One look, or what another one has just seen. Of a server that is found dead, the record is fenced.
    ///
    /// - Parameter mayFence: false: a server that would be fenced is `.gone` all the same; for those who take nothing.
    package func look(
        _ server: String, _ heads: HeadStore, mayFence: Bool = true
    ) async throws(CatalogError) -> OwnerState {
        let key = Key(server: server, location: heads.location)
        if let state = begin(key) { return state }
        defer { seen.withLock { $0[key]?.isLooking = false } }
        for _ in 0..<8 {
            let askedNs = environment.bootNs
            guard let found = try await heads.storedServer(server) else {
                seen.withLock { $0[key] = nil }
                return .gone("it ended in order")
            }
            guard let record = found.record else { return .alive("its record can't be read by this version") }
            if let by = record.fencedBy {
                seen.withLock { $0[key] = nil }
                return .gone("\(by) found it dead")
            }
            let state = judge(key, record, found.etag, askedNs: askedNs)
            guard case .gone = state, mayFence else { return state }
            if try await fence(record, found.etag, heads) { return state }
            // It lives after all, or another one was faster.
        }
        return .alive("its record changes all the time")
    }

    /// What is known without asking; nil: the caller asks, and others wait for it.
    private func begin(_ key: Key) -> OwnerState? {
        let now = environment.bootNs
        return seen.withLock { seen in
            guard let known = seen[key] else { return nil }
            let unchangedMs = known.unchangedMs(now)
            if known.hasChanged, unchangedMs < known.deadAfterMs / 4 {
                return .alive("its record changed \(Self.text(unchangedMs)) ago")
            }
            let pauseNs = UInt64(Self.pauseMs(known.deadAfterMs)) * 1_000_000
            if known.isLooking || (now < known.lookedNs + pauseNs / 2 && unchangedMs < known.deadAfterMs) {
                return .unknown(
                    unchangedMs: min(unchangedMs, max(0, known.deadAfterMs - 1)), ofMs: known.deadAfterMs)
            }
            seen[key]!.isLooking = true
            return nil
        }
    }

    /// - Parameter askedNs: before the record was asked for: it is unchanged at least until then.
    private func judge(_ key: Key, _ record: ServerRecord, _ etag: ETag, askedNs: UInt64) -> OwnerState {
        if process(record) == .gone { return .gone("its process has ended") }
        if fault == .livenessByClock {
            return record.looksAlive(nowMs: environment.wallMs, process: process) ? .alive("") : .gone("")
        }
        let now = environment.bootNs
        return seen.withLock { seen in
            // Notes of others are no sign of life: they leave the nonce alone.
            let mark = record.isRenewedBySwap ? record.nonce.description : etag.value
            if let known = seen[key], known.mark == mark {
                seen[key]!.lookedNs = now
                let unchangedMs = known.unchangedMs(askedNs)
                if unchangedMs < record.deadAfterMs {
                    return .unknown(unchangedMs: unchangedMs, ofMs: record.deadAfterMs)
                }
                return .gone("its record did not change for \(Self.text(unchangedMs))")
            }
            let hasChanged = seen[key] != nil
            if !hasChanged, seen.count >= Self.maxSeen,
                let oldest = seen.min(by: { $0.value.lookedNs < $1.value.lookedNs })
            {
                seen[oldest.key] = nil
            }
            seen[key] = Seen(
                mark: mark, sinceNs: now, hasChanged: hasChanged, deadAfterMs: record.deadAfterMs, lookedNs: now,
                isLooking: true)
            return hasChanged
                ? .alive("its record changed just now") : .unknown(unchangedMs: 0, ofMs: record.deadAfterMs)
        }
    }

    private static func text(_ ms: Int64) -> String { ms < 10_000 ? "\(ms) ms" : "\(ms / 1000) s" }

    // MARK: Taking

    /// Makes the record say that its server is dead. false: it was another one meanwhile.
    private func fence(_ record: ServerRecord, _ etag: ETag, _ heads: HeadStore) async throws(CatalogError) -> Bool {
        var fenced = record
        fenced.fencedBy = name
        fenced.taken = []
        guard case .won = try await heads.swap(fenced, expecting: etag) else { return false }
        seen.withLock { $0[Key(server: record.id, location: heads.location)] = nil }
        return true
    }

    /// Notes in the record of a server that may be alive that a disk is about to be taken from it: to be done before the
    /// head is swapped. The server learns it with its next renewal. Waits for nothing.
    package func note(_ taken: TakenDisk, from server: String, _ heads: HeadStore) async throws(CatalogError) {
        for _ in 0..<16 {
            // One that can't be read is of a later version, or damaged: it finds out by its head.
            guard let found = try await heads.storedServer(server), var record = found.record else { return }
            // A server of an earlier version writes over it without looking, and finds out by its head.
            if record.fencedBy != nil || !record.isRenewedBySwap { return }
            if record.taken.contains(where: { $0.diskID == taken.diskID && $0.epoch >= taken.epoch }) { return }
            record.taken.removeAll { $0.diskID == taken.diskID }
            if record.taken.count >= ServerRecord.maxTaken {
                if try await fence(record, found.etag, heads) { return }
                continue
            }
            record.taken.append(taken)
            if case .won = try await heads.swap(record, expecting: found.etag, isRenewal: false) { return }
        }
        throw CatalogError(.conflict, "the record of server \(server) was changed by others again and again; try again")
    }
}
