// The places that a store's objects are in: one bucket each, in one region. What a manifest names, it names with a
// location's number, so a number belongs to its bucket for ever, and never to the order of a configuration.
//
// Always holds: `buckets[n]` is the bucket of location n, or one that says that location n is not configured.

package import ObjectStore

/// One place of a store: a bucket (and prefix) in one region.
package struct Location: Sendable {
    /// As manifests name it.
    package let number: UInt8
    /// As people name it.
    package let name: String
    /// For what must succeed: tries for as long as the store's patience lasts, and reads blocks and manifest pages from a
    /// copy at another location while its own cannot give them.
    package let bucket: any Bucket
    /// The same without those copies: for whoever wants to know what is here.
    package let alone: any Bucket
    /// The same, given up after a few seconds: for whoever can do without.
    package let hasty: any Bucket
    /// Why it is out of reach, if it was when it was last used.
    package let trouble: @Sendable () -> String?

    package init(
        number: UInt8, name: String, bucket: any Bucket, alone: (any Bucket)? = nil, hasty: (any Bucket)? = nil,
        trouble: @escaping @Sendable () -> String? = { nil }
    ) {
        self.number = number
        self.name = name
        self.bucket = bucket
        self.alone = alone ?? bucket
        self.hasty = hasty ?? self.alone
        self.trouble = trouble
    }
}

/// The locations of a store, and which of them is near.
package struct Locations: Sendable {
    /// A location that the store has and that is not configured here.
    package struct Missing: Sendable, Equatable {
        package var number: UInt8
        package var name: String
    }

    /// Those that are configured, by number.
    package let all: [Location]
    package let missing: [Missing]
    /// By number.
    package let buckets: [any Bucket]
    /// Where new objects go.
    package let near: UInt8
    /// The name of the only location of a store, where nobody has chosen one.
    package static let onlyName = "main"

    package init(_ all: [Location], near: UInt8, missing: [Missing] = []) {
        precondition(all.contains { $0.number == near } && Set(all.map(\.number)).count == all.count)
        self.all = all.sorted { $0.number < $1.number }
        self.missing = missing
        self.near = near
        let last = max(all.map(\.number).max()!, missing.map(\.number).max() ?? 0)
        buckets = (0...last).map { number in
            if let location = all.first(where: { $0.number == number }) { return location.bucket }
            return FallbackBucket(
                UnconfiguredBucket(number: number, name: missing.first { $0.number == number }?.name),
                others: all.map { FallbackBucket.Other(name: $0.name, bucket: $0.alone) })
        }
    }

    /// Locations 0, 1, 2 … in these buckets.
    package init(_ buckets: [any Bucket], near: UInt8 = 0) {
        precondition(!buckets.isEmpty && buckets.count <= 256)
        let locations = buckets.enumerated().map { number, bucket in
            Location(number: UInt8(number), name: buckets.count == 1 ? Self.onlyName : "\(number)", bucket: bucket)
        }
        self.init(locations, near: near)
    }

    package var hasSeveral: Bool { all.count + missing.count > 1 }
    package var nearBucket: any Bucket { buckets[Int(near)] }
    /// All that are configured, the near one first.
    package var nearFirst: [Location] { all.filter { $0.number == near } + all.filter { $0.number != near } }
    package subscript(number: UInt8) -> Location? { all.first { $0.number == number } }

    /// The bucket at `location`; `.refused` when the store knows of none.
    package func bucket(_ location: UInt8) throws(StoreError) -> any Bucket {
        guard Int(location) < buckets.count else { throw UnconfiguredBucket(number: location, name: nil).error }
        return buckets[Int(location)]
    }

    /// The name of a location, for people.
    package func name(_ number: UInt8) -> String {
        self[number]?.name ?? missing.first { $0.number == number }?.name ?? "number \(number)"
    }

    /// What is out of reach now, as the end of a message about something that was not to be had; empty if nothing is.
    package var troubles: String {
        all.compactMap { location in location.trouble().map { "; location '\(location.name)' is out of reach: \($0)" } }
            .joined()
    }
}

/// In the place of a location that is not configured: every call is refused, and says what to do.
package struct UnconfiguredBucket: Bucket {
    let number: UInt8
    package let name: String

    init(number: UInt8, name: String?) {
        self.number = number
        self.name = name.map { "location '\($0)'" } ?? "location number \(number)"
    }

    var error: StoreError {
        StoreError(.refused, "\(name) of this store is not configured here: give its name and URL in 'locations'")
    }
    package func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject { throw error }
    package func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        throw error
    }
    package func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        throw error
    }
    package func delete(_ keys: [String]) async throws(StoreError) { throw error }
}
