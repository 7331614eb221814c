// One attached disk: layers over a committed generation, a journal under them, sessions above. This file holds the state
// and what keeps it together; each aspect (reading, writing, safe points, sessions, committing) has a file beside it.
//
// Always holds:
// - a page's newest bytes are in `active`, else `waiting`, else `committing`, else in `manifest`'s generation;
// - at most these three layers exist; frozen ones never change but by merging the next into `waiting`;
// - nothing is acknowledged before its journal record is appended;
// - once `lost` is set, no request is answered with data and nothing is written to the store.

internal import BlockCache
internal import Logging
internal import ObjectStore
internal import Runtime

/// Owned by its context's loop: every method is called there.
package final class Disk: BlockDevice, @unchecked Sendable {
    package let name: String
    let context: DiskContext
    let heads: HeadStore
    let serverID: String
    let pages: DirtyPages
    let journal: Journal

    // What the store says, as this server last wrote it.
    var head: Head
    var headTag: ETag
    var manifest: Manifest

    /// The slots of the write that is being applied.
    var slotRun: [UInt32] = []

    var active: Layer
    var waiting: Layer?
    var committing: Layer?

    // Safe points (Disk+SafePoints).
    var superBlocks = SuperBlockWatch(isFlushed: true)
    var lastSafePointNs: UInt64?
    /// When a full commit of btrfs last began to become a generation.
    var lastFullNs: UInt64 = 0
    /// Runs while commits wait for the mirrors of the last super block.
    var mirrorTimer: LoopTimer?
    /// What that wait holds up.
    var heldCommit = HeldCommit()
    /// Writes wait for its end (Disk+Cut).
    var hold: DiskHold?
    /// Runs while a flush's safe point waits for the super block that takes its place.
    var superBlockTimer: LoopTimer?

    // Sessions (Disk+Sessions).
    var session: Session?
    var clients: [any DeviceClient] = []
    var windowTimer: LoopTimer?
    var lostSessions: [String] = []
    /// Those among them whose roll-back is not in the journal yet. The head must not know of it before: a restart would find
    /// the session lost and its writes still there.
    var unjournaledLosses: Set<String> = []
    var pendingRequests: [ObjectIdentifier: DeviceRequest] = [:]

    // Committing (Disk+Commit).
    var isCommitting = false
    var commitTimer: LoopTimer?
    var commitWaiters: [(sequence: UInt64, done: (DeviceError?) -> Void)] = []
    var appendWaiters: [(turn: UInt64, done: (DeviceError?) -> Void)] = []
    var roomWaiters: [CheckedContinuation<Void, Never>] = []
    var lastCommitError: String?
    var commitStartedNs: UInt64?
    /// Head changes that have to reach the store though no data waits (session names).
    var headIsStale = false
    /// What must be committed before somebody's wish (`Head.commitWanted`) is fulfilled, by journal sequence.
    var wantedSequence: UInt64 = 0
    var isSwapping = false
    var swapWaiters: [CheckedContinuation<Void, Never>] = []
    var isReleasing = false
    /// Given back to the store; whoever wants it opens it again.
    var wasReleased = false

    // Counted for `margined status`.
    var commits: UInt64 = 0
    var safePoints: UInt64 = 0
    var hits: UInt64 = 0
    var misses: UInt64 = 0
    var storeErrors: UInt64 = 0

    /// The last session, once it has ended; see `endSession`.
    var ended: Ended?
    /// Opened for the client that is about to be admitted: its head was swapped just now.
    var isFresh = false
    /// Why this server no longer has the disk.
    var lost: String?
    var isDraining = false
    /// Told when the disk is done for here (lost, or released).
    var onGone: (Disk) -> Void = { _ in }

    var finished: [DeviceRequest] = []

    init(
        name: String, head: Head, headTag: ETag, manifest: Manifest, serverID: String, heads: HeadStore,
        context: DiskContext, replayed: ReplayedJournal?, pages: DirtyPages, journal: Journal
    ) {
        self.name = name
        self.head = head
        self.headTag = headTag
        self.manifest = manifest
        self.serverID = serverID
        self.heads = heads
        self.context = context
        self.pages = pages
        self.journal = journal
        active = replayed?.active ?? Layer(pages: pages)
        waiting = replayed?.waiting
        if let replayed, let waiting {
            waiting.kind = replayed.waitingKind
            waiting.frozenAtNs = context.environment.nowNs
        }
        lostSessions = head.lostSessions
        if head.commitWanted != nil { noteWanted() }
        journal.onAppended = { [weak self] turn, error in self?.appended(turn: turn, error: error) }
    }

    package var sizeBytes: UInt64 { head.sizeBytes }
    package var isReadOnly: Bool { false }
    var log: Logger { context.log }
    var nowNs: UInt64 { context.environment.nowNs }
    /// The layers that may hold a page, newest first.
    var dirtyBytes: Int { active.dataBytes + (waiting?.dataBytes ?? 0) + (committing?.dataBytes ?? 0) }
    /// Nothing is dirty and nothing is under way.
    var isClean: Bool {
        active.isEmpty && waiting == nil && committing == nil && !isCommitting && pendingRequests.isEmpty
    }

    // MARK: Requests

    package func submit(_ request: DeviceRequest) {
        pendingRequests[ObjectIdentifier(request)] = request
        if lost != nil { return finish(request, .shutdown) }
        switch request.kind {
        case .read: submitRead(request)
        case .write: submitWrite(request)
        case .trim, .writeZeroes: submitZero(request)
        case .flush: submitFlush(request)
        case .cache: submitCache(request)
        case .blockStatus: submitBlockStatus(request)
        }
    }

    /// Ends a request. The client hears of it after the current call has returned.
    func finish(_ request: DeviceRequest, _ error: DeviceError?) {
        pendingRequests[ObjectIdentifier(request)] = nil
        request.error = error
        finished.append(request)
        if finished.count == 1 { context.loop.post { [self] in deliverFinished() } }
    }

    private func deliverFinished() {
        let done = finished
        finished = []
        for request in done { request.client.completed(request) }
    }

    // MARK: The journal

    package func endTurn(client: any DeviceClient) -> TurnEnd {
        lost == nil ? journal.append() : .failed(.shutdown)
    }

    /// Calls `done` once everything queued so far is in the journal: at once, or later.
    func whenAppended(_ done: @escaping (DeviceError?) -> Void) {
        switch journal.append() {
        case .acknowledged: done(nil)
        case .pending(let turn): appendWaiters.append((turn, done))
        case .failed(let error): done(error)
        }
    }

    private func appended(turn: UInt64, error: ScratchError?) {
        let failure: DeviceError? = error == nil ? nil : .io
        var ready: [(DeviceError?) -> Void] = []
        appendWaiters.removeAll { waiter in
            if waiter.turn <= turn { ready.append(waiter.done) }
            return waiter.turn <= turn
        }
        for done in ready { done(failure) }
        for client in clients { client.journaled(turn: turn, error: failure) }
        wakeRoomWaiters()
    }

    // MARK: Room

    /// Whether `count` more dirty pages can be taken now.
    func hasRoom(pages count: Int) -> Bool {
        if hold != nil { return false }
        let bytes = UInt64(count * Geometry.pageBytes + 64 * 1024)
        if journal.heldBytes + bytes > context.settings.journalLimitBytes { return false }
        if !context.journals.hasRoom(bytes) { return false }
        if isJournalFilling, waiting == nil, committing == nil { return false }
        return context.arena.ensure(count)
    }

    /// So full that something must be committed, whether a safe point comes or not.
    private var isJournalFilling: Bool {
        let limit = context.settings.journalLimitBytes
        // btrfs gets longer to reach its own.
        return journal.liveBytes > (expectsSuperBlocks ? limit / 4 * 3 : limit / 2)
    }

    /// Waits until trying again makes sense.
    func waitForRoom(pages count: Int) async {
        if hold != nil { return await withCheckedContinuation { roomWaiters.append($0) } }
        if isJournalFilling { commitAnyway() }
        let bytes = UInt64(count * Geometry.pageBytes + 64 * 1024)
        if !context.journals.hasRoom(bytes) { context.journals.askForRoom(nowNs: nowNs) }
        if journal.heldBytes + bytes > context.settings.journalLimitBytes, waiting != nil || committing != nil {
            return await withCheckedContinuation { roomWaiters.append($0) }
        }
        await context.environment.sleep(ns: 1_000_000)
    }

    /// A client that writes and never flushes would wait for ever: everything acknowledged up to an instant is what a power
    /// cut then would leave, and file systems start from that (Docs/Decisions on full journals).
    private func commitAnyway() {
        if waiting == nil, committing == nil { markSafePoint(.journalFull) }
        startCommit()
    }

    /// All journals together are at their limit.
    func giveRoom() {
        if lost == nil, journal.liveBytes > 0, journal.liveBytes >= context.journals.shareBytes { commitAnyway() }
    }

    func wakeRoomWaiters() {
        let waiters = roomWaiters
        roomWaiters = []
        for waiter in waiters { waiter.resume() }
    }

    // MARK: The end

    /// Another server has the disk (or it was deleted): stop serving it at once.
    func lose(_ reason: String) {
        guard lost == nil else { return }
        lost = reason
        log.error("disk \(name): \(reason); it is no longer served here")
        windowTimer?.cancel()
        commitTimer?.cancel()
        for request in Array(pendingRequests.values) { request.isCancelled = true }
        for client in clients { client.disconnect(reason: reason) }
        let waiters = commitWaiters
        commitWaiters = []
        for waiter in waiters { waiter.done(.shutdown) }
        let appends = appendWaiters
        appendWaiters = []
        for waiter in appends { waiter.done(.shutdown) }
        wakeRoomWaiters()
        onGone(self)
    }
}
