// Writes that wait for room in memory or in a journal, of the disks of one loop. They are woken, one after the other, when
// there is room for the first of a disk: it takes what it needs and wakes the next. However many wait, they use no CPU.
//
// What may bring room: records that reach a journal (their frames can be taken back), a commit that frees segments, the
// journal of a disk on another loop that gives some, a roll-back, new settings. A look once a second is for what may have
// been forgotten here.

internal import Runtime
internal import Synchronization

/// One write that waits.
struct RoomWaiter {
    var pages: Int
    var continuation: CheckedContinuation<Void, Never>
}

/// The writes of one disk that wait, first come, first served.
struct RoomLine {
    private var waiters: [RoomWaiter?] = []
    private var next = 0

    var isEmpty: Bool { next == waiters.count }
    var count: Int { waiters.count - next }
    var first: RoomWaiter? { isEmpty ? nil : waiters[next] }

    /// `again`: it was woken already, and what it needs was gone: it stays the first.
    mutating func add(_ waiter: RoomWaiter, again: Bool) {
        if !again {
            waiters.append(waiter)
        } else if next > 0 {
            next -= 1
            waiters[next] = waiter
        } else {
            waiters.insert(waiter, at: 0)
        }
    }

    mutating func takeFirst() -> RoomWaiter? {
        guard let waiter = first else { return nil }
        waiters[next] = nil
        next += 1
        if isEmpty {
            waiters = []
            next = 0
        } else if next >= 1024 {
            waiters.removeFirst(next)
            next = 0
        }
        return waiter
    }
}

/// Owned by its loop.
final class RoomWaits: @unchecked Sendable {  // owned by its loop; `isWoken` is atomic
    private let loop: Loop
    private let budget: JournalBudget
    private var disks: [ObjectIdentifier: Disk] = [:]
    private var timer: LoopTimer?
    /// A look is on its way.
    private let isWoken = Atomic<Bool>(false)
    /// Somebody waits; read by other loops.
    private let isNeeded = Atomic<Bool>(false)

    private static let lookNs: UInt64 = 1_000_000_000

    init(loop: Loop, budget: JournalBudget) {
        self.loop = loop
        self.budget = budget
        budget.whenRoomComes { [weak self] in self?.wake() }
    }

    /// A disk's line is not empty any more.
    func add(_ disk: Disk) {
        loop.assertOwner()
        guard disks.updateValue(disk, forKey: ObjectIdentifier(disk)) == nil, disks.count == 1 else { return }
        isNeeded.store(true, ordering: .sequentiallyConsistent)
        budget.loopWaits(true)
        lookLater()
    }

    /// A disk's line is empty.
    func remove(_ disk: Disk) {
        loop.assertOwner()
        guard disks.removeValue(forKey: ObjectIdentifier(disk)) != nil, disks.isEmpty else { return }
        isNeeded.store(false, ordering: .sequentiallyConsistent)
        budget.loopWaits(false)
        timer?.cancel()
        timer = nil
    }

    /// On this loop: there may be room.
    @inline(__always)
    func mayHaveCome() { if !disks.isEmpty { wake() } }

    /// From any thread.
    func wake() {
        guard isNeeded.load(ordering: .sequentiallyConsistent),
            !isWoken.exchange(true, ordering: .sequentiallyConsistent)
        else { return }
        loop.post { [self] in
            isWoken.store(false, ordering: .sequentiallyConsistent)
            for disk in disks.values.sorted(by: { $0.name < $1.name }) { disk.wakeNextForRoom() }
        }
    }

    private func lookLater() {
        timer = loop.after(ns: RoomWaits.lookNs) { [weak self] in
            guard let self, !disks.isEmpty else { return }
            for disk in disks.values.sorted(by: { $0.name < $1.name }) { disk.lookForRoom() }
            lookLater()
        }
    }
}
