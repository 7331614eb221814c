// The bytes that the journals of all disks take together on the scratch disk. Where they reach the limit, the largest ones
// commit, whether their own limit is near or not: so a disk that nobody writes to can't starve the others.

internal import Synchronization

/// One for a daemon; used from any loop.
package final class JournalBudget: Sendable {
    package let limitBytes: UInt64
    private let heldBytes = Atomic<UInt64>(0)
    /// Journals that hold anything.
    private let holders = Atomic<Int>(0)
    private let lastAskedNs = Atomic<UInt64>(0)
    private let ask = Mutex<@Sendable () -> Void>({})
    /// Loops on which writers wait for room.
    private let waitingLoops = Atomic<Int>(0)
    private let wakers = Mutex<[@Sendable () -> Void]>([])
    let troubles = ScratchTroubles()

    package init(limitBytes: UInt64) { self.limitBytes = limitBytes }

    package var usedBytes: UInt64 { heldBytes.load(ordering: .relaxed) }

    /// Called when there is no room: every disk is to see whether it should give some.
    package func whenAsked(_ body: @escaping @Sendable () -> Void) { ask.withLock { $0 = body } }

    /// A journal that held `old` bytes holds `new` ones now.
    func change(from old: UInt64, to new: UInt64) {
        if new >= old {
            heldBytes.add(new - old, ordering: .relaxed)
        } else {
            heldBytes.subtract(old - new, ordering: .sequentiallyConsistent)
        }
        if old == 0, new > 0 { holders.add(1, ordering: .relaxed) }
        if old > 0, new == 0 { holders.subtract(1, ordering: .relaxed) }
        if new < old, waitingLoops.load(ordering: .sequentiallyConsistent) > 0 {
            for wake in wakers.withLock({ $0 }) { wake() }
        }
    }

    /// Calls `wake`, from any thread, when bytes have become free while writers wait anywhere.
    func whenRoomComes(_ wake: @escaping @Sendable () -> Void) { wakers.withLock { $0.append(wake) } }

    /// Writers of one more loop wait (or of one less). Whoever begins to wait looks for room once more after this.
    func loopWaits(_ waits: Bool) {
        if waits {
            waitingLoops.add(1, ordering: .sequentiallyConsistent)
        } else {
            waitingLoops.subtract(1, ordering: .sequentiallyConsistent)
        }
    }

    func hasRoom(_ bytes: UInt64) -> Bool {
        heldBytes.load(ordering: .sequentiallyConsistent) + bytes <= limitBytes
    }

    /// Safe points are committed without waiting for their interval.
    var isFilling: Bool { usedBytes > limitBytes / 2 }

    /// At the limit, whoever holds this much has to give: the largest journal always does.
    var shareBytes: UInt64 { usedBytes / UInt64(max(1, holders.load(ordering: .relaxed))) }

    /// How often all disks are told at most.
    static let askPauseNs: UInt64 = 20_000_000

    /// A writer found no room: tells all disks. false: they were told just now; ask again after `askPauseNs`.
    func askForRoom(nowNs: UInt64) -> Bool {
        let last = lastAskedNs.load(ordering: .relaxed)
        guard nowNs >= last + JournalBudget.askPauseNs,
            lastAskedNs.compareExchange(expected: last, desired: nowNs, ordering: .relaxed).exchanged
        else { return false }
        let body = ask.withLock { $0 }
        body()
        return true
    }
}
