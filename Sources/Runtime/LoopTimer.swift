// The timers of a loop, soonest first. Timers of one deadline run in the order in which they were made.

/// Work that a loop will do later. Owned by its loop.
public final class LoopTimer: @unchecked Sendable {  // owned by its loop's thread
    fileprivate let deadlineNs: UInt64
    fileprivate var sequence: UInt64 = 0
    fileprivate var place = -1
    fileprivate var work: (@Sendable () -> Void)?
    private unowned let loop: Loop

    init(loop: Loop, deadlineNs: UInt64, work: @escaping @Sendable () -> Void) {
        self.loop = loop
        self.deadlineNs = deadlineNs
        self.work = work
    }

    /// The work will not run, unless it already did; what it holds is released. Loop only.
    public func cancel() { loop.cancel(self) }

    fileprivate static func < (a: LoopTimer, b: LoopTimer) -> Bool {
        a.deadlineNs != b.deadlineNs ? a.deadlineNs < b.deadlineNs : a.sequence < b.sequence
    }
}

/// A binary heap whose entries know their place, so that a cancelled timer leaves at once.
struct TimerHeap {
    private var heap: [LoopTimer] = []
    private var nextSequence: UInt64 = 0

    var isEmpty: Bool { heap.isEmpty }
    var nextDeadlineNs: UInt64? { heap.first?.deadlineNs }

    mutating func insert(_ timer: LoopTimer) {
        timer.sequence = nextSequence
        nextSequence += 1
        timer.place = heap.count
        heap.append(timer)
        rise(timer.place)
    }

    mutating func remove(_ timer: LoopTimer) {
        timer.work = nil
        let place = timer.place
        guard place >= 0 else { return }
        timer.place = -1
        let last = heap.removeLast()
        guard last !== timer else { return }
        heap[place] = last
        last.place = place
        rise(place)
        sink(last.place)
    }

    /// Takes out the first timer if it is due, and gives its work.
    mutating func takeDue(now: UInt64) -> (@Sendable () -> Void)? {
        guard let first = heap.first, first.deadlineNs <= now else { return nil }
        let work = first.work
        remove(first)
        return work
    }

    private mutating func rise(_ start: Int) {
        var place = start
        while place > 0, heap[place] < heap[(place - 1) / 2] {
            exchange(place, (place - 1) / 2)
            place = (place - 1) / 2
        }
    }

    private mutating func sink(_ start: Int) {
        var place = start
        while true {
            var least = place
            for child in [2 * place + 1, 2 * place + 2] where child < heap.count && heap[child] < heap[least] {
                least = child
            }
            if least == place { return }
            exchange(place, least)
            place = least
        }
    }

    private mutating func exchange(_ a: Int, _ b: Int) {
        heap.swapAt(a, b)
        heap[a].place = a
        heap[b].place = b
    }
}
