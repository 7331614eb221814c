// The journal of one disk on the scratch disk: where dirty data lives until it is committed. Records are queued during a
// turn and appended together; one sync serves all who wait for one.
//
// Always holds:
// - records reach the file in sequence order, and a batch only after the one before it is whole;
// - `syncedSequence` never runs ahead of a completed fdatasync of every segment that holds records up to it;
// - a segment is removed only when the store has everything in it;
// - what the scratch disk lacks for the moment (space, descriptors, memory) is waited for; after any other error nothing is
//   written any more, and whoever wants to go on takes the journal up anew.

internal import BlockCache
internal import Runtime

/// Owned by its disk's loop.
package final class Journal: @unchecked Sendable {
    /// One file. Slots remember its number, and reads keep the file open after it was removed.
    final class Segment: @unchecked Sendable {  // owned by the disk's loop
        let number: UInt32
        /// Its name for ever; 0 until it has a header.
        var id: UInt64 = 0
        let file: any ScratchFile
        let path: String
        var lengthBytes: UInt64
        var lastSequence: UInt64
        var isSynced = false
        init(number: UInt32, file: any ScratchFile, path: String, lengthBytes: UInt64, lastSequence: UInt64) {
            self.number = number
            self.file = file
            self.path = path
            self.lengthBytes = lengthBytes
            self.lastSequence = lastSequence
        }
    }

    struct Operation {
        var kind: JournalFormat.Kind
        var sequence: UInt64
        var a: UInt64
        var b: UInt64
        var slotCount: Int
    }

    /// A batch that the kernel has not taken yet.
    struct Flight {
        var segment: Segment
        var offset: UInt64
        var lengthBytes: UInt64
        var lastSequence: UInt64
        var turn: UInt64
    }

    let folder: String
    let diskID: ObjectID
    let scratch: any ScratchDisk
    let pages: DirtyPages
    let context: DiskContext
    /// Of the attachment; in every new segment.
    let epoch: UInt64

    var segments: [UInt32: Segment] = [:]
    var current: Segment?
    var nextNumber: UInt32
    /// The id of the newest segment, which the next one follows; 0 for none.
    var lastID: UInt64 = 0
    /// Number of the last record queued.
    private(set) var lastSequence: UInt64
    /// Number of the last record the kernel has.
    private(set) var appendedSequence: UInt64
    /// Everything up to here survives power loss.
    var syncedSequence: UInt64
    /// Bytes in all segments; of the daemon's budget.
    var liveBytes: UInt64 = 0 {
        didSet { context.journals.change(from: oldValue, to: liveBytes) }
    }
    /// With what is not in a segment yet: what the limit is held against.
    var heldBytes: UInt64 { liveBytes + (flight?.lengthBytes ?? 0) + UInt64(queuedSlots.count * Geometry.pageBytes) }
    /// Memory that the records take which are not in a segment yet.
    var queuedBytes: Int {
        queued.count * MemoryLayout<Operation>.stride + (queuedSlots.count + (flight == nil ? 0 : flightSlots.count))
            * 4
    }
    /// Set after an error that leaves unknown what is on the disk. Nothing can be written any more.
    private(set) var failure: ScratchError?
    private var isAbandoned = false

    // The batch that the turn is collecting, and the one being appended.
    private(set) var queued: [Operation] = []
    private var queuedSlots: [UInt32] = []
    private var turn: UInt64 = 1
    private(set) var flight: Flight?
    private var flightSlots: [UInt32] = []
    private var header: UnsafeMutableRawBufferPointer = .init(start: nil, count: 0)
    private var pieces: [UnsafeRawBufferPointer] = []
    /// The kernel reads `header` and frames: its completion keeps this journal until then.
    private var isWriting = false
    /// Called once nothing is with the kernel any more.
    private var whenQuiet: [() -> Void] = []
    /// Waits for what the scratch disk lacks.
    private var waits = ScratchWaits()
    /// Records that undo what was acknowledged, or end a session, and are not in the file yet; ascending.
    private var pendingEnds: [UInt64] = []
    private var endWaiters: [(sequence: UInt64, continuation: CheckedContinuation<Void, Never>)] = []

    var syncWaiters: [(sequence: UInt64, done: (ScratchError?) -> Void)] = []
    var isSyncing = false {
        didSet { tellQuiet() }
    }
    var directoryIsSynced = true
    let marker: JournalMarker

    /// A batch that did not complete inline is whole now (or failed).
    var onAppended: (_ turn: UInt64, _ error: ScratchError?) -> Void = { _, _ in }
    /// It has failed, and nothing of it is under way any more: the journal may be taken up anew.
    var onFailed: (ScratchError) -> Void = { _ in }

    init(folder: String, diskID: ObjectID, epoch: UInt64, lastSequence: UInt64, pages: DirtyPages, context: DiskContext)
    {
        self.folder = folder
        self.diskID = diskID
        self.epoch = epoch
        self.pages = pages
        self.context = context
        scratch = context.scratch
        self.lastSequence = lastSequence
        appendedSequence = lastSequence
        syncedSequence = lastSequence
        nextNumber = 1
        marker = JournalMarker(folder: folder, diskID: diskID, epoch: epoch, context: context)
        marker.onQuiet = { [weak self] in self?.tellQuiet() }
    }

    deinit {
        header.deallocate()
        if let trouble = waits.trouble { context.journals.troubles.end(trouble, context) }
        context.journals.change(from: liveBytes, to: 0)
    }

    /// Numbering goes on behind what recovery found.
    func goOn(behind sequence: UInt64) {
        lastSequence = max(lastSequence, sequence)
        appendedSequence = lastSequence
    }

    // MARK: Queueing

    /// Queues pages `first`… whose newest bytes are in `slots`. Returns the record's sequence number.
    @discardableResult
    func write(first: UInt64, slots: some Collection<UInt32>) -> UInt64 {
        queuedSlots.append(contentsOf: slots)
        return queue(.write, first, UInt64(slots.count), slots.count)
    }

    /// Queues "pages `first`..<`first + count` are zeroes".
    @discardableResult
    func zero(first: UInt64, count: UInt64) -> UInt64 { queue(.zero, first, count, 0) }

    @discardableResult
    func mark(_ kind: JournalFormat.Kind, _ a: UInt64 = 0) -> UInt64 {
        let sequence = queue(kind, a, 0, 0)
        if kind == .rollBack || kind == .sessionReplaced { pendingEnds.append(sequence) }
        return sequence
    }

    /// Returns once no record up to `sequence` that undoes something, or ends a session, is missing in the file: a
    /// generation that went past it would hide it from the next recovery. (Other records may be missing. If commits waited
    /// for all of them, a scratch disk full of journals would stay full.)
    func whenEndsAreAppended(upTo sequence: UInt64) async throws(ScratchError) {
        if context.settings.fault == .commitPassesRollBack { return }
        while let first = pendingEnds.first, first <= sequence {
            if let failure { throw failure }
            await withCheckedContinuation { endWaiters.append((first, $0)) }
        }
    }

    /// A record that undoes something, or ends a session, is not in the file yet.
    var isMissingEnds: Bool { !pendingEnds.isEmpty }

    private func wakeEndWaiters() {
        if endWaiters.isEmpty { return }
        let waiters = endWaiters
        endWaiters = []
        for waiter in waiters { waiter.continuation.resume() }
    }

    private func queue(_ kind: JournalFormat.Kind, _ a: UInt64, _ b: UInt64, _ slots: Int) -> UInt64 {
        context.loop.assertOwner()
        lastSequence += 1
        queued.append(Operation(kind: kind, sequence: lastSequence, a: a, b: b, slotCount: slots))
        return lastSequence
    }

    // MARK: Appending

    /// Appends what is queued. `.pending` when the kernel could not take it at once: `onAppended` tells.
    func append() -> TurnEnd {
        context.loop.assertOwner()
        if failure != nil { return .failed(.io) }
        if waits.isWaiting { return .pending(turn: queued.isEmpty ? turn - 1 : turn) }
        if flight != nil, context.settings.fault != .acknowledgedBeforeAppend {
            return queued.isEmpty ? .pending(turn: turn - 1) : .pending(turn: turn)
        }
        while !queued.isEmpty {
            if !begin() { return failure == nil ? .pending(turn: queued.isEmpty ? turn - 1 : turn) : .failed(.io) }
        }
        return .acknowledged
    }

    /// The turn that ended last: all of it is in the file where `append` says `.acknowledged`.
    var lastTurn: UInt64 { turn - 1 }

    /// Builds a batch of up to 32 MiB and hands it to the kernel. true when it is in the file already.
    private func begin() -> Bool {
        let segment: Segment
        do { segment = try writableSegment() } catch {
            stumble(error)
            return false
        }
        var operations = 0
        var slots = 0
        var headerBytes = 0
        var dataBytes = 0
        while operations < queued.count, dataBytes < 32 << 20 {
            let op = queued[operations]
            headerBytes += JournalFormat.recordHeaderBytes + op.slotCount * 4
            dataBytes += op.slotCount * Geometry.pageBytes
            slots += op.slotCount
            operations += 1
        }
        let prefix = segment.lengthBytes == 0 ? JournalFormat.segmentHeaderBytes : 0
        headerBytes += prefix
        build(operations, headerBytes: headerBytes, prefix: prefix, at: segment)
        let whole = operations == queued.count
        let now = Flight(
            segment: segment, offset: segment.lengthBytes, lengthBytes: UInt64(headerBytes + dataBytes),
            lastSequence: queued[operations - 1].sequence, turn: turn)
        flightSlots.removeAll(keepingCapacity: true)
        flightSlots.append(contentsOf: queuedSlots[..<slots])
        queued.removeFirst(operations)
        queuedSlots.removeFirst(slots)
        if whole { turn += 1 }
        flight = now
        return launch()
    }

    /// Lays out headers and pages of the first `operations` queued.
    private func build(_ operations: Int, headerBytes: Int, prefix: Int, at segment: Segment) {
        if header.count < headerBytes {
            header.deallocate()
            header = .allocate(byteCount: max(headerBytes, 4096), alignment: 8)
        }
        pieces.removeAll(keepingCapacity: true)
        if prefix > 0 {
            JournalFormat.putSegmentHeader(
                header.baseAddress!,
                JournalFormat.SegmentHeader(
                    epoch: epoch, number: UInt64(segment.number), firstSequence: queued[0].sequence, id: segment.id,
                    follows: lastID), of: diskID)
            lastID = segment.id
            pieces.append(UnsafeRawBufferPointer(start: header.baseAddress!, count: prefix))
        }
        var at = prefix
        var slot = 0
        var offset = segment.lengthBytes + UInt64(prefix)
        for op in queued[..<operations] {
            let record = header.baseAddress! + at
            let extra = op.slotCount * 4
            let length = JournalFormat.recordHeaderBytes + extra
            pieces.append(UnsafeRawBufferPointer(start: record, count: length))
            offset += UInt64(length)
            for i in 0..<op.slotCount {
                let s = queuedSlots[slot]
                slot += 1
                let bytes = UnsafeRawPointer(pages.arena.pointer(pages[s].frame))
                let sum = JournalFormat.pageSum(bytes)
                pages[s].sum = sum
                pages[s].location = JournalLocation(segment: segment.number, offset: UInt32(offset))
                pages[s].state.insert(.inFlight)
                record.storeBytes(
                    of: sum.littleEndian, toByteOffset: JournalFormat.recordHeaderBytes + i * 4, as: UInt32.self)
                if i > 0, let last = pieces.last, last.baseAddress! + last.count == bytes {
                    pieces[pieces.count - 1] = UnsafeRawBufferPointer(
                        start: last.baseAddress, count: last.count + Geometry.pageBytes)
                } else {
                    pieces.append(UnsafeRawBufferPointer(start: bytes, count: Geometry.pageBytes))
                }
                offset += UInt64(Geometry.pageBytes)
            }
            JournalFormat.putRecordHeader(
                record,
                JournalFormat.Record(
                    kind: op.kind, sequence: op.sequence, a: op.a, b: op.b, synced: syncedSequence, extraBytes: extra,
                    dataBytes: op.slotCount * Geometry.pageBytes), of: diskID)
            at += length
        }
    }

    private func launch() -> Bool {
        guard let now = flight else { preconditionFailure("launch without a batch") }
        do {
            // The completion holds the journal: until then the kernel reads its memory.
            let inline = try pieces.withUnsafeBufferPointer { buffers throws(ScratchError) in
                try now.segment.file.write(buffers, at: now.offset) { [self] error in landed(error) }
            }
            if inline { land() } else { isWriting = true }
            return inline
        } catch {
            stumble(error)
            return false
        }
    }

    private func landed(_ error: ScratchError?) {
        isWriting = false
        tellQuiet()
        if failure != nil { return isAbandoned ? () : tellFailure() }
        if let error { return stumble(error) }
        let turn = land()
        if queued.isEmpty {
            onAppended(turn, nil)
        } else {
            if case .acknowledged = append() { onAppended(self.turn - 1, nil) } else { onAppended(turn, nil) }
        }
        pump()
    }

    /// The batch is in the file. Returns the last turn that is complete.
    @discardableResult
    private func land() -> UInt64 {
        guard let now = flight else { preconditionFailure("landing without a batch") }
        flight = nil
        now.segment.lengthBytes = now.offset + now.lengthBytes
        now.segment.lastSequence = now.lastSequence
        now.segment.isSynced = false
        liveBytes += now.lengthBytes
        appendedSequence = now.lastSequence
        for slot in flightSlots { pages.journaled(slot) }
        if !pendingEnds.isEmpty {
            pendingEnds.removeAll { $0 <= appendedSequence }
            wakeEndWaiters()
        }
        if let trouble = waits.end() { context.journals.troubles.end(trouble, context) }
        context.rooms.mayHaveCome()
        if flightSlots.count > 4096 { flightSlots = [] }
        // A batch cut at 32 MiB is complete only with its rest.
        return now.turn < turn ? now.turn : now.turn - 1
    }

    /// What the scratch disk lacks for the moment is waited for; any other error ends the journal.
    private func stumble(_ error: ScratchError) {
        guard error.isLack else { return fail(error) }
        if waits.trouble != error.errno {
            if let before = waits.trouble { context.journals.troubles.end(before, context) }
            context.journals.troubles.begin(error, context)
        }
        context.after(ns: waits.begin(error)) { [weak self] in self?.retry() }
    }

    private func retry() {
        waits.isWaiting = false
        guard failure == nil else { return }
        if flight == nil || launch() { landedAfterRetry() }
    }

    private func landedAfterRetry() {
        _ = append()
        // Also where the next batch has to wait again: a commit may go past what has landed, and the disk must know of it.
        onAppended((flight?.turn ?? turn) - 1, nil)
        pump()
    }

    /// Ends the journal. Who takes it up anew must not find a write of this one still under way.
    func fail(_ error: ScratchError) {
        guard failure == nil else { return }
        failure = error
        context.problem(
            "journal of \(folder) can't be written: \(error); the disk is closed, and its journal is taken up again as it is, by and by or at the next attach"
        )
        if !isWriting { tellFailure() }
    }

    /// Nothing is written any more, for the disk is not this object's any more: what is queued was never acknowledged. Calls
    /// `done` when no write and no sync is under way any more, of the mark neither: then another object may take the journal up,
    /// and finds in the mark whether a sync has failed.
    func abandon(_ done: @escaping () -> Void = {}) {
        context.loop.assertOwner()
        if failure == nil {
            isAbandoned = true
            failure = ScratchError(errno: 125 /* ECANCELED */, description: "the disk is no longer served here")
            context.loop.post { [self] in tellWaiters() }
        }
        whenQuiet.append(done)
        tellQuiet()
    }

    private func tellQuiet() {
        if isWriting || isSyncing || !marker.isQuiet { return }
        let waiting = whenQuiet
        whenQuiet = []
        for done in waiting { done() }
    }

    /// Never within the call that failed: its caller is a connection's turn, and the disk ends all connections.
    private func tellFailure() {
        context.loop.post { [self] in
            guard let failure else { return }
            onFailed(failure)
            onAppended(.max, failure)
            tellWaiters()
        }
    }

    private func tellWaiters() {
        wakeEndWaiters()
        let waiters = syncWaiters
        syncWaiters = []
        for waiter in waiters { waiter.done(failure) }
    }

    /// Gives back what an idle disk need not hold.
    func freeBuffers() {
        if header.count == 0 { return }
        header.deallocate()
        header = .init(start: nil, count: 0)
        pieces = []
        flightSlots = []
    }
}
