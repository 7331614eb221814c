// A stream of `disk send` as a disk: a new one, or the next generation of one that has what the stream goes over.
//
// Always holds: the generation appears whole, once the stream was read to its end and found whole, or not at all; what was
// stored before that is garbage for the collector.

import BlockCache
import Glibc
import ObjectStore
import Runtime

extension Catalog {
    /// Makes a disk out of a stream; or, of a stream over another generation, the next generation of the disk that has that
    /// one as its current: itself, or received, forked or rolled back from it.
    ///
    /// - Parameters:
    ///   - options: of a new disk; one that is there keeps its own. It gets the size of the disk that was sent.
    ///   - location: where the head of a new disk is to be; nil: near.
    ///   - progress: told in bytes of the disk, holes included.
    package func receive(
        _ name: String, from input: @escaping StreamInput, options: DiskOptions = DiskOptions(), location: UInt8? = nil,
        progress: WorkProgress = { _, _ in }
    ) async throws(CatalogError) -> DiskInfo {
        try DiskName.check(name)
        try Self.check(options)
        let reader = StreamReader(input)
        let description = try await offload { () throws(CatalogError) in try reader.begin() }
        try DiskSize.check(description.sizeBytes)
        let spot = try await store.spot(for: name, at: location ?? store.locations.near)
        var head: Head
        var base: Manifest
        let cache = ManifestCache(store.locations)
        if let from = description.from {
            guard let there = spot.head, !there.deleted, let etag = spot.etag else {
                throw CatalogError(
                    .notFound,
                    "there is no disk '\(name)', and the stream goes over \(from.disk)@\(from.generation): receive that one first"
                )
            }
            head = try await headToFollow(from, in: Store.Found(heads: spot.heads, head: there, etag: etag))
            base = head.manifest(cache: cache)
            head.dispossess()
            head.sizeBytes = description.sizeBytes
        } else {
            head = try newHead(name, over: spot.head, sizeBytes: description.sizeBytes, options: options)
            base = .empty(sizeBytes: head.sizeBytes, cache: cache)
        }
        let limit = try await CommitLimit.begin(store)
        let (manifest, newBytes) = try await store(
            reader, into: base, sizeBytes: description.sizeBytes, limit: limit, progress)
        if let old = spot.head, !old.deleted { try await spot.heads.archive(old) }
        var record = GenerationRecord(
            diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .received,
            committedAtMs: store.environment.wallMs, journalSequence: head.journalSequence, newBytes: newBytes,
            manifest: manifest)
        record.origin = description.generation
        head.advance(to: record)
        try await limit.check(asking: true, what: "receiving '\(name)'")
        guard case .won = try await spot.heads.swap(head, expecting: spot.etag) else {
            throw CatalogError(
                .conflict,
                "disk '\(name)' was made, taken or changed by another while the stream was received; nothing was changed"
            )
        }
        progress(description.sizeBytes, description.sizeBytes)
        return try await info(head, at: spot.heads)
    }

    // MARK: What a stream may go over

    /// The head of a disk whose current generation is the one that a stream goes over.
    private func headToFollow(
        _ from: GenerationRecord.Origin, in found: Store.Found
    ) async throws(CatalogError) -> Head {
        let head = found.head
        if head.isReadOnly {
            throw CatalogError(
                .invalid, "disk '\(head.name)' is read-only and stays as it is; receive into another one")
        }
        if let owner = head.owner {
            throw CatalogError(
                .owned,
                "disk '\(head.name)' is served by server \(owner.server) on \(owner.host); detach it, or take it with 'margined disk release', and send again"
            )
        }
        guard let record = head.record, try await isSame(record, of: found, as: from) else {
            throw CatalogError(
                .invalid,
                "the stream goes over \(from.disk)@\(from.generation), and disk '\(head.name)' is not that generation\(Self.story(head)); go back to where it was, or send from another generation"
            )
        }
        return head
    }

    /// What people can be told of where a disk is.
    private static func story(_ head: Head) -> String {
        guard let record = head.record else { return ": it was never written" }
        let origin = record.origin.map { ", the same as \($0.disk)@\($0.generation)" } ?? ""
        return ": it is at generation \(record.generation)\(origin)"
    }

