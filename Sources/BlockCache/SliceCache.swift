// The memory cache of slices, shared by all loops. Frames of 512 KiB in one mapping that costs nothing until it is
// touched; shards by key hash, each with its own lock, held for tens of nanoseconds and never across a copy.
//
// Always holds: a frame with a pin is neither evicted nor changed; a slice found under a key is complete; the cache
// never takes more than its budget, plus `maxOverflowFrames` while every frame of a shard is pinned.

import Glibc
import Synchronization

public final class SliceCache: Sendable {
    /// What the cache did since it was made, and what it holds now.
    public struct Snapshot: Sendable, Equatable {
        public var hits: UInt64 = 0
        public var misses: UInt64 = 0
        public var insertions: UInt64 = 0
        public var evictions: UInt64 = 0
        /// Insertions of slices evicted a short while before: many of them say that the budget is too small.
        public var returns: UInt64 = 0
        /// Loads that found every frame pinned and took a private buffer.
        public var overflows: UInt64 = 0
        /// Loads that had to wait for a frame: private buffers were used up as well.
        public var waits: UInt64 = 0
        public var heldBytes: UInt64 = 0
        public var budgetBytes: UInt64 = 0
        /// Private buffers in use now.
        public var overflowBytes: UInt64 = 0
    }

    /// Private buffers for loads that find all frames pinned.
    public static let maxOverflowFrames = 64

    // All four are set once; what they point at is guarded as said at `Frame` and `SliceShard`.
    nonisolated(unsafe) private let memory: UnsafeMutableRawPointer
    nonisolated(unsafe) private let zeroes: UnsafeMutableRawPointer
    nonisolated(unsafe) private let frames: UnsafeMutablePointer<Frame>
    nonisolated(unsafe) private let shards: UnsafeMutablePointer<Mutex<SliceShard>>
    private let shardCount: Int
    /// Frames within the budget; those above are private buffers, the one above them stands for a slice of zeroes.
    private let frameCount: Int
    private var zeroFrame: UInt32 { UInt32(frameCount + Self.maxOverflowFrames) }
    private var mappedBytes: Int { (frameCount + Self.maxOverflowFrames) * Geometry.sliceBytes }

    private struct Overflow {
        var free: [UInt32]
        var total: UInt64 = 0
    }
    private let overflow: Mutex<Overflow>

    /// Loads that wait for a frame. `epoch` counts wakes, so that none is missed between a try and the sleep.
    private struct Waiters {
        var epoch: UInt64 = 0
        var sleeping: [UnsafeContinuation<Void, Never>] = []
        var total: UInt64 = 0
    }
    private let waiters = Mutex(Waiters())
    private let waiting = Atomic<Int>(0)

    /// Room for `budgetBytes` of slices, at least one.
    public convenience init(budgetBytes: UInt64) { self.init(budgetBytes: budgetBytes, usePeriod: nil) }

    /// `usePeriod` overrides the shards' own, for comparing.
    init(budgetBytes: UInt64, usePeriod: UInt32?) {
        frameCount = max(1, Int(min(budgetBytes, 1 << 44)) / Geometry.sliceBytes)
        // A shard of less than 64 frames would fill up unevenly.
        var count = 1
        while count < 64, frameCount / (count * 2) >= 64 { count *= 2 }
        shardCount = count
        let bytes = (frameCount + Self.maxOverflowFrames) * Geometry.sliceBytes
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        guard let mapped = mmap(nil, bytes, PROT_READ | PROT_WRITE, flags, -1, 0), mapped != MAP_FAILED,
            let zero = mmap(nil, Geometry.sliceBytes, PROT_READ, flags, -1, 0), zero != MAP_FAILED
        else { fatalError("cannot reserve \(bytes) bytes of address space for the slice cache: errno \(errno)") }
        memory = mapped
        zeroes = zero
        // Raw memory: a frame is initialised when it is first handed out.
        let frameTotal = frameCount + Self.maxOverflowFrames + 1
        frames = UnsafeMutableRawPointer.allocate(byteCount: frameTotal * MemoryLayout<Frame>.stride, alignment: 64)
            .bindMemory(to: Frame.self, capacity: frameTotal)
        shards = .allocate(capacity: count)
        for i in 0..<count {
            let range = UInt32(frameCount * i / count)..<UInt32(frameCount * (i + 1) / count)
            (shards + i).initialize(to: Mutex(SliceShard(frames: frames, range: range, usePeriod: usePeriod)))
        }
        for i in frameCount...frameCount + Self.maxOverflowFrames { (frames + i).initialize(to: Frame()) }
        overflow = Mutex(Overflow(free: [UInt32](UInt32(frameCount)..<UInt32(frameCount + Self.maxOverflowFrames))))
    }

