// What to know of a fork before it is mounted. Looking costs a few requests, so it is done for who asks.

import BlockCache
internal import ObjectStore
internal import Runtime

extension Catalog {
    /// Notes on what the current generation of a disk holds.
    package func mountNotes(_ name: String) async throws(CatalogError) -> [MountNote] {
        let head = try await load(name).head
        guard let record = head.record else { return [] }
        let reader = GenerationReader(record, store: store)
        let contents = DiskContents(try await reader.bytes(at: 0, count: DiskContents.lengthBytes))
        var notes = contents.notes(readOnly: head.isReadOnly, offset: 0)
        for start in contents.partitions(sizeBytes: record.sizeBytes) {
            let bytes = try await reader.bytes(at: start, count: DiskContents.lengthBytes)
            notes += DiskContents(bytes).notes(readOnly: head.isReadOnly, offset: start)
        }
        return notes
    }
}

/// Reads single bytes of a generation, by as few requests as there are. Slices that were read stay in memory.
struct GenerationReader {
    private let record: GenerationRecord
    private let manifest: Manifest
    private let loader: BlockLoader

    init(_ record: GenerationRecord, store: Store) {
        self.record = record
        manifest = Manifest.open(record, cache: ManifestCache(store.locations))
        let files = BlockFiles(disk: MemoryScratch(), budgetBytes: 0, environment: store.environment)
        loader = BlockLoader(
            locations: store.locations.buckets, cache: SliceCache(budgetBytes: 4 << 20), files: files,
            environment: store.environment, spawn: { _ in })
    }

    /// `count` bytes at `offset`; zeroes behind the end of the disk.
    func bytes(at offset: UInt64, count: Int) async throws(CatalogError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count, offset + UInt64(done) < record.sizeBytes {
            let at = offset + UInt64(done)
            let slices = at / UInt64(Geometry.sliceBytes)
            let start = Int(at % UInt64(Geometry.sliceBytes))
            let part = min(count - done, Geometry.sliceBytes - start)
            if let found = try await slice(slices, start..<start + part) {
                bytes.replaceSubrange(done..<done + part, with: found)
            }
            done += part
        }
        return bytes
    }

    /// A part of a slice; nil: all zeroes.
    private func slice(_ number: UInt64, _ part: Range<Int>) async throws(CatalogError) -> [UInt8]? {
        let slice = SliceIndex(Int(number % UInt64(Geometry.slicesPerBlock)))
        return try await CatalogError.wrap { () async throws(StoreError) in
            let block = BlockIndex(number / UInt64(Geometry.slicesPerBlock))
            guard let entry = try await manifest.find(block), entry.key(slice) != nil else { return nil }
            let pinned = try await loader.load(entry, slice)
            return Array(UnsafeRawBufferPointer(start: pinned.pointer + part.lowerBound, count: part.count))
        }
    }
}
