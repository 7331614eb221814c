import ArgumentParser
import Margarine

struct DiskSet: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "set",
        abstract: "Change the options of a disk.",
        discussion: """
            A daemon that serves the disk takes them over with its next commit, or at the next attachment.

            Examples:
              margined disk set work --durability store --store file:///srv/disks
              margined disk set work --resume-window 0 --safe-points btrfs --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @OptionGroup var options: DiskOptionFlags
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws {
        try name.check()
        if try options.change() == Catalog.OptionsChange() {
            throw ValidationError("nothing to change: give --safe-points, --durability or --resume-window")
        }
    }

    func run() async throws {
        let disk = try await source.catalog().set(name.text, try options.change())
        if json { try disk.print(json: true) }
    }
}
