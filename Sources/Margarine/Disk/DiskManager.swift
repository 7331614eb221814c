// All disks that this server has, by name, and the way to them for the handshake. A disk is opened once, on a loop chosen
// for it, and stays there.

internal import BlockCache
package import Logging
internal import ObjectStore
internal import Runtime
internal import Synchronization

package final class DiskManager: ExportProvider {
    /// Everything shared by all disks of one loop.
    private let contexts: [DiskContext]
    private let store: Store
    private let server: ServerIdentity
    private let takeover: Takeover
    private let log: Logger
    private let owners: OwnerWatch
    private let leases: Leases
    private let state = Mutex(State())
    private let exports: ExportList
    private let failed = FailedOpenings()

    private struct Opening {
        var number: UInt64
        var context: DiskContext
        var task: Task<Disk, any Error>
        /// Closed when the task has ended.
        var line: AskerLine
        /// It fails where the disk is not this server's already.
        var onlyOwn: Bool
        /// The task has ended well. Until then it may be watching whether another server lives.
        var isOpen = false
    }
    /// Names are used again, also with the same numbers where a store has several locations; the ids of disks are not.
    private struct SnapshotKey: Hashable {
        var diskID: ObjectID
        var generation: UInt64
        var name: String
    }
    /// A generation that is attached. It is named, and its snapshot stays, as long as anybody uses it or is being admitted.
    private struct Reading {
        var snapshot: Snapshot
        var context: DiskContext
        /// Clients, and those being admitted. Counted under the manager's lock, so that the last one who leaves and the
        /// first one who comes agree on whether it goes on.
        var users = 0
    }
    private struct State {
        var disks: [String: Opening] = [:]
        var snapshots: [SnapshotKey: Reading] = [:]
        var count: UInt64 = 0
        var isDraining = false
    }

    package init(
        contexts: [DiskContext], store: Store, server: ServerIdentity, takeover: Takeover, log: Logger,
        owners: OwnerWatch, leases: Leases
    ) {
        precondition(!contexts.isEmpty)
        self.contexts = contexts
        self.store = store
        self.server = server
        self.takeover = takeover
        self.log = log
        self.owners = owners
        self.leases = leases
        exports = ExportList(store: store, environment: contexts[0].environment, log: log)
        contexts[0].journals.whenAsked { [weak self] in
            guard let self else { return }
            // On the loop of the disk that asks.
            Loop.current?.run { _ = await self.forEachDisk { disk in disk.giveRoom() } }
        }
    }

    // MARK: For the handshake

    package func list() async throws(AttachError) -> [ExportInfo] { try await exports.exports() }

    package func describe(_ exportName: String) async throws(AttachError) -> ExportInfo {
        let export = try ExportName(exportName)
        if export.generation == nil {
            let disk = try await asking { (asker) async throws(AttachError) in try await opened(export.disk, asker) }
            if let disk { return .disk(export.disk, disk.size) }
        }
        let found = try await stored(export.disk)
        guard let generation = export.generation else {
            return .disk(export.disk, found.head.sizeBytes, isReadOnly: found.head.isReadOnly)
        }
        let record = try await kept(found, generation)
        return ExportInfo(
            name: exportName, sizeBytes: record.sizeBytes, isReadOnly: true,
            description: "generation \(generation) of disk \(export.disk)")
    }

    package func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
        try await asking { (asker) async throws(AttachError) in try await attach(exportName, client: client, asker) }
    }

    /// Runs `body` for somebody who goes away when the task is cancelled.
    private func asking<T: Sendable>(
        _ body: (Asker) async throws(AttachError) -> T
    ) async throws(AttachError) -> T {
        let asker = Asker()
        let result: Result<T, AttachError> = await withTaskCancellationHandler {
            do throws(AttachError) { return .success(try await body(asker)) } catch { return .failure(error) }
        } onCancel: {
            asker.leave()
        }
        return try result.get()
    }

    private func attach(
        _ exportName: String, client: ClientIdentity, _ asker: Asker
    ) async throws(AttachError) -> AttachedDevice {
        let export = try ExportName(exportName)
        if state.withLock({ $0.isDraining }) { throw AttachError(.shutdown, "the server is shutting down") }
        if let generation = export.generation {
            let found = try await stored(export.disk)
            return try await attachSnapshot(found.head, try await kept(found, generation))
        }
        for _ in 0..<10 {
            var known: Store.Found?
            if !state.withLock({ $0.disks[export.disk] != nil }) {
                let found = try await stored(export.disk)
                if found.head.isReadOnly { return try await attachSnapshot(found.head, found.head.record) }
                known = found
            }
            let (context, disk) = try await open(export.disk, session: export.session, known: known, asker)
            let admitted: Result<Admission?, AttachError> = await context.run {
                do throws(AttachError) {
                    return .success(try await disk.admit(session: export.session, client: client, asker))
                } catch {
                    return .failure(error)
                }
            }
            if let admission = try admitted.get() {
                return AttachedDevice(device: disk, loop: context.loop, admission: admission)
            }
        }
        throw AttachError(.unavailable, "disk '\(export.disk)' is being given back; try again")
    }

    private func stored(_ name: String) async throws(AttachError) -> Store.Found {
        guard let found = try await AttachError.wrap({ () throws(CatalogError) in try await store.find(name) }),
            !found.head.deleted
        else { throw AttachError(.unknown, "there is no disk '\(name)'") }
        return found
    }

    private func kept(_ found: Store.Found, _ generation: UInt64) async throws(AttachError) -> GenerationRecord {
        try await AttachError.wrap { () throws(CatalogError) in
            try await found.heads.keptRecord(found.head, generation: generation)
        }
    }

    // MARK: Disks

    /// The disk, if it is open here.
    func present(_ name: String) async -> (DiskContext, Disk)? {
        guard let opening = state.withLock({ $0.disks[name] }), let disk = try? await opening.task.value else {
            return nil
        }
        return (opening.context, disk)
    }

    /// The disk, opened if it is not yet. An opening goes on though nobody waits for it any more.
    private func open(
        _ name: String, session: String?, onlyOwn: Bool = false, known: Store.Found? = nil, _ asker: Asker
    ) async throws(AttachError) -> (DiskContext, Disk) {
        let found = state.withLock { state -> Result<Opening, AttachError> in
            if let present = state.disks[name] { return .success(present) }
            // Also of who asked before: nobody would give the disk back.
            if state.isDraining { return .failure(AttachError(.shutdown, "the server is shutting down")) }
            state.count += 1
            let number = state.count
            let context: DiskContext
            do throws(AttachError) { context = try startedContext(number) } catch { return .failure(error) }
            let opener = DiskOpener(
                name: name, session: session, server: server, takeover: takeover, store: store, known: known,
                context: context, owners: owners, leases: leases, failed: failed)
            let line = AskerLine()
            let task = Task(executorPreference: context.loop) { [weak self] () throws -> Disk in
                defer { line.close() }
                do throws(AttachError) {
                    let disk = try await opener.open(onlyOwn: onlyOwn)
                    disk.onGone = { disk in self?.isGone(disk, number) }
                    self?.noteOpen(name, number)
                    // Lost before anybody could be told.
                    if disk.lost != nil, !disk.isLeaving { self?.isGone(disk, number) }
                    return disk
                } catch {
                    self?.remove(name, number)
                    throw error
                }
            }
            let opening = Opening(number: number, context: context, task: task, line: line, onlyOwn: onlyOwn)
            state.disks[name] = opening
            return .success(opening)
        }
        let opening = try found.get()
        await opening.line.wait(asker)
        try asker.check()
        do {
            return (opening.context, try await opening.task.value)
        } catch {
            // It was asked for by a journal, and is not this server's: for a client that is no reason.
            if opening.onlyOwn, !onlyOwn { return try await open(name, session: session, asker) }
            throw error as? AttachError ?? AttachError(.unavailable, "disk '\(name)': \(error)")
        }
    }

    /// A disk is done for here. One that others can't have, as long as this server lives, is taken up again.
    private func isGone(_ disk: Disk, _ number: UInt64) {
        remove(disk.name, number)
        if disk.isStillOurs { takeUpLater([DiskOpener.folderName(disk.name, disk.head.diskID): ""]) }
    }

    private func remove(_ name: String, _ number: UInt64) {
        state.withLock { if $0.disks[name]?.number == number { $0.disks[name] = nil } }
    }

    private func noteOpen(_ name: String, _ number: UInt64) {
        state.withLock { if $0.disks[name]?.number == number { $0.disks[name]!.isOpen = true } }
    }

    private func opened(_ name: String, _ asker: Asker) async throws(AttachError) -> (disk: Disk, size: UInt64)? {
        guard let opening = state.withLock({ $0.disks[name] }) else { return nil }
        await opening.line.wait(asker)
        try asker.check()
        guard let disk = try? await opening.task.value else { return nil }
        return await opening.context.run { disk.lost == nil ? (disk, disk.sizeBytes) : nil }
    }

    /// Takes up the journals of this scratch directory: every disk that was this server's when it ended.
    package func recover(_ progress: @Sendable (_ disk: String) -> Void = { _ in }) async {
        let folders: [(folder: String, disk: String)]
        do { folders = try journalFolders() } catch {
            log.error("the journals in the scratch directory can't be listed, which is tried again: \(error)")
            return takeUpLater(nil)
        }
        var left: [String: String] = [:]
        for (folder, name) in folders {
            progress(name)
            left[folder] = await takeUp(folder, of: name, toldBefore: nil)
        }
        if !left.isEmpty { takeUpLater(left) }
    }

    /// The folders of journals, foreign names left out.
    private func journalFolders() throws(ScratchError) -> [(folder: String, disk: String)] {
        try contexts[0].scratch.list(DiskOpener.journalRoot).compactMap { folder in
            DiskOpener.disk(ofJournal: folder).map { (folder, $0.name) }
        }
    }

    /// Takes up one journal. nil: nothing is left to do. Else why it could not be: nobody else can have the disk meanwhile, so
    /// that has to be tried again.
    private func takeUp(_ folder: String, of name: String, toldBefore: String?) async -> String? {
        let scratch = contexts[0].scratch
        let path = "\(DiskOpener.journalRoot)/\(folder)"
        guard Journal.isLeft(in: path, scratch) else { return nil }
        do {
            _ = try await open(name, session: nil, onlyOwn: true, Asker())
            return nil
        } catch {
            let isFinal = error.kind == .refused || error.kind == .unknown
            // The mark stays with its journal: the disk may still be this server's, and refused for another reason.
            if isFinal {
                // Not of somebody who attaches meanwhile.
                state.withLock { state in
                    guard state.disks[name] == nil, !Journal.hasSegments(path, scratch) else { return }
                    Journal.forget(path, scratch)
                }
            }
            guard Journal.isLeft(in: path, scratch) else { return nil }
            if error.description != toldBefore {
                log.error("disk \(name): its journal waits in the scratch directory: \(error)")
            }
            return isFinal ? nil : error.description
        }
    }

    /// Tries again, by and by: as long as this server lives, no other one may take these disks.
    ///
    /// - Parameter folders: with what was told of each; nil: they could not be listed.
    private func takeUpLater(_ folders: [String: String]?) {
        let environment = contexts[0].environment
        // Without a thread for a loop yet, on the pool.
        let context = try? state.withLock { _ throws(AttachError) in try startedContext(0) }
        _ = Task(executorPreference: context?.loop) { [weak self] in
            var left = folders
            var pauseNs: UInt64 = 1_000_000_000
            while left?.isEmpty != true {
                await environment.sleep(ns: pauseNs)
                pauseNs = min(pauseNs * 2, 60_000_000_000)
                guard let self, !state.withLock({ $0.isDraining }) else { return }
                if left == nil, let found = try? journalFolders() {
                    left = found.reduce(into: [:]) { $0[$1.folder] = "" }
                }
                for (folder, told) in (left ?? [:]).sorted(by: { $0.key < $1.key }) {
                    guard let (name, _) = DiskOpener.disk(ofJournal: folder) else { continue }
                    left?[folder] = await takeUp(folder, of: name, toldBefore: told)
                }
            }
        }
    }

    /// Calls `body` on the loop of every open disk; with `opening`, also of those that are being opened, once they are.
    package func forEachDisk<T: Sendable>(
        opening: Bool = false, _ body: @escaping @Sendable (Disk) async -> T
    ) async -> [T] {
        let openings = state.withLock { state in
            state.disks.values.filter { opening || $0.isOpen }.sorted { $0.number < $1.number }
        }
        return await withTaskGroup(of: T?.self) { group in
            for opening in openings {
                group.addTask {
                    guard let disk = try? await opening.task.value else { return nil }
                    return await opening.context.run { await body(disk) }
                }
            }
            var results: [T] = []
            for await result in group { if let result { results.append(result) } }
            return results
        }
    }

    /// Heads that are looked at at the same time.
    private static let looks = 16

    /// Looks at the heads of this location (nil: of all) for what users changed. Some at a time; no heartbeat waits for it.
    package func checkOwnership(at location: UInt8? = nil) async {
        let openings = state.withLock { $0.disks.values.filter(\.isOpen).sorted { $0.number < $1.number } }
        _ = await inParallel(openings, limit: DiskManager.looks) { opening in
            guard let disk = try? await opening.task.value else { return }
            await opening.context.run {
                if location == nil || disk.heads.location == location { await disk.checkOwnership() }
            }
        }
    }

    /// Admits nobody any more, and brings every disk to rest.
    package func drain() async {
        state.withLock { $0.isDraining = true }
        owners.stop()
        _ = await forEachDisk(opening: true) { disk in await disk.drain() }
    }

    /// The generations that are attached read-only, as `NAME@GENERATION`.
    package var reading: [String] { state.withLock { $0.snapshots.keys.map(\.name) }.sorted() }

    package var hasDisks: Bool { state.withLock { !$0.disks.isEmpty } }

    /// Whether heads may name this server: of disks that are open, or that wait in the scratch directory to be taken up.
    package var ownsDisks: Bool {
        guard !hasDisks, let folders = try? journalFolders() else { return true }
        return folders.contains { Journal.isLeft(in: "\(DiskOpener.journalRoot)/\($0.folder)", contexts[0].scratch) }
    }

    package func apply(_ settings: DiskSettings) {
        state.withLock { _ in
            for context in contexts {
                if context.isStarted {
                    context.loop.post {
                        context.settings = settings
                        context.rooms.mayHaveCome()
                    }
                } else {
                    context.settings = settings
                }
            }
        }
    }

    // MARK: Generations

    /// - Parameter record: nil: of a disk that was never written.
    private func attachSnapshot(_ head: Head, _ record: GenerationRecord?) async throws(AttachError) -> AttachedDevice {
        let generation = record?.generation ?? 0
        let key = SnapshotKey(
            diskID: head.diskID, generation: generation, name: "\(head.name)@\(generation)")
        // A read-only disk may be larger than what it was forked from.
        let sizeBytes = head.isReadOnly ? head.sizeBytes : record?.sizeBytes ?? head.sizeBytes
        try AttachError.checkSize(sizeBytes, of: key.name, "`margined disk export` writes it to a file")
        let reading = state.withLock { state -> Result<Reading, AttachError> in
            do throws(AttachError) {
                var reading: Reading
                if let present = state.snapshots[key] {
                    reading = present
                } else {
                    reading = try read(key, sizeBytes, record, &state)
                }
                if reading.context.settings.fault != .snapshotGoneWhileAdmitting { reading.users += 1 }
                state.snapshots[key] = reading
                return .success(reading)
            } catch { return .failure(error) }
        }
        let (snapshot, context) = (try reading.get().snapshot, try reading.get().context)
        let ticket = await context.run { snapshot.admit() }
        if context.settings.fault == .snapshotGoneWhileAdmitting {
            state.withLock { $0.snapshots[key]?.users += 1 }
        }
        return AttachedDevice(device: snapshot, loop: context.loop, admission: ticket)
    }

    private func read(
        _ key: SnapshotKey, _ sizeBytes: UInt64, _ record: GenerationRecord?, _ state: inout State
    ) throws(AttachError) -> Reading {
        state.count += 1
        let context = try startedContext(state.count)
        let manifest = Manifest(
            sizeBytes: sizeBytes, root: record?.root, depth: record?.depth, cache: context.manifests)
        let snapshot = Snapshot(name: key.name, manifest: manifest, context: context) { [weak self] in
            self?.leaves(key)
        }
        return Reading(snapshot: snapshot, context: context)
    }

    /// A client of a generation has left, or never came.
    private func leaves(_ key: SnapshotKey) {
        state.withLock { state in
            guard let users = state.snapshots[key]?.users else { return }
            state.snapshots[key]!.users = users - 1
            if users <= 1 { state.snapshots[key] = nil }
        }
    }
}

extension DiskManager {
    /// The context that comes next, or, while the system has no thread for its loop, one that runs already. Under the
    /// manager's lock.
    private func startedContext(_ number: UInt64) throws(AttachError) -> DiskContext {
        let place = Int(number % UInt64(contexts.count))
        let next = contexts[place]
        do throws(ScratchError) {
            try next.startOnce()
            return next
        } catch {
            let others = contexts[place...] + contexts[..<place]
            if let running = others.first(where: \.isStarted) { return running }
            throw AttachError(.unavailable, "no disk can be attached now: \(error)")
        }
    }
}

extension DiskContext {
    /// Starts the loop's thread if this is its first disk. Under the manager's lock.
    fileprivate func startOnce() throws(ScratchError) {
        if !isStarted { try loop.start() }
        isStarted = true
    }

    /// Runs `body` on this context's loop and returns what it returns.
    func run<T: Sendable>(_ body: @escaping @Sendable () async -> T) async -> T {
        await Task(executorPreference: loop) { await body() }.value
    }
}
