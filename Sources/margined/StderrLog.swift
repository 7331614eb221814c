// Log lines on standard error: time, level, message, key=value. Under systemd the journal has the time and reads the
// level from a `<N>` in front.
//
// Always holds: one message is one line, whatever names and errors from outside are in it (`printable`); to log never waits
// for whoever reads standard error (`LineWriter`).

import Foundation
import Glibc
import Logging
import Margarine
import Runtime
import Synchronization

/// The one level of all loggers, which SIGHUP can change.
final class SharedLogLevel: Sendable {
    private let level = Mutex(Logger.Level.info)
    var current: Logger.Level {
        get { level.withLock { $0 } }
        set { level.withLock { $0 = newValue } }
    }
}

struct StderrLog: LogHandler {
    let shared: SharedLogLevel
    /// Standard error goes to systemd's journal.
    let isJournal: Bool
    var metadata: Logger.Metadata = [:]
    private var own: Logger.Level?

    init(shared: SharedLogLevel, isJournal: Bool) {
        self.shared = shared
        self.isJournal = isJournal
    }

    var logLevel: Logger.Level {
        get { own ?? shared.current }
        set { own = newValue }
    }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        var line = isJournal ? "<\(priority(event.level))>" : "\(now()) \(event.level) "
        line += event.message.description.printable
        let all = metadata.merging(event.metadata ?? [:]) { _, new in new }
        for (key, value) in all.sorted(by: { $0.key < $1.key }) {
            line += " \(key)=\(quoted("\(value)").printable)"
        }
        Output.log.add(line)
    }

    private func priority(_ level: Logger.Level) -> Int {
        switch level {
        case .trace, .debug: 7
        case .info: 6
        case .notice: 5
        case .warning: 4
        case .error: 3
        case .critical: 2
        }
    }

    private func quoted(_ value: String) -> String {
        guard value.isEmpty || value.contains(where: { $0.isWhitespace || $0 == "\"" || $0 == "=" }) else {
            return value
        }
        let escaped = value.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"")
        return "\"\(escaped)\""
    }

    private func now() -> String {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        var parts = tm()
        gmtime_r(&time.tv_sec, &parts)
        func two(_ value: Int32) -> String { value < 10 ? "0\(value)" : "\(value)" }
        let ms = String(time.tv_nsec / 1_000_000 + 1000).dropFirst()
        return "\(parts.tm_year + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday))"
            + "T\(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec)).\(ms)Z"
    }
}
