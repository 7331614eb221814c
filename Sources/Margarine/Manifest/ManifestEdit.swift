// What one commit changes in a manifest: collected without I/O, then written as the pages that differ and no others.
//
// Always holds: the last word on a block wins; a page whose blocks are all gone costs nothing to drop, loaded or not,
// so removing 2^40 blocks takes the pages at the two ends of the range.

package import BlockCache
package import ObjectStore
package import Runtime

package struct ManifestEdit {
    private let base: Manifest
    private var content: ManifestBuilder.Changes
    /// Pages read or written at the same time.
    private static let parallelCalls = 16

    package init(_ base: Manifest) {
        self.base = base
        content = ManifestBuilder.Changes(sizeBytes: base.sizeBytes)
    }

    /// Size of the disk that the new manifest will be of.
    package var sizeBytes: UInt64 { content.sizeBytes }
    /// Nothing was asked for: writing gives the base again.
    package var isEmpty: Bool {
        content.sets.isEmpty && content.removed.isEmpty && content.relocation == nil && sizeBytes == base.sizeBytes
    }

    /// Gives a block its stored form; nil, or a form that is all zeroes, for none. The block lies within the size.
    package mutating func set(_ block: BlockIndex, _ entry: BlockEntry?) {
        precondition(
            block.value < ManifestShape.blocks(sizeBytes: sizeBytes), "block \(block.value) lies beyond the disk")
        guard var entry, entry.nonzeroSlices != 0 else {
            content.sets[block.value] = .some(nil)
            return
        }
        if entry.base?.nonzeroSlices == 0 { entry.base = nil }
        precondition(entry.isSound, "an entry that no reader would take")
        content.sets[block.value] = entry
    }

    /// Makes all blocks of the range zeroes. Costs a step for each `set` before it and none for a block.
    package mutating func removeAll(in range: Range<BlockIndex>) {
        if range.isEmpty { return }
        var range = range.lowerBound.value..<range.upperBound.value
        // Nothing lies behind the end of the disk: so whole pages go, and none is loaded to cut it there.
        if range.upperBound >= ManifestShape.blocks(sizeBytes: sizeBytes) {
            range =
                range.lowerBound..<max(range.upperBound, ManifestShape.blocksUnder(level: ManifestShape.maxDepth - 1))
        }
        if content.sets.count < range.count {
            for block in content.sets.keys where range.contains(block) { content.sets[block] = nil }
        } else {
            for block in range { content.sets[block] = nil }
        }
        content.removed.insert(range)
    }

    /// Has the blocks of the range name the copies that location `location` has of these objects. The pages over the range
    /// that lie elsewhere than the new ones will are written anew too.
    package mutating func relocate(_ range: Range<BlockIndex>, _ ids: Set<ObjectID>, to location: UInt8) {
        precondition(content.relocation == nil, "one range at a time")
        let blocks = range.lowerBound.value..<range.upperBound.value
        if blocks.isEmpty { return }
        content.relocation = ManifestBuilder.Relocation(blocks: blocks, ids: ids, location: location)
    }

    /// Changes the size. Entries beyond a smaller one are dropped for good; what the last block holds behind the end of the
    /// disk is the caller's to zero.
    package mutating func resize(to sizeBytes: UInt64) {
        let end = ManifestShape.blocks(sizeBytes: sizeBytes)
        if end < ManifestShape.blocks(sizeBytes: content.sizeBytes) {
            removeAll(in: BlockIndex(end)..<BlockIndex(ManifestShape.blocks(sizeBytes: content.sizeBytes)))
        }
        content.sizeBytes = sizeBytes
    }

    /// Writes the changed pages and gives the new manifest, which shares the cache with its base. May be called again
    /// after an error: pages already written are then garbage for the collector.
    package func write(
        to bucket: any Bucket, location: UInt8, environment: any Environment
    ) async throws(StoreError) -> Manifest {
        let depth = ManifestShape.depth(sizeBytes: sizeBytes)
        // A smaller tree is what hangs under the leftmost pages of the larger one.
        var root = base.root
        var rootLevel = base.depth - 1
        while rootLevel > depth - 1, let ref = root {
            root = try await base.cache.page(ref, level: rootLevel, index: 0).child(0)
            rootLevel -= 1
        }
        rootLevel = min(rootLevel, depth - 1)
        let pages = try await loadChanged(root, level: rootLevel)
        let builder = ManifestBuilder(
            changes: content, root: root, rootLevel: rootLevel, depth: depth, pages: pages, location: location,
            environment: environment)
        let built = await environment.offload { builder.build() }
        _ = try await inParallel(built.pages, limit: Self.parallelCalls) { (new) async throws(StoreError) -> ETag in
            try await bucket.put(new.page.id.manifestKey, new.bytes, if: .none)
        }
        for new in built.pages { base.cache.insert(new.page) }
        let manifest = Manifest(sizeBytes: sizeBytes, root: built.root, cache: base.cache)
        manifest.pagesWritten = built.pages.count
        manifest.bytesWritten = built.pages.reduce(0) { $0 + UInt64($1.bytes.count) }
        return manifest
    }

    /// Loads the pages that the changes reach, level by level, each level at once.
    private func loadChanged(_ root: PageRef?, level: Int) async throws(StoreError) -> [ObjectID: ManifestPage] {
        struct Place: Sendable {
            var ref: PageRef
            var index: UInt64
        }
        var pages: [ObjectID: ManifestPage] = [:]
        var places = root.map { [Place(ref: $0, index: 0)] } ?? []
        let sorted = content.sets.keys.sorted()
        var level = level
        while level >= 0, !places.isEmpty {
            let span = ManifestShape.blocksUnder(level: level)
            places.removeAll {
                let range = $0.index * span..<($0.index + 1) * span
                return content.removed.covers(range)
                    || !(content.removed.overlaps(range) || sorted.hasElement(in: range)
                        || content.relocation?.blocks.overlaps(range) ?? false)
            }
            let missing = places.filter { base.cache.resident($0.ref.id)?.page == nil }
            for place in places { pages[place.ref.id] = base.cache.resident(place.ref.id)?.page }
            let here = level
            let locations = base.cache.locations
            let loaded = try await inParallel(missing, limit: Self.parallelCalls) {
                (place) async throws(StoreError) -> ManifestPage in
                try await ManifestCache.fetch(place.ref, level: here, index: place.index, locations).get()
            }
            for page in loaded {
                pages[page.id] = page
                base.cache.insert(page)
            }
            if level > 0 {
                places = places.flatMap { place in
                    let page = pages[place.ref.id]!
                    return zip(page.slots.slots, page.children).map { slot, child in
                        Place(ref: child, index: place.index << ManifestShape.slotBits | UInt64(slot))
                    }
                }
            }
            level -= 1
        }
        return pages
    }
}

extension [UInt64] {
    /// Whether an element of this ascending array lies in `range`.
    func hasElement(in range: Range<UInt64>) -> Bool {
        let i = firstIndex(notBelow: range.lowerBound)
        return i < count && self[i] < range.upperBound
    }

    /// The first index whose element is not below `bound`, of an ascending array.
    func firstIndex(notBelow bound: UInt64) -> Int {
        var low = 0
        var high = count
        while low < high {
            let middle = (low + high) / 2
            if self[middle] < bound { low = middle + 1 } else { high = middle }
        }
        return low
    }
}
