// The scratch cache of block objects: files named by object id, holding the object's bytes as they are in the store.
// It saves fetches and holds nothing that is not in the store too, so it may forget anything at any time, and no failure
// of the scratch disk fails a read: it is counted, and the store is asked.
//
// Always holds: a complete object lies under its id and survives a restart; a partial one has `.part` in its name and is
// removed at start. What is read from here is not trusted: whoever decodes it checks the checksums that are in the
// object itself, and says `drop` when they do not hold. Files are opened, written, renamed and removed on worker
// threads, never on a loop.

import Glibc
public import Runtime
import Synchronization

public final class BlockFiles: Sendable {
    /// What this cache did since it was made, and what it holds now.
    public struct Snapshot: Sendable, Equatable {
        public var heldBytes: UInt64 = 0
        public var budgetBytes: UInt64 = 0
        /// What may be held now: the budget, or less where the disk is needed for the reserve.
        public var limitBytes: UInt64 = 0
        public var files: UInt64 = 0
        /// Reads answered, and their bytes.
        public var reads: UInt64 = 0
        public var readBytes: UInt64 = 0
        public var writtenBytes: UInt64 = 0
        public var evictions: UInt64 = 0
        /// Objects or parts not kept: no room, or a disk that had failed a moment before.
        public var bypasses: UInt64 = 0
        /// Failed calls of the scratch disk.
        public var errors: UInt64 = 0
        /// Files whose content failed its checksums.
        public var corruptions: UInt64 = 0
        /// The last failed call, for people.
        public var lastError: String?
    }

    /// Files open at one time.
    private static let maxOpen = 256
    /// After a failed write none is tried for so long; where room is short it is looked for again after so long.
    private static let pauseNs: UInt64 = 10_000_000_000
    private static let pieceBytes = 1 << 20
    /// The disk's free space is looked at again after so many bytes written.
    private static let checkBytes: UInt64 = 64 << 20

    let budgetBytes: UInt64
    private let reserveBytes: UInt64
    private let disk: any ScratchDisk
    private let environment: any Environment
    private let folder: String

    private struct State {
        var files: [ObjectID: BlockFile] = [:]
        var queues = BlockFileQueues()
        var openOrder = Fifo()
        var openCount = 0
        var partNumber = 0
        var pausedUntilNs: UInt64 = 0
        /// Bytes until the disk's free space is looked at, and when that is due where it is short.
        var untilCheck: UInt64 = 0
        var checkAtNs: UInt64 = 0
        var snapshot = Snapshot()
    }
    private let state: Mutex<State>

    /// A cache of at most `budgetBytes` in `folder` of `disk`; 0 switches it off. Call `start` before anything else.
    ///
    /// `reserveBytes` of the disk stay free for the journal: where they are not, the cache shrinks.
    public init(
        disk: any ScratchDisk, budgetBytes: UInt64, environment: any Environment, folder: String = "blocks",
        reserveBytes: UInt64 = 1 << 30
    ) {
        self.budgetBytes = budgetBytes
        self.reserveBytes = reserveBytes
        self.disk = disk
        self.environment = environment
        self.folder = folder
        var first = State()
        first.snapshot.budgetBytes = budgetBytes
        first.snapshot.limitBytes = budgetBytes
        state = Mutex(first)
    }

    /// Takes stock of what an earlier run left: complete objects are kept, partial ones removed.
    public func start() async {
        let (disk, folder) = (disk, folder)
        let found = await environment.offload { () -> Result<[(ObjectID, UInt64)], ScratchError> in
            do throws(ScratchError) {
                var found: [(ObjectID, UInt64)] = []
                for name in try disk.list(folder) {
                    let path = folder + "/" + name
                    // One file that cannot be opened should not cost the others.
                    if let id = ObjectID(name), let size = try? disk.open(path, create: false).sizeBytes, size > 0 {
                        found.append((id, size))
                    } else if ObjectID(name) != nil || name.contains(".part") {
                        try? disk.remove(path)
                    }
                }
                return .success(found)
            } catch { return .failure(error) }
        }
        switch found {
        case .failure(let error): note(error)
        case .success(let found):
            let evicted = state.withLock { state in
                for (id, size) in found where state.files[id] == nil {
                    let file = BlockFile(id: id, path: path(id))
                    file.present = ByteRanges(0..<size)
                    file.totalBytes = size
                    file.chargedBytes = size
                    state.files[id] = file
                    state.queues.add(file)
                }
                return evict(&state, toFit: 0, keeping: nil) ?? []
            }
            await remove(evicted)
        }
        await checkRoom()
    }

