// The composition: everything one running daemon is made of. As yet it holds the scratch directory and answers on the
// control socket; the store, the disks and the listeners join it here.

public import Logging
import Glibc

public final class Daemon: StatusSource {
    private let settings: Settings
    private let log: Logger
    private let lock: ScratchLock
    private let startedAt = ContinuousClock.now

    /// Takes the scratch directory. Serves nothing before `start`.
    /// - Throws: `DaemonError`, among others when another live daemon uses the scratch directory.
    public init(settings: Settings, log: Logger) throws {
        try settings.validate()
        self.settings = settings
        self.log = log
        lock = try ScratchLock(directory: settings.scratch)
    }

    /// Opens the store and listens.
    /// - Returns: the addresses it serves, such as `tcp://127.0.0.1:10809` and `unix:/path`.
    public func start() async throws -> [String] { [] }

    /// Admits no new sessions, finishes what is in flight, commits the disks and closes everything.
    public func drain() async throws {}

    /// Takes over what can change while running; the rest of `settings` equals what runs.
    public func reload(settings: Settings) {}

    public func status() async -> StatusReport {
        let age = ContinuousClock.now - startedAt
        return StatusReport(
            daemon: DaemonStatus(
                pid: getpid(),
                uptimeMs: age.components.seconds * 1000 + age.components.attoseconds / 1_000_000_000_000_000,
                scratch: settings.scratch, addresses: []),
            store: StoreStatus(name: settings.store ?? ""), memoryCache: CacheStatus(), scratchCache: CacheStatus(),
            sessions: [], disks: [])
    }
}
