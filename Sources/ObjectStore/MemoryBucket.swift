// A bucket in memory, for tests and for the simulator: exact conditions, no clock, no chance, and no suspension, so
// that what surrounds it alone decides the order of events.

internal import CLinux
import Synchronization

/// A bucket that keeps its objects in memory. Its tags are numbers that are never used twice.
public final class MemoryBucket: Bucket {
    private struct Stored {
        var bytes: [UInt8]
        var etag: ETag
        var modifiedMs: Int64
    }
    private struct State {
        var objects: [String: Stored] = [:]
        /// The keys in byte order, made when a listing asks for them.
        var sortedKeys: [String]?
        var lastTag: UInt64 = 0
    }
    private let state = Mutex(State())
    public let name: String
    private let wallMs: @Sendable () -> Int64

    /// - Parameter wallMs: the clock whose times listings show, in milliseconds since 1970; nil: the machine's.
    public init(name: String = "memory", wallMs: (@Sendable () -> Int64)? = nil) {
        self.name = name
        self.wallMs = wallMs ?? { mg_realtime_ms() }
    }

    /// Every key and its bytes, as they are now.
    public var contents: [String: [UInt8]] { state.withLock { $0.objects.mapValues { $0.bytes } } }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try checkKey(key)
        guard let stored = state.withLock({ $0.objects[key] }) else {
            throw StoreError(.notFound, "\(name): there is no object '\(key)'")
        }
        let length = UInt64(stored.bytes.count)
        guard let part = range?.within(length) else {
            return StoredObject(bytes: stored.bytes, etag: stored.etag, totalLengthBytes: length)
        }
        return StoredObject(
            bytes: Array(stored.bytes[Int(part.lowerBound)..<Int(part.upperBound)]), etag: stored.etag,
            totalLengthBytes: length)
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try checkKey(key)
        let tag: ETag? = state.withLock { state in
            let current = state.objects[key]
            switch condition {
            case .none: break
            case .absent: if current != nil { return nil }
            case .matches(let tag): if current?.etag != tag { return nil }
            }
            state.lastTag += 1
            let tag = ETag("m\(state.lastTag)")
            if current == nil { state.sortedKeys = nil }
            state.objects[key] = Stored(bytes: bytes, etag: tag, modifiedMs: wallMs())
            return tag
        }
        guard let tag else { throw conditionFailed(name, key, condition) }
        return tag
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try checkListing(prefix: prefix, limit: limit)
        return state.withLock { state in
            let keys = state.sortedKeys ?? state.objects.keys.sorted(by: comesBefore)
            state.sortedKeys = keys
            var page = ListingPage(prefix: prefix, after: after, folders: folders, limit: limit)
            for key in keys[firstIndex(in: keys, from: max(prefix, after ?? "", by: comesBefore))...] {
                guard key.hasPrefix(prefix) else { break }
                let isTaken = page.add(key: key) {
                    (UInt64(state.objects[key]!.bytes.count), state.objects[key]!.modifiedMs)
                }
                if !isTaken { break }
            }
            return page.listing
        }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        for key in keys { try checkKey(key) }
        state.withLock { state in
            for key in keys where state.objects.removeValue(forKey: key) != nil { state.sortedKeys = nil }
        }
    }
}

/// The error of a `put` whose condition did not hold.
func conditionFailed(_ bucket: String, _ key: String, _ condition: PutCondition) -> StoreError {
    switch condition {
    case .absent: StoreError(.conditionFailed, "\(bucket): '\(key)' exists already")
    default: StoreError(.conditionFailed, "\(bucket): '\(key)' has been changed by another writer")
    }
}

private func max(_ a: String, _ b: String, by comesBefore: (String, String) -> Bool) -> String {
    comesBefore(a, b) ? b : a
}

/// The index of the first key that does not come before `bound`.
private func firstIndex(in keys: [String], from bound: String) -> Int {
    var low = 0
    var high = keys.count
    while low < high {
        let middle = (low + high) / 2
        if comesBefore(keys[middle], bound) { low = middle + 1 } else { high = middle }
    }
    return low
}
