// Memory for dirty pages: 4 KiB frames in one lazily touched mapping of fixed size, owned by one loop and shared by its
// disks. A frame is only a copy: once its page is in the journal it may be taken back at any time, so a full arena never
// stops writers, and dirty memory never exceeds its budget.
//
// What disks hold besides (slots, and the tables of their layers: the overhead) is of the same budget: where it grows,
// frames are given back to the kernel. Where it reaches its own limit, writers wait, and the disks that hold most commit.
// A disk's writers also wait while it holds more than `shares` times what is left. So disks that cannot commit never take
// everything: n of them leave 1 part in `shares` * n + 1 for the others, who go on as they commit.
//
// Always holds: frames that are resident and overhead together are at most the budget, but for what one request adds;
// frames alone may always have `leastFrames`.

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
    /// Free frames whose memory the kernel has back.
    private var parked: [UInt32] = []

    /// Most overhead before writers wait.
    private let overheadLimitBytes: Int
    private let leastFrames: Int
    /// What slots and layers of all disks of the loop take.
    package private(set) var overheadBytes = 0
    /// `overheadBytes` when frames were last given back for it.
    private var settledBytes = 0
    /// Disks that hold any.
    private var holders: [Unmanaged<DirtyPages>] = []

    package var inUse: Int { untouched - freed.count - parked.count }
    /// Frames that there is memory for, with room for what the overhead may grow by before it is looked at again.
    private var limit: Int {
        max(leastFrames, capacity - (settledBytes + FrameArena.settleBytes) / Geometry.pageBytes)
    }
    /// What is held of the budget now, free frames that keep their memory among it.
    package var heldBytes: Int { (untouched - parked.count) * Geometry.pageBytes + overheadBytes }

    /// An arena of `budgetBytes` (at least 1 MiB), which cost nothing until touched.
    package init(budgetBytes: Int) {
        capacity = max(budgetBytes, 1 << 20) / Geometry.pageBytes
        // The largest request, 32 MiB, must find frames whatever else is held.
        let budget = capacity * Geometry.pageBytes
        overheadLimitBytes = max(budget / 8, min(budget / 2, budget - 36 << 20))
        leastFrames = (budget - overheadLimitBytes) / Geometry.pageBytes
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
        let limit = limit
        if limit - inUse >= count { return true }
        if count > limit { return false }
        return reclaim(max(count, limit / 16), of: limit) >= count
    }

    /// Takes a free frame for `slot` of `owner`. `ensure` said there is one.
    func take(for slot: UInt32, of owner: DirtyPages) -> FrameIndex {
        let index: UInt32
        if let last = freed.popLast() ?? parked.popLast() {
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
        freed = []
        parked = []
        untouched = 0
        hand = 0
    }

    /// Takes back frames whose pages are in the journal, oldest first by a rotating hand, until `count` of `limit` are free.
    /// Returns how many are.
    private func reclaim(_ count: Int, of limit: Int) -> Int {
        var looked = 0
        while limit - inUse < count, looked < untouched {
            if hand >= untouched { hand = 0 }
            if let owner = owners[hand], owner._withUnsafeGuaranteedRef({ $0.forget(slots[hand]) }) {
                give(FrameIndex(value: UInt32(hand)))
            }
            hand += 1
            looked += 1
        }
        return limit - inUse
    }

    // MARK: Overhead

    private static let shares = 4

    /// Whether writers of a disk that holds `held` have to wait until layers are committed. `more` is what else it holds.
    @inline(__always)
    func isCrowded(_ more: Int, holding held: Int = 0) -> Bool {
        let left = overheadLimitBytes - overheadBytes - more
        return left < 0 || held + more > left * FrameArena.shares
    }

    /// `bytes` more (or less) are held for `owner`, which holds `held` now.
    func charge(_ bytes: Int, to owner: DirtyPages, holding held: Int) {
        overheadBytes += bytes
        if held > 0, owner.holderIndex < 0 {
            owner.holderIndex = holders.count
            holders.append(.passUnretained(owner))
        } else if held == 0, owner.holderIndex >= 0 {
            let last = holders.removeLast()
            if owner.holderIndex < holders.count {
                holders[owner.holderIndex] = last
                last._withUnsafeGuaranteedRef { $0.holderIndex = owner.holderIndex }
            }
            owner.holderIndex = -1
        }
        settledBytes = min(settledBytes, overheadBytes)
        if overheadBytes > settledBytes + FrameArena.settleBytes { settle() }
    }
    private static let settleBytes = 64 << 10

    private static let parkedAtOnce = 256

    /// Frames make room for what the overhead has grown by: some each time, or one request would pay for all.
    private func settle() {
        settledBytes = overheadBytes
        let limit = limit
        if untouched - parked.count <= limit { return }
        if inUse > limit { _ = reclaim(0, of: limit) }
        for _ in 0..<FrameArena.parkedAtOnce where untouched - parked.count > limit {
            guard let frame = freed.popLast() else { return }
            madvise(pointer(FrameIndex(value: frame)), Geometry.pageBytes, MADV_DONTNEED)
            parked.append(frame)
        }
    }

    /// The overhead has reached its limit, for `asker` at least: every disk with a good part of it is to commit, and he.
    func askForRoom(for asker: DirtyPages) {
        let share = overheadBytes / max(1, holders.count)
        // What they do may change who holds anything.
        let asked = holders.map { $0.takeUnretainedValue() }.filter { $0 === asker || $0.overheadBytes >= share }
        for pages in asked { pages.giveRoom() }
    }
}
