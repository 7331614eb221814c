// Counts what goes to and comes from a store, for status and metrics, and says when it stops doing what it is asked.

public import Runtime
import Synchronization

/// What a store has been asked and has answered since the daemon started.
public struct StoreStatistics: Sendable, Codable, Equatable {
    public struct Calls: Sendable, Codable, Equatable {
        public var started: UInt64 = 0
        public var failed: UInt64 = 0
        public var inFlight: Int64 = 0
        /// Bytes of objects got or put by the calls that succeeded.
        public var bytes: UInt64 = 0
        /// Time that all completed calls took together, in nanoseconds.
        public var totalNs: UInt64 = 0
        public var longestNs: UInt64 = 0
    }
    public struct Errors: Sendable, Codable, Equatable {
        public var notFound: UInt64 = 0
        public var conditionFailed: UInt64 = 0
        public var unclear: UInt64 = 0
        public var unavailable: UInt64 = 0
        public var refused: UInt64 = 0
        public var corrupt: UInt64 = 0
        /// All but the plain answers "not there" and "condition does not hold".
        public var failures: UInt64 { unclear + unavailable + refused + corrupt }
    }
    public var get = Calls()
    public var put = Calls()
    public var list = Calls()
    public var delete = Calls()
    public var errors = Errors()
    /// Calls that were made again after a failure.
    public var retries: UInt64 = 0
    /// The last error that was no plain answer ("not there", "condition does not hold"), and when, in ms since 1970.
    public var lastError: String?
    public var lastErrorWallMs: Int64?
    /// When a call last succeeded, in ms since 1970.
    public var lastSuccessWallMs: Int64?

    public init() {}
}

/// Where the counts of one store are kept; read from any thread.
public final class StoreCounters: Sendable {
    private let statistics = Mutex(StoreStatistics())
    private let onTrouble: (@Sendable (StoreTrouble) -> Void)?
    /// - Parameter onTrouble: told of troubles that begin, change or end, on whatever thread.
    public init(onTrouble: (@Sendable (StoreTrouble) -> Void)? = nil) { self.onTrouble = onTrouble }
    func tell(_ trouble: StoreTrouble?) {
        if let trouble { onTrouble?(trouble) }
    }
    public var snapshot: StoreStatistics { statistics.withLock { $0 } }
    func update(_ change: (inout StoreStatistics) -> Void) { statistics.withLock { change(&$0) } }
}

/// Passes every call on and counts it.
public final class CountingBucket: Bucket {
    private let next: any Bucket
    private let environment: any Environment
    public let counters: StoreCounters
    private let troubles = Mutex(StoreTroubles())
    public var name: String { next.name }

    public init(_ next: any Bucket, counters: StoreCounters = StoreCounters(), environment: any Environment) {
        self.next = next
        self.counters = counters
        self.environment = environment
    }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        let started = begin(.get)
        do throws(StoreError) {
            let object = try await next.get(key, range: range)
            end(.get, started, bytes: object.bytes.count)
            return object
        } catch { throw failed(.get, started, error) }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        let started = begin(.put)
        do throws(StoreError) {
            let tag = try await next.put(key, bytes, if: condition)
            end(.put, started, bytes: bytes.count)
            return tag
        } catch { throw failed(.put, started, error) }
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        let started = begin(.list)
        do throws(StoreError) {
            let listing = try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
            end(.list, started, bytes: 0)
            return listing
        } catch { throw failed(.list, started, error) }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        let started = begin(.delete)
        do throws(StoreError) {
            try await next.delete(keys)
            end(.delete, started, bytes: 0)
        } catch { throw failed(.delete, started, error) }
    }

    private typealias Verb = StoreTroubles.Verb

    private func begin(_ verb: Verb) -> UInt64 {
        counters.update {
            $0[verb].started += 1
            $0[verb].inFlight += 1
        }
        return environment.nowNs
    }

    private func end(_ verb: Verb, _ started: UInt64, bytes: Int) {
        let (now, wallMs) = (environment.nowNs, environment.wallMs)
        counters.update {
            $0[verb].finish(tookNs: now &- started)
            $0[verb].bytes += UInt64(bytes)
            $0.lastSuccessWallMs = wallMs
        }
        counters.tell(troubles.withLock { $0.worked(verb, name, nowNs: now) })
    }

    private func failed(_ verb: Verb, _ started: UInt64, _ error: StoreError) -> StoreError {
        let (now, wallMs) = (environment.nowNs, environment.wallMs)
        counters.update {
            $0[verb].finish(tookNs: now &- started)
            $0[verb].failed += 1
            switch error.kind {
            case .notFound: $0.errors.notFound += 1
            case .conditionFailed: $0.errors.conditionFailed += 1
            case .unclear: $0.errors.unclear += 1
            case .unavailable: $0.errors.unavailable += 1
            case .refused, .denied: $0.errors.refused += 1
            case .corrupt: $0.errors.corrupt += 1
            }
            if error.kind == .notFound || error.kind == .conditionFailed {
                $0.lastSuccessWallMs = wallMs
            } else {
                $0.lastError = error.description
                $0.lastErrorWallMs = wallMs
            }
        }
        counters.tell(troubles.withLock { $0.failed(verb, error, name, nowNs: now) })
        return error
    }
}

extension StoreStatistics {
    fileprivate subscript(verb: StoreTroubles.Verb) -> Calls {
        get {
            switch verb {
            case .get: get
            case .put: put
            case .list: list
            case .delete: delete
            }
        }
        set {
            switch verb {
            case .get: get = newValue
            case .put: put = newValue
            case .list: list = newValue
            case .delete: delete = newValue
            }
        }
    }
}

extension StoreStatistics.Calls {
    fileprivate mutating func finish(tookNs: UInt64) {
        inFlight -= 1
        totalNs += tookNs
        longestNs = max(longestNs, tookNs)
    }
}