    deinit {
        munmap(memory, mappedBytes)
        munmap(zeroes, Geometry.sliceBytes)
        shards.deinitialize(count: shardCount)
        shards.deallocate()
        UnsafeMutableRawPointer(frames).deallocate()
    }

    // MARK: Reading

    /// Copies `count` bytes at `offset` of the slice `key` when it is here. The hot path: no allocation, no reference
    /// counting, one short lock.
    public func tryCopy(_ key: SliceKey, offset: Int, count: Int, into: UnsafeMutableRawPointer) -> Bool {
        precondition(offset >= 0 && count >= 0 && offset + count <= Geometry.sliceBytes)
        let frame = pinned(key)
        if frame == .none { return false }
        memcpy(into, memory + Int(frame) * Geometry.sliceBytes + offset, count)
        unpin(frame)
        return true
    }

    /// The slice `key` when it is here, kept in place until the pin goes.
    public func pin(_ key: SliceKey) -> PinnedSlice? {
        let frame = pinned(key)
        return frame == .none ? nil : PinnedSlice(cache: self, frame: frame)
    }

    /// As `pin`, for a caller whose miss has been counted already.
    func pinAfterMiss(_ key: SliceKey) -> PinnedSlice? {
        let frame = pinned(key, countsMiss: false)
        return frame == .none ? nil : PinnedSlice(cache: self, frame: frame)
    }

    /// 512 KiB of zeroes.
    public var zeroSlice: PinnedSlice { PinnedSlice(cache: self, frame: zeroFrame) }

    /// Whether `key` is here; counts neither as hit nor as use.
    public func contains(_ key: SliceKey) -> Bool {
        let hash = Self.hash(key)
        let shard = shard(hash)
        return shard.pointee.withLock { shard in shard.find(key, hash) != .none }
    }

    /// Finds and pins; `.none` when it is not here.
    @inline(__always) private func pinned(_ key: SliceKey, countsMiss: Bool = true) -> UInt32 {
        let hash = Self.hash(key)
        let shard = shard(hash)
        return shard.pointee.withLock { shard in
            let frame = shard.find(key, hash)
            if frame == .none {
                if countsMiss { shard.counters.misses &+= 1 }
                return .none
            }
            shard.hit(frame)
            frames[Int(frame)].pins.wrappingAdd(1, ordering: .relaxed)
            return frame
        }
    }

    // MARK: Filling

    /// A frame to fill for `key`, evicting where needed; nil when every frame and every private buffer is pinned.
    public func trySlot(_ key: SliceKey) -> SliceSlot? {
        let frame = take(Self.hash(key))
        return frame == .none ? nil : SliceSlot(cache: self, key: key, frame: frame)
    }

    /// A frame to fill for `key`; waits for one where every frame and every private buffer is pinned. Whoever waits here
    /// should hold few pins, or none.
    public func slot(_ key: SliceKey) async -> SliceSlot {
        let hash = Self.hash(key)
        let first = take(hash)
        if first != .none { return SliceSlot(cache: self, key: key, frame: first) }
        waiters.withLock { $0.total += 1 }
        waiting.add(1, ordering: .sequentiallyConsistent)
        defer { waiting.subtract(1, ordering: .sequentiallyConsistent) }
        while true {
            let epoch = waiters.withLock { $0.epoch }
            let frame = take(hash)
            if frame != .none { return SliceSlot(cache: self, key: key, frame: frame) }
            await withUnsafeContinuation { continuation in
                let missed = waiters.withLock {
                    if $0.epoch != epoch { return true }
                    $0.sleeping.append(continuation)
                    return false
                }
                if missed { continuation.resume() }
            }
        }
    }

