import ArgumentParser
import Margarine

struct DiskShow: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "show",
        abstract: "Show one disk.",
        discussion: """
            'disk history' shows its generations.

            Examples:
              margined disk show work --store file:///srv/disks
              margined disk show work --json --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print JSON.") var json = false

    func validate() throws { try name.check() }

    func run() async throws {
        let catalog = try await source.catalog(readOnly: true)
        try await catalog.show(name.text).print(json: json, withLocation: catalog.store.locations.hasSeveral)
    }
}
