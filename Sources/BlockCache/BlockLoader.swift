// The read path below the layers: memory slice, scratch block file, object store. A slice is composed of a base and the
// deltas over it, every byte under a checksum, into a frame of the slice cache.
//
// Always holds: what a read gives is what was stored, or it throws; never zeroes in its place, never older bytes.
// Concurrent loads of one slice are one load. A read of one slice waits for that slice alone; the rest of its object
// follows in the background, onto scratch.

public import ObjectStore
public import Runtime
import Synchronization

public final class BlockLoader: Sendable {
    public let cache: SliceCache
    public let files: BlockFiles
    let reader: ObjectReader
    let environment: any Environment
    private let headers = HeaderCache()

    /// What the loader did since it was made.
    public struct Snapshot: Sendable, Equatable {
        /// Slices composed into memory.
        public var loads: UInt64 = 0
        /// Loads that found another one of the same slice under way and took its result.
        public var joined: UInt64 = 0
        public var failures: UInt64 = 0
        /// GETs of block objects, and their bytes, those of the background among them.
        public var fetches: UInt64 = 0
        public var fetchedBytes: UInt64 = 0
        public var backgroundBytes: UInt64 = 0
        /// Background fetches given up: too many waiting, or a failure.
        public var backgroundGivenUp: UInt64 = 0
        /// Bytes from the store that failed their checksums, counted for each try.
        public var storeCorruptions: UInt64 = 0
        /// The same from scratch; each was fetched anew.
        public var scratchCorruptions: UInt64 = 0
    }

    private struct State {
        var loads: [SliceKey: [UnsafeContinuation<LoadOutcome, Never>]] = [:]
        var snapshot = Snapshot()
    }
    private let state = Mutex(State())

    /// - Parameters:
    ///   - locations: the store's buckets; a manifest entry names them by index.
    ///   - spawn: starts the tasks that outlive a call: writes to scratch and background fetches, a few at a time.
    ///     In a daemon `{ loop.run(task: $0) }`.
    public init(
        locations: [any Bucket], cache: SliceCache, files: BlockFiles, environment: any Environment,
        spawn: @escaping Spawn
    ) {
        self.cache = cache
        self.files = files
        self.environment = environment
        reader = ObjectReader(locations: locations, files: files, spawn: spawn)
    }

    public var snapshot: Snapshot {
        var snapshot = state.withLock { $0.snapshot }
        let counters = reader.counters
        snapshot.fetches = counters.fetches
        snapshot.fetchedBytes = counters.fetchedBytes
        snapshot.backgroundBytes = counters.backgroundBytes
        snapshot.backgroundGivenUp = counters.givenUp
        return snapshot
    }

    // MARK: Reading

    /// Copies `count` bytes at `offset` of a slice when that needs no waiting. The hot path.
    public func tryCopy(
        _ entry: BlockEntry?, _ slice: SliceIndex, offset: Int, count: Int, into: UnsafeMutableRawPointer
    ) -> Bool {
        guard let entry, let key = entry.key(slice) else {
            precondition(offset >= 0 && count >= 0 && offset + count <= Geometry.sliceBytes)
            into.initializeMemory(as: UInt8.self, repeating: 0, count: count)
            return true
        }
        return cache.tryCopy(key, offset: offset, count: count, into: into)
    }

    /// The slice when that needs no waiting.
    public func tryPin(_ entry: BlockEntry?, _ slice: SliceIndex) -> PinnedSlice? {
        guard let entry, let key = entry.key(slice) else { return cache.zeroSlice }
        return cache.pin(key)
    }

