// Which options may be in force for a disk: somebody changes them in its head, and its server takes them over a while later.

@testable import Margarine

struct PossibleOptions {
    private var now: [DiskOptions]
    /// Those that were possible, until the tick that stands beside them.
    private var gone: [(options: DiskOptions, until: UInt64)] = []
    /// The rule for safe points may become another one at any time.
    var changesRule = false
    /// Nothing is said of flushes under `auto`.
    var leavesAutoOut = false

    init(_ options: DiskOptions) { now = [options] }

    /// The head holds `options` now. With `isAdopted`, its owner has written that, and uses them.
    mutating func stored(_ options: DiskOptions, isAdopted: Bool, at tick: UInt64) {
        if isAdopted {
            for one in now where one != options { gone.append((one, tick)) }
            gone.removeFirst(max(0, gone.count - 32))
            now = [options]
        } else if !now.contains(options) {
            now.append(options)
        }
    }

    /// All that were possible at any time since `tick`.
    func all(since tick: UInt64) -> [DiskOptions] { now + gone.filter { $0.until >= tick }.map(\.options) }

    func shortestWindowMs(since tick: UInt64) -> Int64 { all(since: tick).map(\.resumeWindowMs).min()! }

    /// A flush may make a safe point.
    func mayTakeFlushes(since tick: UInt64) -> Bool {
        changesRule || all(since: tick).contains { $0.safePoints != .btrfs }
    }

    /// A flush makes a safe point for sure, under `auto` as well, whatever stands at 64 KiB.
    func takeFlushes(since tick: UInt64) -> Bool { all(since: tick).allSatisfy { $0.safePoints != .btrfs } }

    /// A super block makes one for sure.
    func takeSuperBlocks(since tick: UInt64) -> Bool { all(since: tick).allSatisfy { $0.safePoints != .flush } }
}
