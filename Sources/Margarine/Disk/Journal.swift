// The journal of one disk on the scratch disk: where dirty data lives until it is committed. Records are queued during a
// turn and appended together; one sync serves all who wait for one.
//
// Always holds:
// - records reach the file in sequence order, and a batch only after the one before it is whole;
// - `syncedSequence` never runs ahead of a completed fdatasync of every segment that holds records up to it;
// - a segment is removed only when the store has everything in it.

internal import BlockCache
package import Runtime

/// Owned by its disk's loop.
package final class Journal: @unchecked Sendable {
    /// One file. Slots remember its number, and reads keep the file open after it was removed.
    final class Segment: @unchecked Sendable {  // owned by the disk's loop
        let number: UInt32
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

    private struct Operation {
        var kind: JournalFormat.Kind
        var sequence: UInt64
        var a: UInt64
        var b: UInt64
        var slotCount: Int
    }

    /// A batch that the kernel has not taken yet.
    private struct Flight {
        var segment: Segment
        var offset: UInt64
        var lengthBytes: UInt64
        var lastSequence: UInt64
        var turn: UInt64
    }

    let folder: String
    private let diskID: ObjectID
    private let scratch: any ScratchDisk
    private let pages: DirtyPages
    private let context: DiskContext
    /// Of the attachment; in every new segment.
    var epoch: UInt64

    private(set) var segments: [UInt32: Segment] = [:]
    private var current: Segment?
    private var nextNumber: UInt32
    /// Number of the last record queued.
    private(set) var lastSequence: UInt64
    /// Number of the last record the kernel has.
    private(set) var appendedSequence: UInt64
    /// Everything up to here survives power loss.
    private(set) var syncedSequence: UInt64
    /// Bytes in all segments; of the daemon's budget.
    private(set) var liveBytes: UInt64 = 0 {
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

    // The batch that the turn is collecting, and the one being appended.
    private var queued: [Operation] = []
    private var queuedSlots: [UInt32] = []
    private var turn: UInt64 = 1
    private var flight: Flight?
    private var flightSlots: [UInt32] = []
    private var header: UnsafeMutableRawBufferPointer = .init(start: nil, count: 0)
    private var pieces: [UnsafeRawBufferPointer] = []

    private var syncWaiters: [(sequence: UInt64, done: (ScratchError?) -> Void)] = []
    private var isSyncing = false
    private var directoryIsSynced = true

    /// A batch that did not complete inline is whole now (or failed).
    var onAppended: (_ turn: UInt64, _ error: ScratchError?) -> Void = { _, _ in }

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
    }

    deinit {
        header.deallocate()
        context.journals.change(from: liveBytes, to: 0)
    }

    /// Takes over what recovery found: the segments, and where numbering goes on.
    func adopt(_ found: [Segment], lastSequence: UInt64) {
        for segment in found {
            segments[segment.number] = segment
            liveBytes += segment.lengthBytes
            nextNumber = max(nextNumber, segment.number + 1)
        }
        self.lastSequence = max(self.lastSequence, lastSequence)
        appendedSequence = self.lastSequence
        // What was found may still be in the page cache only: the next sync covers it.
        syncedSequence = 0
        directoryIsSynced = false
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
    func mark(_ kind: JournalFormat.Kind, _ a: UInt64 = 0) -> UInt64 { queue(kind, a, 0, 0) }

    private func queue(_ kind: JournalFormat.Kind, _ a: UInt64, _ b: UInt64, _ slots: Int) -> UInt64 {
        lastSequence += 1
        queued.append(Operation(kind: kind, sequence: lastSequence, a: a, b: b, slotCount: slots))
        return lastSequence
    }

    // MARK: Appending

    /// Appends what is queued. `.pending` when the kernel could not take it at once: `onAppended` tells.
    func append() -> TurnEnd {
        if failure != nil { return .failed(.io) }
        if flight != nil, context.settings.fault != .acknowledgedBeforeAppend {
            return queued.isEmpty ? .pending(turn: turn - 1) : .pending(turn: turn)
        }
        while !queued.isEmpty {
            if !begin() { return failure == nil ? .pending(turn: queued.isEmpty ? turn - 1 : turn) : .failed(.io) }
        }
        return .acknowledged
    }

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
                header.baseAddress!, disk: diskID, epoch: epoch, number: UInt64(segment.number),
                firstSequence: queued[0].sequence)
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
            let inline = try pieces.withUnsafeBufferPointer { buffers throws(ScratchError) in
                try now.segment.file.write(buffers, at: now.offset) { [weak self] error in self?.landed(error) }
            }
            if inline { land() }
            return inline
        } catch {
            stumble(error)
            return false
        }
    }

    private func landed(_ error: ScratchError?) {
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
        if flightSlots.count > 4096 { flightSlots = [] }
        // A batch cut at 32 MiB is complete only with its rest.
        return now.turn < turn ? now.turn : now.turn - 1
    }

    /// A full scratch disk is waited out; any other error ends the journal.
    private func stumble(_ error: ScratchError) {
        if error.isNoSpace {
            context.problem("journal of \(folder): \(error); writers wait until there is space again")
            context.after(ns: 500_000_000) { [weak self] in self?.retry() }
        } else {
            fail(error)
        }
    }

    private func retry() {
        guard failure == nil else { return }
        if flight != nil {
            if launch() { landedAfterRetry() }
        } else if case .acknowledged = append() {
            landedAfterRetry()
        }
    }

    private func landedAfterRetry() {
        if case .acknowledged = append() { onAppended(turn - 1, nil) }
        pump()
    }

    private func fail(_ error: ScratchError) {
        failure = error
        context.problem(
            "journal of \(folder) can't be written: \(error); the disk takes no more writes until it is attached anew")
        onAppended(.max, error)
        let waiters = syncWaiters
        syncWaiters = []
        for waiter in waiters { waiter.done(error) }
    }

    // MARK: Segments

    private func writableSegment() throws(ScratchError) -> Segment {
        if let current, current.lengthBytes < segmentBytes { return current }
        let number = nextNumber
        let path = Journal.path(folder, number)
        let file = try scratch.open(path, create: true)
        try file.truncate(to: 0)
        // The header goes in front of the first batch, in the same write.
        let segment = Segment(number: number, file: file, path: path, lengthBytes: 0, lastSequence: appendedSequence)
        nextNumber += 1
        segments[number] = segment
        current = segment
        directoryIsSynced = false
        return segment
    }

    static func path(_ folder: String, _ number: UInt32) -> String {
        let digits = String(number)
        return folder + "/" + String(repeating: "0", count: 10 - digits.count) + digits + ".journal"
    }

    /// A new segment begins once one is this long: a share of the limit, so that commits free something of a small one.
    private var segmentBytes: UInt64 {
        min(UInt64(JournalFormat.segmentBytes), max(context.settings.journalLimitBytes / 16, 1 << 20))
    }

    /// At a safe point of a journal that is filling up, the next record begins a new segment: the old one can go as soon as
    /// the safe point is committed.
    func rotateIfFilling() {
        guard flight == nil, liveBytes > context.settings.journalLimitBytes / 4 || context.journals.isFilling else {
            return
        }
        current = nil
    }

    /// The store has everything up to `sequence`: removes the segments that hold nothing else.
    func release(upTo sequence: UInt64) {
        if let current, current.lastSequence <= sequence, flight == nil, current.lengthBytes > 1 << 20 || queued.isEmpty
        {
            self.current = nil
        }
        for segment in segments.values
        where segment.lastSequence <= sequence && segment !== current && segment !== flight?.segment {
            segments[segment.number] = nil
            liveBytes -= segment.lengthBytes
            do { try scratch.remove(segment.path) } catch {
                context.problem("\(segment.path) can't be removed: \(error)")
            }
        }
        if segments.isEmpty, header.count > 0, flight == nil {
            header.deallocate()
            header = .init(start: nil, count: 0)
            pieces = []
            flightSlots = []
        }
    }

    // MARK: Syncing

    /// Calls `done` once everything queued so far survives power loss.
    func sync(_ done: @escaping (ScratchError?) -> Void) {
        if let failure { return done(failure) }
        if lastSequence <= syncedSequence || context.settings.fault == .journalSyncSkipped { return done(nil) }
        syncWaiters.append((lastSequence, done))
        pump()
    }

    private func pump() {
        guard !isSyncing, failure == nil, let first = syncWaiters.first, first.sequence <= appendedSequence else {
            return
        }
        isSyncing = true
        let target = appendedSequence
        let unsynced = segments.values.filter { !$0.isSynced }
        for segment in unsynced { segment.isSynced = true }
        let directory = directoryIsSynced ? nil : folder
        directoryIsSynced = true
        context.spawn { [self] in
            do throws(ScratchError) {
                for segment in unsynced { try await segment.file.sync() }
                if let directory { try await scratch.syncDirectory(directory) }
                synced(upTo: target)
            } catch {
                fail(error)
            }
        }
    }

    private func synced(upTo target: UInt64) {
        isSyncing = false
        syncedSequence = max(syncedSequence, target)
        var ready: [(ScratchError?) -> Void] = []
        syncWaiters.removeAll { waiter in
            if waiter.sequence <= syncedSequence { ready.append(waiter.done) }
            return waiter.sequence <= syncedSequence
        }
        for done in ready { done(nil) }
        pump()
    }

    // MARK: Reading back

    /// Pages one behind the other in a segment, which stays readable as long as this value lives, released or not.
    struct Piece: Sendable {
        let segment: Segment
        let offset: UInt32
        /// Of each page.
        var sums: [UInt32]

        /// Where page `index` of the piece is.
        func location(_ index: Int) -> JournalLocation {
            JournalLocation(segment: segment.number, offset: offset + UInt32(index * Geometry.pageBytes))
        }
    }

    /// Groups slots whose pages lie one behind the other; order is kept. Take hold of what is to be read before anything is
    /// awaited: a commit may release segments meanwhile.
    func pieces(of slots: [UInt32]) -> [Piece] {
        var pieces: [Piece] = []
        for slot in slots {
            let s = pages[slot]
            if let last = pieces.last, last.location(last.sums.count) == s.location {
                pieces[pieces.count - 1].sums.append(s.sum)
            } else {
                guard let segment = segments[s.location.segment] else {
                    preconditionFailure("a page in segment \(s.location.segment) of \(folder), which was released")
                }
                pieces.append(Piece(segment: segment, offset: s.location.offset, sums: [s.sum]))
            }
        }
        return pieces
    }

    /// Reads pages back, verified.
    func read(_ piece: Piece) async throws(ScratchError) -> [UInt8] {
        let bytes = try await piece.segment.file.read(
            count: piece.sums.count * Geometry.pageBytes, at: UInt64(piece.offset))
        let bad = bytes.withUnsafeBytes { p in
            piece.sums.indices.first {
                JournalFormat.pageSum(p.baseAddress! + $0 * Geometry.pageBytes) != piece.sums[$0]
            }
        }
        if let bad {
            throw ScratchError.corrupt(
                "\(piece.segment.path): the page at \(Int(piece.offset) + bad * Geometry.pageBytes) is not what was written there"
            )
        }
        return bytes
    }

    /// Removes every segment: the disk was released clean.
    func removeAll() {
        release(upTo: .max)
        Journal.unmarkAttached(folder, scratch)
        // And the folder, where nothing is left in it.
        try? scratch.remove(folder)
    }

    // MARK: The mark of an attached disk

    // A disk whose journal is empty is attached all the same: the daemon that starts next takes it up, or gives it back.
    private static func markPath(_ folder: String) -> String { folder + "/attached" }

    func markAttached() {
        do { _ = try scratch.open(Journal.markPath(folder), create: true) } catch {
            context.problem("\(Journal.markPath(folder)) can't be made: \(error)")
        }
    }

    static func unmarkAttached(_ folder: String, _ scratch: any ScratchDisk) { try? scratch.remove(markPath(folder)) }

    /// Whether a disk with this folder was attached, or has a journal, when its server ended.
    static func isLeft(in folder: String, _ scratch: any ScratchDisk) -> Bool {
        // One that can't be read is looked at by those who say why.
        guard let names = try? scratch.list(folder) else { return true }
        return names.contains { $0.hasSuffix(".journal") } || names.contains("attached")
    }
}

extension ScratchError {
    package var isNoSpace: Bool { errno == 28 /* ENOSPC */ || errno == 122 /* EDQUOT */ }
    static func corrupt(_ text: String) -> ScratchError { ScratchError(errno: 5 /* EIO */, description: text) }
}
