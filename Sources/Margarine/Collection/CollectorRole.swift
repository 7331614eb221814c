// Being the one collector of a store: taken, shown and given back by compare-and-swap of the state object.
//
// Always holds: a collector that is heard of is not robbed. One that is robbed all the same finds out at its next swap, and
// does no harm until then: what it has found to be garbage stays garbage.

import BlockCache
import ObjectStore
import Runtime

/// Used by one task at a time.
final class CollectorRole: @unchecked Sendable {
    private let store: Store
    private let options: CollectionOptions
    private var state: CollectionState
    private var etag: ETag
    private var beatNs: UInt64
    /// What counts as old in this round.
    let graceMs: Int64

    private init(
        _ store: Store, _ options: CollectionOptions, _ state: CollectionState, _ etag: ETag, graceMs: Int64
    ) {
        self.store = store
        self.options = options
        self.state = state
        self.etag = etag
        self.graceMs = graceMs
        beatNs = store.environment.nowNs
    }

    /// The store's rounds have numbers, this is the last one.
    var round: UInt64 { state.rounds }

    /// Makes this the store's collector.
    static func take(_ store: Store, _ options: CollectionOptions) async throws(CatalogError) -> CollectorRole {
        let environment = store.environment
        let nowMs = try await StoreClock.read(store.bucket, environment.objectID())
        for _ in 0..<Catalog.maxAttempts {
            let found = try await CollectionState.load(store.bucket)
            var state = found?.state ?? CollectionState()
            if let other = state.collector { try await checkDead(other, store, options, nowMs: nowMs) }
            let formerMs = state.graceMs
            if let graceMs = options.graceMs, graceMs != state.graceMs {
                let isUnused = try await isUnused(store)
                state.setGrace(graceMs, nowMs: nowMs, isUnused: isUnused)
            }
            state.rounds += 1
            state.collector = CollectionState.Collector(
                id: environment.objectID().description, server: options.server, host: options.host, startedAtMs: nowMs,
                phase: .history, done: 0, total: 0)
            state.nonce = environment.objectID()
            if state.graceMs < formerMs {
                try await store.requireAll()
                try await GraceCopies.write(state, store)
            }
            if case .won(let etag) = try await swap(store, state, expecting: found?.etag) {
                // A longer one may be heard of late.
                try? await GraceCopies.write(state, store)
                return CollectorRole(
                    store, options, state, etag, graceMs: state.effectiveGraceMs(nowMs: nowMs))
            }
        }
        throw CatalogError(.conflict, "the state of collection was changed by others again and again; try again")
    }

    private static func swap(
        _ store: Store, _ state: CollectionState, expecting etag: ETag?
    ) async throws(CatalogError) -> SwapOutcome {
        try await CatalogError.wrap { () async throws(StoreError) in
            try await store.bucket.swap(
                CollectionState.key, state.encoded(), if: etag.map { .matches($0) } ?? .absent)
        }
    }

    private static func checkDead(
        _ other: CollectionState.Collector, _ store: Store, _ options: CollectionOptions, nowMs: Int64
    ) async throws(CatalogError) {
        let heardOfMs = try await CatalogError.wrap { () async throws(StoreError) in
            try await StoreClock.modified(store.bucket, CollectionState.key)
        }
        guard let heardOfMs, nowMs - heardOfMs >= options.deadAfterMs else {
            let who = other.server.isEmpty ? "a command" : "server \(other.server)"
            throw CatalogError(
                .owned,
                "\(who) on \(other.host) is collecting (\(other.phase.rawValue)); one that has ended without a word is taken over \(DurationMs.readable(options.deadAfterMs)) after it was last heard of: try again then"
            )
        }
    }

    /// Whether nobody can know, or go by, an earlier grace period: no disk was ever made, and nothing is stored.
    private static func isUnused(_ store: Store) async throws(CatalogError) -> Bool {
        for bucket in store.locations.buckets {
            for prefix in ["disks/", "blocks/", "manifests/"] {
                let page = try await CatalogError.wrap { () async throws(StoreError) in
                    try await bucket.list(prefix: prefix, after: nil, folders: true, limit: 1)
                }
                if !page.items.isEmpty || !page.folders.isEmpty { return false }
            }
        }
        return true
    }

    /// Shows that this collector lives and how far it has come, if it is time or `isSure`.
    ///
    /// - Throws: `.conflict` when another one has the role.
    func beat(_ phase: CollectionPhase, done: UInt64, total: UInt64, isSure: Bool) async throws(CatalogError) {
        let nowNs = store.environment.nowNs
        guard isSure || nowNs - min(beatNs, nowNs) >= UInt64(options.beatMs) * 1_000_000 else { return }
        beatNs = nowNs
        try await change { state in
            state.collector?.phase = phase
            state.collector?.done = done
            state.collector?.total = total
        }
    }

    /// Gives the role back.
    ///
    /// - Parameter summary: of the round, if it was completed.
    func release(_ summary: CollectionSummary?) async throws(CatalogError) {
        try await change { state in
            state.collector = nil
            if let summary { state.last = summary }
        }
    }

    private func change(_ change: (inout CollectionState) -> Void) async throws(CatalogError) {
        for _ in 0..<Catalog.maxAttempts {
            var next = state
            change(&next)
            next.nonce = store.environment.objectID()
            switch try await Self.swap(store, next, expecting: etag) {
            case .won(let tag):
                state = next
                etag = tag
                return
            case .lost(let object?):
                // Somebody may have changed something else.
                let found = try CollectionState.decode(object.bytes)
                guard let mine = state.collector?.id, found.collector?.id == mine else { throw Self.lost }
                state = found
                etag = object.etag
            case .lost(nil): throw Self.lost
            }
        }
        throw Self.lost
    }

    private static let lost = CatalogError(
        .conflict, "another collector has taken over: this one stops, and nothing is lost")
}
