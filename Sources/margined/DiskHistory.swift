import ArgumentParser
import Margarine

struct DiskHistory: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "history",
        abstract: "Show the generations that a disk keeps.",
        discussion: """
            Oldest first. Each can be attached read-only as NAME@GENERATION, exported, forked and gone back to. The older, \
            the wider apart they are; --history-density of 'disk set' says how wide, and 'disk pin' keeps one for good.

            Examples:
              margined disk history work --store file:///srv/disks
              margined disk history work --json --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print a JSON array.") var json = false

    /// A generation in JSON.
    private struct Generation: Encodable {
        var generation: UInt64
        var committedAt: String
        var kind: String
        /// Bytes.
        var size: UInt64
        var blocks: UInt64
        var storedBytes: UInt64
        /// Bytes that its commit put into the store.
        var newBytes: UInt64
        var pinned: Bool
        var current: Bool
        var origin: String?
        init(_ record: GenerationRecord, of disk: DiskInfo) {
            generation = record.generation
            committedAt = isoTime(record.committedAtMs)
            kind = record.kind.rawValue
            size = record.sizeBytes
            blocks = record.usedBlocks
            storedBytes = record.storedBytes
            newBytes = record.newBytes
            pinned = disk.pinned.contains(record.generation)
            current = record.generation == disk.generation
            origin = record.origin.map { "\($0.disk)@\($0.generation)" }
        }
    }

    func validate() throws { try name.check() }

    func run() async throws {
        let catalog = try await source.catalog(readOnly: true)
        let disk = try await catalog.show(name.text)
        let all = try await catalog.generations(name.text).map { Generation($0, of: disk) }
        if json { return try Output.json(all) }
        var table = Table(
            ["GENERATION", "COMMITTED", "KIND", "SIZE", "BLOCKS", "STORED", "NEW", ""], rightAligned: [0, 3, 4, 5, 6])
        for one in all {
            var notes: [String] = []
            if one.current { notes.append("current") }
            if one.pinned { notes.append("pinned") }
            if let origin = one.origin { notes.append("as \(origin)") }
            table.add([
                "\(one.generation)", one.committedAt, one.kind, ByteSize.readable(one.size), "\(one.blocks)",
                ByteSize.readable(one.storedBytes), ByteSize.readable(one.newBytes), notes.joined(separator: ", "),
            ])
        }
        table.print()
    }
}
