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
    private var slots: UnsafeMutablePointer<Slot>
    private var capacity = 0
    private var used = 0
    private var freeHead = UInt32.max
    /// Slots that layers hold.
    private(set) var count = 0

    init(arena: FrameArena) {
        self.arena = arena
        slots = .allocate(capacity: 0)
    }

    deinit {
        for i in 0..<used where slots[i].frame != .none { arena.give(slots[i].frame) }
        slots.deallocate()
    }

    subscript(slot: UInt32) -> Slot {
        @inline(__always) get { slots[Int(slot)] }
        @inline(__always) _modify { yield &slots[Int(slot)] }
    }

    /// A new slot with a frame, unjournaled. The arena's `ensure` said there is one.
    func make() -> UInt32 {
        let slot = nextSlot()
        slots[Int(slot)] = Slot(
            frame: arena.take(for: slot, of: self), location: JournalLocation(segment: 0, offset: 0), sum: 0,
            state: .unjournaled)
        count += 1
        return slot
    }

    /// A slot for a page found in the journal at start; no frame.
    func recover(at location: JournalLocation, sum: UInt32) -> UInt32 {
        let slot = nextSlot()
        slots[Int(slot)] = Slot(frame: .none, location: location, sum: sum, state: [])
        count += 1
        return slot
    }

    /// The page's bytes, if in memory.
    @inline(__always)
    func bytes(_ slot: UInt32) -> UnsafeMutableRawPointer? {
        let s = slots[Int(slot)]
        return s.frame == .none ? nil : arena.pointer(s.frame)
    }

    /// A layer no longer holds the slot.
    func free(_ slot: UInt32) {
        count -= 1
        if slots[Int(slot)].state.contains(.unjournaled) {
            slots[Int(slot)].state.insert(.dead)
        } else {
            recycle(slot)
        }
    }

    /// The append of the slot's page is complete.
    func journaled(_ slot: UInt32) {
        slots[Int(slot)].state.subtract([.unjournaled, .inFlight])
        if slots[Int(slot)].state.contains(.dead) { recycle(slot) }
    }

    /// Called by the arena: lets go of the frame if the journal has the page.
    func forget(_ slot: UInt32) -> Bool {
        guard slots[Int(slot)].state.isEmpty else { return false }
        slots[Int(slot)].frame = .none
        return true
    }

    /// Takes back a slot from `make` that neither a layer nor the journal was given.
    func discard(_ slot: UInt32) {
        count -= 1
        recycle(slot)
    }

    private func recycle(_ slot: UInt32) {
        let s = slots[Int(slot)]
        if s.frame != .none { arena.give(s.frame) }
        slots[Int(slot)] = Slot(
            frame: .none, location: JournalLocation(segment: freeHead, offset: 0), sum: 0, state: .free)
        freeHead = slot
    }

    private func nextSlot() -> UInt32 {
        if freeHead != .max {
            let slot = freeHead
            freeHead = slots[Int(slot)].location.segment
            return slot
        }
        if used == capacity {
            let larger = max(64, capacity * 2)
            let moved = UnsafeMutablePointer<Slot>.allocate(capacity: larger)
            moved.moveInitialize(from: slots, count: used)
            slots.deallocate()
            slots = moved
            capacity = larger
        }
        used += 1
        return UInt32(used - 1)
    }
}
