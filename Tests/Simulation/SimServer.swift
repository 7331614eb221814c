// One daemon of the simulated world: everything of a real one between its connections and its seams, on loops that the world
// steps. A restart is a new server on the same scratch disk.

import BlockCache
import Logging
import ObjectStore
import Runtime

@testable import Margarine

/// What a server is made with; small, so that everything fills up.
struct ServerShape {
    var commitIntervalMs: Int64 = 200
    var journalPerDiskBytes: UInt64 = 64 << 20
    var journalBytes: UInt64 = 128 << 20
    var dirtyBytes = 4 << 20
    /// Journals have little room, and are committed at any instant for that.
    var isTight = false
    var cacheBytes: UInt64 = 4 << 20
    var blockFileBytes: UInt64 = 64 << 20
    var takeover = Takeover.dead
    var network = NetworkShape()
    /// How often it renews its record, and after which time without that it counts as dead.
    var heartbeatMs: Int64 = 1_000
    var deadAfterMs: Int64 = 5_000
    /// How long a call on the store is repeated.
    var deadlineMs: UInt64 = 20_000
    var fault: Fault?
    /// It answers only while it can prove that a disk is its own. Checked.
    var provesOwnership = true
    /// What a call on the store mostly takes at most, each way.
    var latencyNs: UInt64 = 8_000_000
    /// For manifest pages, of each loop.
    var manifestBytes = 4 << 20
    /// Disk loops.
    var loops = 1
    /// A disk that nobody uses is given back after so long.
    var releaseAfterMs: Int64 = 5_000
}

final class SimServer: @unchecked Sendable {  // as its world
    let id: String
    let world: World
    let clock: World.Clock
    let environment: SimEnvironment
    /// One for each location.
    let buckets: [SimBucket]
    let scratch: MemoryScratch
    /// One for each disk loop.
    let contexts: [DiskContext]
    let manager: DiskManager
    let files: BlockFiles
    private let door: Loop
    /// Renews its records, and does nothing else.
    private let pulse: Loop
    private let served: ServerContext
    let network: NetworkShape
    private(set) var isAlive = true
    private let startedNs: UInt64
    var connections: [SimConnection] = []
    /// Since when it takes no step.
    var stoppedAtNs: UInt64?

    init(
        _ world: World, _ store: SimStore, id: String, scratch: MemoryScratch, bootID: String, shape: ServerShape,
        near: UInt8, obstacles: Obstacles
    ) {
        self.id = id
        self.world = world
        self.scratch = scratch
        clock = world.makeClock(id, rate: 900 + UInt64(world.chance.below(201)))
        environment = SimEnvironment(world, clock)
        environment.wallOffsetMs += Int64(world.chance.below(10_000_000)) - 5_000_000
        buckets = (0..<store.memories.count).map {
            SimBucket(world, store, sender: id, location: $0, obstacles: obstacles)
        }
        for bucket in buckets { bucket.mostNs = shape.latencyNs }
        let loops = (0..<shape.loops).map { [clock] in clock.makeLoop("\(id)-disks-\($0)", isWidened: true) }
        let door = clock.makeLoop("\(id)-door", isWidened: true)
        self.door = door
        pulse = clock.makeLoop("\(id)-heartbeat")
        network = shape.network
        let opened = store.open(buckets, environment, near: near, deadlineMs: shape.deadlineMs)
        let locations = opened.locations
        files = BlockFiles(
            disk: scratch, budgetBytes: shape.blockFileBytes, environment: environment, reserveBytes: 0)
        let loader = BlockLoader(
            locations: locations.buckets, cache: SliceCache(budgetBytes: shape.cacheBytes), files: files,
            environment: environment, spawn: { door.run(task: $0) })
        let grace = GraceGauge()
        var settings = DiskSettings()
        settings.commitIntervalMs = shape.commitIntervalMs
        settings.journalLimitBytes = shape.journalPerDiskBytes
        settings.journalSegmentBytes = 96 << 10
        settings.releaseAfterMs = shape.releaseAfterMs
        settings.fault = shape.fault
        var log = Logger(label: id) { [weak world] _ in TraceLog(world: world, server: id) }
        log.logLevel = world.isTracing ? .debug : .critical
        let journals = JournalBudget(limitBytes: shape.journalBytes)
        let options = settings
        contexts = loops.map { [environment] loop in
            DiskContext(
                loop: loop, environment: environment, scratch: scratch, locations: locations, loader: loader,
                manifests: ManifestCache(locations, budgetBytes: shape.manifestBytes),
                arena: FrameArena(budgetBytes: shape.dirtyBytes), journals: journals, log: log, settings: options,
                grace: grace)
        }
        let server = id
        let leases = Leases(opened.locations.all.map(\.number))
        startedNs = world.nowNs
        manager = DiskManager(
            contexts: contexts,
            store: opened,
            server: ServerIdentity(id: id, host: id, bootID: bootID), takeover: shape.takeover, log: log,
            owners: OwnerWatch(
                name: server, environment: environment, process: { _ in .outOfSight }, fault: shape.fault),
            leases: leases)
        served = ServerContext(
            provider: manager, loop: door, limits: network.limits, log: log, budgetBytes: network.budgetBytes)
        loops[0].run { [self] in await lookAtMemory(shape) }
        loops[0].run { [self] in
            await files.start()
            beat(leases, shape)
            while (try? await grace.refresh(opened.bucket, environment: environment)) == nil {
                await environment.sleep(ns: 100_000_000)
            }
            await manager.recover()
            while self.isAlive {
                await environment.sleep(ns: 1_000_000_000)
                try? await grace.refresh(opened.bucket, environment: environment)
                await manager.checkOwnership()
            }
        }
    }

