import ArgumentParser
import Margarine

struct DiskResize: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "resize",
        abstract: "Change the size of a disk.",
        discussion: """
            Growing is safe while the disk is in use: a daemon that serves it takes the new size over with its next commit, \
            or at the next attachment. What lies behind a smaller size is lost: that takes --shrink, and --force if a server \
            has the disk or did not give it back.

            Examples:
              margined disk resize work --size 20G --store file:///srv/disks
              margined disk resize work --size 5G --shrink --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument

    @Option(help: ArgumentHelp("New size, a multiple of 512 bytes, as in 20G; less than 8E.", valueName: "size"))
    var size: String

    @Flag(help: "A smaller size is meant: what lies behind it is lost.") var shrink = false
    @Flag(help: "Shrink also when a server has the disk: it loses it.") var force = false
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws {
        try name.check()
        _ = try DiskSizeArgument(size)
    }

    func run() async throws {
        let bytes = try DiskSizeArgument(size).bytes
        let disk = try await source.catalog().resize(name.text, to: bytes, shrink: shrink, force: force)
        if json { try disk.print(json: true) }
    }
}
