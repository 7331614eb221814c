// A generation, or what changed since an earlier one, as a stream of bytes: for another store, or a file. Blocks are read
// in parallel, a few at a time, so memory stays bounded whatever the disk's size.

import BlockCache
import ObjectStore
import Runtime

/// Takes the bytes of a stream, in order. Called on worker threads, one call at a time.
package typealias StreamOutput = @Sendable (_ bytes: [UInt8]) throws(CatalogError) -> Void
/// Gives up to `most` bytes of a stream, in order; none: it is at its end. Called on worker threads, one call at a time.
package typealias StreamInput = @Sendable (_ most: Int) throws(CatalogError) -> [UInt8]

extension Catalog {
    /// Blocks of a stream on their way at the same time; each takes up to 48 MiB while it is.
    static let streamedBlocks = 4

    /// Sends a generation (nil: the current one): whole, or only what may differ from the generation `from` of the same
    /// disk. Only what is sent is read.
    ///
    /// - Parameter progress: told in bytes of the disk, holes included.
    package func send(
        _ name: String, generation: UInt64? = nil, from: UInt64? = nil, to output: @escaping StreamOutput,
        progress: WorkProgress = { _, _ in }
    ) async throws(CatalogError) {
        let found = try await load(name)
        let new = try await view(found, generation: generation)
        guard let record = new.record else {
            throw CatalogError(.notFound, "disk '\(name)' has no generation yet: there is nothing to send")
        }
        var old: GenerationView?
        if let from { old = try await view(found, generation: from) }
        let description = StreamDescription(
            generation: new.identity, from: old?.identity, sizeBytes: new.sizeBytes, kind: record.kind,
            committedAtMs: record.committedAtMs)
        var writer = StreamWriter()
        let beginning = writer.begin(description)
        try await offload { () throws(CatalogError) in try output(beginning) }
        // What lay behind a new end goes with the size.
        let base = old?.manifest ?? .empty(sizeBytes: new.sizeBytes, cache: new.manifest.cache)
        let diff = ManifestDiff(from: base, to: new.manifest, endBlock: new.manifest.blockCount)
        try await inOrder(
            limit: Self.streamedBlocks,
            next: { () async throws(CatalogError) -> ManifestDiff.Change? in
                try await CatalogError.wrap { () async throws(StoreError) in try await diff.next() }
            },
            work: { (change) async throws(CatalogError) -> StreamBlock in try await read(change) },
            take: { (block) async throws(CatalogError) in
                let pieces = writer.add(block)
                try await offload { () throws(CatalogError) in for piece in pieces { try output(piece) } }
                progress(
                    min((block.block.value + 1) * UInt64(Geometry.blockBytes), new.sizeBytes), new.sizeBytes)
            })
        let end = writer.end()
        try await offload { () throws(CatalogError) in try output(end) }
        progress(new.sizeBytes, new.sizeBytes)
    }

    /// The changed slices of a block, packed.
    private func read(_ change: ManifestDiff.Change) async throws(CatalogError) -> StreamBlock {
        var block = StreamBlock(block: change.block, changed: change.changed, zeroed: change.zeroed, slices: [])
        guard change.changed != change.zeroed, let entry = change.new else { return block }
        let bytes = try await CatalogError.wrap { () async throws(StoreError) in
            try await readBlock(entry, from: store.locations.buckets, environment: store.environment)
        }
        let wanted = StreamBlock.slices(change.changed & ~change.zeroed)
        let packed = await store.environment.offload {
            bytes.withUnsafeBytes { all in
                wanted.map { encodeSlice(all.baseAddress! + $0.value * Geometry.sliceBytes) }
            }
        }
        for (slice, packed) in zip(wanted, packed) {
            if packed.codec == .zero {
                block.zeroed |= 1 << UInt32(slice.value)
            } else {
                block.slices.append(packed)
            }
        }
        return block
    }
}

extension GenerationView {
    /// What tells it from all others, in other stores too.
    var identity: GenerationRecord.Origin {
        GenerationRecord.Origin(disk: disk, diskID: diskID, generation: generation)
    }
}