    /// Puts a slice in at once, filled by `fill`; false, and `fill` not called, when it is here already or no frame
    /// is to be had.
    @discardableResult
    public func insert(_ key: SliceKey, fill: (UnsafeMutableRawPointer) -> Void) -> Bool {
        if contains(key) { return false }
        // A private buffer would be of no use.
        let frame = take(Self.hash(key), allowsOverflow: false)
        if frame == .none { return false }
        let slot = SliceSlot(cache: self, key: key, frame: frame)
        fill(slot.pointer)
        _ = slot.publish()
        return true
    }

    private func take(_ hash: UInt64, allowsOverflow: Bool = true) -> UInt32 {
        let shard = shard(hash)
        let frame = shard.pointee.withLock { shard in shard.take() }
        if frame != .none || !allowsOverflow { return frame }
        return overflow.withLock {
            guard let frame = $0.free.popLast() else { return .none }
            $0.total += 1
            frames[Int(frame)].pins.store(1, ordering: .relaxed)
            return frame
        }
    }

    /// Publishes a filled frame under `key`. Gives the frame to use from then on, with one pin of the caller: another
    /// one when the slice came in meanwhile, the same when it is a private buffer.
    fileprivate func publish(_ frame: UInt32, _ key: SliceKey) -> UInt32 {
        if Int(frame) >= frameCount { return frame }
        let hash = Self.hash(key)
        let shard = shard(hash)
        let other = shard.pointee.withLock { shard -> UInt32 in
            let other = shard.find(key, hash)
            if other == .none {
                shard.put(frame, key, hash)
            } else {
                shard.giveBack(frame)
                frames[Int(other)].pins.wrappingAdd(1, ordering: .relaxed)
            }
            return other
        }
        if other == .none { return frame }
        wakeWaiters()
        return other
    }

    /// Gives up a frame that was not filled.
    fileprivate func abandon(_ frame: UInt32, _ key: SliceKey) {
        if Int(frame) >= frameCount { return unpin(frame) }
        let shard = shard(Self.hash(key))
        shard.pointee.withLock { shard in shard.giveBack(frame) }
        wakeWaiters()
    }

    // MARK: Pins

    @inline(__always) fileprivate func bytes(_ frame: UInt32) -> UnsafeMutableRawPointer {
        frame == zeroFrame ? zeroes : memory + Int(frame) * Geometry.sliceBytes
    }

    /// One more pin for a frame that has one.
    func pinAgain(_ frame: UInt32, _ count: Int = 1) {
        if frame != zeroFrame { frames[Int(frame)].pins.wrappingAdd(UInt32(count), ordering: .relaxed) }
    }

    @inline(__always) func unpin(_ frame: UInt32) {
        if frame == zeroFrame { return }
        let left = frames[Int(frame)].pins.wrappingSubtract(1, ordering: .sequentiallyConsistent).newValue
        if left == 0, Int(frame) >= frameCount || waiting.load(ordering: .sequentiallyConsistent) != 0 {
            lastPinGone(frame)
        }
    }

    @inline(never) private func lastPinGone(_ frame: UInt32) {
        if Int(frame) >= frameCount {
            madvise(bytes(frame), Geometry.sliceBytes, MADV_DONTNEED)
            overflow.withLock { $0.free.append(frame) }
        }
        wakeWaiters()
    }

    private func wakeWaiters() {
        if waiting.load(ordering: .sequentiallyConsistent) == 0 { return }
        let woken = waiters.withLock { state in
            state.epoch += 1
            let sleeping = state.sleeping
            state.sleeping = []
            return sleeping
        }
        for continuation in woken { continuation.resume() }
    }

    // MARK: Housekeeping

    /// Evicts until at most `bytes` are held (pinned slices stay), and gives the memory of all free frames back to
    /// the system. The cache may fill again afterwards.
    public func trim(to bytes: UInt64) {
        for i in 0..<shardCount {
            let shard = shards + i
            let limit = UInt32(clamping: bytes / UInt64(Geometry.sliceBytes) / UInt64(shardCount))
            while true {
                let more = shard.pointee.withLock { shard in
                    shard.heldCount > limit && shard.drop() != .none
                }
                if !more { break }
            }
            shard.pointee.withLock { shard in
                shard.forEachFree { madvise(self.bytes($0), Geometry.sliceBytes, MADV_DONTNEED) }
            }
        }
    }

