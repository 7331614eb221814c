import ArgumentParser
import Margarine

struct DiskPin: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pin",
        abstract: "Keep a generation for good.",
        discussion: """
            It stays in the history of the disk until it is unpinned. The first generation of a disk is pinned from the start.

            Examples:
              margined disk pin work 17 --store file:///srv/disks
            """)

    @OptionGroup var one: GenerationArguments
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func run() async throws {
        let disk = try await source.catalog().pin(one.name.text, generation: one.number)
        if json { try disk.print(json: true) }
    }
}

struct DiskUnpin: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "unpin",
        abstract: "Keep a generation no longer for good.",
        discussion: """
            From now on it stays as long as the density of the history says, like all others.

            Examples:
              margined disk unpin work 17 --store file:///srv/disks
            """)

    @OptionGroup var one: GenerationArguments
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func run() async throws {
        let disk = try await source.catalog().unpin(one.name.text, generation: one.number)
        if json { try disk.print(json: true) }
    }
}
