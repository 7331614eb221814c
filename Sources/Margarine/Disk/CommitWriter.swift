// Turns a frozen layer into objects and manifest pages. A block that changed little gets a segment in a delta object
// shared with others; one that changed much, or collected many deltas, gets a new base object.
//
// Always holds: nothing is overwritten, every object has a new name; at most `uploadParallelism` blocks and one delta object
// are in memory.

internal import BlockCache
internal import Glibc
internal import ObjectStore
internal import Runtime

/// Memory for the pages of one slice, handed to a worker and back.
private final class SliceBuffer: @unchecked Sendable {  // one owner at a time
    let bytes: UnsafeMutableRawPointer
    init(_ count: Int) { bytes = .allocate(byteCount: max(count, 1), alignment: 4096) }
    deinit { bytes.deallocate() }
}

/// What a layer does to one slice.
private struct SliceChange: Sendable {
    var slice: SliceIndex
    var data: PageMask
    var zero: PageMask
}

private struct BlockChange: Sendable {
    var block: BlockIndex
    var existing: BlockEntry?
    /// Ascending.
    var slices: [SliceChange]
    var dataPages: Int { slices.reduce(0) { $0 + $1.data.count } }
}

/// One commit's work. Lives on the disk's loop.
final class CommitWriter: @unchecked Sendable {
    /// A block with more dirty pages than this (a quarter) is written whole.
    static let foldPages = Geometry.pagesPerBlock / 4
    /// A block without stored bytes is written whole from here on: alone in an object it costs one request.
    static let freshPages = 64
    /// A delta object is sent once it is this long.
    static let deltaBytes = 8 << 20
    /// Blocks that are looked at before others on the loop have their turn.
    static let blocksPerTurn = 256
    /// Segments of one block together; more are folded into a base.
    static let maxDeltaBytes = 4 << 20

    private let disk: Disk
    private let layer: Layer
    private let context: DiskContext
    /// The generation that this commit goes over, whatever becomes current meanwhile; the swap of the head finds out.
    private let base: Manifest
    private var edit: ManifestEdit
    private var encoder: DeltaEncoder
    /// The entries that the collected segments go over.
    private var pending: [BlockIndex: BlockEntry?] = [:]
    private var newBytes: UInt64 = 0

    init(disk: Disk, layer: Layer) {
        self.disk = disk
        self.layer = layer
        context = disk.context
        base = disk.commitBase()
        edit = ManifestEdit(base)
        encoder = DeltaEncoder(id: disk.context.makeID(), location: disk.context.locations.near)
    }

    /// Stores everything but the head. Returns the new manifest, and the bytes put into the store.
    func write() async throws -> (Manifest, UInt64) {
        context.loop.assertOwner()
        try await removeZeroed()
        try await withThrowingTaskGroup(of: Void.self) { group in
            var running = 0
            var seen = 0
            var next = layer.nextBlock(atOrAfter: 0)
            while let block = next.map({ BlockIndex($0) }) {
                seen += 1
                if seen % CommitWriter.blocksPerTurn == 0 { await Task.yield() }
                if let change = try await change(of: block) {
                    if shouldFold(change) {
                        if running == context.settings.uploadParallelism {
                            try await group.next()
                            running -= 1
                        }
                        running += 1
                        group.addTask(executorPreference: context.loop) { [self] in try await writeBase(change) }
                    } else {
                        try await addDelta(change)
                    }
                }
                next = layer.nextBlock(atOrAfter: block.value + 1)
            }
            try await group.waitForAll()
        }
        try await sendDeltas()
        let manifest = try await edit.write(
            to: context.locations.nearBucket, location: context.locations.near, environment: context.environment)
        return (manifest, newBytes + manifest.bytesWritten)
    }

    /// Blocks that are zeroes throughout have no entry any more, but for what was written over them later.
    private func removeZeroed() async throws {
        let per = UInt64(Geometry.slicesPerBlock)
        var from: UInt64 = 0
        var seen = 0
        while let range = layer.zeroed.range(after: from) {
            seen += 1
            if seen % CommitWriter.blocksPerTurn == 0 { await Task.yield() }
            let first = (range.lowerBound + per - 1) / per
            let last = range.upperBound / per
            if first < last { edit.removeAll(in: BlockIndex(first)..<BlockIndex(last)) }
            from = range.upperBound
        }
    }

    /// What the layer does to a block, without what changes nothing. nil: nothing at all.
    private func change(of block: BlockIndex) async throws -> BlockChange? {
        let per = UInt64(Geometry.slicesPerBlock)
        let numbers = block.value * per..<(block.value + 1) * per
        let existing = layer.zeroed.covers(numbers) ? nil : try await base.find(block)
        let keepsZeroes = context.settings.fault != .zeroesNotCommitted
        var slices: [SliceChange] = []
        layer.forEachTouched(in: numbers) { number, masks in
            let slice = SliceIndex(Int(number % per))
            let zero = existing?.key(slice) != nil && keepsZeroes ? masks.zero : .none
            if (masks.data | zero).isEmpty { return }
            slices.append(SliceChange(slice: slice, data: masks.data, zero: zero))
        }
        return slices.isEmpty ? nil : BlockChange(block: block, existing: existing, slices: slices)
    }

