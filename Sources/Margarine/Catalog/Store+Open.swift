// Opening a store: which buckets it is given, whether they are one store's, and which number each has.

internal import BlockCache
package import ObjectStore
package import Runtime

/// A bucket that a store is opened with.
package struct StorePlace: Sendable {
    /// As the configuration calls the location; nil: it has one only and does not say.
    package var name: String?
    /// Gives the transport, without anything that repeats calls.
    package var open: LocationBucket.Open

    package init(name: String?, open: @escaping LocationBucket.Open) {
        self.name = name
        self.open = open
    }
}

extension Store {
    /// Opens the store whose locations are at these URLs.
    ///
    /// - Parameters:
    ///   - near: the name of the location where new objects go; nil: the first.
    ///   - readOnly: nothing is written: a store that is not there yet is an error instead of being made, and that the
    ///     buckets hold conditions is not tried out.
    ///   - counters: where calls on the buckets are counted.
    package static func open(
        urls: [(name: String?, url: String)], near: String? = nil, environment: any Environment, readOnly: Bool = false,
        retries: RetryPolicy = RetryPolicy(), counters: StoreCounters = StoreCounters()
    ) async throws(CatalogError) -> Store {
        for (_, url) in urls { _ = try await CatalogError.wrap { () async throws(StoreError) in try StoreURL(url) } }
        let first = near ?? urls.first?.name
        let places = urls.map { name, url in
            // Whoever can do without a location does not wait for long, and what it must hold was tried out when it was
            // added: nothing is made where it was.
            let isNear = name == first
            var transport = TransportSettings()
            if !isNear { transport.stallTimeoutSeconds = 10 }
            let settings = transport
            return StorePlace(name: name) { () async throws(StoreError) -> any Bucket in
                try await openTransport(
                    url: url, environment: environment, check: isNear && !readOnly, transport: settings,
                    counters: counters)
            }
        }
        return try await open(
            places, near: near, environment: environment, readOnly: readOnly, retries: retries, counters: counters)
    }

    /// Opens the store at a URL.
    package static func open(
        url: String, environment: any Environment, readOnly: Bool = false, retries: RetryPolicy = RetryPolicy(),
        counters: StoreCounters = StoreCounters()
    ) async throws(CatalogError) -> Store {
        try await open(
            urls: [(nil, url)], environment: environment, readOnly: readOnly, retries: retries, counters: counters)
    }

    /// Opens the store in a bucket, whose calls are not repeated; makes it where there is none, unless `readOnly`.
    package static func open(
        bucket: any Bucket, environment: any Environment, readOnly: Bool = false
    ) async throws(CatalogError) -> Store {
        let place = StorePlace(name: nil) { () async throws(StoreError) -> any Bucket in bucket }
        return try await open([place], environment: environment, readOnly: readOnly, retries: nil)
    }

