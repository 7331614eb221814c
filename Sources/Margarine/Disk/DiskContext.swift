// What a disk needs of the world, in one value: the seams, the loop that owns it, and the settings of its daemon. A
// simulator passes its own.

package import BlockCache
package import Logging
internal import ObjectStore
package import Runtime

/// Bounds and times that all disks of a daemon share. Plain values; see `Settings` for what users may choose.
package struct DiskSettings: Sendable {
    /// A safe point older than this is being committed.
    package var commitIntervalMs: Int64 = 5_000
    /// Longest that a commit waits for the mirrors of a btrfs super block.
    package var mirrorsWithinMs: Int64 = 100
    /// Longest that a flush's safe point waits for the btrfs super block that takes its place.
    package var superBlockWithinMs: Int64 = 500
    /// This much waiting data is committed without waiting for the interval. Bytes.
    package var commitBytes: Int = 256 << 20
    /// Most bytes in the journal of one disk. Writers wait where it is reached.
    package var journalLimitBytes: UInt64 = 8 << 30
    /// A new file of a journal begins once one is this long, or sooner where the limit is small.
    package var journalSegmentBytes = JournalFormat.segmentBytes
    /// A read that can't be done by then fails with EIO: less than the client's own patience. Writes wait.
    package var requestTimeoutMs: Int64 = 25_000
    /// Blocks that one disk's committer works on at a time.
    package var uploadParallelism = 4
    /// A disk that nobody uses is given back to the store after this.
    package var releaseAfterMs: Int64 = 30_000
    /// Where connections of one named session may come from.
    package var sessionAddresses = SessionAddresses.one
    /// A rule to break, for tests of the tests.
    package var fault: Fault?
    package init() {}
}

/// Shared by the disks of one loop. Everything here may be used on that loop only, unless it is Sendable by itself.
package final class DiskContext: @unchecked Sendable {
    package let loop: Loop
    /// Loops cost a thread: they start with their first disk. Under the manager's lock.
    var isStarted = false
    package let environment: any Environment
    package let scratch: any ScratchDisk
    package let locations: Locations
    package let loader: BlockLoader
    package let manifests: ManifestCache
    package let arena: FrameArena
    package let journals: JournalBudget
    package let log: Logger
    package var settings: DiskSettings
    /// Much was freed since memory was last given back.
    var heapHasShrunk = false
    private var willGiveBack = false
    /// What is known of the store's grace period: how long a commit may take.
    let grace: GraceGauge
    /// When what was told last, and how often it happened since. On the loop.
    private var problems: [String: (toldAtNs: UInt64, others: Int)] = [:]
    private static let problemPauseNs: UInt64 = 10_000_000_000
    private static let problemKinds = 1024
    /// Writes that wait.
    let rooms: RoomWaits

    package init(
        loop: Loop, environment: any Environment, scratch: any ScratchDisk, locations: Locations, loader: BlockLoader,
        manifests: ManifestCache, arena: FrameArena, journals: JournalBudget, log: Logger,
        settings: DiskSettings, grace: GraceGauge = GraceGauge()
    ) {
        self.loop = loop
        self.environment = environment
        self.scratch = scratch
        self.locations = locations
        self.loader = loader
        self.manifests = manifests
        self.arena = arena
        self.journals = journals
        self.log = log
        self.settings = settings
        self.grace = grace
        rooms = RoomWaits(loop: loop, budget: journals)
    }

    /// Runs `work` as a task on the loop.
    func spawn(_ work: @escaping @Sendable () async -> Void) { loop.run(task: work) }

    /// Runs `work` on the loop after `ns` nanoseconds.
    @discardableResult
    func after(ns: UInt64, _ work: @escaping @Sendable () -> Void) -> LoopTimer { loop.after(ns: ns, work) }

    /// Gives memory that is not used any more back to the system, once there was time to use it again.
    func giveBackLater() {
        loop.assertOwner()
        if willGiveBack { return }
        willGiveBack = true
        after(ns: 5_000_000_000) { [self] in
            willGiveBack = false
            arena.trim()
            if heapHasShrunk {
                heapHasShrunk = false
                spawn { [environment] in await environment.offload { trimHeap() } }
            }
        }
    }

    /// Tells the operator of something that needs a look.
    func problem(_ text: String) { log.error("\(text)") }

    /// The same of what may happen to many requests: of each `kind` a line in `problemPauseNs`, which says how many there
    /// were since the last.
    func problem(_ text: @autoclosure () -> String, kind: String) {
        loop.assertOwner()
        let now = environment.nowNs
        if let last = problems[kind], now &- last.toldAtNs < Self.problemPauseNs {
            problems[kind]?.others += 1
            return
        }
        let others = problems[kind]?.others ?? 0
        if problems.count >= Self.problemKinds { problems = [:] }
        problems[kind] = (now, 0)
        problem(others == 0 ? text() : "\(text()) (and \(others) like it before)")
    }

    /// Brings a slice to memory and runs `body` while it can't leave.
    func withSlice<T>(_ entry: BlockEntry, _ slice: SliceIndex, _ body: (UnsafeRawPointer) -> T)
        async throws(StoreError) -> T
    {
        let pinned = try await loader.load(entry, slice)
        return body(pinned.pointer)
    }

    func makeID() -> ObjectID { ObjectID(high: environment.randomBits(), low: environment.randomBits()) }
}

extension ScratchFile {
    /// Fills `buffer` from `offset`.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) async throws(ScratchError) {
        let error: ScratchError? = await withCheckedContinuation { continuation in
            read(into: buffer, at: offset) { continuation.resume(returning: $0) }
        }
        if let error { throw error }
    }
}
