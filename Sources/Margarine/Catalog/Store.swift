// A store: its bucket (later: several locations), known to be Margarine's and of this format.
//
// Always holds: `store.json` was there, whole, and says what this version reads and writes.

package import BlockCache
package import ObjectStore
package import Runtime

package struct Store: Sendable {
    /// What `store.json` says.
    struct Description: Codable, Equatable {
        var storeID: String
        var blockBytes: Int
        var createdAtMs: Int64
    }
    static let key = "store.json"
    static let format = 1

    /// Tells this store from every other.
    package let id: ObjectID
    package let locations: Locations
    package let environment: any Environment

    /// The bucket that heads, records and heartbeats are in: location 0.
    package var bucket: any Bucket { locations.buckets[0] }
    /// Where new disks get their heads.
    package var heads: HeadStore { HeadStore(bucket: bucket, environment: environment) }

    /// A head, and where it is.
    package struct Found: Sendable {
        package var heads: HeadStore
        package var head: Head
        package var etag: ETag
    }

    /// The head of a name, also when it is a tombstone; nil when the name has never been used.
    package func find(_ name: String) async throws(CatalogError) -> Found? {
        guard let (head, etag) = try await heads.load(name) else { return nil }
        return Found(heads: heads, head: head, etag: etag)
    }

    /// Opens the store at a URL.
    ///
    /// - Parameters:
    ///   - readOnly: nothing is written: a store that is not there yet is an error instead of being made, and that the
    ///     bucket holds conditions is not tried out.
    ///   - counters: where calls on the bucket are counted.
    package static func open(
        url: String, environment: any Environment, readOnly: Bool = false, retries: RetryPolicy = RetryPolicy(),
        counters: StoreCounters = StoreCounters()
    ) async throws(CatalogError) -> Store {
        let bucket = try await CatalogError.wrap { () async throws(StoreError) in
            try await openBucket(
                url: url, environment: environment, check: !readOnly, retries: retries, counters: counters)
        }
        return try await Store.open(bucket: bucket, environment: environment, readOnly: readOnly)
    }

    /// Opens the store in a bucket; makes it where there is none, unless `readOnly`.
    package static func open(
        bucket: any Bucket, environment: any Environment, readOnly: Bool = false
    ) async throws(CatalogError) -> Store {
        var bytes: [UInt8]
        do throws(StoreError) {
            bytes = try await bucket.get(key, range: nil).bytes
        } catch {
            guard error.kind == .notFound else { throw CatalogError(error) }
            if readOnly {
                throw CatalogError(.notFound, "\(bucket.name) is no store yet; 'margined disk create' makes it one")
            }
            let description = Description(
                storeID: environment.objectID().description, blockBytes: Geometry.blockBytes,
                createdAtMs: environment.wallMs)
            bytes = ControlObject.seal(description, kind: "store", format: format)
            let outcome = try await CatalogError.wrap { () async throws(StoreError) in
                try await bucket.swap(key, bytes, if: .absent)
            }
            // Another one made it at the same time.
            if case .lost(let theirs) = outcome { bytes = theirs?.bytes ?? [] }
        }
        let what = "'\(key)' in \(bucket.name)"
        let description = try ControlObject.open(Description.self, bytes, kind: "store", format: format, what: what)
        guard let id = ObjectID(description.storeID) else { throw CatalogError(.corrupt, "\(what) has no store id") }
        guard description.blockBytes == Geometry.blockBytes else {
            throw CatalogError(
                .corrupt,
                "\(bucket.name) is a store of \(description.blockBytes)-byte blocks, this Margarine knows \(Geometry.blockBytes) only"
            )
        }
        return Store(id: id, locations: Locations([bucket]), environment: environment)
    }

    private init(id: ObjectID, locations: Locations, environment: any Environment) {
        self.id = id
        self.locations = locations
        self.environment = environment
    }
}
