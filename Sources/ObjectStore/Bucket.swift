// The first seam: a place that keeps objects under keys. Everything above it, and every decorator on it, sees only
// this. Keys are relative to the store's prefix, `/` between components, of the characters [A-Za-z0-9._/-].
//
// Always holds: a `get` that succeeds gives exactly the bytes of one completed `put`, checked against what the
// store says of them; a write whose answer is lost is reported as `.unclear`, never as failed.

/// An entity tag, exactly as this store wants it back in a condition. Compare for equality only.
public struct ETag: Hashable, Sendable {
    public let value: String
    public init(_ value: String) { self.value = value }
}

/// What must hold for a `put` to take effect.
public enum PutCondition: Sendable, Equatable {
    case none
    /// No object under this key (If-None-Match: *).
    case absent
    /// The object there has this tag (If-Match).
    case matches(ETag)
}

/// An object, or the asked-for range of it.
public struct StoredObject: Sendable {
    public var bytes: [UInt8]
    public var etag: ETag
    /// Length of the whole object in bytes.
    public var totalLengthBytes: UInt64
    public init(bytes: [UInt8], etag: ETag, totalLengthBytes: UInt64) {
        self.bytes = bytes
        self.etag = etag
        self.totalLengthBytes = totalLengthBytes
    }
}

/// A page of a listing, in ascending byte order of keys.
public struct Listing: Sendable {
    public struct Item: Sendable, Equatable {
        public var key: String
        public var lengthBytes: UInt64
        /// When the object was stored, by the store's clock: milliseconds since 1970. To be held against other times of
        /// the same store only.
        public var modifiedMs: Int64
        public init(key: String, lengthBytes: UInt64, modifiedMs: Int64) {
            self.key = key
            self.lengthBytes = lengthBytes
            self.modifiedMs = modifiedMs
        }
    }
    public var items: [Item]
    /// Folders just below the prefix (with their trailing `/`), when a delimiter was asked for.
    public var folders: [String]
    /// Pass as `after` for the next page; nil at the end.
    public var next: String?
    public init(items: [Item], folders: [String], next: String?) {
        self.items = items
        self.folders = folders
        self.next = next
    }
}

/// Why a call on a bucket failed.
public struct StoreError: Error, Sendable, CustomStringConvertible {
    /// Only as many cases as callers act on.
    public enum Kind: Sendable, Equatable {
        case notFound
        /// The condition of a `put` did not hold; nothing was written.
        case conditionFailed
        /// A write that may or may not have taken effect: read back before going on.
        case unclear
        /// Out of reach or overloaded, nothing was changed; later may work.
        case unavailable
        /// The store says no, whatever is asked: keys that have expired or lack a right, a clock that is wrong, a bucket or
        /// directory that is gone, a certificate that is not trusted. Nothing was changed. It lasts until somebody mends
        /// that, and then the same call works: a command fails, a disk waits.
        case denied
        /// Can't be done here, now or later: a bad address, a store that lacks what Margarine needs, a format or location
        /// that this Margarine does not know.
        case refused
        /// The bytes that came are not the bytes that were stored.
        case corrupt

        /// Nothing is known of the object, and later the same call may work: who can wait waits. All others are answers.
        public var isOutage: Bool {
            switch self {
            case .unavailable, .unclear, .denied: true
            case .notFound, .conditionFailed, .refused, .corrupt: false
            }
        }
    }
    public var kind: Kind
    /// What was wrong, where, and what to do: for people, in one line.
    public var description: String
    /// What the store itself calls the cause (`ExpiredToken`, `EACCES`), where it says.
    public var cause: String?
    public init(_ kind: Kind, _ description: String, cause: String? = nil) {
        self.kind = kind
        self.description = description
        self.cause = cause
    }

    /// The store is out of reach, or says no to everything.
    public var isOutage: Bool { kind.isOutage }
}

/// One bucket (and prefix) in one region. Calls may be made from any thread or task, many at once.
public protocol Bucket: Sendable {
    /// For people: the URL without secrets.
    var name: String { get }
    /// The whole object, or those bytes of it that lie in `range` (empty past its end).
    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject
    /// Stores `bytes` whole or not at all, durable when it returns.
    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag
    /// Up to `limit` (at most 1000) keys that start with `prefix`, after `after`. With `folders`, keys that have a
    /// `/` beyond the prefix are folded into `Listing.folders`.
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing
    /// Removes the objects; missing ones are no error.
    func delete(_ keys: [String]) async throws(StoreError)
}
