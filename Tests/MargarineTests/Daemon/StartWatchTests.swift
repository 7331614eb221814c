import Logging
import Runtime
import Synchronization
import Testing

@testable import Margarine

private final class Lines: Sendable {
    let all = Mutex<[String]>([])
    var count: Int { all.withLock { $0.count } }
}

private struct LineLog: LogHandler {
    let lines: Lines
    var metadata: Logger.Metadata = [:]
    var logLevel = Logger.Level.trace
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { nil }
        set {}
    }
    func log(event: LogEvent) { lines.all.withLock { $0.append("\(event.level) \(event.message)") } }
}

/// A clock that goes on when it is told to.
private final class HandClock: Environment {
    let now = Atomic<UInt64>(1_000_000_000)
    var nowNs: UInt64 { now.load(ordering: .relaxed) }
    var wallMs: Int64 { Int64(nowNs / 1_000_000) }
    func randomBits() -> UInt64 { 4 }
    /// Its sleepers sleep for ever: the test looks for them.
    func sleep(ns: UInt64) async { try? await Task.sleep(for: .seconds(3600)) }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}

@Suite struct StartWatchTests {
    @Test("row 23: a start that waits says for what within 5 s, and again with growing gaps") func growingGaps() {
        let lines = Lines()
        let clock = HandClock()
        let watch = StartWatch(log: Logger(label: "t") { _ in LineLog(lines: lines) }, environment: clock) {
            ("the disk is full", 10)
        }
        watch.now("waiting for the store file:///x", remedy: "make room")
        var toldAtS: [Int] = []
        for half in 1...600 {
            clock.now.add(500_000_000, ordering: .relaxed)
            let before = lines.count
            #expect(watch.tellIfDue())
            if lines.count > before { toldAtS.append(half / 2) }
        }
        #expect(toldAtS == [4, 12, 28, 60, 120, 180, 240, 300])
        let first = lines.all.withLock { $0[0] }
        #expect(first.hasPrefix("warning not ready yet: waiting for the store file:///x, for 4 s now"))
        #expect(first.contains("the last error: the disk is full") && first.hasSuffix("; make room"))

        // A new step has its own time, and after the end nothing is said.
        watch.now("taking up the journal of disk d", remedy: "wait")
        clock.now.add(4_000_000_000, ordering: .relaxed)
        #expect(watch.tellIfDue())
        #expect(lines.all.withLock { $0.last?.contains("disk d, for 4 s now") } == true)
        watch.end()
        clock.now.add(100_000_000_000, ordering: .relaxed)
        #expect(!watch.tellIfDue())
        #expect(lines.count == 9)
    }

    @Test("row 23: an error from before the step does not explain it") func oldErrors() {
        let lines = Lines()
        let clock = HandClock()
        let watch = StartWatch(log: Logger(label: "t") { _ in LineLog(lines: lines) }, environment: clock) {
            ("long gone", 60_000)
        }
        watch.now("waiting", remedy: "do something")
        clock.now.add(5_000_000_000, ordering: .relaxed)
        #expect(watch.tellIfDue())
        #expect(lines.all.withLock { $0.count == 1 && !$0[0].contains("long gone") })
    }
}
