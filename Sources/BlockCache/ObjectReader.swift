// Bytes of block objects, from scratch where they are there, else from the store, each byte fetched once however many
// ask for it at the same time, from whatever loop.
//
// Always holds: a fetch stays in the table from its start until its bytes are on scratch (or it is clear that they
// will not be), so that whoever looks finds it in the table or on scratch. Locks: the table's, then that of `BlockFiles`;
// neither is held across anything slow.

import ObjectStore
import Runtime
import Synchronization

/// Starts a task that outlives its maker; the composition says on which executor.
public typealias Spawn = @Sendable (_ work: @escaping @Sendable () async -> Void) -> Void

/// Where bytes came from, and they.
struct Fetched: Sendable {
    var bytes: ByteView
    /// Some of them came from the scratch disk.
    var fromScratch: Bool
}

final class ObjectReader: Sendable {
    /// Fetched bytes that wait to be written to scratch; beyond it they are not kept.
    private static let maxPendingBytes = 64 << 20
    /// Background fetches at a time, and the size of one.
    private static let maxBackground = 3
    private static let backgroundPieceBytes: UInt64 = 2 << 20
    /// Objects waiting for their background fetch; beyond it the oldest is given up.
    private static let maxQueued = 128
    /// With more foreground fetches than that under way, the background waits.
    private static let quietLimit = 8

    private let locations: [any Bucket]
    let files: BlockFiles
    private let spawn: Spawn

    private struct Table {
        var fetches: [ObjectID: [Fetch]] = [:]
        var pendingBytes = 0
        var foreground = 0
        var waitingForQuiet: [UnsafeContinuation<Void, Never>] = []
        var queue: [Completion] = []
        var runners = 0
        var counters = Counters()
    }
    struct Counters: Sendable {
        var fetches: UInt64 = 0
        var fetchedBytes: UInt64 = 0
        var backgroundBytes: UInt64 = 0
        var givenUp: UInt64 = 0
    }
    private let table = Mutex(Table())

    init(locations: [any Bucket], files: BlockFiles, spawn: @escaping Spawn) {
        precondition(!locations.isEmpty)
        self.locations = locations
        self.files = files
        self.spawn = spawn
    }

    var counters: Counters { table.withLock { $0.counters } }
    /// Nothing is under way or waits.
    var isIdle: Bool {
        table.withLock {
            $0.fetches.isEmpty && $0.pendingBytes == 0 && $0.foreground == 0 && $0.queue.isEmpty && $0.runners == 0
        }
    }

    /// The bucket of a location that a manifest names.
    func bucket(_ location: UInt8, of id: ObjectID) throws(StoreError) -> any Bucket {
        guard Int(location) < locations.count else {
            throw StoreError(
                .refused,
                "block object \(id) is in location \(location), and only \(locations.count) are configured: add the location"
            )
        }
        return locations[Int(location)]
    }

    // MARK: Reading

    /// The bytes of `range`, as somebody waits for them. `total` is the object's length where known. With `fresh`,
    /// straight from the store, whatever is here.
    func read(
        _ id: ObjectID, at location: UInt8, _ range: Range<UInt64>, total: UInt64?, fresh: Bool
    ) async throws(StoreError) -> Fetched {
        if range.isEmpty { return Fetched(bytes: ByteView([]), fromScratch: false) }
        if fresh {
            let fetch = Fetch(range)
            try await perform(fetch, id, location, total: total, isTabled: false)
            return Fetched(bytes: try await fetch.bytes() ?? ByteView([]), fromScratch: false)
        }
        attempt: while true {
            let (parts, mine) = plan(id, range)
            for (index, fetch) in mine.enumerated() {
                do throws(StoreError) {
                    try await performInForeground(fetch, id, location, total: total)
                } catch {
                    // Nobody will perform the others.
                    for fetch in mine[(index + 1)...] {
                        leave(fetch, id)
                        fetch.complete(.calledOff)
                    }
                    throw error
                }
            }
            var views: [ByteView] = []
            var fromScratch = false
            for part in parts {
                let view: ByteView?
                if let fetch = part.fetch {
                    let at = Int(part.range.lowerBound - fetch.range.lowerBound)
                    view = try await fetch.bytes()?.part(at..<at + part.range.count)
                } else {
                    view = await files.read(id, part.range)
                    fromScratch = true
                }
                // Evicted meanwhile, or whoever fetched it was cancelled: look again.
                guard let view else { continue attempt }
                views.append(view)
            }
            return Fetched(bytes: ByteView.joined(views), fromScratch: fromScratch)
        }
    }

