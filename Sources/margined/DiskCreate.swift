import ArgumentParser
import Margarine

struct DiskCreate: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Make an empty disk.",
        discussion: """
            Takes no room and no time, whatever the size; the store is made where there is none yet. Options that are not \
            given come from [new-disk] of the configuration.

            Examples:
              margined disk create work --size 10G --store file:///srv/disks
              margined disk create db --size 1T --durability store --safe-points flush --store 's3://disks/prod'
            """)

    @Argument(help: "1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit.")
    var name: DiskNameArgument

    @Option(help: ArgumentHelp("Size, a multiple of 512 bytes, as in 10G; less than 8E.", valueName: "size"))
    var size: String

    @OptionGroup var options: DiskOptionFlags
    @OptionGroup var place: NewDiskLocation
    @OptionGroup var source: StoreOptions
    @Flag(help: "Print the disk as JSON.") var json = false

    func validate() throws {
        try name.check()
        _ = try DiskSizeArgument(size)
    }

    func run() async throws {
        var settings = try source.settings()
        try options.apply(to: &settings)
        let bytes = try DiskSizeArgument(size).bytes
        let catalog = try await source.catalog()
        let disk = try await catalog.create(
            name.text, sizeBytes: bytes, options: settings.newDisk, location: try place.number(in: catalog.store))
        if json { try disk.print(json: true) }
    }
}
