import ArgumentParser
import Margarine
import ObjectStore

/// `margined location`: the places of a store that has several.
struct LocationCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "location",
        abstract: "Add and show the locations of a store.",
        discussion: """
            A store begins with one location, in one region, and can have more. New objects go to the near one; what was \
            written elsewhere is read from where it is. The configuration then has 'locations' and 'near' in the place of \
            'store'; see margined.toml(5).

            Examples:
              margined location add us 's3://disks-us?region=us-east-2' --config /etc/margined.toml
              margined location list --config /etc/margined.toml
            """,
        subcommands: [LocationAdd.self, LocationList.self])
}

struct LocationAdd: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "add",
        abstract: "Make a bucket a location of the store.",
        discussion: """
            The bucket (or prefix) must be empty. It gets a number, which manifests name it by and which it keeps for ever. \
            Afterwards put NAME=URL into 'locations' of every configuration, and restart the daemons. A store that has had \
            one location without a name calls it 'main', or what 'locations' calls it. Ended half-way, the same command \
            goes on where it stopped.

            Examples:
              margined location add us 's3://disks-us?region=us-east-2' --store 's3://disks-eu?region=eu-central-1'
              margined location add us file:///mnt/us --config /etc/margined.toml
            """)

    @Argument(help: "Its name: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit.") var name: String
    @Argument(help: "Its bucket.") var url: String

    @Flag(
        help:
            "The location is known and its bucket lost for good: this one takes its place. What only the old one had is lost."
    )
    var replace = false

    @OptionGroup var source: StoreOptions

    func validate() throws {
        guard LocationSetting("\(name)=\(url)") != nil else {
            throw ValidationError("'\(name)' and '\(url)' are no name and URL of a location")
        }
    }

    func run() async throws {
        var settings = try source.settingsWithStore()
        // It may stand there already.
        settings.locations.removeAll { $0.name == name && $0.url == url }
        if !settings.locations.contains(where: { $0.name == settings.near }) { settings.near = nil }
        try settings.checkStore()
        let store = try await source.open(settings)
        let address = url
        let environment = store.environment
        let place = StorePlace(name: name) { () async throws(StoreError) -> any Bucket in
            try await openTransport(url: address, environment: environment)
        }
        let added = try await store.addLocation(name, place, replace: replace)
        for one in added.behind {
            Failure.say(
                "location '\(one.name)' has not heard of it: \(one.reason); configure it, and give this command again")
        }
    }
}

struct LocationList: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list",
        abstract: "Show the locations of the store.",
        discussion: """
            Examples:
              margined location list --store file:///srv/disks
              margined location list --json --config /etc/margined.toml
            """)

    @OptionGroup var source: StoreOptions
    @Flag(help: "Print a JSON array.") var json = false

    private struct Line: Encodable {
        var number: UInt8
        var name: String
        var near: Bool
        /// null: not configured.
        var url: String?
        /// null: it answers.
        var problem: String?
        init(_ state: Store.LocationState) {
            number = state.number
            name = state.name
            near = state.isNear
            url = state.url
            problem = state.problem
        }
        enum CodingKeys: String, CodingKey { case number, name, near, url, problem }
        func encode(to encoder: any Encoder) throws {
            var c = encoder.container(keyedBy: CodingKeys.self)
            try c.encode(number, forKey: .number)
            try c.encode(name, forKey: .name)
            try c.encode(near, forKey: .near)
            try c.encode(url, forKey: .url)
            try c.encode(problem, forKey: .problem)
        }
    }

    func run() async throws {
        let states = await (try source.open(try source.settingsWithStore(), readOnly: true)).locationStates()
        if json { return try Output.json(states.map(Line.init)) }
        var table = Table(["NUMBER", "NAME", "NEAR", "URL", "STATE"], rightAligned: [0])
        for state in states {
            table.add([
                "\(state.number)", state.name, state.isNear ? "near" : "-", state.url ?? "-",
                state.problem ?? "answers",
            ])
        }
        table.print()
    }
}
