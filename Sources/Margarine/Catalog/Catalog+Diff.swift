// What changed between two generations, of any two disks of a store. The manifests tell; no block is read.

package import BlockCache
import ObjectStore

/// One generation of a disk, to be read.
package struct GenerationView: Sendable {
    package var disk: String
    package var diskID: ObjectID
    /// 0: the disk was never written.
    package var generation: UInt64
    /// Size of the disk then; of the current generation its size now.
    package var sizeBytes: UInt64
    /// nil: the disk was never written.
    package var record: GenerationRecord?
    package var manifest: Manifest
}

extension Catalog {
    /// A generation that the disk keeps; nil: the current one. No page of its manifest is loaded.
    package func view(_ name: String, generation: UInt64? = nil) async throws(CatalogError) -> GenerationView {
        try await view(try await load(name), generation: generation)
    }

    func view(_ found: Store.Found, generation: UInt64?) async throws(CatalogError) -> GenerationView {
        let head = found.head
        let cache = ManifestCache(store.locations, budgetBytes: 8 << 20)
        guard let generation else {
            return GenerationView(
                disk: head.name, diskID: head.diskID, generation: head.record == nil ? 0 : head.generation,
                sizeBytes: head.sizeBytes, record: head.record, manifest: head.manifest(cache: cache))
        }
        let record = try await keptRecord(generation, of: found)
        return GenerationView(
            disk: head.name, diskID: head.diskID, generation: generation, sizeBytes: record.sizeBytes, record: record,
            manifest: .open(record, cache: cache))
    }

    /// The bytes that may differ in `new` from what they are in `old`. Costs the manifest pages that differ, and a few of
    /// them in memory. Where the sizes differ, what lies behind the smaller one's end counts as zeroes there.
    package func diff(from old: GenerationView, to new: GenerationView) -> ChangedRanges {
        ChangedRanges(
            ManifestDiff(from: old.manifest, to: new.manifest), endBytes: max(old.sizeBytes, new.sizeBytes))
    }
}
