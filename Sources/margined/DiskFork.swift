import ArgumentParser
import Foundation
import Margarine

struct DiskFork: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "fork",
        abstract: "Make a disk out of a generation of another one, at once.",
        discussion: """
            Nothing is copied, whatever the size: the fork shares what is stored with its source until one of them writes. \
            The source may be in use; its last committed generation is taken, or the one that is named. With --now its \
            server first commits the newest safe point that it has (sync the file system before).

            A --read-only fork has no owner: any number of clients may attach it anywhere. Of a btrfs the newest generation \
            that mounts without writing is taken, which is one that ends with a full commit.

            Of a store with several locations the fork may be at another one than its source: it then reads from where its \
            source's data is and writes near. 'margined disk localize' copies that data.

            Examples:
              margined disk fork base work --store file:///srv/disks
              margined disk fork work@17 look --read-only --store file:///srv/disks
              margined disk fork work work-us --location us --config /etc/margined.toml
              margined disk fork work copy --now --config /etc/margined.toml
            """)

    @Argument(help: ArgumentHelp("The disk to fork, or one generation of it.", valueName: "name[@generation]"))
    var source: String
    @Argument(help: "The new disk.") var name: DiskNameArgument
    @Flag(help: "Nobody writes the fork.") var readOnly = false
    @Flag(help: "Have the server of the disk commit first.") var now = false
    @OptionGroup var place: NewDiskLocation
    @OptionGroup var store: StoreOptions
    @Flag(help: "Print the fork as JSON.") var json = false

    func validate() throws {
        let wanted = try GenerationName(source)
        try name.check()
        if now, wanted.generation != nil {
            throw ValidationError("--now makes a new generation: leave '@\(wanted.generation ?? 0)' out")
        }
    }

    func run() async throws {
        let wanted = try GenerationName(source)
        let catalog = try await store.catalog()
        if now {
            let control = try store.settings().controlPath
            // A daemon on this machine is told at once; others look with their next heartbeat.
            try await catalog.commitNow(wanted.disk) {
                Thread.detachNewThread { _ = try? ControlClient(path: control).ask(ControlRequest(command: "look")) }
            }
        }
        let disk = try await catalog.fork(
            wanted.disk, generation: wanted.generation, as: name.text, readOnly: readOnly,
            location: try place.number(in: catalog.store))
        if json { try disk.print(json: true) }
    }
}
