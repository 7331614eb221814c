import ArgumentParser
import Glibc
import Margarine

struct DiskExport: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "export",
        abstract: "Write a generation of a disk to a raw image.",
        discussion: """
            The image is one consistent instant, also of a disk in use: the newest generation, or the one that is named. The \
            file becomes sparse and replaces one that is there; '-' is standard output. Only used blocks are read.

            Examples:
              margined disk export work work.img --store file:///srv/disks
              margined disk export work@17 - --store file:///srv/disks | zstd >work-17.img.zst
            """)

    @Argument(help: ArgumentHelp("The disk, or one generation of it.", valueName: "name[@generation]"))
    var source: String

    @Argument(help: "Where the image goes; '-' is standard output.") var file: String
    @OptionGroup var store: StoreOptions

    func validate() throws {
        _ = try GenerationName(source)
        if file.isEmpty { throw ValidationError("the file has no name: give a path, or '-' for standard output") }
        if file == "-" && isatty(STDOUT_FILENO) == 1 {
            throw ValidationError("standard output is a terminal: send it into a file or another command")
        }
    }

    func run() async throws {
        let wanted = try GenerationName(source)
        let catalog = try await store.catalog(readOnly: true)
        // Before the file is touched: there is such a disk.
        _ = try await catalog.show(wanted.disk)
        let output = try ImageOutput(path: file)
        let progress = Progress("export \(source)")
        defer { progress.finish() }
        try await catalog.export(wanted.disk, generation: wanted.generation, to: output) {
            progress.update(doneBytes: $0, totalBytes: $1)
        }
    }
}
