import ArgumentParser
import Margarine

struct DiskRollback: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "rollback",
        abstract: "Make a disk what it was at an earlier generation.",
        discussion: """
            Makes a new generation that equals the old one, its size included: what was there until now stays in the \
            history and can be gone back to as well. Nothing is copied. A disk that a server has, or did not give back, takes \
            --force: what that server did not commit is lost, and its client must attach anew.

            Examples:
              margined disk rollback work 17 --store file:///srv/disks
              margined disk rollback work 17 --force --store file:///srv/disks
            """)

    @OptionGroup var one: GenerationArguments
    @Flag(help: "Also when a server has the disk.") var force = false
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func run() async throws {
        let disk = try await source.catalog().rollBack(one.name.text, to: one.number, force: force)
        if json { try disk.print(json: true) }
    }
}
