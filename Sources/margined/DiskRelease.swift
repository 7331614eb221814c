import ArgumentParser
import Margarine

struct DiskRelease: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "release",
        abstract: "Take a disk away from a server that will not come back.",
        discussion: """
            Any other server can then have the disk at once. What the old owner acknowledged and did not commit is lost, and \
            the session that was attached is refused until it attaches anew. Unless the owner ended in order, its heartbeat is \
            watched first, for its owner-dead-after at most. --force does not wait: a live owner stops serving the disk.

            Examples:
              margined disk release work --store file:///srv/disks
              margined disk release work --force --store file:///srv/disks
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @Flag(help: "Also when the owner is alive.") var force = false
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws { try name.check() }

    func run() async throws {
        let disk = try await source.catalog().release(name.text, force: force)
        if json { try disk.print(json: true) }
    }
}
