// One location of a store that has several: its errors name it, and it need not be there when the store is opened. It
// is opened when it is first used, and again as long as that fails.
//
// Always holds: calls go only to a bucket that `open` gave, which has made sure that it is the right one.

public import Runtime
import Synchronization

public final class LocationBucket: Bucket {
    /// Opens the bucket and makes sure that it is the right one.
    public typealias Open = @Sendable () async throws(StoreError) -> any Bucket

    private struct State {
        var bucket: (any Bucket)?
        /// Why the last call did not reach it.
        var trouble: StoreError?
        var triedAtNs: UInt64?
        var isOpening = false
        var waiting: [UnsafeContinuation<Result<any Bucket, StoreError>, Never>] = []
    }
    /// After a failure nobody tries to open it again for so long.
    private static let pauseNs: UInt64 = 500_000_000

    private let location: String
    private let environment: any Environment
    private let open: Open
    private let state: Mutex<State>

    /// - Parameters:
    ///   - opened: the bucket, where it is open already; nil: it is opened by its first use.
    ///   - trouble: why it could not be opened just now.
    public init(
        _ location: String, opened: (any Bucket)?, trouble: StoreError? = nil, environment: any Environment,
        open: @escaping Open
    ) {
        self.location = location
        self.environment = environment
        self.open = open
        state = Mutex(State(bucket: opened, trouble: trouble, triedAtNs: trouble == nil ? nil : environment.nowNs))
    }

    public var name: String { state.withLock { $0.bucket?.name } ?? "location '\(location)'" }
    /// Why it is out of reach, if it was when it was last used.
    public var trouble: String? { state.withLock { $0.trouble?.description } }

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try await call { (bucket) async throws(StoreError) in try await bucket.get(key, range: range) }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try await call { (bucket) async throws(StoreError) in try await bucket.put(key, bytes, if: condition) }
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try await call { (bucket) async throws(StoreError) in
            try await bucket.list(prefix: prefix, after: after, folders: folders, limit: limit)
        }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        try await call { (bucket) async throws(StoreError) in try await bucket.delete(keys) }
    }

    private func call<T>(_ body: (any Bucket) async throws(StoreError) -> T) async throws(StoreError) -> T {
        do throws(StoreError) {
            let result = try await body(try await opened())
            state.withLock { $0.trouble = nil }
            return result
        } catch {
            switch error.kind {
            case .unavailable, .unclear, .denied, .refused:
                state.withLock { $0.trouble = error }
                throw StoreError(error.kind, "location '\(location)': \(error.description)", cause: error.cause)
            case .notFound, .conditionFailed, .corrupt:
                state.withLock { $0.trouble = nil }
                throw error
            }
        }
    }

    private enum Way {
        case there(any Bucket)
        case failed(StoreError)
        case lead
        case wait
    }

    /// That it can't be opened says nothing of what is in it: it is tried again, whatever the reason.
    private func opened() async throws(StoreError) -> any Bucket {
        do throws(StoreError) { return try await openedOnce() } catch {
            throw error.isOutage ? error : StoreError(.denied, error.description, cause: error.cause)
        }
    }

    private func openedOnce() async throws(StoreError) -> any Bucket {
        let now = environment.nowNs
        let way = state.withLock { state -> Way in
            if let bucket = state.bucket { return .there(bucket) }
            if state.isOpening { return .wait }
            if let trouble = state.trouble, let tried = state.triedAtNs, now < tried + Self.pauseNs {
                return .failed(trouble)
            }
            state.isOpening = true
            return .lead
        }
        switch way {
        case .there(let bucket): return bucket
        case .failed(let error): throw error
        case .wait: return try await others()
        case .lead: return try await lead()
        }
    }

    /// Opens it, for all who wait.
    private func lead() async throws(StoreError) -> any Bucket {
        let result: Result<any Bucket, StoreError>
        do throws(StoreError) { result = .success(try await open()) } catch { result = .failure(error) }
        let now = environment.nowNs
        let waiting = state.withLock { state in
            state.isOpening = false
            state.triedAtNs = now
            if case .success(let bucket) = result { state.bucket = bucket }
            if case .failure(let error) = result { state.trouble = error }
            defer { state.waiting = [] }
            return state.waiting
        }
        for continuation in waiting { continuation.resume(returning: result) }
        return try result.get()
    }

    private func others() async throws(StoreError) -> any Bucket {
        try await withUnsafeContinuation { continuation in
            let isOver = state.withLock { state -> Result<any Bucket, StoreError>? in
                if state.isOpening {
                    state.waiting.append(continuation)
                    return nil
                }
                if let bucket = state.bucket { return .success(bucket) }
                return .failure(state.trouble ?? StoreError(.unavailable, "it could not be opened"))
            }
            if let isOver { continuation.resume(returning: isOver) }
        }.get()
    }
}