    // MARK: Memory

    /// Looks at what the disks hold, as long as the server lives.
    private func lookAtMemory(_ shape: ServerShape) async {
        requests = served.share(of: contexts[0].loop).budget
        while isAlive {
            await environment.sleep(ns: 1_000_000_000)
            // A dirty page is in a frame, or in the journal, or in both.
            let most = Int(shape.journalPerDiskBytes) + shape.dirtyBytes + (2 << 20)
            let held = await manager.forEachDisk { disk in
                (disk.name, disk.pages.count * Geometry.pageBytes, disk.pendingRequests.count, disk.clients.count)
            }
            disks = held.map { "\($0.0): \($0.1) bytes dirty, \($0.2) requests, \($0.3) connections" }
            for (name, bytes, requests, clients) in held {
                if bytes > most { world.violate("\(id) holds \(bytes) bytes of dirty pages of \(name)") }
                // Of those that left, what is under way may still be.
                if requests > network.limits.requestsPerConnection * (clients + 64) {
                    world.violate("\(id) holds \(requests) requests of \(name)")
                }
            }
        }
    }

    /// Whether the disk's journal is what others will ask for room, and no commit has any of it yet.
    func isInTheWay(_ name: String) async -> Bool {
        let limit = min(contexts[0].journals.limitBytes, contexts[0].settings.journalLimitBytes)
        let held = await manager.forEachDisk { disk in
            let isCommitting = disk.waiting != nil || disk.committing != nil || disk.isCommitting
            return disk.name == name && !isCommitting && !disk.active.isEmpty ? disk.journal.liveBytes : 0
        }
        return held.contains { $0 > limit / 2 }
    }

    /// Whether the disk was rolled back, and its journal does not say so yet.
    func owesRollBack(_ name: String) async -> Bool {
        await manager.forEachDisk { disk in disk.name == name && disk.journal.isMissingEnds }.contains(true)
    }

    /// Of the common budget for requests and replies; below 0: overdrawn.
    var freeRequestBytes: Int { requests?.availableBytes ?? network.budgetBytes }
    private var requests: RequestBudget?

