// How generations leave: the collector lists those that history no longer keeps in a retirement, an object of its own, and
// removes their records only once the retirement is older than the grace period. What is in a retirement can't be pinned,
// forked or gone back to any more, so whoever began to do so before has long finished.
//
// Always holds: a retirement is never changed; its age is the object's, by the store's clock.

package import BlockCache
internal import ObjectStore

/// `disks/<disk>/retired/<id>`: generations of one disk name that are about to leave.
package struct Retirement: Sendable, Equatable, Codable {
    /// Ascending, at most `maxGenerations`.
    package var generations: [UInt64]
    package static let maxGenerations = 10_000
    static let format = 1

    package init(generations: [UInt64]) { self.generations = generations }

    package static func folder(disk name: String) -> String { "disks/\(name)/retired/" }
    package static func key(disk name: String, id: ObjectID) -> String { folder(disk: name) + id.description }

    func encoded() -> [UInt8] { ControlObject.seal(self, kind: "retirement", format: Self.format) }

    static func decode(_ bytes: [UInt8], key: String) throws(CatalogError) -> Retirement {
        let found = try ControlObject.open(
            Self.self, bytes, kind: "retirement", format: format, what: "'\(key)'")
        guard found.generations.count <= maxGenerations,
            zip(found.generations, found.generations.dropFirst()).allSatisfy(<)
        else { throw CatalogError(.corrupt, "'\(key)' contradicts itself") }
        return found
    }
}

extension HeadStore {
    /// The retirements of a disk, with the times at which they were stored.
    package func retirements(_ name: String) async throws(CatalogError)
        -> [(key: String, retirement: Retirement, modifiedMs: Int64)]
    {
        var found: [(key: String, retirement: Retirement, modifiedMs: Int64)] = []
        try await bucket.forEachPage(prefix: Retirement.folder(disk: name)) { (page) async throws(CatalogError) in
            for item in page.items {
                let object: StoredObject
                do throws(StoreError) {
                    object = try await bucket.get(item.key, range: nil)
                } catch {
                    // All that was in it is gone, and then it went.
                    if error.kind == .notFound { continue }
                    throw CatalogError(error)
                }
                found.append((item.key, try Retirement.decode(object.bytes, key: item.key), item.modifiedMs))
            }
        }
        return found
    }

    /// Whether the generation is about to leave, or has left.
    package func isRetired(_ name: String, generation: UInt64) async throws(CatalogError) -> Bool {
        try await retirements(name).contains { $0.retirement.generations.contains(generation) }
    }
}
