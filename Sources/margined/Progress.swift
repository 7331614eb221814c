// How far long work has come: one line on the terminal, rewritten a few times a second. Nothing where standard error is
// no terminal.

import Glibc
import Margarine
import Synchronization

final class Progress: Sendable {
    private let what: String
    private let isShown: Bool
    private let state: Mutex<State>
    private struct State {
        let startedAt: ContinuousClock.Instant
        var shownAt: ContinuousClock.Instant?
    }

    /// - Parameter what: names the work: `export demo`.
    init(_ what: String) {
        self.what = what
        isShown = Output.standardErrorIsTerminal
        state = Mutex(State(startedAt: .now))
    }

    /// Shows that `done` of `total` (0: nobody knows of how many) are done, of what `phase` counts.
    func update(_ phase: String, done: UInt64, total: UInt64) {
        guard isShown, isTime() != nil else { return }
        let share = total == 0 ? "\(done)" : "\(Int(100 * Double(done) / Double(total)))% of \(total)"
        Output.toStandardError("\r\u{1B}[K\(what): \(phase) \(share)")
    }

    /// How long it has been going on, if the last showing is old enough for another.
    private func isTime() -> Duration? {
        let now = ContinuousClock.now
        return state.withLock { state in
            if let shownAt = state.shownAt, now - shownAt < .milliseconds(200) { return nil }
            state.shownAt = now
            return now - state.startedAt
        }
    }

    /// Shows that `doneBytes` of `totalBytes` are done, if the last showing is old enough.
    func update(doneBytes: UInt64, totalBytes: UInt64) {
        guard isShown, let elapsed = isTime() else { return }
        let percent = totalBytes == 0 ? 100 : Int(100 * Double(doneBytes) / Double(totalBytes))
        let seconds = max(0.001, Double(elapsed.components.seconds) + Double(elapsed.components.attoseconds) / 1e18)
        let rate = ByteSize.readable(UInt64(Double(doneBytes) / seconds))
        Output.toStandardError(
            "\r\u{1B}[K\(what): \(percent)% of \(ByteSize.readable(totalBytes)), \(rate)/s")
    }

    /// Clears the line.
    func finish() {
        let shown = state.withLock { $0.shownAt != nil }
        if isShown && shown { Output.toStandardError("\r\u{1B}[K") }
    }
}