    private struct Part {
        var range: Range<UInt64>
        /// nil: on scratch.
        var fetch: Fetch?
    }

    /// Cuts `range` into what is being fetched, what is on scratch, and new fetches for the rest, which are the caller's
    /// to perform.
    private func plan(_ id: ObjectID, _ range: Range<UInt64>) -> (parts: [Part], mine: [Fetch]) {
        table.withLock { table in
            var parts: [Part] = []
            var mine: [Fetch] = []
            let fetches = table.fetches[id] ?? []
            // Looked at after the fetches: what left the table is on scratch by then.
            let present = files.present(id)
            var at = range.lowerBound
            while at < range.upperBound {
                let end: UInt64
                if let fetch = fetches.first(where: { $0.range.contains(at) }) {
                    end = min(fetch.range.upperBound, range.upperBound)
                    parts.append(Part(range: at..<end, fetch: fetch))
                } else if let there = present.range(at: at) {
                    end = min(there.upperBound, range.upperBound)
                    parts.append(Part(range: at..<end, fetch: nil))
                } else {
                    end = Self.gapEnd(at, range.upperBound, fetches, present)
                    let fetch = Fetch(at..<end)
                    mine.append(fetch)
                    parts.append(Part(range: at..<end, fetch: fetch))
                }
                at = end
            }
            if !mine.isEmpty { table.fetches[id, default: []] += mine }
            return (parts, mine)
        }
    }

    private static func gapEnd(_ at: UInt64, _ limit: UInt64, _ fetches: [Fetch], _ present: ByteRanges) -> UInt64 {
        var end = min(limit, present.nextStart(after: at) ?? limit)
        for fetch in fetches where fetch.range.lowerBound > at { end = min(end, fetch.range.lowerBound) }
        return end
    }

    // MARK: Fetching

    private func performInForeground(
        _ fetch: Fetch, _ id: ObjectID, _ location: UInt8, total: UInt64?
    ) async throws(StoreError) {
        table.withLock { $0.foreground += 1 }
        defer {
            let woken = table.withLock { table -> [UnsafeContinuation<Void, Never>] in
                table.foreground -= 1
                guard table.foreground <= Self.quietLimit else { return [] }
                defer { table.waitingForQuiet = [] }
                return table.waitingForQuiet
            }
            for continuation in woken { continuation.resume() }
        }
        try await perform(fetch, id, location, total: total, isTabled: true)
    }

    /// Gets the bytes and, in a task of its own, keeps them on scratch.
    private func perform(
        _ fetch: Fetch, _ id: ObjectID, _ location: UInt8, total: UInt64?, isTabled: Bool
    ) async throws(StoreError) {
        let (bytes, length) = try await get(fetch, id, location, isTabled: isTabled)
        let takesWrites = files.takesWrites
        let isKept = table.withLock { table in
            let isKept = takesWrites && table.pendingBytes + bytes.count <= Self.maxPendingBytes
            if isKept { table.pendingBytes += bytes.count }
            return isKept
        }
        if !isKept { return isTabled ? leave(fetch, id) : () }
        spawn { [self] in
            if !fetch.isVoid { await files.write(id, at: fetch.range.lowerBound, bytes, total: total ?? length) }
            table.withLock { $0.pendingBytes -= bytes.count }
            if isTabled { leave(fetch, id) }
        }
    }

