// Larger is a change of one number. Smaller is a commit: what lies behind the new end is taken out of the manifest, and
// out of the last block, so that nothing old comes back when the disk grows again.

import BlockCache
import ObjectStore
import Runtime

extension Catalog {
    /// Changes the size of a disk.
    ///
    /// Growing is safe beside a server that has the disk: it takes the size over with its next commit or attachment.
    ///
    /// - Parameters:
    ///   - shrink: a smaller size is meant; what lies behind it is lost.
    ///   - force: also when a server has the disk: it loses it, and with it what it did not commit. A server that died
    ///     holding the disk counts, for it may come back with writes that it acknowledged.
    package func resize(
        _ name: String, to sizeBytes: UInt64, shrink: Bool = false, force: Bool = false
    ) async throws(CatalogError) -> DiskInfo {
        try DiskSize.check(sizeBytes)
        for _ in 0..<Self.maxAttempts {
            let found = try await load(name)
            let old = found.head
            if old.isReadOnly, sizeBytes != old.sizeBytes {
                throw CatalogError(
                    .invalid, "disk '\(name)' is read-only and keeps its size; fork it, and resize the fork")
            }
            var head = old
            var limit: CommitLimit?
            if sizeBytes < old.sizeBytes {
                guard shrink else {
                    throw CatalogError(
                        .invalid,
                        "disk '\(name)' has \(old.sizeBytes) bytes; what lies behind \(sizeBytes) would be lost: use --shrink to mean it"
                    )
                }
                try await refuseOwned(found, force: force, "make it smaller")
                head.dispossess()
                head.sizeBytes = sizeBytes
                limit = try await CommitLimit.begin(store)
                try await cut(&head, from: found)
            } else {
                head.sizeBytes = sizeBytes
            }
            if head == old { return try await info(old, at: found.heads) }
            try await limit?.check(asking: true, what: "making disk '\(name)' smaller")
            try await limit?.check(what: "making disk '\(name)' smaller")
            // What may fail has come before: a server that is told has lost the disk.
            if head.epoch != old.epoch { try await tell(found, epoch: head.epoch) }
            if case .won = try await found.heads.swap(head, expecting: found.etag) {
                return try await info(head, at: found.heads)
            }
        }
        throw Self.conflict(name)
    }

    /// Makes the current generation one that ends at the head's size.
    private func cut(_ head: inout Head, from old: Store.Found) async throws(CatalogError) {
        guard let record = old.head.record, record.sizeBytes > head.sizeBytes else { return }
        let manifest = Manifest.open(record, cache: ManifestCache(store.locations))
        var edit = ManifestEdit(manifest)
        edit.resize(to: head.sizeBytes)
        let tail = try await cutLastBlock(manifest, at: head.sizeBytes)
        if let tail { edit.set(tail.block, tail.entry) }
        let new = try await CatalogError.wrap { () async throws(StoreError) in
            try await edit.write(
                to: store.locations.nearBucket, location: store.locations.near, environment: store.environment)
        }
        try await old.heads.archive(old.head)
        head.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .resized,
                committedAtMs: store.environment.wallMs, journalSequence: record.journalSequence,
                newBytes: new.bytesWritten + UInt64(tail?.entry?.base?.lengthBytes ?? 0), manifest: new))
    }

    /// The block that the new end cuts, anew, with zeroes behind that end; nil when nothing is to be changed there.
    private func cutLastBlock(
        _ manifest: Manifest, at sizeBytes: UInt64
    ) async throws(CatalogError) -> (block: BlockIndex, entry: BlockEntry?)? {
        let kept = Int(sizeBytes % UInt64(Geometry.blockBytes))
        let block = BlockIndex(sizeBytes / UInt64(Geometry.blockBytes))
        if kept == 0 { return nil }
        let found = try await CatalogError.wrap { () async throws(StoreError) in try await manifest.find(block) }
        guard let entry = found else { return nil }
        var bytes = try await CatalogError.wrap { () async throws(StoreError) in
            try await readBlock(entry, from: store.locations.buckets, environment: store.environment)
        }
        let id = store.environment.objectID()
        bytes.replaceSubrange(kept..., with: repeatElement(0, count: bytes.count - kept))
        let cut = bytes
        let packed = await store.environment.offload {
            cut.withUnsafeBytes { encodeBase($0, id: id, location: store.locations.near) }
        }
        guard let packed else { return (block, nil) }
        try await CatalogError.wrap { () async throws(StoreError) in
            _ = try await store.locations.nearBucket.put(id.blockKey, packed.object, if: .none)
        }
        return (block, BlockEntry(base: packed.ref, deltas: []))
    }
}
