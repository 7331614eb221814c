import ArgumentParser
import Margarine

struct DiskList: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list",
        abstract: "Show all disks of a store.",
        discussion: """
            Examples:
              margined disk list --store file:///srv/disks
              margined disk list --json --config /etc/margined.toml
            """)

    @OptionGroup var source: StoreOptions
    @Flag(help: "Print a JSON array.") var json = false

    func run() async throws {
        try DiskInfo.print(try await source.catalog(readOnly: true).list(), json: json)
    }
}
