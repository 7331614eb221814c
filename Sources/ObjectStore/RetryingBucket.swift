// Repeats calls that failed for a while, and only what is safe to repeat.
//
// Always holds:
// - Reads, listings, deletes and puts without a condition are repeated as they are. A put without a condition is
//   for keys that are written with one content only, or where the last of two writers may win.
// - A put with a condition is repeated only after reading back showed that its condition still holds; when it shows
//   the very bytes of the put, that is its success. Such bytes hold a nonce, or a name used once.
// - No call goes on past its deadline (plus what one attempt may last), and while many calls fail the attempts of all
//   of them together thin out: the budget.

public import Runtime
import Synchronization

/// How long and how often calls are repeated.
public struct RetryPolicy: Sendable, Equatable {
    /// Upper bound of the first pause; it doubles from one attempt to the next.
    public var firstPauseMs: UInt64 = 50
    public var longestPauseMs: UInt64 = 5_000
    /// No new attempt begins later than this after the call.
    public var deadlineMs: UInt64 = 60_000
    /// So many repetitions may come at the pace above; each success gives back a tenth. When they are used up,
    /// repetitions come at the longest pause only.
    public var budget: Double = 200
    /// How often bytes that arrived damaged are asked for again.
    public var corruptRetries = 3

    public init() {}
    public init(firstPauseMs: UInt64, longestPauseMs: UInt64, deadlineMs: UInt64) {
        self.firstPauseMs = firstPauseMs
        self.longestPauseMs = longestPauseMs
        self.deadlineMs = deadlineMs
    }
}

/// Passes calls on and repeats those that failed for a while.
public final class RetryingBucket: Bucket {
    private let next: any Bucket
    private let environment: any Environment
    private let policy: RetryPolicy
    private let budget: Mutex<Double>
    private let counters: StoreCounters
    public var name: String { next.name }

    /// - Parameter counters: where repeated calls are counted.
    public init(
        _ next: any Bucket, environment: any Environment, policy: RetryPolicy = RetryPolicy(),
        counters: StoreCounters = StoreCounters()
    ) {
        self.counters = counters
        self.next = next
        self.environment = environment
        self.policy = policy
        budget = Mutex(policy.budget)
    }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        var attempts = Attempts(environment)
        return try await get(key, range, &attempts)
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        var attempts = Attempts(environment)
        while true {
            do throws(StoreError) {
                let listing = try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
                succeeded()
                return listing
            } catch { try await pause(&attempts, after: error) }
        }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        var attempts = Attempts(environment)
        while true {
            do throws(StoreError) {
                try await next.delete(keys)
                return succeeded()
            } catch { try await pause(&attempts, after: error) }
        }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        var attempts = Attempts(environment)
        // Whether one of the attempts may have taken effect.
        var maybeDone = false
        while true {
            do throws(StoreError) {
                let tag = try await next.put(key, bytes, if: condition)
                succeeded()
                return tag
            } catch {
                if error.kind == .unclear { maybeDone = true }
                if condition == .none {
                    try await pause(&attempts, after: error)
                    continue
                }
                guard maybeDone else {
                    // A plain "no", or nothing was sent: the latter is as good as never tried.
                    try await pause(&attempts, after: error)
                    continue
                }
                if let tag = try await tagIfDone(key, bytes, condition, &attempts, error) {
                    succeeded()
                    return tag
                }
                try await pause(&attempts, after: StoreError(.unclear, error.description))
            }
        }
    }

    /// The tag of a conditional put that turns out to be done; nil when it is not and its condition still holds.
    private func tagIfDone(
        _ key: String, _ bytes: [UInt8], _ condition: PutCondition, _ attempts: inout Attempts, _ error: StoreError
    ) async throws(StoreError) -> ETag? {
        let current: StoredObject?
        do throws(StoreError) {
            current = try await get(key, nil, &attempts)
        } catch let readError {
            guard readError.kind == .notFound else {
                throw StoreError(.unclear, "\(error.description); and it cannot be read back: \(readError.description)")
            }
            current = nil
        }
        if let current, current.bytes == bytes { return current.etag }
        switch condition {
        case .absent where current == nil: return nil
        case .matches(let tag) where tag == current?.etag: return nil
        default: throw conditionFailed(name, key, condition)
        }
    }

    private func get(_ key: String, _ range: Range<UInt64>?, _ attempts: inout Attempts) async throws(StoreError)
        -> StoredObject
    {
        while true {
            do throws(StoreError) {
                let object = try await next.get(key, range: range)
                succeeded()
                return object
            } catch { try await pause(&attempts, after: error) }
        }
    }

    // MARK: Pauses

    private struct Attempts {
        let startedNs: UInt64
        var failed: UInt64 = 0
        var corrupt = 0
        init(_ environment: any Environment) { startedNs = environment.nowNs }
    }

    private func succeeded() {
        budget.withLock { $0 = min(policy.budget, $0 + 0.1) }
    }

    /// Waits before the next attempt, or throws `error` when there is to be none.
    private func pause(_ attempts: inout Attempts, after error: StoreError) async throws(StoreError) {
        attempts.failed += 1
        switch error.kind {
        // What people must mend first is for the caller to wait for, or not to.
        case .notFound, .conditionFailed, .refused, .denied: throw error
        case .corrupt:
            attempts.corrupt += 1
            if attempts.corrupt > policy.corruptRetries { throw error }
        case .unavailable, .unclear: break
        }
        let mayHurry = budget.withLock { budget in
            guard budget >= 1 else { return false }
            budget -= 1
            return true
        }
        let doubled = policy.firstPauseMs << min(attempts.failed - 1, 20)
        let longest = mayHurry ? min(doubled, policy.longestPauseMs) : policy.longestPauseMs
        // Between half and all of it, so that those who failed together do not come back together.
        let pauseNs = (longest * 1_000_000) / 2 + environment.randomBits() % max(1, longest * 500_000)
        let elapsedNs = environment.nowNs &- attempts.startedNs
        guard !Task.isCancelled, elapsedNs + pauseNs <= policy.deadlineMs * 1_000_000 else {
            throw StoreError(
                error.kind,
                "\(error.description) (given up after \(attempts.failed) attempts in \(elapsedNs / 1_000_000) ms)",
                cause: error.cause)
        }
        counters.update { $0.retries += 1 }
        await environment.sleep(ns: pauseNs)
    }
}
