import ArgumentParser
import Margarine
import Runtime

struct Check: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Look whether everything that the disks need is there and whole.",
        discussion: """
            Reads every head, generation record and manifest page, and looks that every object they name is there with its \
            length; with --data it reads those too and verifies every checksum. What is missing, corrupt, truncated or \
            swapped is listed with the generations that need it, and objects that nothing names as orphaned. Safe beside \
            everything else. Exit status 1 if anything is wrong; orphaned objects are not.

            --repair puts valid copies in the place of what is missing or damaged: another location's, or those that a \
            daemon keeps in its scratch directory. Without it nothing is written.

            Examples:
              margined check --store file:///srv/disks
              margined check work --data --json --store file:///srv/disks
              margined check --data --repair --scratch /var/lib/margined --store 's3://disks/prod'
            """)

    @Argument(help: "Only this disk. Default: all of the store, and what is orphaned.") var name: DiskNameArgument?
    @Flag(help: "Read the blocks too, all of their bytes.") var data = false
    @Flag(help: "Put valid copies in the place of what is missing or damaged.") var repair = false

    @Option(help: ArgumentHelp("A daemon's scratch directory, for --repair.", valueName: "dir"))
    var scratch: String?

    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the findings as JSON.") var json = false

    func validate() throws {
        try name?.check()
        if scratch != nil, !repair { throw ValidationError("--scratch is where --repair finds copies: give that too") }
    }

    func run() async throws {
        shareHeaps()
        let store = try await source.catalog(readOnly: !repair).store
        var options = CheckOptions()
        options.disk = name?.text
        options.readsData = data
        options.repairs = repair
        let folder = try TemporaryFolder("check")
        defer { folder.remove() }
        let copies = try scratch.map { path in
            guard isFolder(path + "/blocks") else {
                throw Failure("'\(path)' has no block files: give the scratch directory of a daemon of this store")
            }
            return try DirectoryScratch(path: path)
        }
        let checker = Checker(
            store: store, scratch: try DirectoryScratch(path: folder.path), options: options, copies: copies)
        let progress = Progress("check")
        defer { progress.finish() }
        let report = try await checker.run { progress.update($0.rawValue, done: $1, total: $2) }
        progress.finish()
        if json { try Output.json(report) } else { report.print(readData: data) }
        try Output.finish()
        if report.wrong > 0 {
            throw Failure(
                "\(report.wrong) \(report.wrong == 1 ? "thing is" : "things are") wrong; see Operations, \"When something is wrong\""
            )
        }
    }
}

extension CheckReport {
    /// For people.
    func print(readData: Bool) {
        for problem in problems {
            var line = problem.kind.rawValue + String(repeating: " ", count: max(1, 12 - problem.kind.rawValue.count))
            line +=
                (problem.key.isEmpty ? "location" : problem.key) + " at location \(problem.location): \(problem.text)"
            if problem.isRepaired { line += " (repaired)" }
            if !problem.generations.isEmpty { line += "; needed by " + problem.generations.joined(separator: ", ") }
            Output.line(line)
        }
        let all = counts.values.reduce(0, +)
        if all > UInt64(problems.count) { Output.line("... and \(all - UInt64(problems.count)) more") }
        var text = "\(disks) disks, \(generations) generations, \(pages) manifest pages, \(blocks) blocks"
        if readData { text += " (\(ByteSize.readable(readBytes)) read)" }
        text += " in \(DurationMs.readable(durationMs)): "
        let found = CheckProblem.Kind.allCases.compactMap { kind in
            counts[kind.rawValue].map { "\($0) \(kind.rawValue)" }
        }
        text += found.isEmpty ? "nothing is wrong" : found.joined(separator: ", ")
        if repaired > 0 { text += ", \(repaired) repaired" }
        Output.line(text)
    }
}
