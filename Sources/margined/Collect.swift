import ArgumentParser
import Foundation
import Glibc
import Margarine
import Runtime

struct Collect: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "gc",
        abstract: "Delete what no generation needs any more.",
        discussion: """
            Thins the history of every disk, then looks at every manifest and deletes the blocks and manifest pages that \
            none of them names and that are older than the store's grace period (24h, or what --grace has made it). Safe \
            beside running daemons and other commands; one collection at a time over the whole store. What history lets go \
            leaves in two steps: its record after one grace period, its blocks with that same collection.

            Ended early, by a signal or an error, it has deleted nothing but garbage, and the next one does the rest. With \
            --scratch one that was cut off while it listed the store goes on there.

            Examples:
              margined gc --dry-run --store file:///srv/disks
              margined gc --grace 48h --rate 500 --store 's3://disks/prod'
              margined gc --json --config /etc/margined.toml
            """)

    @Flag(help: "Look, say what would be deleted, and write nothing at all.") var dryRun = false

    @Option(
        help: ArgumentHelp(
            "Make this the grace period of the store, 15m to 366d. A longer one holds at once, a shorter one once the old one has passed.",
            valueName: "duration"))
    var grace: String?

    @Flag(
        help:
            "Take a --grace from 1s on. A commit that a store answers badly may then lose what it has stored: for stores that nobody writes, and for trying things out."
    )
    var allowShortGrace = false

    @Option(help: ArgumentHelp("Delete so many objects a second; 0, the default: no limit.", valueName: "number"))
    var rate: Int = 0

    @Flag(
        help:
            "Also delete copies at one location of what is named and there at another. Not while a disk is being localized."
    )
    var dropCopies = false

    @Option(
        help: ArgumentHelp(
            "Keep what is found in this directory, made where missing: 24 bytes for each object, and for each time that one is named. Else in TMPDIR, for this run alone.",
            valueName: "dir"))
    var scratch: String?

    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the summary as JSON.") var json = false

    func validate() throws {
        _ = try graceMs()
        guard (0...1_000_000).contains(rate) else { throw ValidationError("--rate: a number from 0 to 1000000") }
        if dryRun, scratch != nil {
            throw ValidationError("--scratch: a dry run is not gone on with later; leave one of the two out")
        }
    }

    private func graceMs() throws -> Int64? {
        guard let grace else { return nil }
        let ms: Int64
        do { ms = try DurationMs.parse(grace) } catch { throw ValidationError("--grace: \(error)") }
        guard ((allowShortGrace ? 1000 : Settings.shortestGraceMs)...366 * 86_400_000).contains(ms) else {
            throw ValidationError(
                "--grace: '\(grace)' is out of bounds: it is a duration, 15m to 366d, or from 1s with --allow-short-grace"
            )
        }
        return ms
    }

    func run() async throws {
        shareHeaps()
        let store = try await source.catalog(readOnly: dryRun).store
        var options = CollectionOptions()
        options.isDryRun = dryRun
        options.graceMs = try graceMs()
        options.deletesPerSecond = rate
        options.dropsCopies = dropCopies
        options.host = LocalProcess.hostName()
        // Nobody else's meanwhile.
        let lock = try scratch.map { path in try ScratchLock(directory: path) }
        let folder = scratch == nil ? try TemporaryFolder("gc") : nil
        defer { folder?.remove() }
        let collector = Collector(
            store: store, scratch: try DirectoryScratch(path: folder?.path ?? scratch!), options: options)
        let progress = Progress(dryRun ? "gc --dry-run" : "gc")
        defer { progress.finish() }
        let work = Task {
            try await collector.run { progress.update($0.phase.rawValue, done: $0.done, total: $0.total) }
        }
        try Signals.watch([SIGINT, SIGTERM]) { _ in work.cancel() }
        let summary = try await work.value
        withExtendedLifetime(lock) {}
        progress.finish()
        if json { return try Output.json(summary) }
        summary.print()
    }
}

/// A directory for one command's scratch files.
struct TemporaryFolder {
    let path: String

    init(_ purpose: String) throws {
        let parent = ProcessInfo.processInfo.environment["TMPDIR"].flatMap { $0.isEmpty ? nil : $0 } ?? "/tmp"
        var name = Array("\(parent)/margined-\(purpose).XXXXXX".utf8CString)
        guard mkdtemp(&name) != nil else {
            throw Failure(
                "cannot make a directory in '\(parent)': \(String(cString: strerror(errno))); set TMPDIR to another one"
            )
        }
        path = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    func remove() { try? FileManager.default.removeItem(atPath: path) }
}

func isFolder(_ path: String) -> Bool {
    var isDirectory: ObjCBool = false
    return FileManager.default.fileExists(atPath: path, isDirectory: &isDirectory) && isDirectory.boolValue
}

extension CollectionSummary {
    /// For people.
    func print() {
        func field(_ name: String, _ value: String) {
            Output.line(name + String(repeating: " ", count: max(1, 13 - name.count)) + value)
        }
        func objects(_ counts: Objects) -> String {
            "\(counts.scanned) (\(ByteSize.readable(counts.scannedBytes))): \(counts.kept) in use, "
                + "\(counts.young) younger than the grace period, \(counts.deleted) "
                + (isDryRun ? "would be deleted" : "deleted") + " (\(ByteSize.readable(counts.deletedBytes)))"
        }
        field("grace", DurationMs.readable(graceMs))
        field("disks", "\(disks)" + (locations > 1 ? " at \(locations) locations" : ""))
        field(
            "generations",
            "\(generations.kept) kept, \(generations.retired) " + (isDryRun ? "would be retired" : "retired")
                + ", \(generations.waiting) retired before, \(generations.held) of those being read, "
                + "\(generations.removed) " + (isDryRun ? "would be removed" : "removed"))
        field("blocks", objects(blocks))
        field("manifest", objects(pages))
        field("took", DurationMs.readable(durationMs))
    }
}
