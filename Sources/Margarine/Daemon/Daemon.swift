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

    /// What the machine, or the container, lets this process have.
    private let memory: MemoryLimit

    private struct State {
        /// Fitted to the memory.
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
        /// Accepts and shakes hands; waits for no store. What loads and listings take is done on `errands`.
        let door: Loop
        /// Renews this server's records, and does nothing else.
        let pulse: Loop
        /// One for each location.
        let heartbeats: [Heartbeat]
        /// For commits: as the near location says.
        let grace: GraceGauge
        /// For collections: as the first location says.
        let collected: GraceGauge
        let collection: ScheduledCollection

        init(
            store: Store, counters: StoreCounters, server: ServerIdentity, cache: SliceCache, files: BlockFiles,
            contexts: [DiskContext], disks: DiskManager, listener: Listener, door: Loop,
            pulse: Loop, heartbeats: [Heartbeat], grace: GraceGauge, collected: GraceGauge,
            collection: ScheduledCollection
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
            self.pulse = pulse
            self.heartbeats = heartbeats
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
        memory = MemoryLimit.find()
        let settings = settings.fitted(to: memory)
        log.info(
            "memory",
            metadata: [
                "limit": "\(ByteSize.readable(memory.bytes))", "of": "\(memory.source)",
                "memory-cache": "\(ByteSize.text(settings.memoryCacheBytes))",
                "dirty-memory": "\(ByteSize.text(settings.dirtyMemoryBytes))", "uploads": "\(settings.uploads)",
            ])
        if let warning = settings.memoryWarning(memory) { log.warning("\(warning)") }
        lock = try ScratchLock(directory: settings.scratch)
        environment = SystemEnvironment(workers: settings.workerCount(cores: Daemon.cores))
        try environment.prepare()
        startedAtNs = environment.nowNs
        state = Mutex(State(settings: settings))
    }

    private static var cores: Int { max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN))) }

    /// Opens the store, takes up the journals, and listens.
    /// - Returns: the addresses it serves, such as `tcp://127.0.0.1:10809` and `unix:/path`.
    public func start() async throws -> [String] {
        let settings = state.withLock { $0.settings }
        let counters = StoreCounters { [log] in Daemon.tell($0, log) }
        let watch = StartWatch(log: log, environment: environment) { [environment] in
            let counts = counters.snapshot
            guard let text = counts.lastError, let wallMs = counts.lastErrorWallMs else { return nil }
            return (text, environment.wallMs - wallMs)
        }
        defer { watch.end() }
        let urls = settings.places.map(\.url).joined(separator: " ")
        watch.now(
            "waiting for the store \(urls)",
            remedy: "check that it can be reached, has room, and takes these keys; 'margined check' looks for damage")
        let scratch = try DirectoryScratch(path: settings.scratch)
        let server = try ServerFiles.identity(in: settings.scratch, environment: environment)
        let store = try await Store.open(
            urls: settings.places, near: settings.near, environment: environment, counters: counters)
        for location in store.locations.all {
            if let trouble = location.trouble() {
                log.warning("location '\(location.name)' is out of reach; what needs it waits or fails: \(trouble)")
            }
        }
        watch.now(
            "waiting for the store \(urls) to take this server's heartbeat",
            remedy: "check that it has room and that these keys may write")
        let leases = Leases(store.locations.all.map(\.number))
        let heartbeats = store.locations.all.map {
            makeHeartbeat(at: $0, store, server, settings, counters, lease: leases[$0.number])
        }
        try await firstBeats(heartbeats, store)
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
        try door.start()
        let errands = try Loop(name: "errands")
        try errands.start()
        let pulse = try Loop(name: "heartbeat")
        try pulse.start()
        try AddressSpace.check(
            settings.memoryCacheBytes + settings.dirtyMemoryBytes, for: "memory-cache and dirty-memory together")
        let cache = SliceCache(budgetBytes: settings.memoryCacheBytes)
        let files = BlockFiles(disk: scratch, budgetBytes: settings.scratchCacheBytes, environment: environment)
        let loader = BlockLoader(
            locations: store.locations.buckets, cache: cache, files: files, environment: environment,
            spawn: { errands.run(task: $0) })
        let contexts = try makeContexts(settings, scratch, store, loader, grace)
        let disks = DiskManager(
            contexts: contexts, store: store, server: server, takeover: settings.takeover, log: log,
            owners: OwnerWatch(
                name: "server \(server.id) on \(server.host)", environment: environment, process: LocalProcess.state,
                fault: contexts[0].settings.fault),
            leases: leases)
        let listener = Listener(provider: disks, loop: door, asking: errands, limits: limits(settings), log: log)
        let parts = Parts(
            store: store, counters: counters, server: server, cache: cache, files: files, contexts: contexts,
            disks: disks, listener: listener, door: door, pulse: pulse, heartbeats: heartbeats, grace: grace,
            collected: collected,
            collection: ScheduledCollection(store: store, scratch: scratch, server: server, grace: collected, log: log))
        state.withLock { $0.parts = parts }

        // From here on the leases stand as long as the store answers: taking up journals may last.
        for heartbeat in heartbeats { pulse.run { [weak self] in await self?.beat(parts, heartbeat) } }
        watch.now(
            "taking stock of the cached blocks in '\(settings.scratch)'",
            remedy: "nothing is wrong unless that disk is; 'blocks' in it may be removed while margined is stopped")
        await files.start()
        if ServerFiles.bootID() == nil {
            log.warning(
                "/proc/sys/kernel/random/boot_id can't be read: every crash of this process will count as a loss of power"
            )
        }
        await disks.recover { disk in
            watch.now(
                "taking up the journal of disk \(disk)",
                remedy: "its head must be read from the store; clients are served once all journals are taken up")
        }
        watch.now("binding the addresses", remedy: "check 'listen' and 'unix'")
        let addresses = try await listen(settings, parts)
        state.withLock { $0.addresses = addresses }
        for location in store.locations.all { door.run { [weak self] in await self?.look(parts, at: location) } }
        parts.collection.apply(settings)
        return addresses
    }

    /// One line for each change in how the store answers.
    private static func tell(_ trouble: StoreTrouble, _ log: Logger) {
        switch trouble.change {
        case .denied:
            log.warning(
                "the store refuses (\(trouble.verb)): \(trouble.description). Reads wait until read-timeout, writes and commits until it is mended; nothing is lost meanwhile"
            )
        case .unavailable:
            log.warning(
                "the store does not answer (\(trouble.verb)): \(trouble.description). Reads wait until read-timeout, writes and commits until it answers; nothing is lost meanwhile"
            )
        case .over(let durationMs, let failures):
            log.notice(
                "the store answers again (\(trouble.verb)): \(trouble.bucket) did not for \(DurationMs.readable(durationMs)), \(failures) requests failed"
            )
        }
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
                manifests: ManifestCache(
                    store.locations, budgetBytes: max(4 << 20, Int(MemoryBudgets(memory).manifestBytes) / count)),
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
        disk.sessionAddresses = settings.sessionAddresses
        #if MARGARINE_FAULTS
            disk.fault = Fault.ofEnvironment(log)
        #endif
        return disk
    }

    private func limits(_ settings: Settings) -> ConnectionLimits {
        var limits = ConnectionLimits()
        limits.connections = settings.maxConnections
        limits.handshakeTimeoutMs = UInt64(settings.handshakeTimeoutMs)
        let budgets = MemoryBudgets(memory)
        limits.budgetBytes = Int(budgets.requestBytes)
        limits.pooledBytesPerLoop = Int(budgets.pooledBytesPerLoop)
        // All connections together take an eighth of the memory at most with what is their own.
        let share = Int(clamping: memory.bytes / 8) / (limits.connections + limits.connectionsForOthers)
        limits.ownBytesPerConnection = min(limits.ownBytesPerConnection, max(16 << 10, share & ~4095))
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

    private func makeHeartbeat(
        at location: Location, _ store: Store, _ server: ServerIdentity, _ settings: Settings,
        _ counters: StoreCounters,
        lease: Lease
    ) -> Heartbeat {
        let heads = HeadStore(
            bucket: ownWay(to: location, settings, counters), environment: environment, location: location.number)
        return Heartbeat(
            lease: lease, heads: heads, log: log,
            interval: { [weak self] in self?.state.withLock { $0.settings.heartbeatIntervalMs } ?? 1000 },
            content: { [weak self, environment] in
                let (now, parts, addresses) =
                    self?.state.withLock { ($0.settings, $0.parts, $0.addresses) } ?? (settings, nil, [])
                return LocalProcess.record(
                    id: server.id, addresses: addresses, environment: environment, freshForMs: now.ownerDeadAfterMs,
                    reading: parts?.disks.reading ?? [])
            })
    }

    /// A way to a location for its heartbeat alone: nothing that others ask of the store stands in front of it, and a
    /// request that hangs is given up while there is time for another.
    private func ownWay(to location: Location, _ settings: Settings, _ counters: StoreCounters) -> any Bucket {
        let url = settings.places.first { $0.name == location.name }?.url ?? settings.places[0].url
        var transport = TransportSettings()
        transport.connections = 2
        let patienceMs = Int(min(max(settings.ownerDeadAfterMs / 6, 1000), 10_000))
        transport.connectTimeoutMs = min(patienceMs, 3000)
        transport.totalTimeoutMs = patienceMs
        transport.stallTimeoutSeconds = max(1, patienceMs / 1000)
        let bucket = LocationBucket(location.name, opened: nil, environment: environment) {
            [environment, transport] () async throws(StoreError) -> any Bucket in
            // It is the right one.
            _ = try await location.hasty.get(Store.key, range: 0..<0)
            return try await openTransport(
                url: url, environment: environment, check: false, transport: transport, counters: counters)
        }
        let policy = RetryPolicy(firstPauseMs: 50, longestPauseMs: 500, deadlineMs: 1500)
        return RetryingBucket(bucket, environment: environment, policy: policy, counters: counters)
    }

    /// Says that this server lives, at every location that answers, before it takes a disk; the near one must.
    private func firstBeats(_ heartbeats: [Heartbeat], _ store: Store) async throws(CatalogError) {
        _ = try await inParallel(heartbeats, limit: 16) { (heartbeat) async throws(CatalogError) -> Bool in
            let location = store.locations[heartbeat.lease.location]!
            if location.trouble() != nil { return false }
            do throws(CatalogError) {
                try await heartbeat.renew()
                return true
            } catch {
                if location.number == store.locations.near { throw error }
                return false
            }
        }
    }

    /// Proves that this server lives as long as it runs.
    private func beat(_ parts: Parts, _ heartbeat: Heartbeat) async {
        var before: (@Sendable () async -> Void)?
        if parts.contexts[0].settings.fault == .heartbeatWaits {
            before = { await parts.disks.checkOwnership(at: heartbeat.lease.location) }
        }
        await heartbeat.run(before: before) { [weak self] in
            guard let self else { return true }
            return self.state.withLock { $0.isDraining } && !parts.disks.hasDisks
        }
    }

    /// Looks for what users changed in the heads of its disks, and at the grace period: at one location, so that one that
    /// is out of reach delays no other.
    private func look(_ parts: Parts, at location: Location) async {
        let bucket = parts.store.heads(at: location.number).bucket
        var isTold = false
        while true {
            let (intervalMs, isDraining) = state.withLock { ($0.settings.heartbeatIntervalMs, $0.isDraining) }
            if isDraining, !parts.disks.hasDisks { return }
            do throws(CatalogError) {
                if location.number == parts.store.locations.near {
                    try await parts.grace.refresh(bucket, environment: environment)
                }
                if location.number == 0 { try await parts.collected.refresh(bucket, environment: environment) }
                isTold = false
            } catch {
                if !isTold { log.warning("how long a commit may take can't be asked: \(error); it is asked again") }
                isTold = true
            }
            await parts.disks.checkOwnership(at: location.number)
            await environment.sleep(ns: UInt64(intervalMs) * 1_000_000)
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
        await parts.disks.drain()
        guard !parts.disks.ownsDisks else { return }
        for heartbeat in parts.heartbeats { heartbeat.end() }
        await parts.store.forget(server: parts.server.id)
    }

    /// Takes over what can change while running; the rest of `settings` equals what runs.
    public func reload(settings: Settings) {
        let settings = settings.fitted(to: memory)
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
