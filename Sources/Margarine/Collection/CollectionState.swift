// What the whole store agrees on about collection: the grace period, who collects, what the last round did. One control
// object in the first location, replaced by compare-and-swap alone.
//
// Always holds: at most one collector has the role; who wants to delete swaps this object just before. A grace period that
// is lowered holds for collections only once the former one has passed, for writers may know that one only.

package import BlockCache
import ObjectStore

package struct CollectionState: Sendable, Equatable, Codable {
    /// Who collects.
    package struct Collector: Sendable, Equatable, Codable {
        /// Random for each round.
        package var id: String
        /// The server's id; empty for a command.
        package var server: String
        /// For people.
        package var host: String
        /// By the store's clock, milliseconds since 1970.
        package var startedAtMs: Int64
        package var phase: CollectionPhase
        package var done: UInt64
        package var total: UInt64
    }

    /// What writers go by. Milliseconds.
    package internal(set) var graceMs: Int64
    /// The grace period before it was lowered, and when that was, by the store's clock.
    package internal(set) var formerGraceMs: Int64?
    package internal(set) var loweredAtMs: Int64?
    /// Rounds begun.
    package internal(set) var rounds: UInt64
    package internal(set) var collector: Collector?
    /// What the last completed round did.
    package internal(set) var last: CollectionSummary?
    package internal(set) var nonce: ObjectID

    package static let key = "collection"
    package static let defaultGraceMs: Int64 = 24 * 3_600_000
    /// What a grace period may be.
    package static let graceBoundsMs: ClosedRange<Int64> = 1...3_660 * 86_400_000
    static let format = 1

    /// Of a store that was never collected.
    init() {
        graceMs = Self.defaultGraceMs
        rounds = 0
        nonce = ObjectID(high: 0, low: 0)
    }

    /// What counts as old at `nowMs`, by the store's clock.
    package func effectiveGraceMs(nowMs: Int64) -> Int64 {
        guard let formerGraceMs, let loweredAtMs, nowMs - loweredAtMs < formerGraceMs else { return graceMs }
        return max(graceMs, formerGraceMs)
    }

    /// - Parameter isUnused: nobody writes to this store yet.
    mutating func setGrace(_ ms: Int64, nowMs: Int64, isUnused: Bool) {
        precondition(Self.graceBoundsMs.contains(ms))
        let present = effectiveGraceMs(nowMs: nowMs)
        if isUnused {
            formerGraceMs = nil
            loweredAtMs = nil
        } else if ms < graceMs {
            formerGraceMs = present
            loweredAtMs = nowMs
        } else if present <= ms {
            formerGraceMs = nil
            loweredAtMs = nil
        }
        graceMs = ms
    }

    func encoded() -> [UInt8] { ControlObject.seal(self, kind: "collection", format: Self.format) }

    static func decode(_ bytes: [UInt8]) throws(CatalogError) -> CollectionState {
        let what = "the state of collection"
        let state = try ControlObject.open(Self.self, bytes, kind: "collection", format: format, what: what)
        guard graceBoundsMs.contains(state.graceMs), graceBoundsMs.contains(state.formerGraceMs ?? 1),
            (state.formerGraceMs == nil) == (state.loweredAtMs == nil),
            ControlObject.times.contains(state.loweredAtMs ?? 0), state.rounds < ControlObject.countLimit,
            ControlObject.times.contains(state.collector?.startedAtMs ?? 0)
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
        return state
    }

    enum CodingKeys: String, CodingKey {
        case graceMs, formerGraceMs, loweredAtMs, rounds, collector, last, nonce
    }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        graceMs = try c.decode(Int64.self, forKey: .graceMs)
        formerGraceMs = try c.decodeIfPresent(Int64.self, forKey: .formerGraceMs)
        loweredAtMs = try c.decodeIfPresent(Int64.self, forKey: .loweredAtMs)
        rounds = try c.decode(UInt64.self, forKey: .rounds)
        collector = try c.decodeIfPresent(Collector.self, forKey: .collector)
        last = try c.decodeIfPresent(CollectionSummary.self, forKey: .last)
        nonce = try c.decodeObjectID(.nonce)
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(graceMs, forKey: .graceMs)
        try c.encodeIfPresent(formerGraceMs, forKey: .formerGraceMs)
        try c.encodeIfPresent(loweredAtMs, forKey: .loweredAtMs)
        try c.encode(rounds, forKey: .rounds)
        try c.encodeIfPresent(collector, forKey: .collector)
        try c.encodeIfPresent(last, forKey: .last)
        try c.encode(nonce.description, forKey: .nonce)
    }
}

extension CollectionState {
    /// The state in the first location's bucket; nil when nothing was ever said.
    static func load(_ bucket: any Bucket) async throws(CatalogError) -> (state: CollectionState, etag: ETag)? {
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(key, range: nil)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
        return (try decode(object.bytes), object.etag)
    }
}

extension Store {
    /// What the store says of collection; nil when nothing was ever said.
    package func collection() async throws(CatalogError) -> CollectionState? {
        try await CollectionState.load(bucket)?.state
    }

    /// How old an object that nobody names must be before it is deleted, in milliseconds, as writers have to take it: a
    /// commit that takes longer than half of it is given up.
    package func grace() async throws(CatalogError) -> Int64 {
        let state = try await CollectionState.load(locations.nearBucket)?.state
        return state?.graceMs ?? CollectionState.defaultGraceMs
    }

    /// Where heads are: one for each location.
    var headStores: [HeadStore] {
        locations.buckets.indices.map { heads(at: UInt8($0)) }
    }
}

/// The clocks of the store's locations. Each location has its own; times are compared with times of the same one only.
enum StoreClock {
    static let key = "clock"
    private struct Tick: Codable { var nonce: String }

    /// What time it is at a location: an object is stored there, and the time it got is read back. Never later than now.
    static func read(_ bucket: any Bucket, _ nonce: ObjectID) async throws(CatalogError) -> Int64 {
        let bytes = ControlObject.seal(Tick(nonce: nonce.description), kind: "clock", format: 1)
        return try await CatalogError.wrap { () async throws(StoreError) in
            _ = try await bucket.put(key, bytes, if: .none)
            guard let time = try await modified(bucket, key) else {
                throw StoreError(.unavailable, "\(bucket.name) does not list '\(key)', which was stored just now")
            }
            return time
        }
    }

    /// When the object was stored; nil: it is not listed.
    static func modified(_ bucket: any Bucket, _ key: String) async throws(StoreError) -> Int64? {
        let page = try await bucket.list(prefix: key, after: nil, folders: true, limit: 1)
        guard let item = page.items.first, item.key == key else { return nil }
        return item.modifiedMs
    }
}