    private func shouldFold(_ change: BlockChange) -> Bool {
        let pages = change.dataPages
        guard let existing = change.existing else { return pages >= CommitWriter.freshPages }
        return pages >= CommitWriter.foldPages || existing.deltas.count >= BlockEntry.maxDeltas
            || existing.deltas.reduce(0) { $0 + Int($1.lengthBytes) } >= CommitWriter.maxDeltaBytes
    }

    // MARK: Deltas

    private func addDelta(_ change: BlockChange) async throws {
        var patches: [EncodedPatch] = []
        for slice in change.slices {
            let buffer = SliceBuffer(slice.data.count * Geometry.pageBytes)
            try await gather(number(change.block, slice.slice), slice.data, into: buffer, layout: .packed)
            let patch = await context.environment.offload {
                encodePatch(slice.slice, data: slice.data, zeroes: slice.zero, pages: buffer.bytes, layout: .packed)
            }
            // Pages that turn out to be zeroes over zeroes change nothing.
            if patch.data.isEmpty, change.existing?.key(slice.slice) == nil { continue }
            patches.append(patch)
        }
        if patches.isEmpty { return }
        encoder.begin(change.block)
        for patch in patches { encoder.add(patch) }
        pending[change.block] = .some(change.existing)
        if encoder.sizeBytes >= CommitWriter.deltaBytes { try await sendDeltas() }
    }

    private func sendDeltas() async throws {
        if encoder.isEmpty { return }
        let full = encoder
        let entries = pending
        encoder = DeltaEncoder(id: context.makeID(), location: context.locations.near)
        pending = [:]
        let finished = await context.environment.offload { Finished(full.finish()) }
        try await put(full.id, finished.object)
        for (block, ref) in finished.refs {
            var entry = entries[block]! ?? BlockEntry(base: nil, deltas: [])
            entry.deltas.append(ref)
            edit.set(block, entry.nonzeroSlices == 0 ? nil : entry)
        }
    }

    private struct Finished: Sendable {
        var object: [UInt8]
        var refs: [(block: BlockIndex, ref: DeltaRef)]
        init(_ made: (object: [UInt8], refs: [(block: BlockIndex, ref: DeltaRef)])) {
            object = made.object
            refs = made.refs
        }
    }

    // MARK: Bases

    private func writeBase(_ change: BlockChange) async throws {
        var encoder = BaseEncoder(id: context.makeID(), location: context.locations.near)
        for index in 0..<Geometry.slicesPerBlock {
            let slice = SliceIndex(index)
            let own = change.slices.first { $0.slice == slice } ?? SliceChange(slice: slice, data: .none, zero: .none)
            let isStored = change.existing?.key(slice) != nil
            if own.data.isEmpty, !isStored || own.zero.isAll { continue }
            let buffer = SliceBuffer(Geometry.sliceBytes)
            if isStored, !(own.data | own.zero).isAll {
                try await context.withSlice(change.existing!, slice) {
                    buffer.bytes.copyMemory(from: $0, byteCount: Geometry.sliceBytes)
                }
            } else {
                memset(buffer.bytes, 0, Geometry.sliceBytes)
            }
            own.zero.forEach { memset(buffer.bytes + $0 * Geometry.pageBytes, 0, Geometry.pageBytes) }
            try await gather(number(change.block, slice), own.data, into: buffer, layout: .inPlace)
            encoder.add(await context.environment.offload { encodeSlice(buffer.bytes) }, at: slice)
        }
        if encoder.isZero { return edit.set(change.block, nil) }
        let full = encoder
        let (object, ref) = await context.environment.offload { full.finish() }
        try await put(full.id, object)
        edit.set(change.block, BlockEntry(base: ref, deltas: []))
    }

    private func put(_ id: ObjectID, _ object: [UInt8]) async throws {
        if disk.lost != nil { throw StoreError(.refused, "the disk is no longer this server's") }
        _ = try await context.locations.nearBucket.put(id.blockKey, object, if: .none)
        newBytes += UInt64(object.count)
        await context.loader.adopt(id: id, bytes: object)
    }

    // MARK: Pages

    private func number(_ block: BlockIndex, _ slice: SliceIndex) -> UInt64 {
        block.value * UInt64(Geometry.slicesPerBlock) + UInt64(slice.value)
    }

    /// Copies the layer's pages `mask` of a slice into `buffer`, from memory or from the journal.
    private func gather(_ number: UInt64, _ mask: PageMask, into buffer: SliceBuffer, layout: PageLayout) async throws {
        var evicted: [UInt32] = []
        var targets: [Int] = []
        var packed = 0
        mask.forEach { page in
            let slot = layer.slot(page, of: number)!
            let target = (layout == .packed ? packed : page) * Geometry.pageBytes
            packed += 1
            if let bytes = disk.pages.bytes(slot) {
                (buffer.bytes + target).copyMemory(from: bytes, byteCount: Geometry.pageBytes)
            } else {
                evicted.append(slot)
                targets.append(target)
            }
        }
        var next = 0
        for piece in disk.journal.pieces(of: evicted) {
            let bytes = try await disk.journal.read(piece)
            bytes.withUnsafeBytes { p in
                for i in 0..<piece.sums.count {
                    (buffer.bytes + targets[next + i]).copyMemory(
                        from: p.baseAddress! + i * Geometry.pageBytes, byteCount: Geometry.pageBytes)
                }
            }
            next += piece.sums.count
        }
    }
}
