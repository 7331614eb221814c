// Disks as raw images: out of a generation, and into a new one. Blocks travel in parallel, a few at a time, so memory
// stays bounded whatever the disk's size.

import BlockCache
import ObjectStore
import Runtime

/// How far a long piece of work has come, in bytes.
package typealias WorkProgress = @Sendable (_ doneBytes: UInt64, _ totalBytes: UInt64) -> Void

extension Catalog {
    /// Blocks on their way at the same time; each takes up to 32 MiB while it is.
    private static let parallelBlocks = 4

    // MARK: Out

    /// Writes a generation (nil: the current one) as a raw image: always one consistent instant, also of a disk that is
    /// being written. Only used blocks are read.
    ///
    /// - Parameter progress: told in bytes of used blocks.
    package func export(
        _ name: String, generation: UInt64? = nil, to output: ImageOutput, progress: WorkProgress = { _, _ in }
    ) async throws(CatalogError) {
        let found = try await load(name)
        let head = found.head
        let cache = ManifestCache(store.locations)
        var manifest = head.manifest(cache: cache)
        var sizeBytes = head.sizeBytes
        if let generation {
            let record = try await keptRecord(generation, of: found)
            manifest = .open(record, cache: cache)
            sizeBytes = record.sizeBytes
        }
        try await copy(manifest, sizeBytes: sizeBytes, to: output, progress: progress)
        let size = sizeBytes
        try await offload { () throws(CatalogError) in try output.finish(sizeBytes: size) }
    }

    private func copy(
        _ manifest: Manifest, sizeBytes: UInt64, to output: ImageOutput, progress: WorkProgress
    ) async throws(CatalogError) {
        typealias Block = (number: Int, index: UInt64, bytes: Result<[UInt8], StoreError>)
        let total = manifest.usedBlocks * UInt64(Geometry.blockBytes)
        let buckets = store.locations.buckets
        let environment = store.environment
        let failure: CatalogError? = await withTaskGroup(of: Block.self) { group in
            var begun = 0
            var written = 0
            var next = BlockIndex(0)
            var isAtEnd = false
            // Blocks that came before their turn; with those under way never more than `parallelBlocks`.
            var early: [Int: Block] = [:]
            progress(0, total)
            do throws(CatalogError) {
                while true {
                    while !isAtEnd, begun - written < Self.parallelBlocks {
                        let place = next
                        let found = try await CatalogError.wrap {
                            () async throws(StoreError) -> (BlockIndex, BlockEntry)? in
                            guard let block = try await manifest.nextUsed(from: place) else { return nil }
                            return try await manifest.find(block).map { (block, $0) }
                        }
                        guard let (block, entry) = found else {
                            isAtEnd = true
                            break
                        }
                        let number = begun
                        group.addTask {
                            // In two steps: Swift 6.3 with -O loses what stands before a `try await` in a tuple here.
                            let bytes: Result<[UInt8], StoreError>
                            do throws(StoreError) {
                                bytes = .success(try await readBlock(entry, from: buckets, environment: environment))
                            } catch {
                                bytes = .failure(error)
                            }
                            return (number, block.value, bytes)
                        }
                        begun += 1
                        next = BlockIndex(block.value + 1)
                    }
                    guard let block = await group.next() else { return nil }
                    early[block.number] = block
                    while let block = early.removeValue(forKey: written) {
                        let bytes = try block.bytes.mapError { CatalogError($0) }.get()
                        let offset = block.index * UInt64(Geometry.blockBytes)
                        let count = Int(min(UInt64(bytes.count), sizeBytes > offset ? sizeBytes - offset : 0))
                        if count > 0 {
                            try await offload { () throws(CatalogError) in
                                try output.write(bytes, count: count, at: offset)
                            }
                        }
                        written += 1
                        progress(UInt64(written) * UInt64(Geometry.blockBytes), total)
                    }
                }
            } catch {
                group.cancelAll()
                return error
            }
        }
        if let failure { throw failure }
    }

    // MARK: In