    public var snapshot: Snapshot {
        state.withLock { state in
            state.snapshot.heldBytes = state.queues.bytes
            state.snapshot.files = UInt64(state.files.count)
            return state.snapshot
        }
    }

    /// The longest object that has a chance to be kept.
    var limitBytes: UInt64 { state.withLock { $0.snapshot.limitBytes } }

    /// Whether a write has a chance now.
    var takesWrites: Bool {
        let now = environment.nowNs
        return budgetBytes > 0
            && state.withLock { now >= $0.pausedUntilNs && ($0.snapshot.limitBytes > 0 || now >= $0.checkAtNs) }
    }

    /// Which bytes of the object are here.
    func present(_ id: ObjectID) -> ByteRanges {
        state.withLock { $0.files[id]?.present ?? ByteRanges() }
    }

    // MARK: Reading

    /// The bytes of `range`, unchecked; nil when they are not all here, or the disk fails.
    func read(_ id: ObjectID, _ range: Range<UInt64>) async -> ByteView? {
        let found = state.withLock { state -> (BlockFile, (any ScratchFile)?, String)? in
            guard let file = state.files[id], file.present.contains(range) else { return nil }
            state.queues.use(file)
            return (file, file.file, file.path)
        }
        guard let (entry, open, path) = found else { return nil }
        do throws(ScratchError) {
            let file: any ScratchFile
            if let open { file = open } else { file = try await reopen(entry, path) }
            let storage = ByteStorage(count: range.count)
            let error = await withUnsafeContinuation { (continuation: UnsafeContinuation<ScratchError?, Never>) in
                file.read(into: storage.writable, at: range.lowerBound) { continuation.resume(returning: $0) }
            }
            if let error { throw error }
            state.withLock {
                $0.snapshot.reads += 1
                $0.snapshot.readBytes += UInt64(range.count)
            }
            return ByteView(storage)
        } catch {
            note(error)
            await discard(entry)
            return nil
        }
    }

    private func reopen(_ entry: BlockFile, _ path: String) async throws(ScratchError) -> any ScratchFile {
        let disk = disk
        let opened = await environment.offload { () -> Result<any ScratchFile, ScratchError> in
            do throws(ScratchError) { return .success(try disk.open(path, create: false)) } catch {
                return .failure(error)
            }
        }
        let file = try opened.get()
        keepOpen(entry, file)
        return file
    }

    /// Remembers an open file; closes the one opened longest ago where there are too many.
    private func keepOpen(_ entry: BlockFile, _ file: any ScratchFile) {
        // Let go after the lock: the last reference closes.
        let closed = state.withLock { state -> (any ScratchFile)? in
            if entry.isGone { return nil }
            entry.file = file
            if !entry.isInOpenOrder {
                entry.isInOpenOrder = true
                state.openOrder.push(entry) { $0.isInOpenOrder }
                state.openCount += 1
            }
            guard state.openCount > Self.maxOpen, let oldest = state.openOrder.pop({ $0.isInOpenOrder }) else {
                return nil
            }
            state.openCount -= 1
            oldest.isInOpenOrder = false
            defer { oldest.file = nil }
            return oldest.file
        }
        _ = closed
    }

    // MARK: Writing

    /// Looks how much of the disk there is for this cache, and shrinks it where that is less than it holds.
    private func checkRoom() async {
        guard budgetBytes > 0, reserveBytes > 0 else { return }
        let disk = disk
        let free = await environment.offload { try? disk.freeBytes() }
        let checkAtNs = environment.nowNs + Self.pauseNs
        let evicted = state.withLock { state -> [BlockFile] in
            state.untilCheck = Self.checkBytes
            state.checkAtNs = checkAtNs
            guard let free else { return [] }
            let (sum, isHuge) = state.queues.bytes.addingReportingOverflow(free)
            let room = isHuge ? UInt64.max : sum
            state.snapshot.limitBytes = min(budgetBytes, room > reserveBytes ? room - reserveBytes : 0)
            return evict(&state, toFit: 0, keeping: nil) ?? []
        }
        await remove(evicted)
    }

