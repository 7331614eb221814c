// The composition: everything one running daemon is made of, and the order in which it starts and ends. Reading `start`
// shows the architecture.

internal import BlockCache
internal import Glibc
public import Logging
internal import ObjectStore
internal import Runtime
internal import Synchronization

public final class Daemon: StatusSource {
    private let log: Logger
    private let lock: ScratchLock
    private let startedAtNs: UInt64
    private let state: Mutex<State>
    private let environment: SystemEnvironment

    private struct State {
        var settings: Settings
        var parts: Parts?
        var addresses: [String] = []
        var isDraining = false
    }

    /// What runs once the daemon has started.
    private final class Parts: Sendable {
        let store: Store
        let counters: StoreCounters
        let server: ServerIdentity
        let cache: SliceCache
        let files: BlockFiles
        let contexts: [DiskContext]
        let disks: DiskManager
        let listener: Listener
        /// Accepts, shakes hands, beats, and does what is no disk's.
        let door: Loop
        /// For commits: as the near location says.
        let grace: GraceGauge
        /// For collections: as the first location says.
        let collected: GraceGauge
        let collection: ScheduledCollection

        init(
            store: Store, counters: StoreCounters, server: ServerIdentity, cache: SliceCache, files: BlockFiles,
            contexts: [DiskContext], disks: DiskManager, listener: Listener, door: Loop,
            grace: GraceGauge, collected: GraceGauge, collection: ScheduledCollection
        ) {
            self.store = store
            self.counters = counters
            self.server = server
            self.cache = cache
            self.files = files
            self.contexts = contexts
            self.disks = disks
            self.listener = listener
            self.door = door
            self.grace = grace
            self.collected = collected
            self.collection = collection
        }
    }

    /// Takes the scratch directory. Serves nothing before `start`.
    /// - Throws: `DaemonError`, among others when another live daemon uses the scratch directory.
    public init(settings: Settings, log: Logger) throws {
        try settings.validate()
        self.log = log
        lock = try ScratchLock(directory: settings.scratch)
        environment = SystemEnvironment(workers: settings.workerCount(cores: Daemon.cores))
        startedAtNs = environment.nowNs
        state = Mutex(State(settings: settings))
    }