    /// The sums of all shards, not of one instant.
    public var snapshot: Snapshot {
        var sum = Snapshot()
        var held: UInt64 = 0
        for i in 0..<shardCount {
            let shard = shards + i
            let (counters, count) = shard.pointee.withLock { shard in (shard.counters, shard.heldCount) }
            sum.hits &+= counters.hits
            sum.misses &+= counters.misses
            sum.insertions &+= counters.insertions
            sum.evictions &+= counters.evictions
            sum.returns &+= counters.returns
            held += UInt64(count)
        }
        sum.heldBytes = held * UInt64(Geometry.sliceBytes)
        sum.budgetBytes = UInt64(frameCount * Geometry.sliceBytes)
        let (free, total) = overflow.withLock { ($0.free.count, $0.total) }
        sum.overflows = total
        sum.overflowBytes = UInt64((Self.maxOverflowFrames - free) * Geometry.sliceBytes)
        sum.waits = waiters.withLock { $0.total }
        return sum
    }

    @inline(__always) private func shard(_ hash: UInt64) -> UnsafeMutablePointer<Mutex<SliceShard>> {
        shards + (Int(truncatingIfNeeded: hash) & (shardCount - 1))
    }

    /// Names are random already, but a slice of the same object and a neighbouring segment must go elsewhere too.
    @inline(__always) static func hash(_ key: SliceKey) -> UInt64 {
        var h = key.id.low ^ (key.id.high &* 0x9E37_79B9_7F4A_7C15)
        h ^=
            (UInt64(key.offsetBytes) << 8 | UInt64(UInt8(truncatingIfNeeded: key.slice.value))) &* 0xD6E8_FEB8_6659_FD93
        h = (h ^ h >> 32) &* 0xFF51_AFD7_ED55_8CCD
        return h ^ h >> 29
    }
}

/// A slice in memory that stays where it is until this value goes.
public struct PinnedSlice: ~Copyable, Sendable {
    private let cache: SliceCache
    private let frame: UInt32

    fileprivate init(cache: SliceCache, frame: UInt32) {
        self.cache = cache
        self.frame = frame
    }
    deinit { cache.unpin(frame) }

    /// The slice's 512 KiB; valid as long as this value lives.
    public var pointer: UnsafeRawPointer { UnsafeRawPointer(cache.bytes(frame)) }

    /// Copies `count` bytes at `offset` out of the slice.
    public func copy(offset: Int, count: Int, into: UnsafeMutableRawPointer) {
        precondition(offset >= 0 && count >= 0 && offset + count <= Geometry.sliceBytes)
        memcpy(into, pointer + offset, count)
    }

    /// A second pin on the same slice.
    public func again() -> PinnedSlice {
        cache.pinAgain(frame)
        return PinnedSlice(cache: cache, frame: frame)
    }

    /// Makes pins for others, who take them with `init(adopting:of:)`; each must be taken exactly once.
    func token(for others: Int) -> PinToken {
        cache.pinAgain(frame, others)
        return PinToken(frame: frame)
    }
    init(adopting token: PinToken, of cache: SliceCache) {
        self.init(cache: cache, frame: token.frame)
    }
}

/// A pin on its way from one task to another.
struct PinToken: Sendable {
    fileprivate let frame: UInt32
}

/// A frame being filled. Publish it, or it goes back when this value goes.
public struct SliceSlot: ~Copyable, Sendable {
    private let cache: SliceCache
    /// `.none` once it is published.
    private var frame: UInt32
    public let key: SliceKey

    fileprivate init(cache: SliceCache, key: SliceKey, frame: UInt32) {
        self.cache = cache
        self.key = key
        self.frame = frame
    }
    deinit { if frame != .none { cache.abandon(frame, key) } }

    /// 512 KiB to fill; what they hold before is of no meaning.
    public var pointer: UnsafeMutableRawPointer { cache.bytes(frame) }

    /// Makes the filled frame what `key` finds from now on.
    public consuming func publish() -> PinnedSlice {
        let filled = frame
        frame = .none
        return PinnedSlice(cache: cache, frame: cache.publish(filled, key))
    }
}