    /// What it holds though nobody uses it any more. nil: nothing.
    var leftover: String? {
        if manager.hasDisks { return "disks" }
        if let context = contexts.first(where: { $0.arena.inUse > 0 }) { return "\(context.arena.inUse) frames" }
        let journalBytes = contexts[0].journals.usedBytes
        if journalBytes > 0 { return "\(journalBytes) bytes of journals" }
        // Loops keep a little in reserve.
        let missing = network.budgetBytes - freeRequestBytes
        return missing > (contexts.count + 1) * (4 << 20) ? "\(missing) bytes of requests" : nil
    }

    /// Renews its record at each location, each by itself.
    private func beat(_ leases: Leases, _ shape: ServerShape) {
        let policy = RetryPolicy(firstPauseMs: 50, longestPauseMs: 500, deadlineMs: 1_500)
        for bucket in buckets {
            let number = UInt8(bucket.location)
            let heads = HeadStore(
                bucket: RetryingBucket(bucket, environment: environment, policy: policy), environment: environment,
                location: number)
            let heartbeat = Heartbeat(
                lease: leases[number], heads: heads, log: contexts[0].log, interval: { shape.heartbeatMs },
                content: { [unowned self] in
                    ServerRecord(
                        id: id, host: id, bootID: "", pid: 1, pidNamespace: "", startTicks: 0, addresses: [],
                        timeMs: environment.wallMs, freshForMs: shape.deadAfterMs, reading: manager.reading)
                })
            var before: (@Sendable () async -> Void)?
            if shape.fault == .heartbeatWaits { before = { [manager] in await manager.checkOwnership(at: number) } }
            let look = before
            pulse.run { await heartbeat.run(before: look) { [unowned self] in !isAlive } }
        }
    }

    /// After a stop or a suspension.
    func goOn() {
        clock.goOn()
        stoppedAtNs = nil
        for bucket in buckets { bucket.noteTrouble() }
    }

    /// Whether it has had every chance to renew its record at a location for longer than others must watch it.
    func couldRenew(at location: Int) -> Bool {
        // Its clock and the other's may differ by a fifth.
        let patienceNs = UInt64(5_000 * 13 / 10 + 2_000) * 1_000_000
        let bucket = buckets[location]
        return isAlive && !clock.isStopped && world.nowNs > startedNs + patienceNs && !bucket.faults.isDown
            && bucket.recordsHeldUp == 0 && world.nowNs > bucket.troubledNs + patienceNs
    }
    /// What its disks held when it was last looked, for people.
    private var disks: [String] = []

    /// How full it is, for people.
    var state: String {
        "\(id): \(contexts.map { "\($0.arena.inUse) of \($0.arena.capacity)" }) frames, \(contexts[0].journals.usedBytes) bytes of journals; \(disks)"
    }

    /// A scratch disk whose completions take their time and come back to the loop that asked.
    static func makeDeliver(_ world: World) -> MemoryScratch.Deliver {
        { work in
            guard let loop = Loop.current else { preconditionFailure("a scratch call from no loop") }
            world.after(world.chance.ns(5_000...2_000_000) + world.delay()) { loop.post(work) }
        }
    }

    /// A client has connected; this is the server's end.
    func accept(_ socket: FileDescriptor, host: String) {
        door.post { [served] in
            served.welcome(socket, client: ClientIdentity(address: "\(host):1", host: host))
        }
    }

    /// Something happened at the other end of one of its sockets.
    func socketsMayBeReady() {
        door.descriptorsMayBeReady()
        for context in contexts { context.loop.descriptorsMayBeReady() }
    }

    /// Sockets that it has not closed.
    var connectionCount: Int { served.connectionCount }

    /// Ends at this instant, as by a signal that cannot be caught. Its connections break.
    func kill() {
        isAlive = false
        world.stop(clock)
        for connection in connections { connection.serverDied() }
        connections = []
    }
}

/// Messages of the servers, in the trace.
private struct TraceLog: LogHandler {
    weak var world: World?
    let server: String
    var logLevel = Logger.Level.critical
    var metadata: Logger.Metadata = [:]
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }
    func log(event: LogEvent) {
        guard let world, world.isTracing else { return }
        let reason = event.metadata?["reason"].map { ": \($0)" } ?? ""
        print("    [\(server)] \(event.message)\(reason)")
    }
}
