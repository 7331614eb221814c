// One shard of the slice cache: the index of its frames and the order in which they leave. S3-FIFO: newcomers
// queue in `small`, a tenth of the frames, and are dropped from there unless they were used again; what was used again,
// or comes back soon after it was dropped (`ghosts`), queues in `main`, where a use buys another round
// (Docs/Decisions: eviction).
//
// A slice is read in 128 pages, so 128 hits may be one pass of a scan. A hit counts as a use only when at least
// `usePeriod` slices came into the shard since the slice came or was last counted.
//
// Everything here is called with the shard's lock held. Nothing allocates after `init`.

import Synchronization

/// One frame of the cache's memory. All but `pins` belongs to the lock of the shard.
struct Frame: ~Copyable {
    enum State: UInt8 {
        case free, filling, small, main
    }
    // First, for Thread Sanitizer: it takes a change of any of these for one of what lies at the frame's own address.
    var next: UInt32 = .none
    /// Raised under the shard's lock; lowered by anybody, without it.
    let pins = Atomic<UInt32>(0)
    var low: UInt64 = 0
    var high: UInt64 = 0
    var offsetBytes: UInt32 = 0
    /// The shard's clock when a use was counted last.
    var countedAt: UInt32 = 0
    var slice: UInt8 = 0
    var uses: UInt8 = 0
    var state = State.free
    // 64 bytes in all, a cache line: two frames of two busy threads do not share one.
    private let padding: (UInt64, UInt64, UInt64) = (0, 0, 0)

    init() {}

    var key: SliceKey {
        SliceKey(id: ObjectID(high: high, low: low), offsetBytes: offsetBytes, slice: SliceIndex(Int(slice)))
    }
    @inline(__always) func holds(_ key: SliceKey) -> Bool {
        low == key.id.low && high == key.id.high && offsetBytes == key.offsetBytes && Int(slice) == key.slice.value
    }
}

extension UInt32 {
    /// No frame.
    static let none = UInt32.max
}

/// What a shard counted; sums of all shards are the cache's counters.
struct ShardCounters: Sendable {
    var hits: UInt64 = 0
    var misses: UInt64 = 0
    var insertions: UInt64 = 0
    var evictions: UInt64 = 0
    /// Insertions of slices that had been dropped a short while ago.
    var returns: UInt64 = 0
}

struct SliceShard: ~Copyable {
    var counters = ShardCounters()

    private let frames: UnsafeMutablePointer<Frame>
    private let firstFrame: UInt32
    private let frameCount: UInt32
    /// Frames `firstFrame..<firstFrame + touched` were handed out at least once; the others have cost nothing yet.
    private var touched: UInt32 = 0
    private var free = FrameQueue()
    private var small = FrameQueue()
    private var main = FrameQueue()
    private let smallTarget: UInt32
    private let usePeriod: UInt32
    /// Counts insertions.
    private var clock: UInt32 = 0

    /// Open addressing, linear probing, at most half full: frame number + 1, or 0.
    private let index: UnsafeMutablePointer<UInt32>
    private let indexMask: Int
    /// Of slices dropped from `small`: the hash's other half, at the place its first half names, and when.
    private let ghosts: UnsafeMutablePointer<Ghost>
    private let ghostMask: Int
    private let ghostLife: UInt32
    private var ghostClock: UInt32 = 0
    private struct Ghost {
        var print: UInt32
        var at: UInt32
    }

    /// `frames` is the array of all frames; this shard has those of `range`.
    init(frames: UnsafeMutablePointer<Frame>, range: Range<UInt32>, usePeriod: UInt32?) {
        precondition(!range.isEmpty)
        self.frames = frames
        firstFrame = range.lowerBound
        frameCount = UInt32(range.count)
        smallTarget = max(1, frameCount / 10)
        self.usePeriod = usePeriod ?? max(1, smallTarget / 4)
        var slots = 4
        while slots < range.count * 2 { slots *= 2 }
        index = .allocate(capacity: slots)
        index.initialize(repeating: 0, count: slots)
        indexMask = slots - 1
        let ghostSlots = slots * 2
        ghosts = .allocate(capacity: ghostSlots)
        ghosts.initialize(repeating: Ghost(print: 0, at: 0), count: ghostSlots)
        ghostMask = ghostSlots - 1
        ghostLife = frameCount * 2
    }

    deinit {
        index.deallocate()
        ghosts.deallocate()
    }

    // MARK: Finding

    /// The frame that holds `key`, or `.none`. Counts neither hit nor use.
    @inline(__always) func find(_ key: SliceKey, _ hash: UInt64) -> UInt32 {
        var slot = Int(truncatingIfNeeded: hash >> 32) & indexMask
        while true {
            let entry = index[slot]
            if entry == 0 { return .none }
            if frames[Int(entry - 1)].holds(key) { return entry - 1 }
            slot = (slot + 1) & indexMask
        }
    }

    /// Counts a hit of `frame`, and perhaps a use.
    @inline(__always) mutating func hit(_ frame: UInt32) {
        counters.hits &+= 1
        let f = frames + Int(frame)
        if clock &- f.pointee.countedAt >= usePeriod {
            f.pointee.countedAt = clock
            if f.pointee.uses < 3 { f.pointee.uses += 1 }
        }
    }

    // MARK: Coming and going

    /// A frame for the caller to fill, with one pin; evicts where none is free. `.none`: all are pinned.
    mutating func take() -> UInt32 {
        var frame = free.pop(frames)
        if frame == .none, touched < frameCount {
            frame = firstFrame + touched
            touched += 1
            (frames + Int(frame)).initialize(to: Frame())
        }
        if frame == .none { frame = evict() }
        if frame == .none { return .none }
        frames[Int(frame)].state = .filling
        frames[Int(frame)].pins.store(1, ordering: .relaxed)
        return frame
    }

