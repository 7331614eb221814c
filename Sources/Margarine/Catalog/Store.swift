// A store: its buckets, one for each location, known to be Margarine's, of this format and of one store.
//
// Always holds: every bucket had a whole `store.json` of the same store, and the number and name that its own
// `locations.json` gives it; what is out of reach is held to the same before its first use.

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

    /// For whoever has made sure of the buckets.
    package init(id: ObjectID, locations: Locations, environment: any Environment) {
        self.id = id
        self.locations = locations
        self.environment = environment
    }

    /// What the store has once: location 0's bucket. Disks' heads, records and owners' heartbeats are in the locations of
    /// their disks (`heads(at:)`).
    package var bucket: any Bucket { locations.buckets[0] }
    /// Where new disks get their heads, if nobody chooses.
    package var heads: HeadStore { heads(at: locations.near) }

    /// The heads of the disks of one location.
    package func heads(at number: UInt8) -> HeadStore {
        let bucket: any Bucket =
            Int(number) < locations.buckets.count
            ? locations.buckets[Int(number)] : UnconfiguredBucket(number: number, name: nil)
        return HeadStore(bucket: bucket, environment: environment, location: number)
    }

    /// The same for a look that need not succeed: given up after a few seconds, but at the near location.
    func hastyHeads(at location: Location) -> HeadStore {
        HeadStore(
            bucket: location.number == locations.near ? location.bucket : location.hasty, environment: environment,
            location: location.number)
    }

    /// A location by its name; nil: the near one.
    package func location(named name: String?) throws(CatalogError) -> Location {
        guard let name else { return locations[locations.near]! }
        if let location = locations.all.first(where: { $0.name == name }) { return location }
        if let missing = locations.missing.first(where: { $0.name == name }) { throw unconfigured(missing) }
        throw CatalogError(
            .invalid,
            "there is no location '\(name)'; this store has \(locations.all.map(\.name).joined(separator: ", "))")
    }

    func unconfigured(_ missing: Locations.Missing) -> CatalogError {
        CatalogError(UnconfiguredBucket(number: missing.number, name: missing.name).error)
    }

    /// A head, and where it is.
    package struct Found: Sendable {
        package var heads: HeadStore
        package var head: Head
        package var etag: ETag
    }

    /// The head of a name, wherever it is: at the near location first, then at the others. A tombstone when no location has
    /// more; nil when the name has never been used.
    ///
    /// - Throws: when it was not found and not all locations could be asked, an error that names one which could not.
    package func find(_ name: String) async throws(CatalogError) -> Found? {
        let (found, tombstone, silent) = try await search(name)
        if let found { return found }
        if let silent {
            throw CatalogError(
                silent.kind, "disk '\(name)' is not at the locations that answer, and \(silent.description)")
        }
        return tombstone
    }

    /// `silent`: the error of a location that could not be asked. The near one must answer.
    private func search(_ name: String) async throws(CatalogError)
        -> (found: Found?, tombstone: Found?, silent: CatalogError?)
    {
        var tombstone: Found?
        var silent: CatalogError?
        for location in locations.nearFirst {
            do throws(CatalogError) {
                guard let loaded = try await hastyHeads(at: location).load(name) else { continue }
                let found = Found(heads: heads(at: location.number), head: loaded.head, etag: loaded.etag)
                if !found.head.deleted { return (found, nil, nil) }
                if tombstone == nil { tombstone = found }
            } catch {
                guard location.number != locations.near, case .store = error.kind else { throw error }
                if silent == nil { silent = error }
            }
        }
        if silent == nil, let missing = locations.missing.first { silent = unconfigured(missing) }
        return (nil, tombstone, silent)
    }

    /// Where a disk is, or may be made.
    package struct Spot: Sendable {
        package var heads: HeadStore
        /// The head that is there now: of a disk, or a tombstone.
        package var head: Head?
        package var etag: ETag?
    }

    /// Where to make a disk of this name: at location `number`, unless there is one already at any location that answers;
    /// then where that is.
    package func spot(for name: String, at number: UInt8) async throws(CatalogError) -> Spot {
        if let found = try await search(name).found {
            return Spot(heads: found.heads, head: found.head, etag: found.etag)
        }
        let heads = heads(at: number)
        guard let (head, etag) = try await heads.load(name) else { return Spot(heads: heads, head: nil, etag: nil) }
        return Spot(heads: heads, head: head, etag: etag)
    }

    /// Makes sure that every location of the store is configured and answers, one that was added since the store was
    /// opened among them: for those who must look at all of them or do nothing.
    package func requireAll() async throws(CatalogError) {
        if let missing = locations.missing.first { throw unconfigured(missing) }
        for location in locations.all {
            guard let (registry, _) = try await LocationRegistry.load(location.hasty) else {
                if !locations.hasSeveral, location.number == 0 { continue }
                throw CatalogError(
                    .corrupt, "'\(LocationRegistry.key)' of location '\(location.name)' is missing: restore it")
            }
            guard registry.storeID == id.description, registry.number == location.number else {
                throw CatalogError(.corrupt, "the bucket of location '\(location.name)' is another one now")
            }
            if let added = registry.all.first(where: { locations[$0.number]?.name != $0.name }) {
                throw CatalogError(
                    .store(.refused),
                    "location '\(added.name)' was added to this store: give its name and URL in 'locations', and start anew"
                )
            }
        }
    }
}
