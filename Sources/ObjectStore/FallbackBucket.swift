// Reads immutable objects from a copy at another location while their own cannot give them. Blocks and manifest pages
// have random names and one content each, so an object of the same name is the same object, wherever it lies; heads and
// everything else that changes is never taken from elsewhere.
//
// Always holds: what is asked for of one location alone (puts, listings, deletes, mutable objects) is asked there alone.

/// Passes calls on to one location; gets of blocks and pages that fail there are tried at the others.
public struct FallbackBucket: Bucket {
    /// Another location, as people name it, and its bucket.
    public struct Other: Sendable {
        var name: String
        var bucket: any Bucket
        public init(name: String, bucket: any Bucket) {
            self.name = name
            self.bucket = bucket
        }
    }
    private let own: any Bucket
    private let others: [Other]
    public var name: String { own.name }

    /// - Parameter others: in the order in which they are to be asked.
    public init(_ own: any Bucket, others: [Other]) {
        self.own = own
        self.others = others
    }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        do throws(StoreError) {
            return try await own.get(key, range: range)
        } catch {
            guard error.isOutage || error.kind == .notFound || error.kind == .refused, !others.isEmpty,
                key.hasPrefix("blocks/") || key.hasPrefix("manifests/")
            else { throw error }
            var away: [String] = []
            for other in others {
                do throws(StoreError) {
                    return try await other.bucket.get(key, range: range)
                } catch {
                    // One that is damaged there too, or of which it can't be said: the next.
                    if error.kind != .notFound { away.append("location '\(other.name)': \(error.description)") }
                }
            }
            let rest =
                away.isEmpty ? "no other location has a copy" : "no copy is in reach (\(away.joined(separator: "; ")))"
            throw StoreError(error.kind, "\(error.description); \(rest)", cause: error.cause)
        }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try await own.put(key, bytes, if: condition)
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try await own.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }

    public func delete(_ keys: [String]) async throws(StoreError) { try await own.delete(keys) }
}