    /// Gets the bytes of a fetch and completes it. A failed one leaves the table at once.
    private func get(
        _ fetch: Fetch, _ id: ObjectID, _ location: UInt8, isTabled: Bool
    ) async throws(StoreError) -> (ByteView, total: UInt64) {
        do throws(StoreError) {
            let object = try await getObject(id, location, fetch.range)
            guard object.bytes.count == fetch.range.count else {
                throw StoreError(
                    .corrupt,
                    "block object \(id) in \(try bucket(location, of: id).name) has \(object.totalLengthBytes) bytes,"
                        + " \(fetch.range.upperBound) are needed: restore it, or go back to a generation without it")
            }
            table.withLock {
                $0.counters.fetches += 1
                $0.counters.fetchedBytes += UInt64(object.bytes.count)
            }
            let view = ByteView(object.bytes)
            fetch.complete(.bytes(view))
            return (view, object.totalLengthBytes)
        } catch {
            if isTabled { leave(fetch, id) }
            // Others who wait for it should not fail because this one was called off.
            fetch.complete(Task.isCancelled ? .calledOff : .failed(error))
            throw error
        }
    }

    private func getObject(_ id: ObjectID, _ location: UInt8, _ range: Range<UInt64>) async throws(StoreError)
        -> StoredObject
    {
        let bucket = try bucket(location, of: id)
        do throws(StoreError) {
            return try await bucket.get(id.blockKey, range: range)
        } catch {
            guard error.kind == .notFound else { throw error }
            throw StoreError(
                .notFound,
                "block object \(id) is missing from \(bucket.name) though a generation needs it: restore it from a copy of"
                    + " the bucket, or go back to a generation without it")
        }
    }

    private func leave(_ fetch: Fetch, _ id: ObjectID) {
        table.withLock { table in
            table.fetches[id]?.removeAll { $0 === fetch }
            if table.fetches[id]?.isEmpty == true { table.fetches[id] = nil }
        }
    }

    /// Forgets all that is here of an object, on scratch and on the way, because some of it failed its checksum.
    func discard(_ id: ObjectID) async {
        table.withLock { table in
            for fetch in table.fetches[id] ?? [] where fetch.isComplete { fetch.void() }
            table.fetches[id]?.removeAll { $0.isVoid }
        }
        await files.drop(id)
    }

    // MARK: The rest of an object, in the background

    /// A part of an object to have on scratch whole.
    struct Completion: Sendable {
        var id: ObjectID
        var location: UInt8
        var range: Range<UInt64>
        var totalBytes: UInt64?
        /// Ends of stored slices: pieces end there, so that a reader never waits for two.
        var cuts: [UInt64]
    }

    /// Fetches what is missing of a part of an object, in pieces, when there is nothing more urgent.
    func completeInBackground(_ completion: Completion) {
        let lengthBytes = completion.totalBytes ?? UInt64(completion.range.count)
        guard files.takesWrites, lengthBytes <= files.limitBytes,
            !files.present(completion.id).contains(completion.range)
        else { return }
        let started = table.withLock { table in
            if table.queue.contains(where: { $0.id == completion.id && $0.range == completion.range }) { return 0 }
            if table.queue.count >= Self.maxQueued {
                table.queue.removeFirst()
                table.counters.givenUp += 1
            }
            table.queue.append(completion)
            let started = Self.maxBackground - table.runners
            table.runners = Self.maxBackground
            return started
        }
        for _ in 0..<started { spawn { [self] in await runBackground() } }
    }

