// Where each dirty page of one disk is: in a frame, in the journal, or (once appended) in both. A slot is one version of
// one page. Layers hold slot numbers; the journal fills in locations; the arena takes frames back.
//
// Always holds: a slot whose append has not completed keeps its frame; a slot's bytes change only while no append of it
// is under way; a freed slot under way is recycled only after its append completed.

internal import BlockCache

/// A place in the journal: a page's 4 KiB start there.
struct JournalLocation: Hashable {
    var segment: UInt32
    var offset: UInt32
}

/// Owned by its disk's loop.
package final class DirtyPages {
    struct Slot {
        var frame: FrameIndex
        var location: JournalLocation
        /// Low half of the XXH3 of the page, as in its journal record.
        var sum: UInt32
        var state: State
    }
    struct State: OptionSet {
        var rawValue: UInt32
        /// Waits to be appended to the journal, or its append is under way: the frame is the only copy.
        static let unjournaled = State(rawValue: 1)
        /// Its append is under way: the bytes must not change.
        static let inFlight = State(rawValue: 2)
        /// Freed while unjournaled; recycled when its append is over.
        static let dead = State(rawValue: 4)
        /// On the free list.
        static let free = State(rawValue: 8)
    }

    let arena: FrameArena
    /// Slots come in segments, which are given back once none of their slots is used.
    private struct Segment {
        /// nil: given back.
        var slots: UnsafeMutablePointer<Slot>?
        /// The first free slot that was used before; the next one is named in its `location`.
        var freeHead = UInt32.max
        /// Slots that were ever used since it was allocated.
        var touched = 0
        var used = 0
        /// In `available`.
        var isListed = false
    }
    private static let segmentBits = 9
    private static let segmentSlots = 1 << segmentBits
    /// With its share of the three arrays.
    private static let segmentBytes = heapBytes(segmentSlots * MemoryLayout<Slot>.stride) + 64
    private var segments: UnsafeMutablePointer<Segment>
    private var segmentCount = 0
    private var segmentCapacity = 0
    /// Segments with free slots, the one to use last; among them such as were filled or given back since.
    private var available: [Int] = []
    /// Segments that were given back.
    private var vacant: [Int] = []
    /// Slots that layers hold.
    private(set) var count = 0

    /// What is held in memory for this disk besides the frames: slots, and the tables of its layers.
    private(set) var overheadBytes = 0
    /// Where the arena keeps it among those that hold anything; -1: not there.
    var holderIndex = -1
    /// The arena has no room for more of it, and this disk holds a good part: it is to commit.
    var giveRoom: () -> Void = {}

    init(arena: FrameArena) {
        self.arena = arena
        segments = .allocate(capacity: 0)
    }

    deinit {
        for number in 0..<segmentCount {
            guard let slots = segments[number].slots else { continue }
            for i in 0..<segments[number].touched where slots[i].frame != .none { arena.give(slots[i].frame) }
            slots.deallocate()
        }
        segments.deallocate()
        arena.charge(-overheadBytes, to: self, holding: 0)
    }

    @inline(__always)
    private func place(_ slot: UInt32) -> UnsafeMutablePointer<Slot> {
        segments[Int(slot) >> DirtyPages.segmentBits].slots.unsafelyUnwrapped
            + Int(slot) & (DirtyPages.segmentSlots - 1)
    }

    subscript(slot: UInt32) -> Slot {
        @inline(__always) get { place(slot).pointee }
        @inline(__always) _modify { yield &place(slot).pointee }
    }

    /// `bytes` more (or less) are held for this disk's layers.
    func charge(_ bytes: Int) {
        overheadBytes += bytes
        arena.charge(bytes, to: self, holding: overheadBytes)
    }

    /// A new slot with a frame, unjournaled. The arena's `ensure` said there is one.
    func make() -> UInt32 {
        let slot = nextSlot()
        place(slot).pointee = Slot(
            frame: arena.take(for: slot, of: self), location: JournalLocation(segment: 0, offset: 0), sum: 0,
            state: .unjournaled)
        count += 1
        return slot
    }

    /// A slot for a page found in the journal at start; no frame.
    func recover(at location: JournalLocation, sum: UInt32) -> UInt32 {
        let slot = nextSlot()
        place(slot).pointee = Slot(frame: .none, location: location, sum: sum, state: [])
        count += 1
        return slot
    }

    /// The page's bytes, if in memory.
    @inline(__always)
    func bytes(_ slot: UInt32) -> UnsafeMutableRawPointer? {
        let frame = place(slot).pointee.frame
        return frame == .none ? nil : arena.pointer(frame)
    }

    /// A layer no longer holds the slot.
    func free(_ slot: UInt32) {
        count -= 1
        if place(slot).pointee.state.contains(.unjournaled) {
            place(slot).pointee.state.insert(.dead)
        } else {
            recycle(slot)
        }
    }

    /// The append of the slot's page is complete.
    func journaled(_ slot: UInt32) {
        place(slot).pointee.state.subtract([.unjournaled, .inFlight])
        if place(slot).pointee.state.contains(.dead) { recycle(slot) }
    }

    /// Called by the arena: lets go of the frame if the journal has the page.
    func forget(_ slot: UInt32) -> Bool {
        guard place(slot).pointee.state.isEmpty else { return false }
        place(slot).pointee.frame = .none
        return true
    }

    /// Takes back a slot from `make` that neither a layer nor the journal was given.
    func discard(_ slot: UInt32) {
        count -= 1
        recycle(slot)
    }

    private func recycle(_ slot: UInt32) {
        let place = place(slot)
        if place.pointee.frame != .none { arena.give(place.pointee.frame) }
        let number = Int(slot) >> DirtyPages.segmentBits
        place.pointee = Slot(
            frame: .none, location: JournalLocation(segment: segments[number].freeHead, offset: 0), sum: 0,
            state: .free)
        segments[number].freeHead = slot
        segments[number].used -= 1
        if segments[number].used == 0 { return giveBack(number) }
        if !segments[number].isListed {
            segments[number].isListed = true
            available.append(number)
        }
    }

    /// None of its slots is used.
    private func giveBack(_ number: Int) {
        segments[number].slots!.deallocate()
        if vacant.count == segmentCount - 1 {
            // The last one.
            segmentCount = 0
            resizeSegments(0)
            available = []
            vacant = []
        } else {
            // Where it is listed it is skipped.
            segments[number] = Segment(slots: nil, isListed: segments[number].isListed)
            vacant.append(number)
        }
        charge(-DirtyPages.segmentBytes)
    }

    private func resizeSegments(_ capacity: Int) {
        let old = segments
        segments = .allocate(capacity: capacity)
        segments.update(from: old, count: segmentCount)
        segmentCapacity = capacity
        old.deallocate()
    }

    private func nextSlot() -> UInt32 {
        let number = segmentWithRoom()
        let segment = segments + number
        segment.pointee.used += 1
        let slot = segment.pointee.freeHead
        if slot != .max {
            segment.pointee.freeHead = place(slot).pointee.location.segment
            return slot
        }
        segment.pointee.touched += 1
        return UInt32(number << DirtyPages.segmentBits + segment.pointee.touched - 1)
    }

    private func segmentWithRoom() -> Int {
        while let number = available.last {
            if segments[number].slots != nil, segments[number].used < DirtyPages.segmentSlots { return number }
            segments[number].isListed = false
            available.removeLast()
        }
        let number: Int
        if let vacant = vacant.popLast() {
            number = vacant
        } else {
            number = segmentCount
            if segmentCount == segmentCapacity { resizeSegments(max(4, segmentCapacity * 2)) }
            segmentCount += 1
        }
        segments[number] = Segment(slots: .allocate(capacity: DirtyPages.segmentSlots), isListed: true)
        available.append(number)
        charge(DirtyPages.segmentBytes)
        return number
    }
}
