// `locations.json`: which location of its store a bucket is, and which others there are. A bucket without one is number
// 0 of a store that has no other.
//
// Always holds: a number, once given, means one location for ever; lists only grow. Numbers are given in location 0 alone,
// by compare-and-swap; the other lists are copies, and may be behind.

import BlockCache
import ObjectStore
import Runtime

struct LocationRegistry: Codable, Equatable, Sendable {
    struct Entry: Codable, Equatable, Sendable {
        var number: UInt8
        var name: String
    }
    static let key = "locations.json"
    static let kind = "locations"
    static let format = 1
    static let maxNameBytes = 64

    /// Of the store.
    var storeID: String
    /// This bucket's own.
    var number: UInt8
    /// Every location of the store, by number.
    var all: [Entry]
    /// Tells a write from another with the same content.
    var nonce: String

    enum CodingKeys: String, CodingKey {
        case storeID, all, nonce
        case number = "self"
    }

    init(storeID: ObjectID, number: UInt8, all: [Entry]) {
        self.storeID = storeID.description
        self.number = number
        self.all = all
        nonce = ""
    }

    func name(_ number: UInt8) -> String? { all.first { $0.number == number }?.name }
    func number(_ name: String) -> UInt8? { all.first { $0.name == name }?.number }

    static func isValidName(_ name: String) -> Bool { DiskName.isValid(name) && name.utf8.count <= maxNameBytes }

    /// The registry of a bucket; nil: it has none.
    static func load(_ bucket: any Bucket) async throws(CatalogError) -> (registry: LocationRegistry, etag: ETag)? {
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(key, range: nil)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
        let what = "'\(key)' in \(bucket.name)"
        let found = try ControlObject.open(Self.self, object.bytes, kind: kind, format: format, what: what)
        guard ObjectID(found.storeID) != nil, found.name(found.number) != nil, found.all.count <= 256,
            zip(found.all, found.all.dropFirst()).allSatisfy({ $0.number < $1.number }),
            Set(found.all.map(\.name)).count == found.all.count, found.all.allSatisfy({ isValidName($0.name) })
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
        return (found, object.etag)
    }

    /// Stores it if the bucket's is still the one with this tag (nil: if it has none). false: another was faster.
    func swap(into bucket: any Bucket, expecting: ETag?, _ environment: any Environment) async throws(CatalogError)
        -> Bool
    {
        var new = self
        new.nonce = environment.objectID().description
        let bytes = ControlObject.seal(new, kind: Self.kind, format: Self.format)
        let outcome = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(Self.key, bytes, if: expecting.map { .matches($0) } ?? .absent)
        }
        if case .won = outcome { return true }
        return false
    }

    /// Takes in what another list knows.
    mutating func merge(_ other: [Entry]) throws(CatalogError) {
        for entry in other {
            if let known = name(entry.number) {
                guard known == entry.name else {
                    throw CatalogError(
                        .corrupt,
                        "two lists of this store's locations disagree: number \(entry.number) is '\(known)' and '\(entry.name)'"
                    )
                }
                continue
            }
            guard number(entry.name) == nil else {
                throw CatalogError(.corrupt, "location '\(entry.name)' has two numbers in this store")
            }
            all.append(entry)
        }
        all.sort { $0.number < $1.number }
    }
}
