// A loader with its surroundings, for tests: a bucket that remembers what was asked of it, a scratch disk in memory,
// and background tasks that can be waited for.

import ObjectStore
import Runtime
import Synchronization
import Testing

@testable import BlockCache

/// Remembers every GET; can hold some of them back.
final class RecordingBucket: Bucket {
    struct Get: Sendable, Equatable {
        var key: String
        var range: Range<UInt64>
    }
    let memory = MemoryBucket()
    private struct State {
        var gets: [Get] = []
        var gate: (holds: @Sendable (Get) -> Bool, gate: StoreGate)?
    }
    private let state = Mutex(State())
    var name: String { "recording" }
    var gets: [Get] { state.withLock { $0.gets } }
    func forget() { state.withLock { $0.gets = [] } }
    func hold(at gate: StoreGate, _ holds: @escaping @Sendable (Get) -> Bool) {
        state.withLock { $0.gate = (holds, gate) }
    }

    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        let get = Get(key: key, range: range ?? 0..<UInt64.max)
        let gate = state.withLock { state -> StoreGate? in
            state.gets.append(get)
            guard let (holds, gate) = state.gate, holds(get) else { return nil }
            return gate
        }
        if let gate {
            await gate.passOrCancel()
            if Task.isCancelled { throw StoreError(.unavailable, "cancelled") }
        }
        return try await memory.get(key, range: range)
    }
    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try await memory.put(key, bytes, if: condition)
    }
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try await memory.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }
    func delete(_ keys: [String]) async throws(StoreError) { try await memory.delete(keys) }
}

/// Where calls wait until it opens or they are cancelled.
final class StoreGate: Sendable {
    private let isOpen = Mutex(false)
    private let count = Mutex(0)
    var arrived: Int { count.withLock { $0 } }
    func open() { isOpen.withLock { $0 = true } }
    func passOrCancel() async {
        count.withLock { $0 += 1 }
        while !Task.isCancelled, !isOpen.withLock({ $0 }) { try? await Task.sleep(for: .milliseconds(1)) }
    }
}

/// Counts background tasks, so that a test can wait until there are none.
final class Spawner: Sendable {
    private let running = Mutex(0)
    var spawn: Spawn {
        { work in
            self.running.withLock { $0 += 1 }
            Task {
                await work()
                self.running.withLock { $0 -= 1 }
            }
        }
    }
    func idle() async { while running.withLock({ $0 }) > 0 { try? await Task.sleep(for: .milliseconds(1)) } }
}

final class LoaderBed: Sendable {
    let bucket: RecordingBucket
    let faulty: FaultyBucket
    let scratch: MemoryScratch
    let cache: SliceCache
    let files: BlockFiles
    let loader: BlockLoader
    let spawner = Spawner()
    let environment: SystemEnvironment

    init(
        frames: Int = 64, scratchBytes: UInt64 = 1 << 30, bucket: RecordingBucket = RecordingBucket(),
        scratch: MemoryScratch = MemoryScratch()
    ) async {
        environment = SystemEnvironment(workers: 2)
        self.bucket = bucket
        self.scratch = scratch
        faulty = FaultyBucket(bucket, environment: environment)
        cache = SliceCache(budgetBytes: UInt64(frames * Geometry.sliceBytes))
        files = BlockFiles(disk: scratch, budgetBytes: scratchBytes, environment: environment, reserveBytes: 0)
        await files.start()
        loader = BlockLoader(
            locations: [faulty], cache: cache, files: files, environment: environment, spawn: spawner.spawn)
    }

    /// The same store and scratch disk, with empty memory: a restart.
    func restarted(frames: Int = 64, scratchBytes: UInt64 = 1 << 30) async -> LoaderBed {
        await spawner.idle()
        return await LoaderBed(frames: frames, scratchBytes: scratchBytes, bucket: bucket, scratch: scratch)
    }

    /// Stores a base object with these slices.
    func storeBase(_ slices: [Int: [UInt8]], id: UInt64) async throws -> BaseRef {
        var encoder = BaseEncoder(id: .sample(id), location: 0)
        for (i, bytes) in slices { bytes.withUnsafeBytes { encoder.add(from: $0.baseAddress!, at: SliceIndex(i)) } }
        let (object, ref) = encoder.finish()
        _ = try await bucket.put(ref.id.blockKey, object, if: .absent)
        return ref
    }

    /// A base of more than 3 MiB of noise, in these slices.
    static let noisySlices = [0, 1, 2, 5, 17, 30, 31]
    func storeNoise(id: UInt64) async throws -> BaseRef {
        try await storeBase(Dictionary(uniqueKeysWithValues: Self.noisySlices.map { ($0, noise(id, $0)) }), id: id)
    }
    func noise(_ id: UInt64, _ slice: Int) -> [UInt8] {
        (Self.noisySlices.contains(slice) ? Sample.noise : .zeroes).slice(seed: id &* 100 &+ UInt64(slice))
    }

    func load(_ entry: BlockEntry?, _ slice: Int) async throws(StoreError) -> [UInt8] {
        let pin = try await loader.load(entry, SliceIndex(slice))
        return [UInt8](UnsafeRawBufferPointer(start: pin.pointer, count: Geometry.sliceBytes))
    }

    /// Expects a slice to read as `expected`.
    func expect(
        _ entry: BlockEntry?, _ slice: Int, _ expected: [UInt8], _ location: SourceLocation = #_sourceLocation
    ) async throws {
        // Not within the macro, which would print both.
        let isSame = try await load(entry, slice) == expected
        #expect(isSame, "slice \(slice)", sourceLocation: location)
    }

    func tryCopy(_ entry: BlockEntry?, _ slice: Int) -> [UInt8]? {
        var out = [UInt8](repeating: 0xEE, count: Geometry.sliceBytes)
        let found = out.withUnsafeMutableBytes {
            loader.tryCopy(entry, SliceIndex(slice), offset: 0, count: Geometry.sliceBytes, into: $0.baseAddress!)
        }
        return found ? out : nil
    }
}
