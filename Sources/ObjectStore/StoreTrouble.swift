// What is told of a store that does not do what it is asked: when it begins, with cause and remedy, and when it is over.

import Runtime

/// A change in how a bucket answers one kind of call.
public struct StoreTrouble: Sendable {
    public enum Change: Sendable, Equatable {
        /// It says no to everything of this kind, until somebody mends something.
        case denied
        /// It has not answered for a while.
        case unavailable
        /// It answers again.
        case over(durationMs: Int64, failures: UInt64)
    }
    /// The bucket, for people.
    public var bucket: String
    /// `get`, `put`, `list` or `delete`.
    public var verb: String
    public var change: Change
    /// The store's words and what to do; empty when it is over.
    public var description: String
}

/// The troubles of one bucket, by kind of call: keys may have a right to read and none to write.
struct StoreTroubles {
    private var episodes = [Episode](repeating: Episode(), count: Verb.allCases.count)

    enum Verb: Int, CaseIterable {
        case get, put, list, delete
    }

    /// A store that is out of reach for less is not worth a line.
    private static let worthTellingNs: UInt64 = 5_000_000_000
    /// What fails again within this is the same trouble.
    private static let quietNs: UInt64 = 3_000_000_000

    mutating func failed(_ verb: Verb, _ error: StoreError, _ bucket: String, nowNs: UInt64) -> StoreTrouble? {
        guard error.isOutage else { return worked(verb, bucket, nowNs: nowNs) }
        let isDenied = error.kind == .denied
        let cause = isDenied ? error.cause ?? "denied" : "unavailable"
        guard episodes[verb.rawValue].failed(cause, nowNs: nowNs, afterNs: isDenied ? 0 : Self.worthTellingNs) else {
            return nil
        }
        return StoreTrouble(
            bucket: bucket, verb: "\(verb)", change: isDenied ? .denied : .unavailable, description: error.description)
    }

    mutating func worked(_ verb: Verb, _ bucket: String, nowNs: UInt64) -> StoreTrouble? {
        guard let over = episodes[verb.rawValue].worked(nowNs: nowNs, quietNs: Self.quietNs) else { return nil }
        return StoreTrouble(
            bucket: bucket, verb: "\(verb)", change: .over(durationMs: over.durationMs, failures: over.count),
            description: "")
    }
}
