import ArgumentParser
import Foundation
import Glibc
import Logging
import Margarine
import Runtime

/// `margined serve`: reads the settings, runs one daemon, and passes signals on to it.
struct Serve: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Serve the disks of a store over NBD.",
        discussion: """
            Prints 'ready' with its addresses once it serves. Every disk of the store can be attached by its name; \
            NAME?session=ID names the attachment, NAME@GENERATION is a read-only view of one generation.

            SIGTERM and SIGINT drain: no new sessions, what is in flight is finished, what is at a safe point is \
            committed, disks whose clients have detached are given back, exit 0. A second one ends at once; what was not \
            committed stays in the journal of the scratch directory and is taken up at the next start. \
            SIGHUP reads the configuration again and takes over what can change.

            Everything in the configuration can also be set with --set; flags come before the file, the file before the \
            environment.

            Examples:
              margined serve --store file:///srv/disks --scratch /var/lib/margined
              margined serve --store 's3://disks/prod?region=eu-central-1' --scratch /var/lib/margined \\
                --listen 0.0.0.0:10809 --unix /run/margined/nbd.sock
              margined serve --config /etc/margined.toml --set commit-interval=1s --set memory-cache=4G
            """)

    @OptionGroup var source: StoreOptions

    @Option(help: ArgumentHelp("Directory for journals and cached blocks, for this daemon alone.", valueName: "dir"))
    var scratch: String?

    @Option(
        help: ArgumentHelp(
            "TCP address to serve on; may be given again. Default: 127.0.0.1:10809 if there is no --unix either.",
            valueName: "host:port"))
    var listen: [String] = []

    @Option(help: ArgumentHelp("Unix socket to serve on; may be given again.", valueName: "path"))
    var unix: [String] = []

    @Option(help: ArgumentHelp("Control socket. Default: control.sock in the scratch directory.", valueName: "path"))
    var control: String?

    @Option(
        help: ArgumentHelp("Take disks of other servers: 'dead' ones only, or by 'force'.", valueName: "dead|force"))
    var takeover: String?

    @Option(help: ArgumentHelp("trace, debug, info, notice, warning, error or critical.", valueName: "level"))
    var logLevel: String?

    @Option(help: ArgumentHelp("Set any key of the configuration; may be given again.", valueName: "key=value"))
    var set: [String] = []

    func validate() throws {
        var settings = Settings()
        try applyFlags(to: &settings)
    }

    /// All settings, with every source in its place.
    private func settings() throws -> Settings {
        var settings = try source.settings()
        try applyFlags(to: &settings)
        if settings.listen.isEmpty && settings.unix.isEmpty {
            settings.listen = [ListenAddress(host: "127.0.0.1", port: 10809)]
        }
        do { try settings.validate() } catch { throw ValidationError("\(error)") }
        return settings
    }

    private func applyFlags(to settings: inout Settings) throws {
        for pair in set {
            guard let equals = pair.firstIndex(of: "=") else {
                throw ValidationError("--set: '\(pair)' has no '=': write KEY=VALUE, as in commit-interval=1s")
            }
            try settings.set(String(pair[..<equals]), String(pair[pair.index(after: equals)...]), flag: "--set")
        }
        let flags: [(key: String, flag: String, text: String?)] = [
            ("scratch", "--scratch", scratch),
            ("listen", "--listen", listen.isEmpty ? nil : listen.joined(separator: ",")),
            ("control", "--control", control), ("takeover", "--takeover", takeover),
            ("log-level", "--log-level", logLevel),
        ]
        for (key, flag, text) in flags {
            if let text { try settings.set(key, text, flag: flag) }
        }
        // Not through text: a path may hold a comma.
        if !unix.isEmpty { settings.unix = unix }
    }

    func run() async throws {
        let settings = try settings()
        try settings.checkStore()
        let level = SharedLogLevel()
        level.current = Logger.Level(rawValue: settings.logLevel.rawValue) ?? .info
        let isJournal = ProcessInfo.processInfo.environment["JOURNAL_STREAM"] != nil
        let log = Logger(label: "margined") { _ in StderrLog(shared: level, isJournal: isJournal) }
        guard Output.log.prepare() else {
            throw Failure("the system has no thread for the log: raise the limit of threads (pids, ulimit -u)")
        }
        raiseDescriptorLimit(for: settings, log)
        try await ServeRun(settings: settings, level: level, log: log, reread: self.settings).run()
    }
}

