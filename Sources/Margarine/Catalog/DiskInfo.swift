// A disk as people and scripts see it: `margined disk show --json` prints exactly this.

import BlockCache
import FoundationEssentials

public struct DiskInfo: Sendable, Codable, Equatable {
    public struct Owner: Sendable, Codable, Equatable {
        public var server: String
        public var host: String
        /// ISO 8601, UTC.
        public var since: String
        /// Whether its heartbeat says that it lives.
        public var alive: Bool
    }

    public var name: String
    /// The location of its head.
    public var location: String
    /// 32 hex digits.
    public var id: String
    /// Bytes.
    public var size: UInt64
    /// 0: nothing was ever committed under this name.
    public var generation: UInt64
    public var epoch: UInt64
    public var owner: Owner?
    /// The named session that is attached, or whose end is not known.
    public var session: String?
    public var safePoints: SafePointRule
    public var durability: Durability
    public var resumeWindowMs: Int64
    /// 0: only the newest generation is kept, besides pinned ones.
    public var historyDensity: Int
    /// Generations that are kept whatever the rule says.
    public var pinned: [UInt64]
    /// Nobody writes it: any number of clients may attach it, without an owner.
    public var readOnly: Bool
    /// The generation, `DISK@GENERATION`, that the current one equals: of forks, roll-backs and received disks.
    public var origin: String?
    /// Blocks of 16 MiB that hold something.
    public var blocks: UInt64
    /// Bytes in the store that the current generation names.
    public var storedBytes: UInt64
    /// ISO 8601, UTC; nil before the first commit.
    public var committedAt: String?
    public var createdAt: String

    init(_ head: Head, location: String, ownerAlive: Bool) {
        name = head.name
        self.location = location
        id = head.diskID.description
        size = head.sizeBytes
        generation = head.generation
        epoch = head.epoch
        owner = head.owner.map {
            Owner(server: $0.server, host: $0.host, since: isoTime($0.sinceMs), alive: ownerAlive)
        }
        session = head.session
        safePoints = head.options.safePoints
        durability = head.options.durability
        resumeWindowMs = head.options.resumeWindowMs
        historyDensity = head.options.historyDensity
        pinned = head.pinned
        readOnly = head.isReadOnly
        origin = head.origin.map { "\($0.disk)@\($0.generation)" }
        blocks = head.usedBlocks
        storedBytes = head.storedBytes
        committedAt = head.committedAtMs.map(isoTime)
        createdAt = isoTime(head.createdAtMs)
    }

    /// Every member is there, null where there is nothing to say.
    public func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(name, forKey: .name)
        try c.encode(location, forKey: .location)
        try c.encode(id, forKey: .id)
        try c.encode(size, forKey: .size)
        try c.encode(generation, forKey: .generation)
        try c.encode(epoch, forKey: .epoch)
        try c.encode(owner, forKey: .owner)
        try c.encode(session, forKey: .session)
        try c.encode(safePoints, forKey: .safePoints)
        try c.encode(durability, forKey: .durability)
        try c.encode(resumeWindowMs, forKey: .resumeWindowMs)
        try c.encode(historyDensity, forKey: .historyDensity)
        try c.encode(pinned, forKey: .pinned)
        try c.encode(readOnly, forKey: .readOnly)
        try c.encode(origin, forKey: .origin)
        try c.encode(blocks, forKey: .blocks)
        try c.encode(storedBytes, forKey: .storedBytes)
        try c.encode(committedAt, forKey: .committedAt)
        try c.encode(createdAt, forKey: .createdAt)
    }
}

/// Milliseconds since 1970 as ISO 8601 in UTC, to the second.
package func isoTime(_ ms: Int64) -> String {
    Date(timeIntervalSince1970: Double(ms) / 1000).formatted(.iso8601)
}
