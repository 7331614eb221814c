// The answer to NBD_OPT_LIST: what disks the store has. Anybody who can connect may ask, without end, and each answer reads
// the head of every disk; so it is made for all who ask at a time, and kept for a while.
//
// Always holds:
// - One listing is under way at most, with few reads at a time, and only while somebody waits for it.
// - What is kept is so young that making it takes a fifth of the time at most, however often clients ask; it holds
//   `mostExports` at most.

internal import Logging
internal import Runtime
internal import Synchronization

/// Shared by all who ask. A disk that was made or deleted less than the age of an answer ago may be missing or still there.
final class ExportList: Sendable {
    typealias Answer = Result<[ExportInfo], AttachError>

    private struct Round {
        var number: UInt64
        var task: Task<Void, Never>?
        var waiting: [UInt64: CheckedContinuation<Answer, Never>] = [:]
    }

    private struct State {
        var kept: (exports: [ExportInfo], untilNs: UInt64)?
        var round: Round?
        var count: UInt64 = 0
    }

    private let store: Store
    private let environment: any Environment
    private let log: Logger
    private let state = Mutex(State())

    static let mostExports = 10_000
    private static let readsAtATime = 8
    private static let leastAgeNs: UInt64 = 1_000_000_000
    private static let mostAgeNs: UInt64 = 60_000_000_000

    init(store: Store, environment: any Environment, log: Logger) {
        self.store = store
        self.environment = environment
        self.log = log
    }

    /// The exports, from the last listing or the one that is under way. When the last task that waits for a listing is
    /// cancelled, the listing is.
    func exports() async throws(AttachError) -> [ExportInfo] {
        let now = environment.nowNs
        let (kept, id) = state.withLock { state -> ([ExportInfo]?, UInt64) in
            if let kept = state.kept, now < kept.untilNs { return (kept.exports, 0) }
            state.kept = nil
            state.count += 1
            return (nil, state.count)
        }
        if let kept { return kept }
        let answer = await withTaskCancellationHandler {
            await withCheckedContinuation { continuation in join(id, continuation) }
        } onCancel: {
            leave(id)
        }
        return try answer.get()
    }

    private func join(_ id: UInt64, _ continuation: CheckedContinuation<Answer, Never>) {
        state.withLock { state in
            if state.round == nil {
                state.count += 1
                let number = state.count
                state.round = Round(number: number)
                // Where the asking is done; tasks do not inherit it.
                state.round?.task = Task(executorPreference: Loop.current) { await self.run(number) }
            }
            state.round?.waiting[id] = continuation
        }
        // `leave` may have come before, and found nothing.
        if Task.isCancelled { leave(id) }
    }

    private func leave(_ id: UInt64) {
        let continuation = state.withLock { state -> CheckedContinuation<Answer, Never>? in
            guard let found = state.round?.waiting.removeValue(forKey: id) else { return nil }
            if state.round?.waiting.isEmpty == true {
                state.round?.task?.cancel()
                state.round = nil
            }
            return found
        }
        continuation?.resume(returning: .failure(AttachError(.unavailable, "nobody waits for the answer")))
    }

    private func run(_ number: UInt64) async {
        let began = environment.nowNs
        let answer: Answer
        do throws(AttachError) { answer = .success(try await load()) } catch { answer = .failure(error) }
        let now = environment.nowNs
        let waiting = state.withLock { state -> [CheckedContinuation<Answer, Never>] in
            guard let round = state.round, round.number == number else { return [] }
            state.round = nil
            if case .success(let exports) = answer {
                let age = min(max(Self.leastAgeNs, 4 * (now - began)), Self.mostAgeNs)
                state.kept = (exports, now + age)
            }
            return Array(round.waiting.values)
        }
        for continuation in waiting { continuation.resume(returning: answer) }
    }

    private func load() async throws(AttachError) -> [ExportInfo] {
        var exports: [ExportInfo] = []
        for location in store.locations.nearFirst {
            let heads = store.hastyHeads(at: location)
            do throws(CatalogError) {
                let names = try await names(heads, most: Self.mostExports - exports.count)
                // A disk whose head can't be read is left out: it can't be attached now either.
                let found = try await inParallel(names, limit: Self.readsAtATime) {
                    (name) async throws(CatalogError) -> ExportInfo? in
                    if Task.isCancelled { throw CatalogError(.conflict, "nobody waits for the list") }
                    guard let head = try? await heads.load(name)?.head, !head.deleted else { return nil }
                    return .disk(name, head.sizeBytes, isReadOnly: head.isReadOnly)
                }
                exports += found.compactMap(\.self)
            } catch {
                if location.number == store.locations.near {
                    throw AttachError(.unavailable, "the disks can't be listed: \(error)")
                }
                log.warning("the disks of location '\(location.name)' can't be listed: \(error)")
            }
        }
        return exports
    }

    private func names(_ heads: HeadStore, most: Int) async throws(CatalogError) -> [String] {
        var names: [String] = []
        do throws(CatalogError) {
            try await heads.forEachName { (page) throws(CatalogError) in
                names += page.prefix(most - names.count)
                if names.count == most { throw CatalogError(.conflict, "that is enough") }
            }
        } catch {
            if names.count < most { throw error }
        }
        return names
    }
}

extension ExportInfo {
    static func disk(_ name: String, _ sizeBytes: UInt64, isReadOnly: Bool = false) -> ExportInfo {
        ExportInfo(name: name, sizeBytes: sizeBytes, isReadOnly: isReadOnly, description: "Margarine disk \(name)")
    }
}
