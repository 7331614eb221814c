import ArgumentParser
import Margarine

struct DiskShow: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "show",
        abstract: "Show one disk.",
        discussion: """
            With --generations, the generations that can be exported or attached read-only, oldest first.

            Examples:
              margined disk show work --store file:///srv/disks
              margined disk show work --json --store file:///srv/disks
              margined disk show work --generations --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @Flag(help: "Show its generations instead.") var generations = false
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print JSON.") var json = false

    /// A generation in JSON.
    private struct Generation: Encodable {
        var generation: UInt64
        var size: UInt64
        var blocks: UInt64
        var storedBytes: UInt64
        var committedAt: String
        init(_ record: GenerationRecord) {
            generation = record.generation
            size = record.sizeBytes
            blocks = record.usedBlocks
            storedBytes = record.storedBytes
            committedAt = isoTime(record.committedAtMs)
        }
    }

    func validate() throws { try name.check() }

    func run() async throws {
        let catalog = try await source.catalog(readOnly: true)
        guard generations else {
            return try await catalog.show(name.text)
                .print(json: json, withLocation: catalog.store.locations.hasSeveral)
        }
        let all = try await catalog.generations(name.text).map(Generation.init)
        if json { return try Output.json(all) }
        var table = Table(["GENERATION", "COMMITTED", "SIZE", "BLOCKS", "STORED"], rightAligned: [0, 2, 3, 4])
        for one in all {
            table.add([
                "\(one.generation)", one.committedAt, ByteSize.readable(one.size), "\(one.blocks)",
                ByteSize.readable(one.storedBytes),
            ])
        }
        table.print()
    }
}
