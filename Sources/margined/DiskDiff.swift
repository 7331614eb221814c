import ArgumentParser
import Margarine

struct DiskDiff: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "diff",
        abstract: "Show which bytes changed between two generations.",
        discussion: """
            Of the same disk, of forks, or of any two disks of the store. Told by what the store names, without reading data, \
            in pieces of 512 KiB: what is listed may hold other bytes in B than in A ('data'), or holds only zeroes now \
            ('zeroes'); what is not listed is the same in both. Where the sizes differ, what the smaller one lacks counts as \
            zeroes.

            Examples:
              margined disk diff work@17 work --store file:///srv/disks
              margined disk diff base@1 work@20 --json --store file:///srv/disks
            """)

    @Argument(help: ArgumentHelp("The disk before, or one generation of it.", valueName: "name[@generation]"))
    var before: String
    @Argument(help: ArgumentHelp("The disk after, or one generation of it.", valueName: "name[@generation]"))
    var after: String
    @OptionGroup var store: StoreOptions
    @Flag(help: "Print a JSON object.") var json = false

    func validate() throws {
        _ = try GenerationName(before)
        _ = try GenerationName(after)
    }

    func run() async throws {
        let (a, b) = (try GenerationName(before), try GenerationName(after))
        let catalog = try await store.catalog(readOnly: true)
        let old = try await catalog.view(a.disk, generation: a.generation)
        let new = try await catalog.view(b.disk, generation: b.generation)
        let ranges = catalog.diff(from: old, to: new)
        var report: any DiffReport = json ? JSONDiff(old, new) : TextDiff(old, new)
        var count = 0
        // As it comes: there may be more ranges than fit in memory.
        while let range = try await ranges.next() {
            report.add(range)
            count += 1
            // A reader that went away needs no more.
            if count % 1000 == 0 { try Output.finish() }
        }
        report.end()
    }
}

private protocol DiffReport {
    mutating func add(_ range: ChangedRange)
    mutating func end()
}

/// Bytes of each kind.
private struct DiffSums {
    var data: UInt64 = 0
    var zeroes: UInt64 = 0
    mutating func add(_ range: ChangedRange) {
        switch range.kind {
        case .data: data += UInt64(range.bytes.count)
        case .zeroes: zeroes += UInt64(range.bytes.count)
        }
    }
}

private struct TextDiff: DiffReport {
    private let old: GenerationView
    private let new: GenerationView
    private var sums = DiffSums()
    private var isFirst = true

    init(_ old: GenerationView, _ new: GenerationView) { (self.old, self.new) = (old, new) }

    private func line(_ offset: String, _ length: String, _ kind: String) {
        func right(_ text: String) -> String { String(repeating: " ", count: max(0, 20 - text.count)) + text }
        Output.line("\(right(offset))  \(right(length))  \(kind)")
    }

    mutating func add(_ range: ChangedRange) {
        if isFirst { line("OFFSET", "LENGTH", "KIND") }
        isFirst = false
        line("\(range.bytes.lowerBound)", "\(range.bytes.count)", range.kind.rawValue)
        sums.add(range)
    }

    mutating func end() {
        func name(_ view: GenerationView) -> String { "\(view.disk)@\(view.generation)" }
        let size =
            old.sizeBytes == new.sizeBytes
            ? "" : "; the size was \(old.sizeBytes) bytes and is \(new.sizeBytes)"
        let changed =
            isFirst
            ? "nothing changed"
            : "\(ByteSize.readable(sums.data)) may hold other data, \(ByteSize.readable(sums.zeroes)) are zeroes now"
        Output.line("\(name(old)) to \(name(new)): \(changed)\(size)")
    }
}

private struct JSONDiff: DiffReport {
    private var sums = DiffSums()
    private var isFirst = true

    init(_ old: GenerationView, _ new: GenerationView) {
        // Names of disks need no escapes.
        func side(_ view: GenerationView) -> String {
            "{\"disk\": \"\(view.disk)\", \"generation\": \(view.generation), \"size\": \(view.sizeBytes)}"
        }
        Output.line("{\"from\": \(side(old)),")
        Output.line(" \"to\": \(side(new)),")
        Output.line(" \"ranges\": [")
    }

    mutating func add(_ range: ChangedRange) {
        Output.line(
            (isFirst ? "  " : "  ,")
                + "{\"offset\": \(range.bytes.lowerBound), \"length\": \(range.bytes.count), \"kind\": \"\(range.kind.rawValue)\"}"
        )
        isFirst = false
        sums.add(range)
    }

    mutating func end() {
        Output.line(" ],")
        Output.line(" \"dataBytes\": \(sums.data), \"zeroesBytes\": \(sums.zeroes)}")
    }
}
