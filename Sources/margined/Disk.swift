import ArgumentParser
import Foundation
import Margarine
import ObjectStore
import Runtime

/// `margined disk`: what works on the store itself.
struct Disk: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make, change, copy and remove disks.",
        discussion: """
            Works on the store itself, safely beside running daemons and without any.

            Sizes are written like 4096, 512M, 10G or 2T (powers of 1024), durations like 500ms, 60s, 5m, 1d or 0.

            Examples:
              margined disk create work --size 10G --store file:///srv/disks
              margined disk list --store file:///srv/disks
              margined disk export work work.img --store file:///srv/disks
            """,
        subcommands: [
            DiskCreate.self, DiskSet.self, DiskList.self, DiskShow.self, DiskResize.self, DiskDelete.self,
            DiskExport.self, DiskImport.self, DiskRelease.self, DiskLocalize.self,
            DiskFork.self, DiskHistory.self, DiskPin.self, DiskUnpin.self, DiskRollback.self,
            DiskDiff.self, DiskSend.self, DiskReceive.self,
        ])
}

extension StoreOptions {
    /// Opens the store of the command.
    /// - Parameter readOnly: nothing is written; a directory that may only be read will do.
    func catalog(readOnly: Bool = false) async throws -> Catalog {
        var catalog = Catalog(
            try await open(try settingsWithStore(), readOnly: readOnly), name: "a command on \(LocalProcess.hostName())"
        )
        catalog.waits = { FileHandle.standardError.write(Data("margined: \($0)\n".utf8)) }
        return catalog
    }

    /// Opens the store that the settings name.
    func open(_ settings: Settings, readOnly: Bool = false) async throws -> Store {
        let environment = SystemEnvironment(workers: ProcessInfo.processInfo.activeProcessorCount)
        // Somebody waits: a store that is away is told sooner than a daemon would give up.
        let retries = RetryPolicy(firstPauseMs: 50, longestPauseMs: 2000, deadlineMs: 15_000)
        return try await Store.open(
            urls: settings.places, near: settings.near, environment: environment, readOnly: readOnly, retries: retries)
    }
}

/// The name of a disk, checked before the store is asked.
struct DiskNameArgument: ExpressibleByArgument {
    var text: String
    init?(argument: String) {
        text = argument
    }
    func check() throws {
        do { try DiskName.check(text) } catch { throw ValidationError(error.description) }
    }
}

/// `--location`, of commands that make a disk.
struct NewDiskLocation: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Of a store with several locations, the one that keeps the disk's head. Default: the near one.",
            valueName: "location"))
    var location: String?

    /// Its number; nil: nobody chose.
    func number(in store: Store) throws -> UInt8? {
        try location.map { try store.location(named: $0).number }
    }
}

/// A size of a disk.
struct DiskSizeArgument {
    var bytes: UInt64

    /// - Throws: `ValidationError` that says what is wrong.
    init(_ text: String) throws {
        do {
            bytes = try ByteSize.parse(text)
            try DiskSize.check(bytes)
        } catch let error as QuantityError where error.isTooLarge {
            throw ValidationError("--size: \(error); \(DiskSize.maxReason)")
        } catch {
            throw ValidationError("--size: \(error)")
        }
    }
}

/// `--safe-points`, `--durability` and `--resume-window`.
struct DiskOptionFlags: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Which instants become generations: flushes, only super blocks of btrfs, or both.",
            valueName: "auto|btrfs|flush"))
    var safePoints: String?

    @Option(
        help: ArgumentHelp(
            "What a flush promises: nothing more than a write, stable storage on scratch, or a commit to the store.",
            valueName: "memory|scratch|store"))
    var durability: String?

    @Option(
        help: ArgumentHelp(
            "How long a session that ended without disconnecting is kept; 0 rolls back at once.", valueName: "duration")
    )
    var resumeWindow: String?

    @Option(
        help: ArgumentHelp(
            "How dense the history is: 1 to 16, or 0 for only the newest generation.", valueName: "number"))
    var historyDensity: String?

    private var given: [(key: String, text: String)] {
        [
            ("safe-points", safePoints), ("durability", durability), ("resume-window", resumeWindow),
            ("history-density", historyDensity),
        ].compactMap { key, text in text.map { (key, $0) } }
    }

    func validate() throws {
        var settings = Settings()
        try apply(to: &settings)
    }

    /// Puts the given flags over `settings.newDisk`.
    func apply(to settings: inout Settings) throws {
        for (key, text) in given { try settings.set(key, text, flag: "--\(key)") }
    }

    /// Only what is given.
    func change() throws -> Catalog.OptionsChange {
        var settings = Settings()
        try apply(to: &settings)
        return Catalog.OptionsChange(
            safePoints: safePoints == nil ? nil : settings.newDisk.safePoints,
            durability: durability == nil ? nil : settings.newDisk.durability,
            resumeWindowMs: resumeWindow == nil ? nil : settings.newDisk.resumeWindowMs,
            historyDensity: historyDensity == nil ? nil : settings.newDisk.historyDensity)
    }
}