    /// Opens the store at these places. The near one must answer; another that is out of reach is opened later.
    ///
    /// - Parameter retries: how calls are repeated; nil: not at all.
    package static func open(
        _ places: [StorePlace], near: String? = nil, environment: any Environment, readOnly: Bool = false,
        retries: RetryPolicy? = RetryPolicy(), counters: StoreCounters = StoreCounters()
    ) async throws(CatalogError) -> Store {
        precondition(!places.isEmpty && (places.count == 1 || places.allSatisfy { $0.name != nil }))
        let nearName = near ?? places[0].name
        guard let index = places.firstIndex(where: { $0.name == nearName }) else {
            throw CatalogError(.invalid, "there is no location '\(nearName ?? "")' to be near")
        }
        let place = places[index]
        let opener = Opener(environment: environment, retries: retries, counters: counters)
        let transport = try await CatalogError.wrap { () async throws(StoreError) in try await place.open() }
        let nearBucket = opener.patient(transport)
        let id: ObjectID
        do throws(CatalogError) {
            id = try await describe(nearBucket, environment: environment, make: places.count == 1 && !readOnly)
        } catch {
            guard error.kind == .notFound, places.count > 1 else { throw error }
            throw CatalogError(
                .notFound,
                "\(nearBucket.name) is no store yet: begin with one location, and add others with 'margined location add'"
            )
        }
        guard var registry = try await LocationRegistry.load(nearBucket)?.registry else {
            if let other = places.first(where: { $0.name != nearName }) {
                throw unregistered(other.name!, [nearName!])
            }
            // One location, and nobody has said more of it.
            let location = Location(
                number: 0, name: nearName ?? Locations.onlyName, bucket: nearBucket, alone: nearBucket,
                hasty: opener.hasty(transport))
            return Store(id: id, locations: Locations([location], near: 0), environment: environment)
        }
        let nearNumber = registry.number
        if let problem = mismatch(registry, id: id, name: nearName, number: nil, nearBucket.name) { throw problem }
        let name = registry.name(nearNumber)!

        // What answers tells its number; of the rest the near one's list does.
        let others = places.indices.filter { $0 != index }.map { places[$0] }
        let attempts = try await inParallel(others, limit: 16) { (place) async throws(CatalogError) -> Attempt in
            try await Attempt(place, id: id, environment)
        }
        for attempt in attempts { if let found = attempt.registry { try registry.merge(found.all) } }
        var made: [Opener.Made] = [
            opener.make(
                nearNumber, name, opened: transport, trouble: nil,
                open: place.open, verify: { (_) async throws(StoreError) in })
        ]
        for (place, attempt) in zip(others, attempts) {
            let name = place.name!
            guard let number = registry.number(name) else {
                if let found = attempt.registry {
                    throw mismatch(found, id: id, name: name, number: nil, attempt.what)!
                }
                throw unregistered(name, registry.all.map(\.name))
            }
            if let found = attempt.registry,
                let problem = mismatch(found, id: id, name: name, number: number, attempt.what)
            {
                throw problem
            }
            made.append(
                opener.make(number, name, opened: attempt.bucket, trouble: attempt.trouble, open: place.open) {
                    (bucket) async throws(StoreError) in
                    try await Store.verify(bucket, id: id, name: name, number: number, environment)
                })
        }
        let missing = registry.all.filter { entry in !made.contains { $0.number == entry.number } }
            .map { Locations.Missing(number: $0.number, name: $0.name) }
        let locations = Locations(opener.compose(made, near: nearNumber), near: nearNumber, missing: missing)
        return Store(id: id, locations: locations, environment: environment)
    }

    private static func unregistered(_ name: String, _ known: [String]) -> CatalogError {
        CatalogError(
            .invalid,
            "location '\(name)' is none of this store (it has \(known.joined(separator: ", "))): add it with 'margined location add', or correct 'locations'"
        )
    }

    /// Why a bucket with this registry is not the one that is meant; nil: it is.
    static func mismatch(
        _ registry: LocationRegistry, id: ObjectID, name: String?, number: UInt8?, _ what: String
    ) -> CatalogError? {
        let own = registry.name(registry.number)!
        guard registry.storeID == id.description else {
            return CatalogError(.corrupt, "'\(LocationRegistry.key)' in \(what) is of another store")
        }
        if let name, own != name {
            return CatalogError(
                .invalid, "\(what) is location '\(own)' of this store, not '\(name)': correct 'locations'")
        }
        if let number, registry.number != number {
            return CatalogError(
                .corrupt, "\(what) is location number \(registry.number) of this store, '\(own)' is \(number)")
        }
        return nil
    }

