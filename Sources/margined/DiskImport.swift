import ArgumentParser
import Margarine

struct DiskImport: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "import",
        abstract: "Make a disk out of a raw image.",
        discussion: """
            The disk gets the size of the image, rounded up to 512 bytes, and appears whole or not at all; what is all \
            zeroes takes no room. A disk that is there already takes it if it was never written and is large enough; it then \
            keeps its options. Options that are not given come from [new-disk] of the configuration.

            Examples:
              margined disk import debian-12.raw base --store file:///srv/disks
              margined disk import /dev/sdb1 work --durability store --store 's3://disks/prod'
            """)

    @Argument(help: "The image: a file or a block device.") var file: String
    @Argument(help: "The disk.") var name: DiskNameArgument
    @OptionGroup var options: DiskOptionFlags
    @OptionGroup var place: NewDiskLocation
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws { try name.check() }

    func run() async throws {
        var settings = try source.settings()
        try options.apply(to: &settings)
        let catalog = try await source.catalog()
        let location = try place.number(in: catalog.store)
        let image = try ImageInput(path: file)
        let progress = Progress("import \(name.text)")
        defer { progress.finish() }
        let disk = try await catalog.import(image, as: name.text, options: settings.newDisk, location: location) {
            progress.update(doneBytes: $0, totalBytes: $1)
        }
        progress.finish()
        if json { try disk.print(json: true) }
    }
}