    /// The slice, from wherever it is. Keep the pin only as long as the bytes are being used, and keep few while waiting
    /// here: frames are bounded.
    ///
    /// - Throws: `.corrupt` when the store's bytes fail their checksums twice, `.notFound` when the store lost an
    ///   object, `.unavailable` when it is out of reach, `.refused` for a format or location this Margarine lacks.
    public func load(_ entry: BlockEntry?, _ slice: SliceIndex) async throws(StoreError) -> PinnedSlice {
        guard let entry, let key = entry.key(slice) else { return cache.zeroSlice }
        while true {
            if let pin = cache.pinAfterMiss(key) { return pin }
            switch await join(key) {
            case .lead:
                // It may have come in between the look and the joining.
                if let pin = cache.pinAfterMiss(key) {
                    finish(key, pin)
                    return pin
                }
                do throws(StoreError) {
                    let slot = await cache.slot(key)
                    try await compose(entry, slice, into: slot.pointer)
                    let pin = slot.publish()
                    finish(key, pin)
                    return pin
                } catch {
                    finish(key, error)
                    throw error
                }
            case .loaded(let token): return PinnedSlice(adopting: token, of: cache)
            case .failed(let error): throw error
            case .calledOff: continue
            }
        }
    }

    private enum LoadOutcome: Sendable {
        /// Nobody loads it: the caller does.
        case lead
        case loaded(PinToken)
        case failed(StoreError)
        case calledOff
    }

    private func join(_ key: SliceKey) async -> LoadOutcome {
        await withUnsafeContinuation { continuation in
            let leads = state.withLock { state in
                if state.loads[key] == nil {
                    state.loads[key] = []
                    state.snapshot.loads += 1
                    return true
                }
                state.loads[key]!.append(continuation)
                state.snapshot.joined += 1
                return false
            }
            if leads { continuation.resume(returning: .lead) }
        }
    }

    private func finish(_ key: SliceKey, _ pin: borrowing PinnedSlice) {
        let waiting = state.withLock { $0.loads.removeValue(forKey: key) } ?? []
        if waiting.isEmpty { return }
        let token = pin.token(for: waiting.count)
        for continuation in waiting { continuation.resume(returning: .loaded(token)) }
    }

    private func finish(_ key: SliceKey, _ error: StoreError) {
        let waiting = state.withLock { state in
            state.snapshot.failures += 1
            return state.loads.removeValue(forKey: key) ?? []
        }
        let outcome = Task.isCancelled ? LoadOutcome.calledOff : .failed(error)
        for continuation in waiting { continuation.resume(returning: outcome) }
    }

    // MARK: Ahead of reading

    /// Brings slices into memory, a few at a time, and drops the pins.
    public func prefetch(_ entry: BlockEntry?, _ slices: [SliceIndex]) async throws(StoreError) {
        guard let entry else { return }
        let wanted = slices.filter { slice in entry.key(slice).map { !cache.contains($0) } ?? false }
        let failure = await withTaskGroup(of: StoreError?.self) { group -> StoreError? in
            var failure: StoreError?
            var started = 0
            for slice in wanted {
                if started >= 4, let result = await group.next(), let error = result { failure = error }
                if failure != nil { break }
                started += 1
                group.addTask {
                    do throws(StoreError) {
                        _ = try await self.load(entry, slice)
                        return nil
                    } catch { return error }
                }
            }
            for await result in group { if let error = result { failure = error } }
            return failure
        }
        if let failure { throw failure }
    }

    /// Puts an object just stored onto scratch, so that it need not be fetched. Never fails; at worst it is fetched.
    public func adopt(id: ObjectID, bytes: [UInt8]) async { await files.adopt(id, bytes) }

    // MARK: Composing

    private func compose(
        _ entry: BlockEntry, _ slice: SliceIndex, into frame: UnsafeMutableRawPointer
    ) async throws(StoreError) {
        let lent = Lent(pointer: frame)
        let (layers, ground) = layers(of: entry, slice)
        var all = layers
        // Kept pinned until the end.
        let below = pinned(ground)
        let belowLent = below.lent
        // It was evicted since it was seen: compose from the objects alone.
        if ground != nil, belowLent == nil { all = self.layers(of: entry, slice, usingCache: false).layers }
        var parts = [LayerPart?](repeating: nil, count: all.count)
        var isFresh = [Bool](repeating: false, count: all.count)
        var storeFailures = [Int](repeating: 0, count: all.count)
        while true {
            var problem = try await fetchMissing(all, slice, &parts, isFresh)
            if problem == nil {
                let ready = parts.map { $0! }
                problem = await environment.offload { applyLayers(ready, over: belowLent, slice, into: lent) }
            }
            guard let problem else { break }
            let layer = all[problem.index]
            await reader.discard(layer.id)
            headers.remove(layer)
            parts[problem.index] = nil
            isFresh[problem.index] = true
            state.withLock {
                if problem.fromScratch {
                    $0.snapshot.scratchCorruptions += 1
                } else {
                    $0.snapshot.storeCorruptions += 1
                }
            }
            if !problem.fromScratch { storeFailures[problem.index] += 1 }
            if storeFailures[problem.index] == 2 { throw bad(layer, slice, problem.error) }
        }
        below.unpin()
    }