    /// Whether a generation holds the same bytes as another one, as far as what is kept of their origins tells.
    private func isSame(
        _ record: GenerationRecord, of found: Store.Found, as other: GenerationRecord.Origin
    ) async throws(CatalogError) -> Bool {
        func isOther(_ diskID: ObjectID, _ generation: UInt64) -> Bool {
            diskID == other.diskID && generation == other.generation
        }
        if isOther(record.diskID, record.generation) { return true }
        var record = record
        var found = found
        // A fork of a roll-back of a received one, and so on: each step is one earlier generation.
        for _ in 0..<16 {
            guard let origin = record.origin else { return false }
            if isOther(origin.diskID, origin.generation) { return true }
            if origin.diskID != found.head.diskID {
                guard let next = try await store.find(origin.disk), next.head.diskID == origin.diskID else {
                    return false
                }
                found = next
            }
            do throws(CatalogError) {
                record = try await found.heads.record(found.head, generation: origin.generation)
            } catch {
                if error.kind == .notFound { return false }
                throw error
            }
        }
        return false
    }

    // MARK: Blocks

    private struct Received: Sendable {
        var block: BlockIndex
        var entry: BlockEntry?
        var newBytes: UInt64
    }

    /// Reads a stream to its end and stores its blocks and pages. Gives the manifest of the disk, and the bytes stored.
    private func store(
        _ reader: StreamReader, into base: Manifest, sizeBytes: UInt64, limit: CommitLimit, _ progress: WorkProgress
    ) async throws(CatalogError) -> (Manifest, UInt64) {
        var resized = ManifestEdit(base)
        resized.resize(to: sizeBytes)
        var edit = GradualEdit(resized, to: store.locations, environment: store.environment)
        var blockBytes: UInt64 = 0
        try await inOrder(
            limit: Self.streamedBlocks,
            next: { () async throws(CatalogError) -> (StreamBlock, BlockEntry?)? in
                try await limit.check(what: "receiving the stream")
                guard let block = try await offload({ () throws(CatalogError) in try reader.next() }) else {
                    return nil
                }
                let old = try await CatalogError.wrap { () async throws(StoreError) in try await base.find(block.block)
                }
                return (block, old)
            },
            work: { (item) async throws(CatalogError) -> Received in
                try await storeBlock(item.0, over: item.1, sizeBytes: sizeBytes)
            },
            take: { (received) async throws(CatalogError) in
                blockBytes += received.newBytes
                try await CatalogError.wrap { () async throws(StoreError) in
                    try await edit.set(received.block, received.entry)
                }
                progress(min(received.block.value * UInt64(Geometry.blockBytes), sizeBytes), sizeBytes)
            })
        let manifest = try await CatalogError.wrap { () async throws(StoreError) in try await edit.finish() }
        return (manifest, blockBytes + edit.bytesWritten)
    }

    /// What a block of a stream becomes.
    private enum Packed: Sendable {
        /// Zeroes, or what was there.
        case nothing(BlockEntry?)
        case object(ObjectID, [UInt8], BlockEntry)
        /// Other slices of the block stay: it must be read, and written whole.
        case merge
    }

    private func storeBlock(
        _ block: StreamBlock, over old: BlockEntry?, sizeBytes: UInt64
    ) async throws(CatalogError) -> Received {
        let id = store.environment.objectID()
        let location = store.locations.near
        var packed = try await offload { () throws(CatalogError) in
            try pack(block, over: old, sizeBytes: sizeBytes, id: id, location: location)
        }
        if case .merge = packed, let old {
            let bytes = try await CatalogError.wrap { () async throws(StoreError) in
                try await readBlock(old, from: store.locations.buckets, environment: store.environment)
            }
            packed = await store.environment.offload { merge(block, over: bytes, id: id, location: location) }
        }
        guard case .object(let id, let object, let entry) = packed else {
            guard case .nothing(let entry) = packed else { preconditionFailure("a block without a form") }
            return Received(block: block.block, entry: entry, newBytes: 0)
        }
        try await CatalogError.wrap { () async throws(StoreError) in
            _ = try await store.locations.nearBucket.put(id.blockKey, object, if: .none)
        }
        return Received(block: block.block, entry: entry, newBytes: UInt64(object.count))
    }