    /// What `store.json` says; made where there is none, with `make`.
    static func describe(
        _ bucket: any Bucket, environment: any Environment, make: Bool
    ) async throws(CatalogError) -> ObjectID {
        var bytes: [UInt8]
        do throws(StoreError) {
            bytes = try await bucket.get(key, range: nil).bytes
        } catch {
            guard error.kind == .notFound else { throw CatalogError(error) }
            if !make {
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
        return try decode(bytes, bucket.name)
    }

    /// The id in the bytes of a `store.json`.
    static func decode(_ bytes: [UInt8], _ bucket: String) throws(CatalogError) -> ObjectID {
        let what = "'\(key)' in \(bucket)"
        let description = try ControlObject.open(Description.self, bytes, kind: "store", format: format, what: what)
        guard let id = ObjectID(description.storeID) else { throw CatalogError(.corrupt, "\(what) has no store id") }
        guard description.blockBytes == Geometry.blockBytes else {
            throw CatalogError(
                .corrupt,
                "\(bucket) is a store of \(description.blockBytes)-byte blocks, this Margarine knows \(Geometry.blockBytes) only"
            )
        }
        return id
    }

    /// That a bucket is the location that is meant, when it comes into reach.
    static func verify(
        _ bucket: any Bucket, id: ObjectID, name: String, number: UInt8, _ environment: any Environment
    ) async throws(StoreError) {
        do throws(CatalogError) {
            let found = try await Attempt.look(bucket, id: id, environment)
            if let problem = mismatch(found, id: id, name: name, number: number, bucket.name) { throw problem }
        } catch {
            if case .store(let kind) = error.kind { throw StoreError(kind, error.description) }
            throw StoreError(.refused, error.description)
        }
    }

    /// One try to open a location that is not the near one.
    private struct Attempt: Sendable {
        var bucket: (any Bucket)?
        var registry: LocationRegistry?
        /// Why it is out of reach.
        var trouble: StoreError?
        var what = ""

        init(_ place: StorePlace, id: ObjectID, _ environment: any Environment) async throws(CatalogError) {
            do throws(StoreError) { bucket = try await place.open() } catch { trouble = error }
            guard let bucket else { return }
            what = bucket.name
            do throws(CatalogError) {
                registry = try await Attempt.look(bucket, id: id, environment)
            } catch {
                self.bucket = nil
                switch error.kind {
                case .store(let kind): trouble = StoreError(kind, error.description)
                // Lost, perhaps.
                case .notFound: trouble = StoreError(.refused, error.description)
                default: throw CatalogError(error.kind, "location '\(place.name!)': \(error.description)")
                }
            }
        }

        /// The registry of a bucket that must be of the store.
        static func look(
            _ bucket: any Bucket, id: ObjectID, _ environment: any Environment
        ) async throws(CatalogError) -> LocationRegistry {
            do throws(CatalogError) {
                guard try await describe(bucket, environment: environment, make: false) == id else {
                    throw CatalogError(.invalid, "\(bucket.name) is another store: correct 'locations'")
                }
            } catch {
                guard error.kind == .notFound else { throw error }
                throw CatalogError(
                    .notFound,
                    "there is no store in \(bucket.name): restore it, or, if it is lost for good, see 'margined location add --replace'"
                )
            }
            guard let found = try await LocationRegistry.load(bucket)?.registry else {
                throw CatalogError(
                    .invalid,
                    "\(bucket.name) does not know which location of its store it is: add it with 'margined location add'"
                )
            }
            return found
        }
    }
}

/// Puts the stack of each location together: the transport, its location, copies at other locations, repetition.
struct Opener: Sendable {
    let environment: any Environment
    let retries: RetryPolicy?
    let counters: StoreCounters

    struct Made: Sendable {
        var number: UInt8
        var name: String
        var bucket: LocationBucket
    }

    func patient(_ bucket: any Bucket) -> any Bucket {
        guard let retries else { return bucket }
        return RetryingBucket(bucket, environment: environment, policy: retries, counters: counters)
    }

    func hasty(_ bucket: any Bucket) -> any Bucket {
        guard retries != nil else { return bucket }
        let policy = RetryPolicy(firstPauseMs: 50, longestPauseMs: 500, deadlineMs: 1500)
        return RetryingBucket(bucket, environment: environment, policy: policy, counters: counters)
    }

    func make(
        _ number: UInt8, _ name: String, opened: (any Bucket)?, trouble: StoreError?,
        open: @escaping LocationBucket.Open,
        verify: @escaping @Sendable (any Bucket) async throws(StoreError) -> Void
    ) -> Made {
        let bucket = LocationBucket(name, opened: opened, trouble: trouble, environment: environment) {
            () async throws(StoreError) -> any Bucket in
            let bucket = try await open()
            try await verify(bucket)
            return bucket
        }
        return Made(number: number, name: name, bucket: bucket)
    }

    func compose(_ made: [Made], near: UInt8) -> [Location] {
        let nearFirst = made.filter { $0.number == near } + made.filter { $0.number != near }
        return made.map { one in
            let others = nearFirst.filter { $0.number != one.number }
                .map { FallbackBucket.Other(name: $0.name, bucket: $0.bucket) }
            return Location(
                number: one.number, name: one.name, bucket: patient(FallbackBucket(one.bucket, others: others)),
                alone: patient(one.bucket), hasty: hasty(one.bucket), trouble: { one.bucket.trouble })
        }
    }
}