    /// Keeps bytes of an object, if there is room and the disk lets it. `total` is the object's length where known.
    func write(_ id: ObjectID, at offset: UInt64, _ bytes: ByteView, total: UInt64?) async {
        let range = offset..<offset + UInt64(bytes.count)
        let now = environment.nowNs
        let needsCheck = state.withLock { state in
            let needsCheck =
                state.untilCheck < UInt64(range.count)
                || (state.snapshot.limitBytes < budgetBytes && now >= state.checkAtNs)
            state.untilCheck -= min(state.untilCheck, UInt64(range.count))
            return needsCheck
        }
        if needsCheck { await checkRoom() }
        let plan = state.withLock {
            state -> (entry: BlockFile, open: (any ScratchFile)?, path: String, evicted: [BlockFile])? in
            guard budgetBytes > 0 else { return nil }
            guard now >= state.pausedUntilNs, max(total ?? 0, UInt64(range.count)) <= state.snapshot.limitBytes else {
                state.snapshot.bypasses += 1
                return nil
            }
            var evicted: [BlockFile] = []
            if let old = state.files[id], let known = old.totalBytes, let total, known != total {
                // Cut short by a crash, or another thing altogether.
                forget(&state, old)
                evicted.append(old)
            }
            let known = state.files[id]
            if let known, known.present.contains(range) { return nil }
            guard let room = evict(&state, toFit: UInt64(range.count), keeping: known) else {
                state.snapshot.bypasses += 1
                return nil
            }
            evicted += room
            let entry: BlockFile
            if let known {
                entry = known
                state.queues.charge(entry, UInt64(range.count))
                entry.chargedBytes += UInt64(range.count)
            } else {
                state.partNumber += 1
                entry = BlockFile(id: id, path: path(id) + ".part\(state.partNumber)")
                entry.chargedBytes = UInt64(range.count)
                state.files[id] = entry
                state.queues.add(entry)
            }
            if let total { entry.totalBytes = total }
            return (entry, entry.file, entry.path, evicted)
        }
        guard let plan else { return }
        await remove(plan.evicted)
        do throws(ScratchError) {
            let file = try await put(bytes, at: offset, in: plan.open, path: plan.path)
            if plan.open == nil { keepOpen(plan.entry, file) }
        } catch {
            await failed(plan.entry, error)
            return
        }
        let entry = plan.entry
        let (isGone, isNowComplete) = state.withLock { state in
            state.snapshot.writtenBytes += UInt64(range.count)
            if entry.isGone { return (true, false) }
            let wasComplete = entry.isComplete
            entry.present.insert(range)
            return (false, entry.isComplete && !wasComplete)
        }
        // It may have been removed just before it was made.
        if isGone { await remove([entry]) }
        if isNowComplete { await settle(entry) }
    }

    /// Writes on a worker thread; gives the file, opened there where it was not.
    private func put(
        _ bytes: ByteView, at offset: UInt64, in open: (any ScratchFile)?, path: String
    ) async throws(ScratchError) -> any ScratchFile {
        let disk = disk
        let waits = Mailbox()
        let result = await environment.offload { () -> Result<any ScratchFile, ScratchError> in
            do throws(ScratchError) {
                let file = if let open { open } else { try disk.open(path, create: true) }
                try bytes.withBytes { (all) throws(ScratchError) in
                    var at = 0
                    while at < all.count {
                        let piece = all.part(at..<min(at + Self.pieceBytes, all.count))
                        waits.expect()
                        let error = withUnsafePointer(to: piece) { piece -> Result<Bool, ScratchError> in
                            do throws(ScratchError) {
                                return .success(
                                    try file.write(
                                        UnsafeBufferPointer(start: piece, count: 1), at: offset + UInt64(at),
                                        done: { waits.arrived($0) }))
                            } catch { return .failure(error) }
                        }
                        switch error {
                        case .success(true): waits.arrived(nil)
                        case .success(false): break
                        case .failure(let error):
                            waits.arrived(nil)
                            throw error
                        }
                        at += piece.count
                    }
                }
                return .success(file)
            } catch { return .failure(error) }
        }
        // Those that were not done at once still read from `bytes`.
        let late = await waits.all()
        withExtendedLifetime(bytes) {}
        let file = try result.get()
        if let late { throw late }
        return file
    }

    /// Gives a complete file its lasting name.
    private func settle(_ entry: BlockFile) async {
        let (disk, from, to) = (disk, state.withLock { _ in entry.path }, path(entry.id))
        let error = await environment.offload { () -> ScratchError? in
            do throws(ScratchError) {
                try disk.rename(from, to: to)
                return nil
            } catch { return error }
        }
        if let error { return await failed(entry, error) }
        let isGone = state.withLock { _ in
            entry.path = to
            return entry.isGone
        }
        // Evicted while it was renamed. If another file of this name came meanwhile, it is fetched once more.
        if isGone { await remove([entry]) }
    }

    /// Puts a whole object here that this daemon has just stored, so that it need not be fetched.
    public func adopt(_ id: ObjectID, _ object: [UInt8]) async {
        await write(id, at: 0, ByteView(object), total: UInt64(object.count))
    }

