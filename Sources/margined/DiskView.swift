// One disk as `disk show`, `disk list` and the commands that change one print it.

import Foundation
import Margarine

/// The JSON of a disk. Every key is always there; what is not known is null.
struct DiskView: Encodable {
    struct Owner: Encodable {
        var server: String
        var host: String
        var since: Date
    }
    var name: String
    /// Bytes.
    var size: UInt64
    /// The newest in the store; 0 before the first commit.
    var generation: UInt64
    var epoch: UInt64
    var owner: Owner?
    var safePoints: String
    var durability: String
    var resumeWindowMs: Int64
    /// Blocks of 16 MiB that hold anything.
    var blocks: UInt64
    /// Bytes of the objects that the current generation names.
    var storedBytes: UInt64
    var committedAt: Date?
    var createdAt: Date
    /// The named session that is attached, or whose end is not known.
    var session: String?

    init(_ head: Head) {
        name = head.name
        size = head.sizeBytes
        generation = head.generation
        epoch = head.epoch
        owner = head.owner.map { Owner(server: $0.server, host: $0.host, since: date($0.sinceMs)) }
        safePoints = head.options.safePoints.rawValue
        durability = head.options.durability.rawValue
        resumeWindowMs = head.options.resumeWindowMs
        blocks = head.usedBlocks
        storedBytes = head.storedBytes
        committedAt = head.committedAtMs.map(date)
        createdAt = date(head.createdAtMs)
        session = head.session
    }

    private enum Key: CodingKey {
        case name, size, generation, epoch, owner, safePoints, durability, resumeWindowMs, blocks, storedBytes, committedAt
        case createdAt, session
    }

    func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: Key.self)
        try c.encode(name, forKey: .name)
        try c.encode(size, forKey: .size)
        try c.encode(generation, forKey: .generation)
        try c.encode(epoch, forKey: .epoch)
        try c.encode(owner, forKey: .owner)
        try c.encode(safePoints, forKey: .safePoints)
        try c.encode(durability, forKey: .durability)
        try c.encode(resumeWindowMs, forKey: .resumeWindowMs)
        try c.encode(blocks, forKey: .blocks)
        try c.encode(storedBytes, forKey: .storedBytes)
        try c.encode(committedAt, forKey: .committedAt)
        try c.encode(createdAt, forKey: .createdAt)
        try c.encode(session, forKey: .session)
    }

    /// As JSON, or as one `name value` a line.
    func print(json: Bool) throws {
        if json { return try Output.json(self) }
        func field(_ name: String, _ value: String) {
            Output.line(name + String(repeating: " ", count: 14 - name.count) + value)
        }
        field("name", name)
        field("size", "\(ByteSize.readable(size)) (\(size) bytes)")
        field("generation", generation == 0 ? "none yet" : "\(generation)")
        field("committed", text(committedAt))
        field("blocks", "\(blocks) of 16 MiB in use, \(ByteSize.readable(storedBytes)) stored")
        field("owner", owner.map { "\($0.server) on \($0.host), since \(text($0.since))" } ?? "nobody")
        field("epoch", "\(epoch)")
        if let session { field("session", session) }
        field("safe-points", safePoints)
        field("durability", durability)
        field("resume-window", DurationMs.text(resumeWindowMs))
        field("created", text(createdAt))
    }

    /// Many disks, a line each.
    static func print(_ views: [DiskView], json: Bool) throws {
        if json { return try Output.json(views) }
        var table = Table(
            ["NAME", "SIZE", "GENERATION", "COMMITTED", "BLOCKS", "STORED", "OWNER"], rightAligned: [1, 2, 4, 5])
        for view in views {
            table.add([
                view.name, ByteSize.readable(view.size), "\(view.generation)", text(view.committedAt), "\(view.blocks)",
                ByteSize.readable(view.storedBytes), view.owner?.host ?? "-",
            ])
        }
        table.print()
    }
}

private func date(_ wallMs: Int64) -> Date { Date(timeIntervalSince1970: Double(wallMs) / 1000) }
private func text(_ date: Date?) -> String { date.map { $0.formatted(.iso8601) } ?? "-" }