/// Lets the process open as many files as it may: the usual soft limit of 1024 is for programs that use select().
private func raiseDescriptorLimit(for settings: Settings, _ log: Logger) {
    var limit = rlimit()
    guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
    limit.rlim_cur = limit.rlim_max
    _ = setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    // Connections, and what the scratch directory, the store and the loops need beside them.
    let wanted = UInt64(settings.maxConnections + max(16, settings.maxConnections / 4)) + 1024
    if limit.rlim_max < wanted {
        log.warning(
            "fewer files may be open than max-connections needs: raise LimitNOFILE or ulimit -n",
            metadata: ["limit": "\(limit.rlim_max)", "wanted": "\(wanted)"])
    }
}

/// One run of the daemon: start, signals, end.
private struct ServeRun {
    let settings: Settings
    let level: SharedLogLevel
    let log: Logger
    let reread: () throws -> Settings

    private enum Event: Sendable {
        case signal(Int32)
        case started(Result<[String], any Error>)
        case drained(Result<Void, any Error>)
        case drainTimedOut
    }

    func run() async throws {
        let (events, queue) = AsyncStream.makeStream(of: Event.self)
        try Signals.watch([SIGTERM, SIGINT, SIGHUP]) { queue.yield(.signal($0)) }
        let daemon = try Daemon(settings: settings, log: log)
        let control = try ControlSocket(path: settings.controlPath) { request in
            switch request.command {
            case "status": ControlAnswer(status: await daemon.status())
            case "look": await daemon.look()
            case "cut": await daemon.cut(request.arguments?["disks"] ?? "")
            default: ControlAnswer(error: "unknown command '\(request.command)': known are status, look and cut")
            }
        }
        defer { control.close() }
        Task {
            do { queue.yield(.started(.success(try await daemon.start()))) } catch {
                queue.yield(.started(.failure(error)))
            }
        }

        var running = settings
        var isServing = false
        var isDraining = false
        for await event in events {
            switch event {
            case .started(.success(let addresses)):
                isServing = true
                Output.announcements.add((["ready"] + addresses).joined(separator: " ").printable)
                ServiceManager.notify("READY=1\nSTATUS=serving \(addresses.joined(separator: " "))")
            case .started(.failure(let error)):
                throw error
            case .signal(SIGHUP):
                running = reload(daemon, running)
            case .signal(let number):
                guard isServing else {
                    // No client was served: the scratch directory is as it was found, or better.
                    log.notice("stopped before it was ready", metadata: ["signal": "\(number)"])
                    return
                }
                guard !isDraining else {
                    throw Failure(
                        "ended by a second signal while draining: what is not committed stays in '\(settings.scratch)'")
                }
                isDraining = true
                log.notice("draining", metadata: ["limit": "\(DurationMs.text(running.drainTimeoutMs))"])
                ServiceManager.notify("STOPPING=1\nSTATUS=draining")
                drain(daemon, limitMs: running.drainTimeoutMs, queue)
            case .drained(.success):
                log.notice("drained")
                return
            case .drained(.failure(let error)):
                throw error
            case .drainTimedOut:
                throw Failure(
                    "not everything could be committed within drain-timeout (\(DurationMs.text(running.drainTimeoutMs))): "
                        + "the rest stays in '\(settings.scratch)' and is taken up at the next start")
            }
        }
    }

    private func drain(_ daemon: Daemon, limitMs: Int64, _ queue: AsyncStream<Event>.Continuation) {
        Task {
            do {
                try await daemon.drain()
                queue.yield(.drained(.success(())))
            } catch {
                queue.yield(.drained(.failure(error)))
            }
        }
        Task {
            try? await Task.sleep(for: .milliseconds(limitMs))
            queue.yield(.drainTimedOut)
        }
    }

    /// Takes over what can change, and says what cannot.
    private func reload(_ daemon: Daemon, _ running: Settings) -> Settings {
        let wanted: Settings
        do {
            wanted = try reread()
        } catch {
            log.error("configuration not taken over: \(Margined.message(for: error))")
            return running
        }
        let next = wanted.keepingFixed(of: running)
        for key in wanted.differences(from: running) {
            if key.isReloadable {
                log.notice("changed", metadata: ["key": "\(key.name)", "value": "\(key.text(next))"])
            } else {
                log.warning(
                    "needs a restart to change", metadata: ["key": "\(key.name)", "value": "\(key.text(running))"])
            }
        }
        level.current = Logger.Level(rawValue: next.logLevel.rawValue) ?? .info
        daemon.reload(settings: next)
        log.notice("configuration read again")
        return next
    }
}
