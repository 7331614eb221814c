// What an operator can choose for one daemon, as plain values. `SettingKeys.swift` gives each its name, bounds and
// text form; where the values come from (defaults, environment, file, flags) is the command's business.
//
// Always holds once `validate` passed: every value is within its bounds, and the addresses are well formed.

/// What to do with a disk that another server owns.
public enum Takeover: String, Sendable, Codable, CaseIterable {
    /// Take it only when the owner's record was seen unchanged for as long as it says.
    case dead
    /// Take it at once. The old owner's head no longer swaps, so it loses the disk and says so.
    case force
}

/// An address to listen on: `127.0.0.1:10809`, `[::1]:10809`, `name:10809`; port 0 lets the kernel choose.
public struct ListenAddress: Sendable, Equatable, CustomStringConvertible {
    public var host: String
    public var port: UInt16
    public init(host: String, port: UInt16) {
        self.host = host
        self.port = port
    }
    /// nil when `text` is not `HOST:PORT`. An IPv6 host stands in brackets.
    public init?(_ text: String) {
        guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[text.index(after: colon)...]) else {
            return nil
        }
        var host = text[..<colon]
        if host.hasPrefix("[") && host.hasSuffix("]") {
            host = host.dropFirst().dropLast()
            if !host.contains(":") { return nil }
        } else if host.contains(":") || host.contains("[") || host.contains("]") {
            return nil
        }
        if host.isEmpty || host.contains(where: { $0.isWhitespace || $0 == "/" || $0 == "," }) { return nil }
        self.init(host: String(host), port: port)
    }
    public var description: String { host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)" }
}

/// One location of a store, as the configuration names it: `eu=s3://bucket?region=eu-central-1`.
public struct LocationSetting: Sendable, Equatable, CustomStringConvertible {
    public var name: String
    public var url: String
    public init(name: String, url: String) {
        self.name = name
        self.url = url
    }
    /// nil when `text` is not `NAME=URL`.
    public init?(_ text: String) {
        guard let equals = text.firstIndex(of: "=") else { return nil }
        let (name, url) = (String(text[..<equals]), String(text[text.index(after: equals)...]))
        // Lists of them are also written with commas between.
        guard LocationRegistry.isValidName(name), url.contains("://"),
            !url.contains(where: { $0.isNewline || $0 == "," })
        else {
            return nil
        }
        self.init(name: name, url: url)
    }
    public var description: String { "\(name)=\(url)" }
}

public struct Settings: Sendable, Equatable {
    /// Where the disks are: `file:///path` or `s3://bucket/prefix?endpoint=…&region=…`. This or `locations` is needed.
    public var store: String?
    /// The same for a store that has several locations.
    public var locations: [LocationSetting] = []
    /// The name of the location where new objects go; nil: the first.
    public var near: String?

    // Places.
    /// Directory of the journals (precious) and cached blocks (not so) of this daemon, and of no other.
    public var scratch = "/var/lib/margined"
    /// TCP addresses to serve NBD on.
    public var listen: [ListenAddress] = []
    /// Paths of unix sockets to serve NBD on. They are made at start and removed at the end.
    public var unix: [String] = []
    /// Path of the control socket; nil is `control.sock` in the scratch directory.
    public var control: String?

    // Budgets, in bytes.
    /// Slices kept in memory for all disks together. 0: an eighth of the memory, at most 512 MiB (`fitted`).
    public var memoryCacheBytes: UInt64 = 0
    /// Dirty pages of all disks held in memory, and the tables of their layers; beyond it pages are read back from the
    /// journal. Shared out among the loops, of which there are no more than can have `dirtyBytesPerLoop`. 0: as for the cache.
    public var dirtyMemoryBytes: UInt64 = 0
    /// What one loop needs: a request of 32 MiB, and some more.
    public static let dirtyBytesPerLoop: UInt64 = 40 << 20
    /// Block files kept on the scratch directory.
    public var scratchCacheBytes: UInt64 = 10 << 30
    /// Journals of all disks together. A disk's writers wait while it is full.
    public var journalBytes: UInt64 = 16 << 30
    /// Journal of one disk. Its writers wait while it is full.
    public var journalPerDiskBytes: UInt64 = 4 << 30

    // Commits.
    /// Once a safe point is this old, its commit is under way. Milliseconds.
    public var commitIntervalMs: Int64 = 5000
    /// Blocks that one disk's commit works on at a time; each takes up to 32 MiB meanwhile. 0: as many as an eighth of the
    /// memory holds, at most 4.
    public var uploads = 0

    // The store.
    /// How often this server's record is renewed. Milliseconds.
    public var heartbeatIntervalMs: Int64 = 5000
    /// This server is dead to others when they have seen its record unchanged for so long. Milliseconds.
    public var ownerDeadAfterMs: Int64 = 30_000
    /// What to do with disks that other servers own.
    public var takeover = Takeover.dead

    // Collection.
    /// How often this daemon collects what nothing names; 0: never. Milliseconds.
    public var collectionIntervalMs: Int64 = 0
    /// Makes this the store's grace period when it collects; 0: leaves that as it is. Milliseconds.
    public var collectionGraceMs: Int64 = 0
    /// Shortest grace period that may be asked for. A commit has half of it, and then the swap of its head still may take
    /// five tries of a minute each, on a store that answers badly. Milliseconds.
    public static let shortestGraceMs: Int64 = 900_000
    /// Objects that it deletes in a second; 0: as many as the store takes.
    public var collectionRate = 1000

    // Clients.
    /// A request that cannot be answered by then fails with EIO; below the client's own limit. Milliseconds.
    public var readTimeoutMs: Int64 = 25_000
    /// A client that has not finished its handshake by then is dropped. Milliseconds.
    public var handshakeTimeoutMs: Int64 = 10_000
    /// NBD connections at once from one client address; more are refused. A quarter more are for others then.
    public var maxConnections = 4096
    /// From where the connections of one `NAME?session=ID` may come at a time.
    public var sessionAddresses = SessionAddresses.one

    // The process.
    /// Event loops (threads that own connections and disks), started when first needed. 0: twice the cores, at least 8.
    public var loops = 0
    /// Threads for compression and checksums. 0: one for each core.
    public var workers = 0
    /// SIGTERM waits this long for commits; what is not committed then stays in the journal. Milliseconds.
    public var drainTimeoutMs: Int64 = 60_000
    /// Least severe messages that are logged.
    public var logLevel = LogLevel.info

    /// What `disk create` gives a disk where its flags say nothing.
    public var newDisk = DiskOptions()

    public init() {}

    /// Where the store is, from `store` or from `locations`; empty: nobody has said.
    package var places: [(name: String?, url: String)] {
        if let store { return [(nil, store)] }
        return locations.map { ($0.name, $0.url) }
    }

    /// The path of the control socket.
    public var controlPath: String { control ?? scratch + "/control.sock" }

    /// `loops`, with 0 worked out for a machine of `cores`.
    public func loopCount(cores: Int) -> Int { loops != 0 ? loops : max(8, 2 * cores) }
    /// `workers`, with 0 worked out for a machine of `cores`.
    public func workerCount(cores: Int) -> Int { workers != 0 ? workers : max(1, cores) }
}

/// How severe a message must be to be logged. The names are swift-log's.
public enum LogLevel: String, Sendable, CaseIterable {
    case trace, debug, info, notice, warning, error, critical
}