    /// Fetches pieces until none is wanted. All runners work on the oldest object of the queue: one that is half there
    /// soon is there.
    private func runBackground() async {
        while true {
            await quiet()
            let takesWrites = files.takesWrites
            let next = table.withLock { table -> (Completion, Fetch)? in
                if !takesWrites {
                    table.counters.givenUp += UInt64(table.queue.count)
                    table.queue = []
                }
                while let first = table.queue.first {
                    if let fetch = claim(first, &table) { return (first, fetch) }
                    table.queue.removeFirst()
                }
                table.runners -= 1
                return nil
            }
            guard let (completion, fetch) = next else { return }
            if await !complete(completion, fetch) {
                table.withLock { table in
                    table.counters.givenUp += 1
                    table.queue.removeAll { $0.id == completion.id && $0.range == completion.range }
                }
            }
        }
    }

    /// Fetches a piece onto scratch; false when the rest would be in vain.
    private func complete(_ completion: Completion, _ fetch: Fetch) async -> Bool {
        let id = completion.id
        guard let (bytes, total) = try? await get(fetch, id, completion.location, isTabled: true) else { return false }
        table.withLock { $0.counters.backgroundBytes += UInt64(bytes.count) }
        await files.write(id, at: fetch.range.lowerBound, bytes, total: completion.totalBytes ?? total)
        leave(fetch, id)
        return files.present(id).contains(fetch.range)
    }

    /// The next piece of it that nobody has or fetches.
    private func claim(_ completion: Completion, _ table: inout Table) -> Fetch? {
        let fetches = table.fetches[completion.id] ?? []
        let present = files.present(completion.id)
        var at = completion.range.lowerBound
        while at < completion.range.upperBound {
            if let fetch = fetches.first(where: { $0.range.contains(at) }) {
                at = fetch.range.upperBound
            } else if let there = present.range(at: at) {
                at = there.upperBound
            } else {
                let gapEnd = Self.gapEnd(at, completion.range.upperBound, fetches, present)
                let most = min(gapEnd, at + Self.backgroundPieceBytes)
                let end = most == gapEnd ? gapEnd : completion.cuts.last { $0 > at && $0 <= most } ?? most
                let fetch = Fetch(at..<end)
                table.fetches[completion.id, default: []].append(fetch)
                return fetch
            }
        }
        return nil
    }

    private func quiet() async {
        await withUnsafeContinuation { continuation in
            let isQuiet = table.withLock { table in
                if table.foreground <= Self.quietLimit { return true }
                table.waitingForQuiet.append(continuation)
                return false
            }
            if isQuiet { continuation.resume() }
        }
    }
}

/// One range of one object on its way from the store.
private final class Fetch: Sendable {
    enum Outcome: Sendable {
        case bytes(ByteView)
        case failed(StoreError)
        /// The task that fetched was cancelled: somebody else may try.
        case calledOff
    }
    let range: Range<UInt64>
    private struct State {
        var outcome: Outcome?
        var waiting: [UnsafeContinuation<Outcome, Never>] = []
        var isVoid = false
    }
    private let state = Mutex(State())

    init(_ range: Range<UInt64>) { self.range = range }

    var isComplete: Bool { state.withLock { $0.outcome != nil } }

    /// Its bytes failed a checksum: they are not to be kept.
    var isVoid: Bool { state.withLock { $0.isVoid } }
    func void() { state.withLock { $0.isVoid = true } }

    func complete(_ outcome: Outcome) {
        let waiting = state.withLock { state in
            state.outcome = outcome
            defer { state.waiting = [] }
            return state.waiting
        }
        for continuation in waiting { continuation.resume(returning: outcome) }
    }

    /// Waits for the bytes; nil when the fetch was called off.
    func bytes() async throws(StoreError) -> ByteView? {
        let outcome = await withUnsafeContinuation { continuation in
            let outcome = state.withLock { state in
                if state.outcome == nil { state.waiting.append(continuation) }
                return state.outcome
            }
            if let outcome { continuation.resume(returning: outcome) }
        }
        switch outcome {
        case .bytes(let view): return view
        case .failed(let error): throw error
        case .calledOff: return nil
        }
    }
}
