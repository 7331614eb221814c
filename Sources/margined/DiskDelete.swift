import ArgumentParser
import Margarine

struct DiskDelete: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "delete",
        abstract: "Remove a disk.",
        discussion: """
            Its name is free at once. If a server has the disk, its heartbeat is watched first, and a disk that a live server \
            owns takes --force: the server then stops serving it. --force does not wait.

            Examples:
              margined disk delete work --store file:///srv/disks
              margined disk delete work --force --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @Flag(help: "Also when a live server owns it.") var force = false
    @OptionGroup var source: StoreOptions

    func validate() throws { try name.check() }

    func run() async throws {
        try await source.catalog().delete(name.text, force: force)
    }
}
