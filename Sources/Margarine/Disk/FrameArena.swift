// Memory for dirty pages: 4 KiB frames in one lazily touched mapping of fixed size, owned by one loop and shared by its
// disks. A frame is only a copy: once its page is in the journal it may be taken back at any time, so a full arena never
// stops writers, and dirty memory never exceeds its budget.

internal import BlockCache
internal import Glibc

/// A frame's number; `.none` for a page that is in the journal only.
package struct FrameIndex: Equatable {
    var value: UInt32
    static let none = FrameIndex(value: .max)
}

/// Owned by its loop.
package final class FrameArena {
    private let base: UnsafeMutableRawPointer
    package let capacity: Int
    /// Frames handed out and given back, as a stack; those from `untouched` on were never used.
    private var freed: [UInt32] = []
    private var untouched = 0
    /// Who uses each frame; nil for a free one.
    private var owners: UnsafeMutablePointer<Unmanaged<DirtyPages>?>
    private var slots: UnsafeMutablePointer<UInt32>
    private var hand = 0

    package var inUse: Int { untouched - freed.count }

    /// An arena of `budgetBytes` (at least 1 MiB), which cost nothing until touched.
    package init(budgetBytes: Int) {
        capacity = max(budgetBytes, 1 << 20) / Geometry.pageBytes
        let length = capacity * Geometry.pageBytes
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        let mapped = mmap(nil, length, PROT_READ | PROT_WRITE, flags, -1, 0)
        precondition(mapped != MAP_FAILED, "no address space for \(length) bytes of dirty pages")
        base = mapped!
        owners = .allocate(capacity: capacity)
        owners.initialize(repeating: nil, count: capacity)
        slots = .allocate(capacity: capacity)
        slots.initialize(repeating: 0, count: capacity)
    }

    deinit {
        munmap(base, capacity * Geometry.pageBytes)
        owners.deallocate()
        slots.deallocate()
    }

    @inline(__always)
    func pointer(_ frame: FrameIndex) -> UnsafeMutableRawPointer {
        base + Int(frame.value) * Geometry.pageBytes
    }

    /// True if `count` frames can be had now, after taking back those of journaled pages.
    func ensure(_ count: Int) -> Bool {
        if capacity - inUse >= count { return true }
        if count > capacity { return false }
        return reclaim(max(count, capacity / 16)) >= count
    }

    /// Takes a free frame for `slot` of `owner`. `ensure` said there is one.
    func take(for slot: UInt32, of owner: DirtyPages) -> FrameIndex {
        let index: UInt32
        if let last = freed.popLast() {
            index = last
        } else {
            precondition(untouched < capacity, "FrameArena.take without ensure")
            index = UInt32(untouched)
            untouched += 1
        }
        owners[Int(index)] = Unmanaged.passUnretained(owner)
        slots[Int(index)] = slot
        return FrameIndex(value: index)
    }

    func give(_ frame: FrameIndex) {
        owners[Int(frame.value)] = nil
        freed.append(frame.value)
    }

    /// Gives all memory of unused frames back to the kernel once the arena is empty.
    func trim() {
        guard inUse == 0, untouched > 0 else { return }
        madvise(base, untouched * Geometry.pageBytes, MADV_DONTNEED)
        freed.removeAll()
        untouched = 0
        hand = 0
    }

    /// Takes back up to `count` frames whose pages are in the journal, oldest first by a rotating hand. Returns how many
    /// frames are free afterwards.
    private func reclaim(_ count: Int) -> Int {
        var looked = 0
        while capacity - inUse < count, looked < untouched {
            if hand >= untouched { hand = 0 }
            if let owner = owners[hand], owner._withUnsafeGuaranteedRef({ $0.forget(slots[hand]) }) {
                give(FrameIndex(value: UInt32(hand)))
            }
            hand += 1
            looked += 1
        }
        return capacity - inUse
    }
}
