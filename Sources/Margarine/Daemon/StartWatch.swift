// Says what a start waits for, when it takes long: a store that is away, full or damaged would else look like a hang.
//
// Always holds: the first line comes within `firstMs` of a step that takes longer; the gaps double up to `longestGapMs`, and
// begin anew with every step; nothing is said after `end`.

package import Logging
internal import ObjectStore
package import Runtime
internal import Synchronization

package final class StartWatch: Sendable {
    package static let firstMs: UInt64 = 4_000
    package static let longestGapMs: UInt64 = 60_000

    private struct State {
        var step = ""
        /// What to do when it does not get on.
        var remedy = ""
        var number = 0
        var sinceNs: UInt64 = 0
        var nextNs: UInt64 = 0
        var gapMs: UInt64 = 0
        var isOver = false
    }
    private let state = Mutex(State())
    private let log: Logger
    private let environment: any Environment
    /// Why the store did not do what it was asked last, and how long ago in ms.
    private let trouble: @Sendable () -> (text: String, ageMs: Int64)?
    private static let lookEveryNs: UInt64 = 500_000_000

    /// - Parameter trouble: the last thing that went wrong, and how long ago.
    package init(
        log: Logger, environment: any Environment, trouble: @escaping @Sendable () -> (text: String, ageMs: Int64)?
    ) {
        self.log = log
        self.environment = environment
        self.trouble = trouble
    }

    /// The next step begins: `waiting for …`.
    package func now(_ step: String, remedy: String) {
        let now = environment.nowNs
        let isFirst = state.withLock { state in
            state.step = step
            state.remedy = remedy
            state.number += 1
            state.sinceNs = now
            state.gapMs = Self.firstMs
            state.nextNs = now + Self.firstMs * 1_000_000
            return state.number == 1
        }
        if isFirst { Task { await watch() } }
    }

    /// The daemon serves, or has failed.
    package func end() { state.withLock { $0.isOver = true } }

    private func watch() async {
        while true {
            await environment.sleep(ns: Self.lookEveryNs)
            guard tellIfDue() else { return }
        }
    }

    /// One look; false once the start is over.
    package func tellIfDue() -> Bool {
        let now = environment.nowNs
        let (isOver, due) = state.withLock { state -> (Bool, State?) in
            guard !state.isOver, now >= state.nextNs else { return (state.isOver, nil) }
            state.gapMs = min(state.gapMs * 2, Self.longestGapMs)
            state.nextNs = now + state.gapMs * 1_000_000
            return (false, state)
        }
        guard let due else { return !isOver }
        let waitedMs = Int64((now - due.sinceNs) / 1_000_000)
        var text = "not ready yet: \(due.step), for \(DurationMs.readable(waitedMs)) now"
        // An error from before this step explains nothing.
        if let trouble = trouble(), trouble.ageMs <= waitedMs + 1_000 { text += "; the last error: \(trouble.text)" }
        log.warning("\(text); \(due.remedy)")
        return true
    }
}
