import ArgumentParser
import Glibc
import Margarine

struct DiskReceive: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "receive",
        abstract: "Make a disk, or its next generation, out of a stream of 'disk send' on standard input.",
        discussion: """
            A whole stream makes a new disk; options that are not given come from [new-disk] of the configuration. A stream \
            over an earlier generation ('disk send --from') becomes the next generation of a disk that nobody has and that \
            is at that generation: which it received, was forked from, or was rolled back to. The disk gets the size of the \
            one that was sent. All of it appears once the stream was whole, or nothing.

            Examples:
              margined disk receive work --store file:///srv/spare <work.stream
              ssh main margined disk send work@20 --from 17 | margined disk receive work --store file:///srv/spare
            """)

    @Argument(help: "The disk.") var name: DiskNameArgument
    @OptionGroup var options: DiskOptionFlags
    @OptionGroup var place: NewDiskLocation
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws {
        try name.check()
        if isatty(STDIN_FILENO) == 1 {
            throw ValidationError("standard input is a terminal: give it a stream of 'margined disk send'")
        }
    }

    func run() async throws {
        var settings = try source.settings()
        try options.apply(to: &settings)
        let catalog = try await source.catalog()
        let location = try place.number(in: catalog.store)
        let progress = Progress("receive \(name.text)")
        defer { progress.finish() }
        let disk = try await catalog.receive(
            name.text, from: { (most) throws(CatalogError) in try StandardStream.read(most) },
            options: settings.newDisk, location: location,
            progress: { progress.update(doneBytes: $0, totalBytes: $1) })
        progress.finish()
        if json { try disk.print(json: true) }
    }
}
