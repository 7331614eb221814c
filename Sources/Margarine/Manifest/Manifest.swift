// One generation's map from block index to stored objects. Opening it does no I/O: pages come when a block under them
// is asked for, so a disk of 16 EiB opens as fast as one of 1 GiB.
//
// Always holds: the map is immutable; what `entry` says stays true. Owned by its loop (or by one task, off loops), as
// its cache is.

package import BlockCache
package import ObjectStore

package final class Manifest: @unchecked Sendable {  // owned by its loop
    /// What can be said of a block without I/O.
    package enum Lookup: Sendable, Equatable {
        /// nil: all zeroes.
        case entry(BlockEntry?)
        /// `load` it first.
        case notLoaded
    }

    /// Size of the disk in bytes; blocks beyond it have no entry.
    package let sizeBytes: UInt64
    /// Levels of pages under `root`. Fewer than `sizeBytes` asks for when the disk has grown since: what lies beyond them is
    /// zeroes.
    package let depth: Int
    /// The page at the top; nil when no block has an entry.
    package let root: PageRef?
    package let cache: ManifestCache
    /// Pages, and their bytes, that were written to make this manifest out of the one before; 0 for an opened one.
    package internal(set) var pagesWritten = 0
    package internal(set) var bytesWritten: UInt64 = 0

    /// A few leaves found lately (or found absent), by the low bits of their index.
    private struct Shortcut {
        var leaf = UInt64.max
        /// nil: no block under this leaf has an entry.
        var resident: ManifestCache.Resident?
    }
    private static let shortcutCount: UInt64 = 64
    private var shortcuts = ContiguousArray(repeating: Shortcut(), count: Int(shortcutCount))

    /// The manifest with this root of a disk of this size. `depth` is for a root made when the disk was smaller.
    package init(sizeBytes: UInt64, root: PageRef?, depth: Int? = nil, cache: ManifestCache) {
        let full = ManifestShape.depth(sizeBytes: sizeBytes)
        self.sizeBytes = sizeBytes
        self.depth = depth ?? full
        precondition(self.depth >= 1 && self.depth <= full)
        self.root = root
        self.cache = cache
    }

    /// The manifest of a generation. No I/O.
    ///
    /// - Parameter sizeBytes: the disk's size now, if it has grown since; nil: as it was then.
    package static func open(_ record: GenerationRecord, sizeBytes: UInt64? = nil, cache: ManifestCache) -> Manifest {
        Manifest(sizeBytes: sizeBytes ?? record.sizeBytes, root: record.root, depth: record.depth, cache: cache)
    }

    /// The manifest of a new disk: nothing but zeroes.
    package static func empty(sizeBytes: UInt64, cache: ManifestCache) -> Manifest {
        Manifest(sizeBytes: sizeBytes, root: nil, cache: cache)
    }

    /// Blocks with an entry.
    package var usedBlocks: UInt64 { root?.usedBlocks ?? 0 }
    /// Stored bytes that the entries name.
    package var storedBytes: UInt64 { root?.storedBytes ?? 0 }
    /// Blocks of the disk, used or not.
    package var blockCount: UInt64 { ManifestShape.blocks(sizeBytes: sizeBytes) }

    // MARK: Looking

    /// The stored form of a block, if its leaf is in memory (or known to be absent). Blocks beyond the size have none.
    package func entry(_ block: BlockIndex) -> Lookup {
        let leaf = block.value >> ManifestShape.slotBits
        let shortcut = Int(leaf % Self.shortcutCount)
        if shortcuts[shortcut].leaf == leaf {
            guard let resident = shortcuts[shortcut].resident else { return .entry(nil) }
            if let page = resident.page {
                resident.isUsed = true
                return .entry(page.entry(Int(block.value & 511)))
            }
        }
        return walk(block)
    }

    private func walk(_ block: BlockIndex) -> Lookup {
        if ManifestShape.pageIndex(block.value, level: depth - 1) != 0 { return .entry(nil) }
        var found = root
        var level = depth - 1
        while let ref = found {
            guard let resident = cache.resident(ref.id), let page = resident.page else { return .notLoaded }
            let slot = ManifestShape.slot(block.value, level: level)
            if level == 0 {
                note(block, resident)
                return .entry(page.entry(slot))
            }
            found = page.child(slot)
            level -= 1
        }
        note(block, nil)
        return .entry(nil)
    }

    private func note(_ block: BlockIndex, _ resident: ManifestCache.Resident?) {
        let leaf = block.value >> ManifestShape.slotBits
        shortcuts[Int(leaf % Self.shortcutCount)] = Shortcut(leaf: leaf, resident: resident)
    }

    /// Brings the pages on the way to `block` into memory: `entry` knows it right after, however small the cache is, and
    /// until other pages push its own out.
    package func load(_ block: BlockIndex) async throws(StoreError) { _ = try await find(block) }

    /// The entry of a block, from the store if need be.
    package func find(_ block: BlockIndex) async throws(StoreError) -> BlockEntry? {
        if ManifestShape.pageIndex(block.value, level: depth - 1) != 0 { return nil }
        var found = root
        var level = depth - 1
        while let ref = found {
            let page = try await cache.page(
                ref, level: level, index: ManifestShape.pageIndex(block.value, level: level))
            let slot = ManifestShape.slot(block.value, level: level)
            if level == 0 {
                note(block, cache.hold(page))
                return page.entry(slot)
            }
            found = page.child(slot)
            level -= 1
        }
        note(block, nil)
        return nil
    }

    // MARK: Walking

    /// What `nextUsedLoaded` can say.
    package enum Next: Sendable, Equatable {
        /// The first block with an entry; nil: none from there to the end.
        case block(BlockIndex?)
        /// `nextUsed` must load pages first.
        case notLoaded
    }

    /// The first block from `from` on that has an entry, without I/O. Absent subtrees cost nothing.
    package func nextUsedLoaded(from: BlockIndex) -> Next {
        var block = from.value
        search: while ManifestShape.pageIndex(block, level: depth - 1) == 0, var ref = root {
            var level = depth - 1
            while true {
                guard let page = cache.resident(ref.id)?.page else { return .notLoaded }
                switch page.step(&block) {
                case .past: continue search
                case .block: return .block(BlockIndex(block))
                case .child(let child):
                    ref = child
                    level -= 1
                }
            }
        }
        return .block(nil)
    }

    /// The first block from `from` on that has an entry; nil: none from there to the end. Loads only pages on the way.
    package func nextUsed(from: BlockIndex) async throws(StoreError) -> BlockIndex? {
        var block = from.value
        search: while ManifestShape.pageIndex(block, level: depth - 1) == 0, var ref = root {
            var level = depth - 1
            while true {
                let page = try await cache.page(ref, level: level, index: ManifestShape.pageIndex(block, level: level))
                switch page.step(&block) {
                case .past: continue search
                case .block: return BlockIndex(block)
                case .child(let child):
                    ref = child
                    level -= 1
                }
            }
        }
        return nil
    }
}

extension ManifestPage {
    enum Step {
        /// No entry in this page from `block` on: `block` is now the first one behind the page.
        case past
        /// `block` has an entry.
        case block
        /// Look in this page below; `block` is now its first block, if it was before that.
        case child(PageRef)
    }

    /// One step of a walk to the next used block at or after `block`, which lies under this page.
    func step(_ block: inout UInt64) -> Step {
        let slot = ManifestShape.slot(block, level: level)
        guard let next = slots.next(from: slot) else {
            block = firstBlock + ManifestShape.blocksUnder(level: level)
            return .past
        }
        if next != slot { block = firstBlock + UInt64(next) << (ManifestShape.slotBits * UInt64(level)) }
        if level == 0 { return .block }
        return .child(child(next)!)
    }
}