    /// Makes a disk out of a raw image, or fills one that was never written and that nobody has. The disk appears whole, or
    /// not at all.
    ///
    /// - Parameters:
    ///   - options: of a new disk; one that is there keeps its own, and its size if that is larger.
    ///   - location: where the head of a new disk is to be; nil: near.
    ///   - progress: told in bytes of the image, holes included.
    package func `import`(
        _ image: ImageInput, as name: String, options: DiskOptions = DiskOptions(), location: UInt8? = nil,
        progress: WorkProgress = { _, _ in }
    ) async throws(CatalogError) -> DiskInfo {
        let sector = ManifestShape.sectorBytes
        let (wanted, overflow) = image.sizeBytes.addingReportingOverflow(sector - 1)
        let imageBytes = overflow ? .max : wanted / sector * sector
        try DiskSize.check(imageBytes)
        let spot = try await store.spot(for: name, at: location ?? store.locations.near)
        var head: Head
        if let found = spot.head, !found.deleted {
            guard found.record == nil, found.owner == nil, !found.isReadOnly else {
                throw CatalogError(
                    .exists, "disk '\(name)' is in use or has been written already; import under another name")
            }
            guard found.sizeBytes >= imageBytes else {
                throw CatalogError(
                    .invalid, "disk '\(name)' has \(found.sizeBytes) bytes, too few for an image of \(imageBytes)")
            }
            head = found
            head.epoch += 1
        } else {
            try Self.check(options)
            head = try newHead(name, over: spot.head, sizeBytes: imageBytes, options: options)
        }
        let limit = try await CommitLimit.begin(store)
        let (manifest, newBytes) = try await load(
            image, into: .empty(sizeBytes: head.sizeBytes, cache: ManifestCache(store.locations)), progress)
        head.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .imported,
                committedAtMs: store.environment.wallMs, journalSequence: 0,
                newBytes: newBytes, manifest: manifest))
        try await limit.check(asking: true, what: "the import of '\(name)'")
        guard case .won = try await spot.heads.swap(head, expecting: spot.etag) else {
            throw CatalogError(
                .conflict, "disk '\(name)' was made or taken by another while the image was read; nothing was changed")
        }
        progress(image.sizeBytes, image.sizeBytes)
        return try await info(head, at: spot.heads)
    }

    /// Stores the blocks of an image, and pages. Gives the manifest that names them, and the bytes stored.
    private func load(
        _ image: ImageInput, into empty: Manifest, _ progress: WorkProgress
    ) async throws(CatalogError) -> (Manifest, UInt64) {
        typealias Block = (index: UInt64, ref: Result<BaseRef?, CatalogError>)
        let result: Result<(Manifest, UInt64), CatalogError> = await withTaskGroup(of: Block.self) { group in
            var edit = GradualEdit(ManifestEdit(empty), to: store.locations, environment: store.environment)
            var storedBytes: UInt64 = 0
            var underWay = 0
            var next: UInt64? = 0
            let blockBytes = UInt64(Geometry.blockBytes)
            do throws(CatalogError) {
                while true {
                    while underWay < Self.parallelBlocks, let from = next {
                        let data = await store.environment.offload { image.nextData(from: from) }
                        next = data.map { ($0 / blockBytes + 1) * blockBytes }
                        guard let data else { break }
                        let block = data / blockBytes
                        progress(min(block * blockBytes, image.sizeBytes), image.sizeBytes)
                        underWay += 1
                        group.addTask {
                            // In two steps: see `copy`.
                            let ref: Result<BaseRef?, CatalogError>
                            do throws(CatalogError) {
                                ref = .success(try await storeBlock(of: image, block))
                            } catch {
                                ref = .failure(error)
                            }
                            return (block, ref)
                        }
                    }
                    guard let done = await group.next() else {
                        let manifest = try await CatalogError.wrap { () async throws(StoreError) in
                            try await edit.finish()
                        }
                        return .success((manifest, storedBytes + edit.bytesWritten))
                    }
                    underWay -= 1
                    if let ref = try done.ref.get() {
                        try await CatalogError.wrap { () async throws(StoreError) in
                            try await edit.set(BlockIndex(done.index), BlockEntry(base: ref, deltas: []))
                        }
                        storedBytes += UInt64(ref.lengthBytes)
                    }
                }
            } catch {
                group.cancelAll()
                return .failure(error)
            }
        }
        return try result.get()
    }

    /// Reads, packs and stores one block of an image; nil: it is all zeroes.
    private func storeBlock(of image: ImageInput, _ block: UInt64) async throws(CatalogError) -> BaseRef? {
        let id = store.environment.objectID()
        let packed = try await offload { () throws(CatalogError) -> ([UInt8], BaseRef)? in
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Geometry.blockBytes, alignment: 4096)
            defer { buffer.deallocate() }
            try image.read(into: buffer, at: block * UInt64(Geometry.blockBytes))
            return encodeBase(UnsafeRawBufferPointer(buffer), id: id, location: store.locations.near)
        }
        guard let (object, ref) = packed else { return nil }
        try await CatalogError.wrap { () async throws(StoreError) in
            _ = try await store.locations.nearBucket.put(id.blockKey, object, if: .none)
        }
        return ref
    }

    /// Runs blocking or long work on a worker thread.
    func offload<T: Sendable>(
        _ work: @escaping @Sendable () throws(CatalogError) -> T
    ) async throws(CatalogError) -> T {
        try await store.environment.offload { () -> Result<T, CatalogError> in
            do throws(CatalogError) { return .success(try work()) } catch { return .failure(error) }
        }.get()
    }
}

/// The base object of a whole block; nil: it is all zeroes. For a worker thread.
func encodeBase(_ block: UnsafeRawBufferPointer, id: ObjectID, location: UInt8) -> (object: [UInt8], ref: BaseRef)? {
    precondition(block.count == Geometry.blockBytes)
    var encoder = BaseEncoder(id: id, location: location)
    for slice in 0..<Geometry.slicesPerBlock {
        encoder.add(from: block.baseAddress! + slice * Geometry.sliceBytes, at: SliceIndex(slice))
    }
    return encoder.isZero ? nil : encoder.finish()
}
