// The daemon's own collections: one now and then, on a loop of their own, so that nobody who is served waits for them.

internal import Logging
internal import Runtime
internal import Synchronization

final class ScheduledCollection: Sendable {
    private let store: Store
    private let scratch: any ScratchDisk
    private let server: ServerIdentity
    private let grace: GraceGauge
    private let log: Logger
    private let state = Mutex(State())

    private struct State {
        var settings = Settings()
        var loop: Loop?
        var task: Task<Void, Never>?
        var isStopped = false
        var progress: CollectionProgress?
        var lastError: String?
    }

    /// How often it looks whether a collection is due.
    private static let lookEveryMs: Int64 = 60_000
    /// After a round that failed. Milliseconds.
    private static let pauseMs: Int64 = 600_000

    init(store: Store, scratch: any ScratchDisk, server: ServerIdentity, grace: GraceGauge, log: Logger) {
        self.store = store
        self.scratch = scratch
        self.server = server
        self.grace = grace
        self.log = log
    }

    /// Takes over interval, grace period and rate. The thread is there from when there is an interval on.
    func apply(_ settings: Settings) {
        state.withLock { state in
            state.settings = settings
            guard settings.collectionIntervalMs > 0, state.loop == nil, !state.isStopped else { return }
            let loop: Loop
            do throws(ScratchError) {
                loop = try Loop(name: "collection")
                try loop.start()
            } catch {
                log.error("no collections by this daemon until its configuration is read again: \(error)")
                return
            }
            state.loop = loop
            state.task = Task(executorPreference: loop) { [self] in await run() }
        }
    }

    /// Ends a round that is under way, with nothing lost, and begins no other.
    func stop() async {
        let (loop, task) = state.withLock { state in
            state.isStopped = true
            return (state.loop, state.task)
        }
        task?.cancel()
        await task?.value
        loop?.stop()
    }

    private func run() async {
        while !Task.isCancelled {
            let settings = state.withLock { $0.settings }
            var pauseMs = min(Self.lookEveryMs, max(settings.collectionIntervalMs, 100))
            if settings.collectionIntervalMs == 0 {
                pauseMs = Self.lookEveryMs
            } else if isDue(settings.collectionIntervalMs), await !collect(settings) {
                pauseMs = min(settings.collectionIntervalMs, Self.pauseMs)
            }
            if Task.isCancelled { return }
            await store.environment.sleep(ns: UInt64(pauseMs) * 1_000_000)
        }
    }

    /// Whether the last round of anybody is long enough ago.
    private func isDue(_ intervalMs: Int64) -> Bool {
        guard let last = grace.current.state?.last else { return true }
        return store.environment.wallMs - last.startedAtMs >= intervalMs
    }

    /// One round; false: it was not completed.
    private func collect(_ settings: Settings) async -> Bool {
        var options = CollectionOptions()
        options.server = server.id
        options.host = server.host
        options.graceMs = settings.collectionGraceMs == 0 ? nil : settings.collectionGraceMs
        options.deletesPerSecond = settings.collectionRate
        let collector = Collector(store: store, scratch: scratch, options: options)
        defer { state.withLock { $0.progress = nil } }
        do throws(CatalogError) {
            let summary = try await collector.run { [self] progress in state.withLock { $0.progress = progress } }
            log.notice(
                "collection: \(summary.deleted) objects of \(ByteSize.readable(summary.deletedBytes)) deleted in \(DurationMs.readable(summary.durationMs)); \(summary.blocks.scanned) blocks and \(summary.pages.scanned) manifest pages looked at"
            )
            state.withLock { $0.lastError = nil }
            // So that the status, and whether one is due, go by it.
            try await grace.refresh(store.bucket, environment: store.environment)
            return true
        } catch {
            if Task.isCancelled { return false }
            // Another one is at work: as it should be.
            if error.kind == .owned { return false }
            log.warning("a collection was not completed, and nothing is lost: \(error)")
            state.withLock { $0.lastError = error.description }
            return false
        }
    }

    var status: CollectionStatus {
        let (settings, progress, lastError) = state.withLock { ($0.settings, $0.progress, $0.lastError) }
        let known = grace.current
        var status = CollectionStatus()
        status.intervalMs = settings.collectionIntervalMs
        status.graceMs = known.graceMs
        status.phase = progress?.phase
        status.done = progress?.done ?? 0
        status.total = progress?.total ?? 0
        status.last = known.state?.last
        status.lastAgeMs = status.last.map { max(0, store.environment.wallMs - $0.startedAtMs) }
        status.lastError = lastError
        return status
    }
}
