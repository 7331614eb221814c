// What the trace of collection and check begins with: every head, and every generation record, of every location.
//
// Always holds: a disk's head is read before its records are listed. A generation that leaves the head meanwhile was archived
// before that, so one of the two shows it.

import BlockCache
import ObjectStore

/// One disk's head, and the generations that have records.
struct FoundDisk: Sendable {
    var heads: HeadStore
    var name: String
    /// nil: there is none, or it can't be read.
    var head: Result<Head?, CatalogError>
    /// Ascending.
    var generations: [UInt64]
}

struct RootScan: Sendable {
    let heads: HeadStore
    /// Requests under way at the same time.
    let requests: Int

    private var bucket: any Bucket { heads.bucket }

    /// Head and records of each of `names`. A head that can't be read is for the caller to judge; a listing that fails
    /// throws.
    func disks(_ names: [String]) async throws(CatalogError) -> [FoundDisk] {
        try await inParallel(names, limit: requests) { (name) async throws(CatalogError) -> FoundDisk in
            var head: Result<Head?, CatalogError>
            do throws(CatalogError) {
                head = .success(try await heads.load(name)?.head)
            } catch {
                head = .failure(error)
            }
            let generations = try await heads.recordedGenerations(name)
            return FoundDisk(heads: heads, name: name, head: head, generations: generations)
        }
    }

    /// One generation record, of whatever disk that had the name; nil: there is none.
    func record(_ name: String, _ generation: UInt64) async throws(CatalogError) -> GenerationRecord? {
        let key = GenerationRecord.key(disk: name, generation: generation)
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(key, range: nil)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
        let record = try GenerationRecord.decode(object.bytes, key: key)
        guard record.generation == generation else {
            throw CatalogError(.corrupt, "\(bucket.name): '\(key)' is of generation \(record.generation)")
        }
        return record
    }
}
