// Every manifest page under a set of roots, each visited once, level by level from the top. Pages that wait are on scratch.
//
// Always holds: a page is visited after all pages above it; at most a batch of pages is in memory.

import BlockCache
import ObjectStore
import Runtime

/// A page to be visited, as the page above it (or a record) names it.
struct PagePlace: Sendable, Hashable {
    var ref: PageRef
    var level: Int
    var index: UInt64

    static let width = 6
    /// As words of a `PartitionedFile`.
    var words: [UInt64] {
        [
            ref.id.high, ref.id.low, UInt64(ref.location) << 32 | UInt64(ref.lengthBytes), index, ref.usedBlocks,
            ref.storedBytes,
        ]
    }
    init(ref: PageRef, level: Int, index: UInt64) {
        self.ref = ref
        self.level = level
        self.index = index
    }
    init(_ words: ContiguousArray<UInt64>.SubSequence, level: Int) {
        let w = words.startIndex
        ref = PageRef(
            id: ObjectID(high: words[w], low: words[w + 1]), location: UInt8(words[w + 2] >> 32),
            lengthBytes: UInt32(truncatingIfNeeded: words[w + 2]), usedBlocks: words[w + 4],
            storedBytes: words[w + 5])
        self.level = level
        index = words[w + 3]
    }
}

/// Used by one task at a time.
final class PageTrace: @unchecked Sendable {
    /// The pages of each level, leaves first. Each page is there once for everyone who names it.
    private let levels: [PartitionedFile]
    private let locations: Locations
    private let requests: Int
    /// Pages visited.
    private(set) var visited: UInt64 = 0

    init(
        _ scratch: any ScratchDisk, folder: String, partitionBits: Int, locations: Locations, requests: Int,
        salt: UInt64
    ) {
        levels = (0..<ManifestShape.maxDepth).map {
            PartitionedFile(
                scratch, path: "\(folder)/pages.\($0)", partitionBits: partitionBits, width: PagePlace.width,
                salt: salt)
        }
        self.locations = locations
        self.requests = requests
    }

    /// Adds the manifest of a generation.
    func add(_ record: GenerationRecord) {
        guard let root = record.root else { return }
        add(PagePlace(ref: root, level: record.depth - 1, index: 0))
    }

    var partitions: Int { levels[0].partitions }

    func add(_ place: PagePlace) { levels[place.level].add(place.words) }
    func spill() async throws(CatalogError) { for level in levels { try await level.spill() } }

    /// Visits every page, and those below it that are found on the way. The first page that can't be read ends it.
    func run(_ visit: (PagePlace, ManifestPage) async throws(CatalogError) -> Void) async throws(CatalogError) {
        let locations = locations
        try await forEachBatch { (batch) async throws(CatalogError) in
            let pages = try await inParallel(batch, limit: requests) {
                (place) async throws(CatalogError) -> ManifestPage in
                do throws(StoreError) {
                    return try await ManifestCache.fetch(
                        place.ref, level: place.level, index: place.index, locations
                    ).get()
                } catch { throw CatalogError(error) }
            }
            for (place, page) in zip(batch, pages) {
                descend(place, page)
                try await visit(place, page)
            }
            try await spill()
        }
    }

    /// Adds the pages that `page` names.
    func descend(_ place: PagePlace, _ page: ManifestPage) {
        if page.level == 0 { return }
        for (slot, child) in zip(page.slots.slots, page.children) {
            add(
                PagePlace(
                    ref: child, level: place.level - 1, index: place.index << ManifestShape.slotBits | UInt64(slot)))
        }
    }

    /// All pages, level by level from the top, in batches that fit memory. What is added below during a batch comes later.
    func forEachBatch(_ body: ([PagePlace]) async throws(CatalogError) -> Void) async throws(CatalogError) {
        var batch: [PagePlace] = []
        for level in levels.indices.reversed() {
            for partition in 0..<levels[level].partitions {
                for place in try await places(level, partition) {
                    batch.append(place)
                    if batch.count < 4 * requests { continue }
                    visited += UInt64(batch.count)
                    try await body(batch)
                    batch = []
                }
            }
            // The level below is not complete before.
            if batch.isEmpty { continue }
            visited += UInt64(batch.count)
            try await body(batch)
            batch = []
        }
    }

    /// The pages of a partition, each once for each different thing that is said of it, in the order of ids.
    func places(_ level: Int, _ partition: Int) async throws(CatalogError) -> [PagePlace] {
        var seen: Set<PagePlace> = []
        try await levels[level].forEachRun(in: partition) { words in
            for start in stride(from: 0, to: words.count, by: PagePlace.width) {
                seen.insert(PagePlace(words[start..<start + PagePlace.width], level: level))
            }
        }
        return seen.sorted {
            ($0.ref.id.high, $0.ref.id.low, $0.index, $0.ref.location, $0.ref.lengthBytes, $0.ref.usedBlocks)
                < ($1.ref.id.high, $1.ref.id.low, $1.index, $1.ref.location, $1.ref.lengthBytes, $1.ref.usedBlocks)
        }
    }

    func remove() { for level in levels { level.remove() } }
}
