// A new location: it gets a number in location 0, then control objects of its own, and at last the other locations hear
// of it. Ended anywhere on the way, the same command takes it up again.

internal import BlockCache
internal import ObjectStore
internal import Runtime

extension Store {
    /// What `addLocation` did.
    package struct Added: Sendable {
        package var number: UInt8
        /// Locations whose lists could not be brought up to date, and why.
        package var behind: [(name: String, reason: String)] = []
    }

    /// Makes a bucket the location `name` of this store.
    ///
    /// - Parameters:
    ///   - place: an empty bucket, or one whose adding was not finished.
    ///   - replace: the location is known, and its bucket is lost for good: this one takes its place.
    package func addLocation(
        _ name: String, _ place: StorePlace, replace: Bool = false
    ) async throws(CatalogError) -> Added {
        guard LocationRegistry.isValidName(name) else {
            throw CatalogError(
                .invalid,
                "'\(name.prefix(64))' cannot be the name of a location: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
            )
        }
        let bucket = try await CatalogError.wrap { () async throws(StoreError) in try await place.open() }
        let description = try await storeDescription()
        let begun = try await checkNew(bucket, name)
        let (number, all) = replace ? try await lostNumber(name) : try await number(for: name, begun: begun)
        let registry = LocationRegistry(storeID: id, number: number, all: all)
        // First the number: a bucket with `store.json` alone would be taken for location 0.
        if try await !registry.swap(into: bucket, expecting: nil, environment) {
            guard let there = try await LocationRegistry.load(bucket)?.registry, there.number == number else {
                throw CatalogError(.conflict, "\(bucket.name) was made another location at the same time; look again")
            }
        }
        try await copyGrace(to: bucket)
        let outcome = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(Store.key, description, if: .absent)
        }
        if case .lost(let theirs) = outcome, theirs?.bytes != description {
            throw CatalogError(.conflict, "\(bucket.name) was made another store at the same time")
        }
        var added = Added(number: number)
        for location in locations.all where location.number != number {
            do throws(CatalogError) {
                try await bringUpToDate(location, all)
            } catch {
                added.behind.append((location.name, error.description))
            }
        }
        for missing in locations.missing where missing.number != number {
            added.behind.append((missing.name, "it is not configured here"))
        }
        return added
    }

    /// Its writers go by the store's grace period from the start.
    private func copyGrace(to bucket: any Bucket) async throws(CatalogError) {
        guard let state = try await CollectionState.load(locations.nearBucket)?.state else { return }
        var copy = CollectionState()
        copy.graceMs = state.graceMs
        copy.nonce = environment.objectID()
        let bytes = copy.encoded()
        _ = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(CollectionState.key, bytes, if: .absent)
        }
    }

    private func storeDescription() async throws(CatalogError) -> [UInt8] {
        try await CatalogError.wrap { () async throws(StoreError) in
            try await locations.nearBucket.get(Store.key, range: nil).bytes
        }
    }

    /// That the bucket may become a location: nothing of a store is in it, or it is this very location, half made.
    ///
    /// - Returns: the number that it has; nil: none yet.
    private func checkNew(_ bucket: any Bucket, _ name: String) async throws(CatalogError) -> UInt8? {
        if let there = try await LocationRegistry.load(bucket)?.registry {
            if let problem = Store.mismatch(there, id: id, name: name, number: nil, bucket.name) {
                throw CatalogError(.exists, problem.description)
            }
            return there.number
        }
        let page = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.list(prefix: "", after: nil, folders: false, limit: 10)
        }
        guard page.items.isEmpty else {
            throw CatalogError(
                .exists,
                "\(bucket.name) is not empty ('\(page.items[0].key)'): a new location begins in an empty bucket or prefix"
            )
        }
        return nil
    }

    /// The number of a new location, given by compare-and-swap in location 0, and all that there are with it.
    ///
    /// - Parameter begun: the number that its bucket has already.
    private func number(for name: String, begun: UInt8?) async throws(CatalogError) -> (UInt8, [LocationRegistry.Entry])
    {
        guard let first = locations[0] else {
            throw unconfigured(Locations.Missing(number: 0, name: locations.name(0)))
        }
        for _ in 0..<Catalog.maxAttempts {
            let loaded = try await LocationRegistry.load(first.bucket)
            var registry =
                loaded?.registry
                ?? LocationRegistry(storeID: id, number: 0, all: [.init(number: 0, name: first.name)])
            if let number = registry.number(name) {
                guard number == begun else {
                    throw CatalogError(
                        .exists,
                        "there is a location '\(name)' already; if its bucket is lost for good, or was never finished, --replace puts this one in its place"
                    )
                }
                return (number, registry.all)
            }
            guard let last = registry.all.last?.number, last < 255 else {
                throw CatalogError(.invalid, "a store has at most 256 locations")
            }
            registry.all.append(.init(number: last + 1, name: name))
            if try await registry.swap(into: first.bucket, expecting: loaded?.etag, environment) {
                return (last + 1, registry.all)
            }
        }
        throw CatalogError(.conflict, "others keep adding locations; try again")
    }

    /// The number of a location whose bucket is lost.
    private func lostNumber(_ name: String) async throws(CatalogError) -> (UInt8, [LocationRegistry.Entry]) {
        guard let registry = try await LocationRegistry.load(locations.nearBucket)?.registry,
            let number = registry.number(name), number != locations.near
        else { throw CatalogError(.invalid, "--replace: '\(name)' is no other location of this store; add it without") }
        if let location = locations[number], (try? await LocationRegistry.load(location.hasty)) ?? nil != nil {
            throw CatalogError(.exists, "--replace: location '\(name)' answers; it is not lost")
        }
        return (number, registry.all)
    }

    private func bringUpToDate(_ location: Location, _ all: [LocationRegistry.Entry]) async throws(CatalogError) {
        for _ in 0..<Catalog.maxAttempts {
            guard let (there, etag) = try await LocationRegistry.load(location.hasty) else { return }
            var registry = there
            try registry.merge(all)
            if registry.all == there.all { return }
            if try await registry.swap(into: location.hasty, expecting: etag, environment) { return }
        }
        throw CatalogError(.conflict, "others keep changing it")
    }

    /// One location, for people.
    package struct LocationState: Sendable {
        package var number: UInt8
        package var name: String
        package var isNear: Bool
        /// nil: not configured.
        package var url: String?
        /// nil: it answers.
        package var problem: String?
    }

    /// Every location of the store, and whether it answers.
    package func locationStates() async -> [LocationState] {
        var states: [LocationState] = []
        for location in locations.all {
            var problem: String?
            do throws(StoreError) { _ = try await location.hasty.get(Store.key, range: 0..<0) } catch {
                problem = error.description
            }
            states.append(
                LocationState(
                    number: location.number, name: location.name, isNear: location.number == locations.near,
                    url: location.alone.name, problem: problem))
        }
        for missing in locations.missing {
            states.append(
                LocationState(
                    number: missing.number, name: missing.name, isNear: false, url: nil, problem: "not configured here")
            )
        }
        return states.sorted { $0.number < $1.number }
    }
}
