import ArgumentParser
import Glibc
import Margarine

struct DiskSend: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "send",
        abstract: "Write a generation of a disk to standard output, for 'disk receive'.",
        discussion: """
            The newest generation, or the one that is named; with --from only what may differ from that earlier generation \
            of the same disk. The stream is packed and checksummed, and can be kept in a file or received by another store.

            Examples:
              margined disk send work@17 --store file:///srv/disks | ssh spare margined disk receive work
              margined disk send work@20 --from 17 --store file:///srv/disks >work-17-20.stream
            """)

    @Argument(help: ArgumentHelp("The disk, or one generation of it.", valueName: "name[@generation]"))
    var source: String
    @Option(help: ArgumentHelp("Only what changed since this generation.", valueName: "generation"))
    var from: String?
    @OptionGroup var store: StoreOptions

    func validate() throws {
        _ = try GenerationName(source)
        if let from { _ = try GenerationName.number(from) }
        if isatty(STDOUT_FILENO) == 1 {
            throw ValidationError("standard output is a terminal: send it into a file or another command")
        }
    }

    func run() async throws {
        let wanted = try GenerationName(source)
        let base = try from.map { try GenerationName.number($0) }
        let catalog = try await store.catalog(readOnly: true)
        let progress = Progress("send \(source)")
        defer { progress.finish() }
        try await catalog.send(
            wanted.disk, generation: wanted.generation, from: base,
            to: { (bytes) throws(CatalogError) in try StandardStream.write(bytes) },
            progress: { progress.update(doneBytes: $0, totalBytes: $1) })
    }
}

/// Standard input and output as the bytes of a stream. Calls block: they are made on worker threads.
enum StandardStream {
    static func write(_ bytes: [UInt8]) throws(CatalogError) {
        var done = 0
        while done < bytes.count {
            let count = bytes[done...].withUnsafeBytes { Glibc.write(STDOUT_FILENO, $0.baseAddress, $0.count) }
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { throw error("cannot write to standard output") }
            done += count
        }
    }

    /// Up to `most` bytes; none at the end.
    static func read(_ most: Int) throws(CatalogError) -> [UInt8] {
        var failure: Int32 = 0
        let bytes = [UInt8](unsafeUninitializedCapacity: most) { out, filled in
            var count = 0
            repeat { count = Glibc.read(STDIN_FILENO, out.baseAddress, most) } while count < 0 && errno == EINTR
            if count < 0 { failure = errno }
            filled = max(0, count)
        }
        if failure != 0 {
            errno = failure
            throw error("cannot read standard input")
        }
        return bytes
    }

    private static func error(_ what: String) -> CatalogError {
        CatalogError(.file, "\(what): \(String(cString: strerror(errno)))")
    }
}
