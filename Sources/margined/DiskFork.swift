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
            that mounts without writing is taken, which is one that ends with a full commit. An ext4 or xfs that was mounted \
            at that instant needs its journal, which nobody can replay on a read-only disk: the command says so, and with \
            which options it mounts all the same.

            With --into several disks are forked as they are at one instant: the members of a btrfs over several devices, of \
            an LVM volume group or of an md array. The server that has them holds their writes for a moment; run this on its \
            machine. Disks that nobody has attached are taken as they are.

            Of a store with several locations the fork may be at another one than its source: it then reads from where its \
            source's data is and writes near. 'margined disk localize' copies that data.

            Examples:
              margined disk fork base work --store file:///srv/disks
              margined disk fork work@17 look --read-only --store file:///srv/disks
              margined disk fork work work-us --location us --config /etc/margined.toml
              margined disk fork work copy --now --config /etc/margined.toml
              margined disk fork data1 data2 --into copy1 copy2 --config /etc/margined.toml
            """)

    @Argument(
        help: ArgumentHelp(
            "The disk to fork, or one generation of it, and the new disk; with --into the disks to fork.",
            valueName: "name[@generation]"))
    var names: [String]
    @Option(
        parsing: .upToNextOption,
        help: ArgumentHelp("As many new disks as there are disks, all as of one instant.", valueName: "name"))
    var into: [String] = []
    @Flag(help: "Nobody writes the fork.") var readOnly = false
    @Flag(help: "Have the server of the disk commit first.") var now = false
    @OptionGroup var place: NewDiskLocation
    @OptionGroup var store: StoreOptions
    @Flag(help: "Print the fork as JSON; with --into a list.") var json = false

    func validate() throws {
        if into.isEmpty {
            guard names.count == 2 else {
                throw ValidationError(
                    names.count < 2
                        ? "give the disk to fork and the new disk" : "to fork several disks at one instant use --into")
            }
            let wanted = try GenerationName(names[0])
            try DiskNameArgument(argument: names[1])?.check()
            if now, wanted.generation != nil {
                throw ValidationError("--now makes a new generation: leave '@\(wanted.generation ?? 0)' out")
            }
        } else {
            guard names.count == into.count else {
                throw ValidationError(
                    "\(names.count) disks to fork, and \(into.count) names for the forks: give as many")
            }
            for name in names + into { try DiskNameArgument(argument: name)?.check() }
            guard Set(names).count == names.count, Set(into).count == into.count else {
                throw ValidationError("a disk is named twice")
            }
            if now { throw ValidationError("--into takes the disks as they are now: leave --now out") }
        }
    }

    func run() async throws {
        let catalog = try await store.catalog()
        let disks = into.isEmpty ? [try await forkOne(catalog)] : try await forkSet(catalog)
        var forks: [ForkInfo] = []
        for disk in disks {
            // Of a whole set no member is missing.
            let isPart = into.count > 1
            let notes = try await catalog.mountNotes(disk.name).filter { !(isPart && $0.isOfSeveralDisks) }
            forks.append(ForkInfo(disk: disk, notes: notes))
            for note in notes {
                let place = note.offset == 0 ? "" : " (its partition at byte \(note.offset))"
                Output.toStandardError("margined: note: disk '\(disk.name)'\(place): \(note.text)\n")
            }
        }
        guard json else { return }
        if into.isEmpty { try Output.json(forks[0]) } else { try Output.json(forks) }
    }

    private func forkOne(_ catalog: Catalog) async throws -> DiskInfo {
        let wanted = try GenerationName(names[0])
        if now {
            let control = try store.settings().controlPath
            // A daemon on this machine is told at once; others look with their next heartbeat.
            try await catalog.commitNow(wanted.disk) {
                Thread.detachNewThread { _ = try? ControlClient(path: control).ask(ControlRequest(command: "look")) }
            }
        }
        return try await catalog.fork(
            wanted.disk, generation: wanted.generation, as: names[1], readOnly: readOnly,
            location: try place.number(in: catalog.store))
    }

    private func forkSet(_ catalog: Catalog) async throws -> [DiskInfo] {
        let control = try store.settings().controlPath
        return try await catalog.forkSet(
            names, as: into, readOnly: readOnly, location: try place.number(in: catalog.store)
        ) { disks in
            let request = ControlRequest(command: "cut", arguments: ["disks": disks.joined(separator: ",")])
            return try ControlClient(path: control).ask(request).generations ?? [:]
        }
    }
}

/// A fork, with what to know before it is mounted.
private struct ForkInfo: Encodable {
    var disk: DiskInfo
    var notes: [MountNote]

    private enum CodingKeys: CodingKey { case notes }
    func encode(to encoder: any Encoder) throws {
        try disk.encode(to: encoder)
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(notes, forKey: .notes)
    }
}
