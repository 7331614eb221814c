// Bringing a disk's data near: what its current generation names at other locations is copied, and a new generation that
// equals it names the copies. In steps, so that none lasts long beside a collection and what is done stays done.
//
// Always holds: a generation names a copy only after the copy was stored; copies keep their names, so caches know them,
// and reads fall back from one to the other. A copy that nothing names yet is no garbage: its name is in use.

import BlockCache
import ObjectStore
import Runtime

/// What `localize` did.
package struct LocalizeSummary: Sendable, Codable, Equatable {
    /// Block objects that were elsewhere only, and their bytes.
    package var copiedObjects: UInt64 = 0
    package var copiedBytes: UInt64 = 0
    /// Block objects that the location had a copy of.
    package var presentObjects: UInt64 = 0
    /// New generations, all equal to the one before.
    package var generations: UInt64 = 0
    /// The disk's current generation at the end.
    package var generation: UInt64 = 0
}

/// Bounds of one step. A step ends at the first that it reaches.
package struct LocalizeBounds: Sendable {
    package var bytes: UInt64 = 4 << 30
    package var milliseconds: Int64 = 300_000
    /// Leaf pages of the manifest.
    package var leaves = 64
    /// Objects after which the other bounds are looked at.
    package var batch = 64
    /// Objects on their way at the same time; each takes up to 32 MiB while it is.
    package var parallel = 8
    package init() {}
}

extension Catalog {
    /// Copies what the disk's current generation names elsewhere to a location, and makes generations that name the
    /// copies.
    ///
    /// Safe beside a server that has the disk: it goes on with the new generations, which hold the same bytes.
    ///
    /// - Parameters:
    ///   - location: nil: the near one.
    ///   - progress: told in stored bytes that the disk names, wherever they are.
    package func localize(
        _ name: String, to location: UInt8? = nil, bounds: LocalizeBounds = LocalizeBounds(),
        progress: @escaping WorkProgress = { _, _ in }
    ) async throws(CatalogError) -> LocalizeSummary {
        let number = location ?? store.locations.near
        guard let target = store.locations[number] else {
            throw store.unconfigured(Locations.Missing(number: number, name: store.locations.name(number)))
        }
        var summary = LocalizeSummary()
        // A step must have ended long before what it stored could be taken for garbage.
        var bounds = bounds
        bounds.milliseconds = min(bounds.milliseconds, max(1, try await store.grace() / 8))
        // Copies that this run knows of.
        var known: Set<ObjectID> = []
        var from = BlockIndex(0)
        var isDone = false
        var doneBytes: UInt64 = 0
        var lost = 0
        let diskID = try await load(name).head.diskID
        while !isDone {
            let found = try await load(name)
            guard found.head.diskID == diskID else { throw Self.notFound(name) }
            let limit = try await CommitLimit.begin(store)
            var mover = Localizer(
                manifest: found.head.manifest(cache: ManifestCache(store.locations)), target: target, store: store,
                bounds: bounds, known: known, progress: progress, doneBytes: doneBytes)
            mover.totalBytes = found.head.storedBytes
            try await mover.step(from: from)
            known = mover.known
            summary.copiedObjects += mover.copiedObjects
            summary.copiedBytes += mover.copiedBytes
            summary.presentObjects += mover.presentObjects
            guard let isSwitched = try await mover.finish(found, from: from, limit: limit) else {
                // Its server committed meanwhile: with what was copied, the same goes faster.
                lost += 1
                if lost >= 100 { throw Self.conflict(name) }
                continue
            }
            lost = 0
            if isSwitched { summary.generations += 1 }
            doneBytes = mover.doneBytes
            from = mover.next
            isDone = mover.isAtEnd
            // Behind this nothing asks for them again.
            known = []
        }
        summary.generation = try await load(name).head.generation
        return summary
    }
}

/// One step at work.
private struct Localizer {
    let manifest: Manifest
    let target: Location
    let store: Store
    let bounds: LocalizeBounds
    /// Objects that the target has.
    var known: Set<ObjectID>
    let progress: WorkProgress
    var doneBytes: UInt64
    var totalBytes: UInt64 = 0
    /// The first block behind this step.
    var next = BlockIndex(0)
    var isAtEnd = false
    var copiedObjects: UInt64 = 0
    var copiedBytes: UInt64 = 0
    var presentObjects: UInt64 = 0

