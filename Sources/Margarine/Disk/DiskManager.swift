// All disks that this server has, by name, and the way to them for the handshake. A disk is opened once, on a loop chosen
// for it, and stays there.

internal import BlockCache
package import Logging
internal import ObjectStore
internal import Runtime
internal import Synchronization

/// Says by which sign the server of an id lives, by what is stored beside a head that it owns; nil when it is dead.
package typealias OwnerProbe = @Sendable (_ server: String, _ heads: HeadStore) async throws -> String?

package final class DiskManager: ExportProvider {
    /// Everything shared by all disks of one loop.
    private let contexts: [DiskContext]
    private let store: Store
    private let server: ServerIdentity
    private let takeover: Takeover
    private let log: Logger
    private let isAlive: OwnerProbe
    private let state = Mutex(State())

    private struct Opening {
        var number: UInt64
        var context: DiskContext
        var task: Task<Disk, any Error>
    }
    /// Names are used again, also with the same numbers where a store has several locations; the ids of disks are not.
    private struct SnapshotKey: Hashable {
        var diskID: ObjectID
        var generation: UInt64
        var name: String
    }
    private struct State {
        var disks: [String: Opening] = [:]
        var snapshots: [SnapshotKey: (snapshot: Snapshot, context: DiskContext)] = [:]
        var count: UInt64 = 0
        var isDraining = false
    }

    package init(
        contexts: [DiskContext], store: Store, server: ServerIdentity, takeover: Takeover, log: Logger,
        isAlive: @escaping OwnerProbe
    ) {
        precondition(!contexts.isEmpty)
        self.contexts = contexts
        self.store = store
        self.server = server
        self.takeover = takeover
        self.log = log
        self.isAlive = isAlive
        contexts[0].journals.whenAsked { [weak self] in
            guard let self else { return }
            // On the loop of the disk that asks.
            Loop.current?.run { _ = await self.forEachDisk { disk in disk.giveRoom() } }
        }
    }

    // MARK: For the handshake

    package func list() async throws(AttachError) -> [ExportInfo] {
        var infos: [ExportInfo] = []
        for location in store.locations.nearFirst {
            let heads = store.hastyHeads(at: location)
            do throws(CatalogError) {
                for name in try await heads.names() where infos.count < 10_000 {
                    guard let found = try? await heads.load(name), !found.head.deleted else { continue }
                    infos.append(DiskManager.info(name, found.head.sizeBytes, isReadOnly: found.head.isReadOnly))
                }
            } catch {
                if location.number == store.locations.near {
                    throw AttachError(.unavailable, "the disks can't be listed: \(error)")
                }
                log.warning("the disks of location '\(location.name)' can't be listed: \(error)")
            }
        }
        return infos
    }

    package func describe(_ exportName: String) async throws(AttachError) -> ExportInfo {
        let export = try ExportName(exportName)
        if export.generation == nil, let disk = await opened(export.disk) {
            return DiskManager.info(export.disk, disk.size)
        }
        let found = try await stored(export.disk)
        guard let generation = export.generation else {
            return DiskManager.info(export.disk, found.head.sizeBytes, isReadOnly: found.head.isReadOnly)
        }
        let record = try await kept(found, generation)
        return ExportInfo(
            name: exportName, sizeBytes: record.sizeBytes, isReadOnly: true,
            description: "generation \(generation) of disk \(export.disk)")
    }

    package func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
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
            let (context, disk) = try await open(export.disk, session: export.session, known: known)
            let admitted: Result<Admission?, AttachError> = await context.run {
                // Given back just now: open it again.
                while disk.isReleasing { await context.environment.sleep(ns: 5_000_000) }
                if disk.wasReleased { return .success(nil) }
                let wasOurs = disk.lost == nil
                do throws(AttachError) {
                    return .success(try await disk.admit(session: export.session, client: client))
                } catch {
                    // Found out just now that another server has it: that is for the opening to judge.
                    return wasOurs && disk.lost != nil ? .success(nil) : .failure(error)
                }
            }
            if let admission = try admitted.get() {
                return AttachedDevice(device: disk, loop: context.loop, admission: admission)
            }
        }
        throw AttachError(.unavailable, "disk '\(export.disk)' is being given back; try again")
    }

    private static func info(_ name: String, _ size: UInt64, isReadOnly: Bool = false) -> ExportInfo {
        ExportInfo(name: name, sizeBytes: size, isReadOnly: isReadOnly, description: "Margarine disk \(name)")
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

    /// The disk, opened if it is not yet.
    private func open(
        _ name: String, session: String?, onlyOwn: Bool = false, known: Store.Found? = nil
    ) async throws(AttachError) -> (DiskContext, Disk) {
        let opening = state.withLock { state in
            if let present = state.disks[name] { return present }
            state.count += 1
            let number = state.count
            let context = contexts[Int(number % UInt64(contexts.count))]
            let opener = DiskOpener(
                name: name, session: session, server: server, takeover: takeover, store: store, known: known,
                context: context, isAlive: isAlive)
            context.startOnce()
            let task = Task(executorPreference: context.loop) { [weak self] () throws -> Disk in
                let disk = try await opener.open(onlyOwn: onlyOwn)
                disk.onGone = { _ in self?.remove(name, number) }
                return disk
            }
            let opening = Opening(number: number, context: context, task: task)
            state.disks[name] = opening
            return opening
        }
        do {
            let disk = try await opening.task.value
            return (opening.context, disk)
        } catch {
            remove(name, opening.number)
            throw error as? AttachError ?? AttachError(.unavailable, "disk '\(name)': \(error)")
        }
    }

    private func remove(_ name: String, _ number: UInt64) {
        state.withLock { if $0.disks[name]?.number == number { $0.disks[name] = nil } }
    }

    private func opened(_ name: String) async -> (disk: Disk, size: UInt64)? {
        guard let opening = state.withLock({ $0.disks[name] }), let disk = try? await opening.task.value else {
            return nil
        }
        return await opening.context.run { disk.lost == nil ? (disk, disk.sizeBytes) : nil }
    }

    /// Takes up the journals of this scratch directory: every disk that was this server's when it ended. false: not all
    /// could be; then what was lost with the host's power has not been judged for each, and must be at the next start.
    @discardableResult
    package func recover() async -> Bool {
        let scratch = contexts[0].scratch
        let folders: [String]
        do { folders = try scratch.list(DiskOpener.journalRoot) } catch {
            log.error("the journals in the scratch directory can't be listed: \(error)")
            return false
        }
        var isWhole = true
        for folder in folders {
            let path = "\(DiskOpener.journalRoot)/\(folder)"
            guard let (name, _) = DiskOpener.disk(ofJournal: folder), Journal.isLeft(in: path, scratch) else {
                continue
            }
            do {
                _ = try await open(name, session: nil, onlyOwn: true)
            } catch {
                if error.kind == .refused || error.kind == .unknown {
                    Journal.unmarkAttached(path, scratch)
                } else {
                    isWhole = false
                }
                guard Journal.isLeft(in: path, scratch) else { continue }
                log.error("disk \(name): its journal waits in the scratch directory: \(error)")
            }
        }
        return isWhole
    }

    /// Calls `body` on the loop of every open disk.
    package func forEachDisk<T: Sendable>(_ body: @escaping @Sendable (Disk) async -> T) async -> [T] {
        let openings = state.withLock { $0.disks.values.sorted { $0.number < $1.number } }
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

    /// Looks whether the disks whose heads are at this location (nil: at any) are still this server's.
    package func checkOwnership(at location: UInt8? = nil) async {
        _ = await forEachDisk { disk in
            if location == nil || disk.heads.location == location { await disk.checkOwnership() }
        }
    }

    /// Admits nobody any more, and brings every disk to rest.
    package func drain() async {
        state.withLock { $0.isDraining = true }
        _ = await forEachDisk { disk in await disk.drain() }
    }

    /// The generations that are attached read-only, as `NAME@GENERATION`.
    package var reading: [String] { state.withLock { $0.snapshots.keys.map(\.name) }.sorted() }

    package var hasDisks: Bool { state.withLock { !$0.disks.isEmpty } }

    package func apply(_ settings: DiskSettings) {
        state.withLock { _ in
            for context in contexts {
                if context.isStarted {
                    context.loop.post { context.settings = settings }
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
        let (snapshot, context) = state.withLock { state in
            if let present = state.snapshots[key] { return present }
            state.count += 1
            let context = contexts[Int(state.count % UInt64(contexts.count))]
            context.startOnce()
            let made = (
                Snapshot(
                    name: key.name,
                    manifest: Manifest(
                        sizeBytes: sizeBytes, root: record?.root, depth: record?.depth, cache: context.manifests),
                    context: context), context
            )
            state.snapshots[key] = made
            return made
        }
        let ticket = await context.run { [weak self] in
            snapshot.onGone = { gone in
                self?.state.withLock { if $0.snapshots[key]?.snapshot === gone { $0.snapshots[key] = nil } }
            }
            return snapshot.admit()
        }
        return AttachedDevice(device: snapshot, loop: context.loop, admission: ticket)
    }
}

extension DiskContext {
    /// Starts the loop's thread if this is its first disk. Under the manager's lock.
    fileprivate func startOnce() {
        if !isStarted { loop.start() }
        isStarted = true
    }

    /// Runs `body` on this context's loop and returns what it returns.
    func run<T: Sendable>(_ body: @escaping @Sendable () async -> T) async -> T {
        await Task(executorPreference: loop) { await body() }.value
    }
}
