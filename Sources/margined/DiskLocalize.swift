import ArgumentParser
import Margarine

struct DiskLocalize: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "localize",
        abstract: "Copy a disk's data to the near location.",
        discussion: """
            Of a store with several locations: copies everything that the disk's current generation has elsewhere, and makes \
            a generation that names the copies, a few gigabytes at a time. The disk may be in use. What was copied stays \
            where it was too; older generations go on naming it there. Ended early, what is done is done, and the same \
            command goes on from there.

            Examples:
              margined disk localize work --config /etc/margined.toml
              margined disk localize work --to us --json --config /etc/margined.toml
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @Option(help: ArgumentHelp("Where to. Default: the near location.", valueName: "location")) var to: String?
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print what was done as JSON.") var json = false

    func validate() throws { try name.check() }

    func run() async throws {
        let catalog = try await source.catalog()
        let location = try catalog.store.location(named: to)
        let progress = Progress("localize \(name.text)")
        defer { progress.finish() }
        let summary = try await catalog.localize(name.text, to: location.number) {
            progress.update(doneBytes: $0, totalBytes: $1)
        }
        progress.finish()
        if json { return try Output.json(summary) }
        Output.line(
            "\(summary.copiedObjects) objects (\(ByteSize.readable(summary.copiedBytes))) copied to '\(location.name)', "
                + "\(summary.presentObjects) were there; generation \(summary.generation)")
    }
}
