// What a running daemon is doing, as `margined status` shows it. Plain values, encoded as JSON on the control socket:
// fields may be added, and are never renamed or given another unit.
//
// Ages and durations are in milliseconds, sizes in bytes, counters count since the daemon started.

/// Whoever can say what the daemon is doing. Called from tasks of the control socket, several at once perhaps.
public protocol StatusSource: Sendable {
    func status() async -> StatusReport
}

public struct StatusReport: Codable, Sendable, Equatable {
    public var daemon: DaemonStatus
    public var store: StoreStatus
    public var memoryCache: CacheStatus
    public var scratchCache: CacheStatus
    /// By address, then export.
    public var sessions: [SessionStatus]
    /// Disks that are served or still have something to commit, by name.
    public var disks: [DiskStatus]
    /// nil before the daemon serves.
    public var collection: CollectionStatus?
    public init(
        daemon: DaemonStatus, store: StoreStatus, memoryCache: CacheStatus, scratchCache: CacheStatus,
        sessions: [SessionStatus], disks: [DiskStatus]
    ) {
        self.daemon = daemon
        self.store = store
        self.memoryCache = memoryCache
        self.scratchCache = scratchCache
        self.sessions = sessions
        self.disks = disks
    }
}

/// The process.
public struct DaemonStatus: Codable, Sendable, Equatable {
    public var version = Version.text
    public var pid: Int32
    public var uptimeMs: Int64
    /// The name of this server in heads and heartbeats.
    public var serverID: String?
    public var scratch: String
    /// Where it serves NBD: `tcp://127.0.0.1:10809`, `unix:/path`.
    public var addresses: [String]
    /// SIGTERM has come: no new sessions, the rest is being committed.
    public var isDraining = false
    public var connections = 0
    /// Memory of the process that is in RAM.
    public var residentBytes: UInt64 = 0
    /// Dirty pages in memory, all disks.
    public var dirtyMemoryBytes: UInt64 = 0
    public var dirtyMemoryLimitBytes: UInt64 = 0
    /// Journals on scratch, all disks.
    public var journalBytes: UInt64 = 0
    public var journalLimitBytes: UInt64 = 0
    public init(pid: Int32, uptimeMs: Int64, scratch: String, addresses: [String]) {
        self.pid = pid
        self.uptimeMs = uptimeMs
        self.scratch = scratch
        self.addresses = addresses
    }
}

/// The object store, as this daemon sees it.
public struct StoreStatus: Codable, Sendable, Equatable {
    /// URL without secrets.
    public var name: String
    public var requests: UInt64 = 0
    /// Tries that were made again.
    public var retries: UInt64 = 0
    /// Tries that failed, other than by a plain "not there" or "condition does not hold".
    public var errors: UInt64 = 0
    public var readBytes: UInt64 = 0
    public var writtenBytes: UInt64 = 0
    public var lastError: String?
    public var lastErrorAgeMs: Int64?
    /// The locations, where the store has several.
    public var locations: [LocationStatus]?
    public init(name: String) { self.name = name }
}

/// One location of a store that has several.
public struct LocationStatus: Codable, Sendable, Equatable {
    public var name: String
    /// Without secrets.
    public var url: String
    /// New objects go there.
    public var isNear: Bool
    /// Why it is out of reach, if it was when it was last used.
    public var trouble: String?
    public init(name: String, url: String, isNear: Bool, trouble: String?) {
        self.name = name
        self.url = url
        self.isNear = isNear
        self.trouble = trouble
    }
}

/// Collection, by this daemon or others.
public struct CollectionStatus: Codable, Sendable, Equatable {
    /// How often this daemon collects; 0: never.
    public var intervalMs: Int64 = 0
    /// Of the store.
    public var graceMs: Int64 = 0
    /// What this daemon's round is at; nil: none is under way.
    public var phase: CollectionPhase?
    public var done: UInt64 = 0
    /// 0: not known.
    public var total: UInt64 = 0
    /// The last completed round in the store, by whomever.
    public var last: CollectionSummary?
    /// Since it was begun.
    public var lastAgeMs: Int64?
    /// Why this daemon's last round was not completed.
    public var lastError: String?
    public init() {}
}

/// One of the caches.
public struct CacheStatus: Codable, Sendable, Equatable {
    public var usedBytes: UInt64 = 0
    public var limitBytes: UInt64 = 0
    public var hits: UInt64 = 0
    public var misses: UInt64 = 0
    public init() {}
    /// Hits of a hundred look-ups; nil before the first.
    public var hitPercent: Double? {
        hits &+ misses == 0 ? nil : 100 * Double(hits) / (Double(hits) + Double(misses))
    }
}

/// One client's attachment to one disk.
public struct SessionStatus: Codable, Sendable, Equatable {
    /// Of its first connection: `127.0.0.1:40112`, `unix:pid 812`.
    public var address: String
    /// As the client asked for it: `NAME`, `NAME?session=ID`, `NAME@GENERATION`.
    public var export: String
    /// The ID of a named session.
    public var session: String?
    /// 0 while it may still be resumed.
    public var connections: Int
    public var ageMs: Int64 = 0
    /// How much longer a session without connections is kept.
    public var resumableForMs: Int64?
    public var requests: UInt64 = 0
    public var readBytes: UInt64 = 0
    public var writtenBytes: UInt64 = 0
    public init(address: String, export: String, session: String?, connections: Int) {
        self.address = address
        self.export = export
        self.session = session
        self.connections = connections
    }
}

/// One disk that this daemon owns.
public struct DiskStatus: Codable, Sendable, Equatable {
    public var name: String
    public var sizeBytes: UInt64
    public var epoch: UInt64
    public var safePoints: String
    public var durability: String
    /// The newest generation in the store.
    public var committedGeneration: UInt64
    public var committedAgeMs: Int64?
    /// Acknowledged and not yet in the store.
    public var dirtyBytes: UInt64 = 0
    /// Since the last safe point; nil when there was none since the disk was attached.
    public var safePointAgeMs: Int64?
    public var safePointCount: UInt64 = 0
    /// The generation that is being written to the store.
    public var committingGeneration: UInt64?
    public var committingForMs: Int64?
    /// The journal of this disk on scratch.
    public var journalBytes: UInt64 = 0
    public var journalLimitBytes: UInt64 = 0
    /// Requests that wait for room in the journal or in memory.
    public var waitingWriters: Int = 0
    /// Slices wanted by reads, found in memory or not.
    public var cacheHits: UInt64 = 0
    public var cacheMisses: UInt64 = 0
    /// Failed commits, and reads that the store could not answer.
    public var storeErrors: UInt64 = 0
    public var lastError: String?
    public init(
        name: String, sizeBytes: UInt64, epoch: UInt64, safePoints: String, durability: String,
        committedGeneration: UInt64
    ) {
        self.name = name
        self.sizeBytes = sizeBytes
        self.epoch = epoch
        self.safePoints = safePoints
        self.durability = durability
        self.committedGeneration = committedGeneration
    }
}
