// One attached disk: layers over a committed generation, a journal under them, sessions above. This file holds the state
// and what keeps it together; each aspect (reading, writing, safe points, sessions, committing) has a file beside it.
//
// Always holds:
// - a page's newest bytes are in the view's `active` layer, else `waiting`, else `committing`, else in its generation;
// - at most these three layers exist; frozen ones never change but by merging the next into `waiting`;
// - whatever looks at them looks through `view`, within one synchronous step;
// - nothing is acknowledged before its journal record is appended;
// - once `lost` is set, no request is answered with data and nothing new is sent to the store.

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
    /// Proof that the disk is this server's (Disk+Lease).
    let claim: Claim
    /// Whether there was one when the turn of a connection last began.
    var isProven = true
    var parked = Parked()
    let pages: DirtyPages
    let journal: Journal

    // What the store says, as this server last wrote it.
    var head: Head
    var headTag: ETag
    /// A swap may have been won without our knowing, or may be won yet: another one has to be before the head is relied upon.
    var isHeadUnclear = false
    /// What the head has to say of sessions and wishes.
    var notes = HeadNotes()
    let headTurns = Turns()
    /// Who wait for a look at the head that has not begun.
    var lookWaiters: [CheckedContinuation<Bool, Never>] = []
    /// The committed generation and the layers over it.
    var view: DiskView

    /// The slots of the write that is being applied.
    var slotRun: [UInt32] = []

    // Requests that wait for bytes (RequestLine), block status, and prefetches.
    let coldReads: RequestLine
    let waitingWrites: RequestLine
    private(set) lazy var statuses = StatusQueue(self)
    private(set) lazy var prefetches = Prefetches(self)

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
    /// Cuts that wait for the commit that is under way. No other one begins before them.
    var cutWishes: [CutWish] = []
    /// One was to begin meanwhile.
    var isCommitPutOff = false
    /// Runs while a flush's safe point waits for the super block that takes its place.
    var superBlockTimer: LoopTimer?

    // Sessions (Disk+Sessions).
    /// Who may use the disk; changed by `happen` alone.
    var tenure = Tenure.idle
    /// Who has it: there while `tenure` is reserved, live, away, challenged or overdue, and may be while draining.
    var session: Session? {
        didSet { notes.session = session?.name }
    }
    var clients: [any DeviceClient] = []
    /// Of `away` and `challenged`.
    var windowTimer: LoopTimer?
    /// Of `idle`.
    var restTimer: LoopTimer?
    /// Who asked while something was undecided, while it left, and while the journal did not say what was lost.
    let undecided = AskerLine()
    /// Clients of the session that is away which came back, and have to wait for another one's outcome.
    var returning = 0
    let leaving = AskerLine()
    let appending = AskerLine()
    /// `appending` will be woken.
    var awaitsAppend = false
    var pendingRequests: [ObjectIdentifier: DeviceRequest] = [:]
    /// Numbers requests.
    private var submitted: UInt64 = 0

    // Committing (Disk+Commit).
    var isCommitting = false
    var commitTimer: LoopTimer?
    var commitWaiters: [(sequence: UInt64, done: (DeviceError?) -> Void)] = []
    var appendWaiters: [(turn: UInt64, done: (DeviceError?) -> Void)] = []
    var roomLine = RoomLine()
    /// It has asked for room too often, and will ask again.
    var asksLater = false
    var lastCommitError: String?
    var commitStartedNs: UInt64?

    // Counted for `margined status`.
    var commits: UInt64 = 0
    var safePoints: UInt64 = 0
    var hits: UInt64 = 0
    var misses: UInt64 = 0
    var storeErrors: UInt64 = 0

    /// Opened for the client that is about to be admitted: its head was swapped just now, or he has gone since.
    var isFresh = false
    let openedNs: UInt64
    /// Why this server no longer has the disk.
    var lost: String?
    /// Lost, and the head may name this server still: nobody else can have the disk then.
    var isStillOurs = false
    /// Lost, and its last append has not landed yet.
    var isLeaving = false
    /// Told when the disk is done for here (lost, or released).
    var onGone: (Disk) -> Void = { _ in }

    var finished: [DeviceRequest] = []

    init(
        name: String, head: Head, headTag: ETag, manifest: Manifest, serverID: String, heads: HeadStore,
        context: DiskContext, replayed: ReplayedJournal?, pages: DirtyPages, journal: Journal, claim: Claim
    ) {
        self.claim = claim
        self.name = name
        self.head = head
        self.headTag = headTag
        self.serverID = serverID
        self.heads = heads
        self.context = context
        openedNs = context.environment.nowNs
        self.pages = pages
        self.journal = journal
        view = DiskView(
            manifest: manifest, active: replayed?.active ?? Layer(pages: pages), waiting: replayed?.waiting)
        coldReads = RequestLine(limit: RequestLine.reads, context)
        waitingWrites = RequestLine(limit: RequestLine.writes, context)
        if let replayed, let waiting {
            waiting.kind = replayed.waitingKind
            waiting.frozenAtNs = context.environment.nowNs
        }
        notes.fault = context.settings.fault
        pages.giveRoom = { [weak self] in
            guard let self, lost == nil else { return }
            commitAnyway()
        }
        if head.commitWanted != nil { noteWanted() }
        journal.onAppended = { [weak self] turn, error in self?.appended(turn: turn, error: error) }
        journal.onFailed = { [weak self] error in
            self?.lose("its journal can't be written: \(error)", isStillOurs: true)
        }
    }

    /// Whoever had it last, on whatever thread: what it holds is taken apart on its loop, beside other disks' frames.
    deinit {
        let parts = Unmanaged.passRetained(DiskParts(layers: view.layers, pages: pages, journal: journal))
        nonisolated(unsafe) let handed = parts  // to the loop, and no longer anybody else's
        let loop = context.loop
        if loop.isCurrent {
            loop.post { handed.release() }
        } else {
            loop.post { DiskParts.letGo(handed, loop) }
        }
    }

    package var sizeBytes: UInt64 { head.sizeBytes }
    package var isReadOnly: Bool { false }
    var log: Logger { context.log }
    var nowNs: UInt64 { context.environment.nowNs }
    /// What waits to be committed, and what is held in memory to know of it.
    var dirtyBytes: Int {
        view.layers.reduce(0) { $0 + $1.dataBytes } + pages.overheadBytes + journal.queuedBytes
    }
    /// Nothing is dirty and nothing is under way.
    var isClean: Bool {
        active.isEmpty && waiting == nil && committing == nil && !isCommitting && pendingRequests.isEmpty
    }

    // MARK: Requests

    package func submit(_ request: DeviceRequest) {
        context.loop.assertOwner()
        pendingRequests[ObjectIdentifier(request)] = request
        submitted += 1
        request.deviceState = submitted
        if lost != nil { return finish(request, .shutdown) }
        if !isProven { return park(request) }
        begin(request)
    }

    func begin(_ request: DeviceRequest) {
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
        request.deviceObject = nil
        request.error = error
        finished.append(request)
        if finished.count == 1 { context.loop.post { [self] in deliverFinished() } }
    }

    func deliverFinished() {
        if lost == nil, !proves() { return parkFinished() }
        let done = finished
        finished = []
        for request in done { request.client.completed(request) }
    }

    // MARK: The journal

    package func endTurn(client: any DeviceClient) -> TurnEnd {
        context.loop.assertOwner()
        if lost != nil { return .failed(.shutdown) }
        let end = journal.append()
        // The scratch disk may have kept this thread for longer than the proof of before the turn lasts.
        if case .acknowledged = end, !proves() {
            park(turn: journal.lastTurn)
            return .pending(turn: journal.lastTurn)
        }
        return end
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
        if failure == nil, !proves() {
            park(turn: turn)
        } else {
            for client in clients { client.journaled(turn: turn, error: failure) }
        }
    }

    // MARK: Room

    /// Whether `count` more dirty pages can be taken now.
    func hasRoom(pages count: Int) -> Bool {
        if hold != nil { return false }
        let bytes = UInt64(count * Geometry.pageBytes + 64 * 1024)
        if journal.heldBytes + bytes > context.settings.journalLimitBytes { return false }
        if !context.journals.hasRoom(bytes) { return false }
        if isJournalFilling, waiting == nil, committing == nil { return false }
        if isCrowded { return false }
        return context.arena.ensure(count)
    }

    /// Layers and queues of the loop's disks have used up their part of the dirty memory, or those of this disk its share.
    var isCrowded: Bool {
        context.arena.isCrowded(journal.queuedBytes, holding: pages.overheadBytes)
            && context.settings.fault != .memoryNotBounded
    }

    /// So full that something must be committed, whether a safe point comes or not.
    var isJournalFilling: Bool {
        let limit = context.settings.journalLimitBytes
        // btrfs gets longer to reach its own.
        return journal.liveBytes > (expectsSuperBlocks ? limit / 4 * 3 : limit / 2)
    }

    /// A client that writes and never flushes would wait for ever: everything acknowledged up to an instant is what a power
    /// cut then would leave, and file systems start from that (Docs/Decisions on full journals).
    func commitAnyway() {
        if waiting == nil, committing == nil { markSafePoint(.journalFull) }
        startCommit()
    }

    /// All journals together are at their limit.
    func giveRoom() {
        if lost == nil, journal.liveBytes > 0, journal.liveBytes >= context.journals.shareBytes { commitAnyway() }
    }
}