    /// The slice below the layers, if it is there, kept in place.
    private struct Below: ~Copyable {
        let pin: PinnedSlice?
        let lent: Lent?
        consuming func unpin() {}
    }
    private func pinned(_ key: SliceKey?) -> Below {
        guard let key, let pin = cache.pinAfterMiss(key) else { return Below(pin: nil, lent: nil) }
        let lent = Lent(pointer: UnsafeMutableRawPointer(mutating: pin.pointer))
        return Below(pin: pin, lent: lent)
    }

    /// Which layers make up a slice, oldest first, and the key of the slice below them where that is in memory.
    private func layers(
        of entry: BlockEntry, _ slice: SliceIndex, usingCache: Bool = true
    ) -> (layers: [Layer], below: SliceKey?) {
        let bit = UInt32(1) << UInt32(slice.value)
        var layers: [Layer] = []
        for ref in entry.deltas.reversed() where ref.touchedSlices & bit != 0 {
            if ref.zeroedSlices & bit != 0 { return (layers.reversed(), nil) }
            let key = SliceKey(id: ref.id, offsetBytes: ref.offsetBytes, slice: slice)
            if usingCache, !layers.isEmpty, cache.contains(key) { return (layers.reversed(), key) }
            layers.append(.segment(ref))
        }
        if let base = entry.base, base.nonzeroSlices & bit != 0 {
            let key = SliceKey(id: base.id, offsetBytes: 0, slice: slice)
            if usingCache, !layers.isEmpty, cache.contains(key) { return (layers.reversed(), key) }
            layers.append(.base(base))
        }
        return (layers.reversed(), nil)
    }

    /// Fetches the parts that are nil, all at once. A header that is no good is a problem, not an error.
    private func fetchMissing(
        _ layers: [Layer], _ slice: SliceIndex, _ parts: inout [LayerPart?], _ isFresh: [Bool]
    ) async throws(StoreError) -> LayerProblem? {
        let missing = parts.indices.filter { parts[$0] == nil }
        if missing.count == 1, let index = missing.first {
            switch try await fetch(layers[index], index, slice, fresh: isFresh[index]) {
            case .part(let part): parts[index] = part
            case .problem(let problem): return problem
            }
            return nil
        }
        let results = await withTaskGroup(of: (Int, Result<FetchedLayer, StoreError>).self) { group in
            for index in missing {
                group.addTask {
                    // In two steps: Swift 6.3 with -O loses what stands before a `try await` in a tuple here.
                    let layer: Result<FetchedLayer, StoreError>
                    do throws(StoreError) {
                        layer = .success(try await self.fetch(layers[index], index, slice, fresh: isFresh[index]))
                    } catch {
                        layer = .failure(error)
                    }
                    return (index, layer)
                }
            }
            var results: [(Int, Result<FetchedLayer, StoreError>)] = []
            for await result in group { results.append(result) }
            return results
        }
        var problem: LayerProblem?
        for (index, result) in results {
            switch try result.get() {
            case .part(let part): parts[index] = part
            case .problem(let found): problem = found
            }
        }
        return problem
    }

