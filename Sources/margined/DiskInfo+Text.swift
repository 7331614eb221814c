// Disks for people; `--json` prints `DiskInfo` as it is.

import Margarine

extension DiskInfo {
    /// As JSON, or as one `name value` a line.
    ///
    /// - Parameter withLocation: the store has several.
    func print(json: Bool, withLocation: Bool = false) throws {
        if json { return try Output.json(self) }
        func field(_ name: String, _ value: String) {
            Output.line(name + String(repeating: " ", count: 14 - name.count) + value)
        }
        field("name", name)
        field("size", "\(ByteSize.readable(size)) (\(size) bytes)")
        if withLocation { field("location", location) }
        field("generation", generation == 0 ? "none yet" : "\(generation)")
        field("committed", committedAt ?? "never")
        field("blocks", "\(blocks) of 16 MiB in use, \(ByteSize.readable(storedBytes)) stored")
        field(
            "owner",
            owner.map { "server \($0.server) on \($0.host) since \($0.since), \($0.alive ? "alive" : "gone")" }
                ?? "nobody")
        field("epoch", "\(epoch)")
        if let session { field("session", session) }
        field("safe-points", safePoints.rawValue)
        field("durability", durability.rawValue)
        field("resume-window", DurationMs.text(resumeWindowMs))
        field("density", historyDensity == 0 ? "0 (only the newest generation)" : "\(historyDensity)")
        if !pinned.isEmpty { field("pinned", pinned.map(String.init).joined(separator: " ")) }
        if readOnly { field("read-only", "yes") }
        if let origin { field("origin", origin) }
        field("created", createdAt)
        field("id", id)
    }

    /// Many disks, a line each.
    ///
    /// - Parameter withLocations: the store has several.
    static func print(_ disks: [DiskInfo], json: Bool, withLocations: Bool = false) throws {
        if json { return try Output.json(disks) }
        var table = Table(
            ["NAME", "SIZE", "GENERATION", "COMMITTED", "BLOCKS", "STORED", "OWNER"]
                + (withLocations ? ["LOCATION"] : []), rightAligned: [1, 2, 4, 5])
        for disk in disks {
            table.add(
                [
                    disk.name, ByteSize.readable(disk.size), "\(disk.generation)", disk.committedAt ?? "never",
                    "\(disk.blocks)", ByteSize.readable(disk.storedBytes),
                    disk.owner.map { $0.alive ? $0.host : "\($0.host) (gone)" } ?? "-",
                ] + (withLocations ? [disk.location] : []))
        }
        table.print()
    }
}
