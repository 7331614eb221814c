// One object's file in the scratch cache, and the order in which such files leave.

import Runtime

/// One object's bytes on scratch, all of them or some. Guarded by the lock of `BlockFiles`.
final class BlockFile: @unchecked Sendable {
    enum Queue { case none, small, main }
    let id: ObjectID
    /// Changes once, when the file is complete.
    var path: String
    /// Open, or nil: opened again when needed.
    var file: (any ScratchFile)?
    var isInOpenOrder = false
    var present = ByteRanges()
    /// Length of the whole object, once known.
    var totalBytes: UInt64?
    /// Counted against the budget: present, or being written.
    var chargedBytes: UInt64 = 0
    var queue = Queue.none
    var uses = 0
    /// The clock when a use was counted last.
    var countedAt = 0
    /// Evicted or dropped: whoever still reads or writes it does so in vain.
    var isGone = false

    init(id: ObjectID, path: String) {
        self.id = id
        self.path = path
    }
    var isComplete: Bool { totalBytes.map { present.contains(0..<$0) } ?? false }
}

/// S3-FIFO over files of different lengths, as `SliceShard` has it over frames: see there.
struct BlockFileQueues {
    private var small = Fifo()
    private var main = Fifo()
    private(set) var smallBytes: UInt64 = 0
    private(set) var mainBytes: UInt64 = 0
    private(set) var clock = 0
    private var count = 0
    /// When each of the files dropped from `small` left, and the order for forgetting them.
    private var ghosts: [ObjectID: Int] = [:]
    private var ghostOrder: [ObjectID] = []
    private var ghostHead = 0

    var bytes: UInt64 { smallBytes + mainBytes }

    mutating func add(_ file: BlockFile) {
        clock += 1
        count += 1
        file.countedAt = clock
        if ghosts.removeValue(forKey: file.id) != nil {
            file.queue = .main
            main.push(file) { $0.queue == .main }
        } else {
            file.queue = .small
            small.push(file) { $0.queue == .small }
        }
        charge(file, file.chargedBytes)
    }

    /// Adds bytes of a file that is in a queue; the caller keeps `chargedBytes`.
    mutating func charge(_ file: BlockFile, _ bytes: UInt64) {
        switch file.queue {
        case .none: break
        case .small: smallBytes += bytes
        case .main: mainBytes += bytes
        }
    }
    mutating func uncharge(_ file: BlockFile, _ bytes: UInt64) {
        switch file.queue {
        case .none: break
        case .small: smallBytes -= bytes
        case .main: mainBytes -= bytes
        }
    }

    mutating func use(_ file: BlockFile) {
        if clock - file.countedAt >= max(1, count / 40) {
            file.countedAt = clock
            file.uses = min(3, file.uses + 1)
        }
    }

    /// Takes a file out; its place in the queue is skipped later.
    mutating func remove(_ file: BlockFile) {
        if file.queue == .none { return }
        uncharge(file, file.chargedBytes)
        file.queue = .none
        count -= 1
    }

    /// Takes out the file that should leave, `keep` excepted; nil when there is no other.
    mutating func evict(keeping keep: BlockFile?, budgetBytes: UInt64) -> BlockFile? {
        var keepWaits = false
        defer { if keepWaits, let keep { push(keep) } }
        var smallIsEmpty = false
        var mainIsEmpty = false
        while !smallIsEmpty || !mainIsEmpty {
            if !smallIsEmpty, smallBytes >= budgetBytes / 10 || mainIsEmpty {
                guard let file = small.pop({ $0.queue == .small }) else {
                    smallIsEmpty = true
                    continue
                }
                if file === keep {
                    keepWaits = true
                } else if file.uses > 0 {
                    file.uses = 0
                    uncharge(file, file.chargedBytes)
                    file.queue = .main
                    charge(file, file.chargedBytes)
                    push(file)
                    mainIsEmpty = false
                } else {
                    remember(file.id)
                    remove(file)
                    return file
                }
            } else if !mainIsEmpty {
                guard let file = main.pop({ $0.queue == .main }) else {
                    mainIsEmpty = true
                    continue
                }
                if file === keep {
                    keepWaits = true
                } else if file.uses > 0 {
                    file.uses -= 1
                    push(file)
                } else {
                    remove(file)
                    return file
                }
            } else {
                break
            }
        }
        return nil
    }

    private mutating func push(_ file: BlockFile) {
        switch file.queue {
        case .none: break
        case .small: small.push(file) { $0.queue == .small }
        case .main: main.push(file) { $0.queue == .main }
        }
    }

    private mutating func remember(_ id: ObjectID) {
        ghosts[id] = clock
        ghostOrder.append(id)
        while ghostOrder.count - ghostHead > max(16, 2 * count) {
            ghosts[ghostOrder[ghostHead]] = nil
            ghostHead += 1
        }
        if ghostHead > 64, ghostHead > ghostOrder.count / 2 {
            ghostOrder.removeFirst(ghostHead)
            ghostHead = 0
        }
    }
}

/// A queue of files. Files that left otherwise are skipped when their turn comes, and forgotten before they are most of it.
struct Fifo {
    private var files: [BlockFile?] = []
    private var head = 0
    private var compactAt = Fifo.leastCompacted
    private static let leastCompacted = 512

    /// Files and what is left of those that no longer belong.
    var count: Int { files.count - head }

    mutating func push(_ file: BlockFile, _ belongs: (BlockFile) -> Bool) {
        files.append(file)
        guard count >= compactAt else { return }
        files = files[head...].filter { $0.map(belongs) ?? false }
        head = 0
        compactAt = max(Fifo.leastCompacted, 2 * files.count)
    }

    /// The first file that still `belongs`; files that no longer do are forgotten.
    mutating func pop(_ belongs: (BlockFile) -> Bool) -> BlockFile? {
        defer {
            if head > 64, head > files.count / 2 {
                files.removeFirst(head)
                head = 0
            }
        }
        while head < files.count {
            let file = files[head]
            files[head] = nil
            head += 1
            if let file, belongs(file) { return file }
        }
        return nil
    }
}