    /// Checks what the slices hold, and makes a base of them if they are all that is in the block, or a delta if they are
    /// few. For a worker thread.
    private func pack(
        _ block: StreamBlock, over old: BlockEntry?, sizeBytes: UInt64, id: ObjectID, location: UInt8
    ) throws(CatalogError) -> Packed {
        let indices = StreamBlock.slices(block.changed & ~block.zeroed)
        let isWhole = (old?.nonzeroSlices ?? 0) & ~block.changed == 0
        let isSmall =
            indices.count <= Geometry.slicesPerBlock / 4 && (old?.deltas.count ?? 0) < BlockEntry.maxDeltas
            && (old?.deltas.reduce(0) { $0 + Int($1.lengthBytes) } ?? 0) < CommitWriter.maxDeltaBytes
        let frame = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 4096)
        defer { frame.deallocate() }
        var base = BaseEncoder(id: id, location: location)
        var patches: [EncodedPatch] = []
        for (index, slice) in zip(indices, block.slices) {
            try unpack(slice, index, of: block.block, sizeBytes: sizeBytes, into: frame)
            if isWhole {
                base.add(slice, at: index)
            } else if isSmall {
                patches.append(encodePatch(index, data: .all, zeroes: .none, pages: frame, layout: .inPlace))
            }
        }
        if isWhole {
            if base.isZero { return .nothing(nil) }
            let (object, ref) = base.finish()
            return .object(id, object, BlockEntry(base: ref, deltas: []))
        }
        guard isSmall, var entry = old else { return .merge }
        for index in StreamBlock.slices(block.zeroed) where entry.key(index) != nil {
            patches.append(encodePatch(index, data: .none, zeroes: .all, pages: nil, layout: .inPlace))
        }
        if patches.isEmpty { return .nothing(old) }
        var delta = DeltaEncoder(id: id, location: location)
        delta.begin(block.block)
        for patch in patches.sorted(by: { $0.slice < $1.slice }) { delta.add(patch) }
        let (object, refs) = delta.finish()
        entry.deltas.append(refs[0].ref)
        return .object(id, object, entry)
    }

    /// Unpacks a slice; what it holds behind the end of the disk must be zeroes.
    private func unpack(
        _ slice: EncodedSlice, _ index: SliceIndex, of block: BlockIndex, sizeBytes: UInt64,
        into frame: UnsafeMutableRawPointer
    ) throws(CatalogError) {
        let start = block.value * UInt64(Geometry.blockBytes) + UInt64(index.value * Geometry.sliceBytes)
        guard slice.unpack(into: frame) else {
            throw CatalogError(.corrupt, "the stream holds a slice that does not unpack, at byte \(start) of the disk")
        }
        let kept = Int(min(UInt64(Geometry.sliceBytes), sizeBytes > start ? sizeBytes - start : 0))
        guard isZero(UnsafeRawBufferPointer(start: frame + kept, count: Geometry.sliceBytes - kept)) else {
            throw CatalogError(.corrupt, "the stream holds bytes behind the end of the disk, at byte \(sizeBytes)")
        }
    }

    /// A base of the block's slices and of what else was there. For a worker thread.
    private func merge(_ block: StreamBlock, over old: [UInt8], id: ObjectID, location: UInt8) -> Packed {
        var encoder = BaseEncoder(id: id, location: location)
        old.withUnsafeBytes { old in
            for index in StreamBlock.slices(~block.changed) {
                encoder.add(from: old.baseAddress! + index.value * Geometry.sliceBytes, at: index)
            }
        }
        for (index, slice) in zip(StreamBlock.slices(block.changed & ~block.zeroed), block.slices) {
            encoder.add(slice, at: index)
        }
        if encoder.isZero { return .nothing(nil) }
        let (object, ref) = encoder.finish()
        return .object(id, object, BlockEntry(base: ref, deltas: []))
    }
}