    /// The stored bytes of one layer of one slice, not yet checked, with the header that says how to check them.
    private func fetch(
        _ layer: Layer, _ index: Int, _ slice: SliceIndex, fresh: Bool
    ) async throws(StoreError) -> FetchedLayer {
        do throws(StoreError) {
            return try await fetchUnchecked(layer, index, slice, fresh: fresh)
        } catch {
            // Too few bytes, or the transport's own checksum: as bad as ours, and tried again like it.
            guard error.kind == .corrupt else { throw error }
            return .problem(LayerProblem(index: index, error: .corrupt(error.description), fromScratch: false))
        }
    }

    private func fetchUnchecked(
        _ layer: Layer, _ index: Int, _ slice: SliceIndex, fresh: Bool
    ) async throws(StoreError) -> FetchedLayer {
        var front: ByteView?
        var fromScratch = false
        let header: LayerHeader
        if !fresh, let known = headers.get(layer) {
            header = known
        } else {
            let range = layer.extent.lowerBound..<layer.extent.lowerBound + layer.frontBytes(wanting: slice)
            let fetched = try await reader.read(
                layer.id, at: layer.location, range, total: layer.totalBytes, fresh: fresh)
            fromScratch = fetched.fromScratch
            do throws(FormatError) {
                header = try fetched.bytes.withBytes { (bytes) throws(FormatError) in try layer.decodeHeader(bytes) }
            } catch {
                return .problem(LayerProblem(index: index, error: error, fromScratch: fromScratch))
            }
            headers.put(layer, header)
            front = fetched.bytes
        }
        let wanted = header.storedRange(slice)
        let bytes: ByteView
        if let front, wanted.upperBound <= UInt64(front.count) {
            bytes = front.part(Int(wanted.lowerBound)..<Int(wanted.upperBound))
        } else {
            let base = layer.extent.lowerBound
            let fetched = try await reader.read(
                layer.id, at: layer.location, base + wanted.lowerBound..<base + wanted.upperBound,
                total: layer.totalBytes, fresh: fresh)
            bytes = fetched.bytes
            fromScratch = fetched.fromScratch
        }
        if layer.extent.count > Layer.smallBytes {
            reader.completeInBackground(
                ObjectReader.Completion(
                    id: layer.id, location: layer.location, range: layer.extent, totalBytes: layer.totalBytes,
                    cuts: header.cuts.map { layer.extent.lowerBound + $0 }))
        }
        return .part(LayerPart(header: header, bytes: bytes, fromScratch: fromScratch))
    }

    private func bad(_ layer: Layer, _ slice: SliceIndex, _ error: FormatError) -> StoreError {
        let place = (try? reader.bucket(layer.location, of: layer.id).name) ?? "?"
        return StoreError(
            error.kind == .unknownVersion ? .refused : .corrupt,
            "block object \(layer.id) in \(place), needed for slice \(slice.value) of a block: \(error)."
                + (error.kind == .unknownVersion
                    ? "" : " Restore the object from a copy of the bucket, or go back to a generation without it."))
    }
}

/// Headers seen lately, so that a slice of a known object is one fetch.
private final class HeaderCache: Sendable {
    private static let limit = 2048
    private struct Place: Hashable {
        var id: ObjectID
        var offset: UInt64
        init(_ layer: Layer) {
            id = layer.id
            offset = layer.extent.lowerBound
        }
    }
    private struct State {
        var headers: [Place: LayerHeader] = [:]
        /// In the order of coming; a place in the ring is used again after `limit` others.
        var ring: [Place] = []
        var next = 0
    }
    private let state = Mutex(State())

    func get(_ layer: Layer) -> LayerHeader? { state.withLock { $0.headers[Place(layer)] } }

    func put(_ layer: Layer, _ header: LayerHeader) {
        let place = Place(layer)
        state.withLock { state in
            if state.headers.updateValue(header, forKey: place) != nil { return }
            if state.ring.count < Self.limit {
                state.ring.append(place)
            } else {
                let old = state.ring[state.next]
                if old != place { state.headers[old] = nil }
                state.ring[state.next] = place
                state.next = (state.next + 1) % Self.limit
            }
        }
    }

    func remove(_ layer: Layer) { state.withLock { $0.headers[Place(layer)] = nil } }
}