    init(
        manifest: Manifest, target: Location, store: Store, bounds: LocalizeBounds, known: Set<ObjectID>,
        progress: @escaping WorkProgress, doneBytes: UInt64
    ) {
        self.manifest = manifest
        self.target = target
        self.store = store
        self.bounds = bounds
        self.known = known
        self.progress = progress
        self.doneBytes = doneBytes
    }

    /// Copies what blocks from `from` on name elsewhere, up to the step's bounds.
    mutating func step(from: BlockIndex) async throws(CatalogError) {
        let began = store.environment.nowNs
        next = from
        var leaf: UInt64?
        var leaves = 0
        var batch: [BlockObject] = []
        var seen: Set<ObjectID> = []
        while let (block, entry) = try await used(from: next) {
            if leaf != block.value >> ManifestShape.slotBits {
                if leaves == bounds.leaves { return try await copy(batch) }
                leaf = block.value >> ManifestShape.slotBits
                leaves += 1
            }
            next = BlockIndex(block.value + 1)
            doneBytes += entry.storedBytes
            var named = entry.deltas.map { BlockObject.delta($0) }
            if let base = entry.base { named.append(.base(base)) }
            for object in named where object.location != target.number && !known.contains(object.id) {
                if seen.insert(object.id).inserted { batch.append(object) }
            }
            if batch.count < bounds.batch { continue }
            try await copy(batch)
            batch = []
            seen = []
            let elapsedMs = Int64((store.environment.nowNs - began) / 1_000_000)
            if copiedBytes >= bounds.bytes || elapsedMs >= bounds.milliseconds { return }
        }
        try await copy(batch)
        isAtEnd = true
        next = BlockIndex(ManifestShape.blocksUnder(level: ManifestShape.maxDepth - 1))
    }

    /// The first block from `from` on that has an entry.
    private func used(from: BlockIndex) async throws(CatalogError) -> (BlockIndex, BlockEntry)? {
        let manifest = manifest
        return try await CatalogError.wrap { () async throws(StoreError) -> (BlockIndex, BlockEntry)? in
            guard let block = try await manifest.nextUsed(from: from) else { return nil }
            return try await manifest.find(block).map { (block, $0) }
        }
    }

    private mutating func copy(_ objects: [BlockObject]) async throws(CatalogError) {
        let (store, target) = (store, target)
        let copied = try await inParallel(objects, limit: bounds.parallel) {
            (object) async throws(CatalogError) -> UInt64 in
            try await CatalogError.wrap { () async throws(StoreError) in
                try await object.copy(
                    from: try store.locations.bucket(object.location), to: target.alone,
                    environment: store.environment)
            }
        }
        for (object, bytes) in zip(objects, copied) {
            known.insert(object.id)
            copiedBytes += bytes
            if bytes > 0 { copiedObjects += 1 } else { presentObjects += 1 }
        }
        progress(doneBytes, totalBytes)
    }

    /// Makes the generation that names the copies of the blocks from `from` up to `next`.
    ///
    /// - Returns: whether one was needed; nil: the disk has changed meanwhile.
    func finish(_ found: Store.Found, from: BlockIndex, limit: CommitLimit) async throws(CatalogError) -> Bool? {
        let head = found.head
        guard let record = head.record else { return false }
        var edit = ManifestEdit(manifest)
        edit.relocate(from..<next, known, to: target.number)
        let change = edit
        let new = try await CatalogError.wrap { () async throws(StoreError) in
            try await change.write(to: target.alone, location: target.number, environment: store.environment)
        }
        if new.pagesWritten == 0 { return false }
        try await found.heads.archive(head)
        var after = head
        var moved = GenerationRecord(
            diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .localized,
            committedAtMs: store.environment.wallMs, journalSequence: record.journalSequence,
            newBytes: copiedBytes + new.bytesWritten, manifest: new)
        moved.origin = GenerationRecord.Origin(disk: head.name, diskID: head.diskID, generation: record.generation)
        after.advance(to: moved)
        try await limit.check(asking: true, what: "a step of the copying of '\(head.name)'")
        guard case .won = try await found.heads.swap(after, expecting: found.etag) else { return nil }
        return true
    }
}