    /// Gives back a frame that was taken and not put in.
    mutating func giveBack(_ frame: UInt32) {
        frames[Int(frame)].pins.store(0, ordering: .relaxed)
        frames[Int(frame)].state = .free
        free.pushFront(frame, frames)
    }

    /// Makes a filled frame the one that holds `key`, which no other does.
    mutating func put(_ frame: UInt32, _ key: SliceKey, _ hash: UInt64) {
        let f = frames + Int(frame)
        f.pointee.low = key.id.low
        f.pointee.high = key.id.high
        f.pointee.offsetBytes = key.offsetBytes
        f.pointee.slice = UInt8(key.slice.value)
        f.pointee.uses = 0
        clock &+= 1
        f.pointee.countedAt = clock
        var slot = Int(truncatingIfNeeded: hash >> 32) & indexMask
        while index[slot] != 0 { slot = (slot + 1) & indexMask }
        index[slot] = frame + 1
        counters.insertions &+= 1
        let ghost = ghosts[Int(truncatingIfNeeded: hash >> 32) & ghostMask]
        if ghost.at != 0, ghost.print == UInt32(truncatingIfNeeded: hash), ghostClock &- ghost.at < ghostLife {
            counters.returns &+= 1
            f.pointee.state = .main
            main.pushBack(frame, frames)
        } else {
            f.pointee.state = .small
            small.pushBack(frame, frames)
        }
    }

    /// Frames that hold slices.
    var heldCount: UInt32 { small.count + main.count }

    /// Evicts one slice for good: its frame becomes free. `.none`: nothing left that is not pinned.
    mutating func drop() -> UInt32 {
        let frame = evict()
        if frame == .none { return .none }
        frames[Int(frame)].state = .free
        free.pushBack(frame, frames)
        return frame
    }

    /// Calls `body` with each free frame that has been touched.
    func forEachFree(_ body: (UInt32) -> Void) {
        var frame = free.head
        while frame != .none {
            body(frame)
            frame = frames[Int(frame)].next
        }
    }

    /// Takes the frame that should leave out of queue and index; `.none` when all are pinned. A pinned frame goes to the
    /// end of its queue; a queue is given up once as many pinned frames came by as it holds.
    private mutating func evict() -> UInt32 {
        var smallPinned: UInt32 = 0
        var mainPinned: UInt32 = 0
        while true {
            let smallOpen = smallPinned < small.count
            let mainOpen = mainPinned < main.count
            if smallOpen, small.count >= smallTarget || !mainOpen {
                let frame = small.pop(frames)
                let f = frames + Int(frame)
                if f.pointee.uses > 0 {
                    f.pointee.uses = 0
                    f.pointee.state = .main
                    main.pushBack(frame, frames)
                } else if f.pointee.pins.load(ordering: .acquiring) > 0 {
                    smallPinned += 1
                    small.pushBack(frame, frames)
                } else {
                    remember(f.pointee.key)
                    remove(frame)
                    return frame
                }
            } else if mainOpen {
                let frame = main.pop(frames)
                let f = frames + Int(frame)
                if f.pointee.uses > 0 {
                    f.pointee.uses -= 1
                    mainPinned = 0
                    main.pushBack(frame, frames)
                } else if f.pointee.pins.load(ordering: .acquiring) > 0 {
                    mainPinned += 1
                    main.pushBack(frame, frames)
                } else {
                    remove(frame)
                    return frame
                }
            } else {
                return .none
            }
        }
    }

    private mutating func remember(_ key: SliceKey) {
        let hash = SliceCache.hash(key)
        ghostClock &+= 1
        if ghostClock == 0 { ghostClock = 1 }
        ghosts[Int(truncatingIfNeeded: hash >> 32) & ghostMask] =
            Ghost(print: UInt32(truncatingIfNeeded: hash), at: ghostClock)
    }

    /// Takes `frame` out of the index and closes the gap, so that probing never needs tombstones.
    private mutating func remove(_ frame: UInt32) {
        counters.evictions &+= 1
        var hole = Int(truncatingIfNeeded: SliceCache.hash(frames[Int(frame)].key) >> 32) & indexMask
        while index[hole] != frame + 1 { hole = (hole + 1) & indexMask }
        var slot = hole
        while true {
            slot = (slot + 1) & indexMask
            let entry = index[slot]
            if entry == 0 { break }
            let home = Int(truncatingIfNeeded: SliceCache.hash(frames[Int(entry - 1)].key) >> 32) & indexMask
            // It may move into the hole when its home is not between the hole and where it is.
            if (slot - home) & indexMask >= (slot - hole) & indexMask {
                index[hole] = entry
                hole = slot
            }
        }
        index[hole] = 0
    }
}

/// A queue of frames, linked through `Frame.next`.
struct FrameQueue {
    private(set) var head = UInt32.none
    private var tail = UInt32.none
    private(set) var count: UInt32 = 0

    mutating func pushBack(_ frame: UInt32, _ frames: UnsafeMutablePointer<Frame>) {
        frames[Int(frame)].next = .none
        if tail == .none { head = frame } else { frames[Int(tail)].next = frame }
        tail = frame
        count += 1
    }
    mutating func pushFront(_ frame: UInt32, _ frames: UnsafeMutablePointer<Frame>) {
        frames[Int(frame)].next = head
        if tail == .none { tail = frame }
        head = frame
        count += 1
    }
    mutating func pop(_ frames: UnsafeMutablePointer<Frame>) -> UInt32 {
        if head == .none { return .none }
        let frame = head
        head = frames[Int(frame)].next
        if head == .none { tail = .none }
        count -= 1
        return frame
    }
}
