import ArgumentParser
import Margarine

struct DiskList: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list",
        abstract: "Show all disks of a store.",
        discussion: """
            Of a store with several locations, those of all of them; when one is out of reach, the rest, and exit status 1.

            Examples:
              margined disk list --store file:///srv/disks
              margined disk list --json --config /etc/margined.toml
            """)

    @OptionGroup var source: StoreOptions
    @Flag(help: "Print a JSON array.") var json = false

    func run() async throws {
        let catalog = try await source.catalog(readOnly: true)
        let listed = try await catalog.list()
        try DiskInfo.print(listed.disks, json: json, withLocations: catalog.store.locations.hasSeveral)
        guard let last = listed.failures.last else { return }
        try Output.finish()
        for failure in listed.failures.dropLast() { Failure.say("not all disks are shown: \(failure)") }
        throw Failure("not all disks are shown: \(last)")
    }
}
