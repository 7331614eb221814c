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
    var cacheBytes: UInt64 = 4 << 20
    var blockFileBytes: UInt64 = 64 << 20
    var takeover = Takeover.dead
    var network = NetworkShape()
    /// It says every second that it lives, and what it reads.
    var beats = false
    /// How long a call on the store is repeated.
    var deadlineMs: UInt64 = 20_000
    var fault: Fault?
}

final class SimServer: @unchecked Sendable {  // as its world
    let id: String
    let world: World
    let clock: World.Clock
    let environment: SimEnvironment
    /// One for each location.
    let buckets: [SimBucket]
    let scratch: MemoryScratch
    let context: DiskContext
    let manager: DiskManager
    let files: BlockFiles
    let loop: Loop
    private let door: Loop
    private let served: ServerContext
    let network: NetworkShape
    private(set) var isAlive = true
    var connections: [SimConnection] = []

    init(
        _ world: World, _ store: SimStore, id: String, scratch: MemoryScratch, bootID: String, shape: ServerShape,
        near: UInt8, isAlive: @escaping @Sendable (String) -> Bool
    ) {
        self.id = id
        self.world = world
        self.scratch = scratch
        clock = world.makeClock(id, rate: 900 + UInt64(world.chance.below(201)))
        environment = SimEnvironment(world, clock)
        environment.wallOffsetMs += Int64(world.chance.below(10_000_000)) - 5_000_000
        buckets = (0..<store.memories.count).map { SimBucket(world, store, sender: id, location: $0) }
        loop = clock.makeLoop("\(id)-disks")
        let door = clock.makeLoop("\(id)-door")
        self.door = door
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
        settings.releaseAfterMs = 5_000
        settings.fault = shape.fault
        var log = Logger(label: id) { [weak world] _ in TraceLog(world: world, server: id) }
        log.logLevel = world.isTracing ? .debug : .critical
        context = DiskContext(
            loop: loop, environment: environment, scratch: scratch, locations: locations, loader: loader,
            manifests: ManifestCache(locations, budgetBytes: 4 << 20),
            arena: FrameArena(budgetBytes: shape.dirtyBytes), journals: JournalBudget(limitBytes: shape.journalBytes),
            log: log, settings: settings, grace: grace)
        let server = id
        manager = DiskManager(
            contexts: [context],
            store: opened,
            server: ServerIdentity(id: id, host: id, bootID: bootID), takeover: shape.takeover, log: log,
            isAlive: { other, _ in other != server && isAlive(other) ? "it runs" : nil })
        served = ServerContext(
            provider: manager, loop: door, limits: network.limits, log: log, budgetBytes: network.budgetBytes)
        loop.run { [self] in
            await files.start()
            while (try? await grace.refresh(opened.bucket, environment: environment)) == nil {
                await environment.sleep(ns: 100_000_000)
            }
            await manager.recover()
            while self.isAlive {
                await environment.sleep(ns: 1_000_000_000)
                try? await grace.refresh(opened.bucket, environment: environment)
                if shape.beats { await beat(opened) }
                await manager.checkOwnership()
            }
        }
    }

    private func beat(_ store: Store) async {
        for location in store.locations.all {
            try? await store.heads(at: location.number).beat(
                ServerRecord(
                    id: id, host: id, bootID: "", pid: 1, pidNamespace: "", startTicks: 0, addresses: [],
                    timeMs: environment.wallMs, reading: manager.reading))
        }
    }

    /// How full it is, for people.
    var state: String {
        "\(id): \(context.arena.inUse) of \(context.arena.capacity) frames, \(context.journals.usedBytes) bytes of journals"
    }

    /// A scratch disk whose completions take their time and come back to the loop that asked.
    static func makeDeliver(_ world: World) -> MemoryScratch.Deliver {
        { work in
            guard let loop = Loop.current else { preconditionFailure("a scratch call from no loop") }
            world.after(world.chance.ns(5_000...2_000_000)) { loop.post(work) }
        }
    }

    /// A client has connected; this is the server's end.
    func accept(_ socket: FileDescriptor) {
        door.post { [served] in
            served.welcome(socket, client: ClientIdentity(address: "client:1", host: "client"))
        }
    }

    /// Something happened at the other end of one of its sockets.
    func socketsMayBeReady() {
        door.descriptorsMayBeReady()
        loop.descriptorsMayBeReady()
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
        if let world, world.isTracing { print("    [\(server)] \(event.message)") }
    }
}
