import ArgumentParser
import Foundation
import Margarine

/// `margined status`: asks a running daemon over its control socket.
struct Status: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show what a running daemon is doing.",
        discussion: """
            Shows the daemon, its store and caches, the sessions of its clients, and for each disk what is not yet in the \
            store. Ages are how long ago; counters count since the daemon started.

            The daemon is found by its control socket: --control, or control.sock in --scratch, or what --config says.

            Examples:
              margined status --scratch /var/lib/margined
              margined status --config /etc/margined.toml --json
            """)

    @Option(help: ArgumentHelp("Scratch directory of the daemon.", valueName: "dir"))
    var scratch: String?

    @Option(help: ArgumentHelp("Control socket of the daemon.", valueName: "path"))
    var control: String?

    @Option(help: ArgumentHelp("Configuration file of the daemon.", valueName: "file"))
    var config: String?

    @Flag(help: "Print JSON.")
    var json = false

    func run() throws {
        var source = StoreOptions()
        source.config = config
        source.store = nil
        source.near = nil
        var settings = try source.settings()
        if let scratch {
            settings.scratch = scratch
            settings.control = nil
        }
        if let control { settings.control = control }
        let answer = try ControlClient(path: settings.controlPath).ask(ControlRequest(command: "status"))
        guard let report = answer.status else {
            throw Failure("the daemon at '\(settings.controlPath)' gives no status: use its own version of margined")
        }
        if json {
            try Output.json(report)
        } else {
            StatusText(report).print()
        }
    }
}