    // MARK: Letting go

    /// Forgets an object whose bytes failed their checksum.
    func drop(_ id: ObjectID) async {
        let entry = state.withLock { state -> BlockFile? in
            guard let entry = state.files[id] else { return nil }
            state.snapshot.corruptions += 1
            forget(&state, entry)
            return entry
        }
        if let entry { await remove([entry]) }
    }

    /// Evicts until at most `bytes` are held: for when the disk is needed for better things.
    public func trim(to bytes: UInt64) async {
        let evicted = state.withLock { state in
            var evicted: [BlockFile] = []
            while state.queues.bytes > bytes, let file = evictOne(&state, keeping: nil) { evicted.append(file) }
            return evicted
        }
        await remove(evicted)
    }

    private func discard(_ entry: BlockFile) async {
        let mine = state.withLock { state in
            if entry.isGone { return false }
            forget(&state, entry)
            return true
        }
        if mine { await remove([entry]) }
    }

    private func failed(_ entry: BlockFile, _ error: ScratchError) async {
        note(error)
        let until = environment.nowNs + Self.pauseNs
        state.withLock { state in
            state.pausedUntilNs = until
            state.snapshot.bypasses += 1
        }
        await discard(entry)
        // A full disk is needed by the journal more than by a cache.
        if error.errno == ENOSPC { await trim(to: snapshot.heldBytes / 8 * 7) }
    }

    private func note(_ error: ScratchError) {
        state.withLock { state in
            state.snapshot.errors += 1
            state.snapshot.lastError = error.description
        }
    }

    /// Evicts until `bytes` more fit; nil when they cannot.
    private func evict(_ state: inout State, toFit bytes: UInt64, keeping keep: BlockFile?) -> [BlockFile]? {
        let limit = state.snapshot.limitBytes
        if bytes + (keep?.chargedBytes ?? 0) > limit { return nil }
        var evicted: [BlockFile] = []
        while state.queues.bytes + bytes > limit, let file = evictOne(&state, keeping: keep) {
            evicted.append(file)
        }
        return evicted
    }

    private func evictOne(_ state: inout State, keeping keep: BlockFile?) -> BlockFile? {
        guard let file = state.queues.evict(keeping: keep, budgetBytes: state.snapshot.limitBytes) else { return nil }
        state.snapshot.evictions += 1
        forget(&state, file)
        return file
    }

    private func forget(_ state: inout State, _ file: BlockFile) {
        state.queues.remove(file)
        file.isGone = true
        if state.files[file.id] === file { state.files[file.id] = nil }
        if file.isInOpenOrder {
            file.isInOpenOrder = false
            state.openCount -= 1
        }
    }

    /// Removes the files of entries that are gone.
    private func remove(_ gone: [BlockFile]) async {
        if gone.isEmpty { return }
        let disk = disk
        let paths = state.withLock { _ in gone.map(\.path) }
        let errors = await environment.offload { () -> [ScratchError] in
            paths.compactMap { path in
                do throws(ScratchError) {
                    try disk.remove(path)
                    return nil
                } catch { return error }
            }
        }
        for error in errors { note(error) }
        // The last use of the open files, off every lock.
        let files = state.withLock { _ in
            gone.map { file -> (any ScratchFile)? in
                defer { file.file = nil }
                return file.file
            }
        }
        _ = files
    }

    private func path(_ id: ObjectID) -> String { folder + "/" + id.description }
}

/// Counts writes under way and wakes one waiter when all have arrived.
private final class Mailbox: Sendable {
    private struct State {
        var expected = 0
        var error: ScratchError?
        var waiter: UnsafeContinuation<ScratchError?, Never>?
    }
    private let state = Mutex(State())

    func expect() { state.withLock { $0.expected += 1 } }

    func arrived(_ error: ScratchError?) {
        let woken = state.withLock { state -> (UnsafeContinuation<ScratchError?, Never>, ScratchError?)? in
            state.expected -= 1
            if state.error == nil { state.error = error }
            guard state.expected == 0, let waiter = state.waiter else { return nil }
            state.waiter = nil
            return (waiter, state.error)
        }
        if let (waiter, error) = woken { waiter.resume(returning: error) }
    }

    /// Returns when all that was expected has arrived, with the first error.
    func all() async -> ScratchError? {
        await withUnsafeContinuation { continuation in
            let done = state.withLock { state -> ScratchError?? in
                if state.expected == 0 { return .some(state.error) }
                state.waiter = continuation
                return nil
            }
            if let done { continuation.resume(returning: done) }
        }
    }
}
