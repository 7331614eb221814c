// How long a commit may take. The collector deletes what no generation names once it is older than the grace period; whoever
// stores objects must have them named long before, or begin anew with others.
//
// Always holds: what passes `check` names objects that are younger than half of any grace period that a collection may go
// by, then and for as long again.

package import ObjectStore
package import Runtime
internal import Synchronization

/// What this process knows of the store's grace period, and since when. Refreshed with the heartbeat.
package final class GraceGauge: Sendable {
    struct Reading: Sendable {
        var state: CollectionState?
        /// nil: the default, that never gets old.
        var at: Instant?
        var graceMs: Int64 { state?.graceMs ?? CollectionState.defaultGraceMs }
    }
    private let reading = Mutex(Reading())

    /// Says the default until it is refreshed.
    package init() {}

    /// Asks the store, whose near location has `bucket`: see `GraceCopies`.
    package func refresh(_ bucket: any Bucket, environment: any Environment) async throws(CatalogError) {
        // Before the question: the answer may be of any time since.
        let at = Instant(environment)
        let state = try await CollectionState.load(bucket)?.state
        reading.withLock { $0 = Reading(state: state, at: at) }
    }

    /// Nothing is known: who wants to go by it must ask.
    package func forget() {
        reading.withLock { $0 = Reading(state: nil, at: Instant(ns: 0, wallMs: 0)) }
    }

    var current: Reading { reading.withLock { $0 } }
}

/// One instant by both clocks of an environment.
struct Instant: Sendable {
    var ns: UInt64
    var wallMs: Int64
    init(_ environment: any Environment) {
        self.init(ns: environment.nowNs, wallMs: environment.wallMs)
    }
    init(ns: UInt64, wallMs: Int64) {
        self.ns = ns
        self.wallMs = wallMs
    }

    /// Milliseconds since then by the clock that says more: one of them stands still while a machine sleeps, the other one
    /// can be set back.
    func elapsedMs(_ environment: any Environment) -> Int64 {
        let now = Instant(environment)
        return max(Int64((now.ns - min(ns, now.ns)) / 1_000_000), now.wallMs - wallMs)
    }
}

/// The time that one commit (import, change of size, copy …) has, from before its first stored object to just before the swap
/// of its head.
package struct CommitLimit: Sendable {
    private let began: Instant
    private let graceMs: Int64
    private let gauge: GraceGauge
    private let bucket: any Bucket
    private let environment: any Environment

    /// Begins now.
    ///
    /// - Parameter bucket: the store's near location, to be asked when the gauge is old.
    package init(_ gauge: GraceGauge, bucket: any Bucket, environment: any Environment) {
        self.gauge = gauge
        self.bucket = bucket
        self.environment = environment
        // Of a grace period that changes meanwhile the shorter one counts.
        graceMs = gauge.current.graceMs
        began = Instant(environment)
    }

    /// Begins now, for a command: asks the store.
    package static func begin(_ store: Store) async throws(CatalogError) -> CommitLimit {
        let gauge = GraceGauge()
        try await gauge.refresh(store.locations.nearBucket, environment: store.environment)
        return CommitLimit(gauge, bucket: store.locations.nearBucket, environment: store.environment)
    }

    /// To be called just before the swap. What is known of the grace period must be fresh: else the store is asked.
    ///
    /// - Parameters:
    ///   - asking: asks the store in any case.
    ///   - what: names the commit, for people.
    /// - Throws: `.tooSlow` when it has taken too long: begin anew, with new objects.
    package func check(asking: Bool = false, what: String) async throws(CatalogError) {
        let known = gauge.current
        let ageMs = known.at?.elapsedMs(environment) ?? 0
        if asking || ageMs > known.graceMs / 4 {
            do throws(CatalogError) {
                try await gauge.refresh(bucket, environment: environment)
            } catch {
                // A shorter one than this holds for collections only once this one has passed since.
                guard case .store = error.kind, ageMs <= known.graceMs / 2 else { throw error }
            }
        }
        let limitMs = min(graceMs, gauge.current.graceMs) / 2
        let elapsedMs = began.elapsedMs(environment)
        guard elapsedMs < limitMs else {
            throw CatalogError(
                .tooSlow,
                "\(what) took \(DurationMs.readable(elapsedMs)), longer than half of the grace period of collection (\(DurationMs.readable(limitMs))): what it stored may be deleted any moment, so it is given up"
            )
        }
    }
}