    private static var cores: Int { max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN))) }

    /// Opens the store, takes up the journals, and listens.
    /// - Returns: the addresses it serves, such as `tcp://127.0.0.1:10809` and `unix:/path`.
    public func start() async throws -> [String] {
        let settings = state.withLock { $0.settings }
        let scratch = try DirectoryScratch(path: settings.scratch)
        let server = try ServerFiles.identity(in: settings.scratch, environment: environment)
        let counters = StoreCounters()
        let store = try await Store.open(
            urls: settings.places, near: settings.near, environment: environment, counters: counters)
        for location in store.locations.all {
            if let trouble = location.trouble() {
                log.warning("location '\(location.name)' is out of reach; what needs it waits or fails: \(trouble)")
            }
        }
        try await firstBeat(store, server, settings)
        let grace = GraceGauge()
        do throws(CatalogError) {
            try await grace.refresh(store.locations.nearBucket, environment: environment)
        } catch {
            // Disks are served; commits ask again.
            log.warning("how long a commit may take is not known yet: \(error)")
            grace.forget()
        }
        let collected = GraceGauge()
        if let first = store.locations[0] { try? await collected.refresh(first.hasty, environment: environment) }

        let door = try Loop(name: "door")
        door.start()
        let cache = SliceCache(budgetBytes: settings.memoryCacheBytes)
        let files = BlockFiles(disk: scratch, budgetBytes: settings.scratchCacheBytes, environment: environment)
        let loader = BlockLoader(
            locations: store.locations.buckets, cache: cache, files: files, environment: environment,
            spawn: { door.run(task: $0) })
        let contexts = try makeContexts(settings, scratch, store, loader, grace)
        let disks = DiskManager(
            contexts: contexts, store: store, server: server, takeover: settings.takeover, log: log,
            isAlive: { [environment] id, heads in
                guard let record = try await heads.server(id),
                    record.isAlive(nowMs: environment.wallMs, process: LocalProcess.state)
                else { return nil }
                return "its last heartbeat is \((environment.wallMs - record.timeMs) / 1000) s old"
            })
        let listener = Listener(provider: disks, loop: door, limits: limits(settings), log: log)
        let parts = Parts(
            store: store, counters: counters, server: server, cache: cache, files: files, contexts: contexts,
            disks: disks, listener: listener, door: door, grace: grace, collected: collected,
            collection: ScheduledCollection(store: store, scratch: scratch, server: server, grace: collected, log: log))
        state.withLock { $0.parts = parts }

        await files.start()
        if await disks.recover() { ServerFiles.noteBoot(in: settings.scratch) }
        let addresses = try await listen(settings, parts)
        state.withLock { $0.addresses = addresses }
        for location in store.locations.all { door.run { [weak self] in await self?.beat(parts, at: location) } }
        parts.collection.apply(settings)
        return addresses
    }

    private func makeContexts(
        _ settings: Settings, _ scratch: DirectoryScratch, _ store: Store, _ loader: BlockLoader, _ grace: GraceGauge
    ) throws -> [DiskContext] {
        // Every loop's share of the dirty memory must hold the largest request, or that would wait for ever.
        let count = min(
            settings.loopCount(cores: Daemon.cores), max(1, Int(settings.dirtyMemoryBytes / Settings.dirtyBytesPerLoop))
        )
        let journals = JournalBudget(limitBytes: settings.journalBytes)
        return try (0..<count).map { number in
            DiskContext(
                loop: try Loop(name: "disks-\(number)"), environment: environment, scratch: scratch,
                locations: store.locations, loader: loader,
                manifests: ManifestCache(store.locations, budgetBytes: max(4 << 20, (64 << 20) / count)),
                arena: FrameArena(budgetBytes: Int(settings.dirtyMemoryBytes) / count), journals: journals,
                log: log, settings: diskSettings(settings), grace: grace)
        }
    }

    private func diskSettings(_ settings: Settings) -> DiskSettings {
        var disk = DiskSettings()
        disk.commitIntervalMs = settings.commitIntervalMs
        disk.journalLimitBytes = settings.journalPerDiskBytes
        disk.requestTimeoutMs = settings.readTimeoutMs
        disk.uploadParallelism = settings.uploads
        #if MARGARINE_FAULTS
            disk.fault = Fault.ofEnvironment(log)
        #endif
        return disk
    }

    private func limits(_ settings: Settings) -> ConnectionLimits {
        var limits = ConnectionLimits()
        limits.connections = settings.maxConnections
        limits.handshakeTimeoutMs = UInt64(settings.handshakeTimeoutMs)
        return limits
    }

    private func listen(_ settings: Settings, _ parts: Parts) async throws -> [String] {
        var addresses: [String] = []
        for address in settings.listen {
            for bound in try await parts.listener.listen(on: .tcp(host: address.host, port: address.port)) {
                addresses.append("tcp://\(bound)")
            }
        }
        for path in settings.unix {
            for bound in try await parts.listener.listen(on: .unix(path: path)) { addresses.append("\(bound)") }
        }
        return addresses
    }

    // MARK: Heartbeat

    private func heartbeat(
        _ server: ServerIdentity, addresses: [String], reading: [String] = [], _ settings: Settings
    ) -> ServerRecord {
        LocalProcess.record(
            id: server.id, addresses: addresses, environment: environment, freshForMs: settings.ownerDeadAfterMs,
            reading: reading)
    }

    /// Says that this server lives, at every location that answers, before it takes a disk; the near one must.
    private func firstBeat(_ store: Store, _ server: ServerIdentity, _ settings: Settings) async throws(CatalogError) {
        let record = heartbeat(server, addresses: [], settings)
        _ = try await inParallel(store.locations.all, limit: 16) { (location) async throws(CatalogError) -> Bool in
            if location.trouble() != nil { return false }
            do throws(CatalogError) {
                try await store.hastyHeads(at: location).beat(record)
                return true
            } catch {
                if location.number == store.locations.near { throw error }
                return false
            }
        }
    }

    /// Says that this server lives, and looks whether its disks are still its own, as long as it runs: at one location,
    /// so that one that is out of reach delays no other.
    private func beat(_ parts: Parts, at location: Location) async {
        let heads = parts.store.heads(at: location.number)
        var isAway = location.trouble() != nil
        while true {
            let (settings, addresses, isDraining) = state.withLock { ($0.settings, $0.addresses, $0.isDraining) }
            if isDraining, !parts.disks.hasDisks { return }
            do {
                try await heads.beat(
                    heartbeat(parts.server, addresses: addresses, reading: parts.disks.reading, settings))
                if location.number == parts.store.locations.near {
                    try await parts.grace.refresh(heads.bucket, environment: environment)
                }
                if location.number == 0 {
                    try await parts.collected.refresh(heads.bucket, environment: environment)
                }
                if isAway, parts.store.locations.hasSeveral {
                    log.notice("location '\(location.name)' is in reach again")
                }
                isAway = false
            } catch {
                log.warning("the heartbeat could not be written: \(error)")
                isAway = true
            }
            await parts.disks.checkOwnership(at: location.number)
            await environment.sleep(ns: UInt64(settings.heartbeatIntervalMs) * 1_000_000)
        }
    }

    // MARK: The end

    /// Admits no new sessions, finishes what is in flight, commits the disks and closes everything.
    public func drain() async throws {
        let parts = state.withLock { state in
            state.isDraining = true
            return state.parts
        }
        guard let parts else { return }
        await parts.collection.stop()
        await parts.listener.drain(timeoutMs: 10_000)
        for path in state.withLock({ $0.settings.unix }) { unlink(path) }
        await parts.disks.drain()
        if !parts.disks.hasDisks { await parts.store.forget(server: parts.server.id) }
    }

    /// Takes over what can change while running; the rest of `settings` equals what runs.
    public func reload(settings: Settings) {
        let parts = state.withLock { state in
            state.settings = settings
            return state.parts
        }
        parts?.disks.apply(diskSettings(settings))
        parts?.collection.apply(settings)
    }

    /// Looks at the heads of its disks now rather than with the next heartbeat: somebody has changed one.
    public func look() async -> ControlAnswer {
        await state.withLock { $0.parts }?.disks.checkOwnership()
        return ControlAnswer()
    }

    /// Once started.
    var disks: DiskManager? { state.withLock { $0.parts }?.disks }

    // MARK: Status

    public func status() async -> StatusReport {
        let (settings, parts, addresses, isDraining) = state.withLock {
            ($0.settings, $0.parts, $0.addresses, $0.isDraining)
        }
        var daemon = DaemonStatus(
            pid: getpid(), uptimeMs: Int64((environment.nowNs - startedAtNs) / 1_000_000), scratch: settings.scratch,
            addresses: addresses)
        daemon.isDraining = isDraining
        daemon.residentBytes = ServerFiles.residentBytes()
        daemon.dirtyMemoryLimitBytes = settings.dirtyMemoryBytes
        daemon.journalLimitBytes = settings.journalBytes
        guard let parts else {
            return StatusReport(
                daemon: daemon, store: StoreStatus(name: settings.places.map(\.url).joined(separator: " ")),
                memoryCache: CacheStatus(),
                scratchCache: CacheStatus(), sessions: [], disks: [])
        }
        daemon.serverID = parts.server.id
        daemon.connections = parts.listener.connectionCount
        let disks = await parts.disks.forEachDisk { disk in (disk.status(), disk.sessionStatus()) }
        daemon.dirtyMemoryBytes = disks.reduce(0) { $0 + $1.0.dirtyBytes }
        daemon.journalBytes = disks.reduce(0) { $0 + $1.0.journalBytes }
        var sessions = disks.compactMap(\.1)
        for connection in await parts.listener.sessions() { Daemon.add(connection, to: &sessions) }
        sessions.sort { ($0.address, $0.export) < ($1.address, $1.export) }
        var report = StatusReport(
            daemon: daemon, store: storeStatus(parts), memoryCache: memoryStatus(parts.cache),
            scratchCache: scratchStatus(parts.files, parts.cache), sessions: sessions,
            disks: disks.map(\.0).sorted { $0.name < $1.name })
        report.collection = parts.collection.status
        return report
    }

    /// Adds a connection's counts to its session, or makes one for a reader of a generation.
    private static func add(_ connection: ConnectionStatus, to sessions: inout [SessionStatus]) {
        let export = connection.exportName
        let place: Int
        if let found = sessions.firstIndex(where: { $0.export == export }) {
            place = found
        } else {
            sessions.append(
                SessionStatus(address: connection.client.address, export: export, session: nil, connections: 0))
            place = sessions.count - 1
        }
        if export.contains("@") { sessions[place].connections += 1 }
        sessions[place].requests += connection.counters.requests
        sessions[place].readBytes += connection.counters.readBytes
        sessions[place].writtenBytes += connection.counters.writtenBytes
    }

    private func storeStatus(_ parts: Parts) -> StoreStatus {
        let counts = parts.counters.snapshot
        let locations = parts.store.locations
        var status = StoreStatus(name: locations[locations.near]!.alone.name)
        if locations.hasSeveral {
            status.locations = locations.all.map {
                LocationStatus(
                    name: $0.name, url: $0.alone.name, isNear: $0.number == locations.near, trouble: $0.trouble())
            }
        }
        let calls = [counts.get, counts.put, counts.list, counts.delete]
        status.requests = calls.reduce(0) { $0 + $1.started }
        status.retries = counts.retries
        status.errors = counts.errors.failures
        status.readBytes = counts.get.bytes
        status.writtenBytes = counts.put.bytes
        status.lastError = counts.lastError
        status.lastErrorAgeMs = counts.lastErrorWallMs.map { environment.wallMs - $0 }
        return status
    }

    private func memoryStatus(_ cache: SliceCache) -> CacheStatus {
        let counts = cache.snapshot
        var status = CacheStatus()
        status.usedBytes = counts.heldBytes
        status.limitBytes = counts.budgetBytes
        status.hits = counts.hits
        status.misses = counts.misses
        return status
    }

    private func scratchStatus(_ files: BlockFiles, _ cache: SliceCache) -> CacheStatus {
        let counts = files.snapshot
        var status = CacheStatus()
        status.usedBytes = counts.heldBytes
        status.limitBytes = counts.budgetBytes
        status.hits = counts.reads
        status.misses = cache.snapshot.misses &- min(counts.reads, cache.snapshot.misses)
        return status
    }
}
