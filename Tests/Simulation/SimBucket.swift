// One server's way to the common object store: requests and answers take time, get lost, come damaged, and what was sent
// takes effect also after its sender has died.

import BlockCache
import ObjectStore
import Runtime

@testable import Margarine

/// What goes wrong on the way to a store. One in so many calls; 0: never.
struct StoreFaults {
    var failBefore = 0
    var loseAnswer = 0
    var corrupt = 0
    var truncate = 0
    var slow = 0
    /// How long a slow call takes at most, each way.
    var slowNs: UInt64 = 3_000_000_000
    /// How long it takes at most to ask for a manifest page, and to get it; 0: as long as anything else.
    var slowPageNs: UInt64 = 0
    /// Calls on heads that take up to 20 s.
    var hangingHeads = 0
    /// Nothing gets through.
    var isDown = false
}

/// The store itself, and what is looked at when it changes.
final class SimStore: @unchecked Sendable {  // as its world
    /// One for each location.
    let memories: [MemoryBucket]
    let net: Loop
    /// Called for each object stored, in the order in which they are.
    var onPut: (_ sender: String, _ location: Int, _ key: String, _ bytes: [UInt8]) -> Void = { _, _, _, _ in }
    var onDelete: (_ sender: String, _ location: Int, _ key: String) -> Void = { _, _, _ in }

    init(_ world: World, locations: Int) {
        net = world.makeClock("net").makeLoop("net")
        memories = (0..<locations).map { number in
            // Each location has a clock of its own.
            let offsetMs = Int64(world.chance.below(10_000_000))
            return MemoryBucket(name: "location \(number)") { [unowned world] in
                Int64(world.nowNs / 1_000_000) + offsetMs + 1_700_000_000_000
            }
        }
    }

    /// The store as seen over `buckets`, with retries as a daemon has them.
    func open(_ buckets: [SimBucket], _ environment: any Environment, near: UInt8, deadlineMs: UInt64 = 5_000) -> Store
    {
        var policy = RetryPolicy()
        policy.deadlineMs = deadlineMs
        let retrying = buckets.map { RetryingBucket($0, environment: environment, policy: policy) }
        return Store(
            id: ObjectID(high: 0, low: 1), locations: Locations(retrying, near: near), environment: environment)
    }
}

final class SimBucket: Bucket, @unchecked Sendable {  // as its world
    private let world: World
    private let store: SimStore
    private let sender: String
    let location: Int
    /// When something went wrong, the last time, with a call on a server's record.
    private(set) var troubledNs: UInt64 = 0
    /// Calls on a server's record that something is in the way of now.
    private(set) var recordsHeldUp = 0
    private var memory: MemoryBucket { store.memories[location] }
    var faults = StoreFaults()
    /// What a call that is not slow takes at most, each way.
    var mostNs: UInt64 = 8_000_000
    private let obstacles: Obstacles?
    var name: String { memory.name }

    init(_ world: World, _ store: SimStore, sender: String, location: Int = 0, obstacles: Obstacles? = nil) {
        self.world = world
        self.store = store
        self.sender = sender
        self.location = location
        self.obstacles = obstacles
    }

    /// Its server could not send anything, or go on with an answer, until now.
    func noteTrouble() { troubledNs = max(troubledNs, world.nowNs) }

    private func roll(_ n: Int) -> Bool { n > 0 && world.chance.one(in: n) }
    private var latencyNs: UInt64 {
        world.chance.ns(200_000...(roll(faults.slow) ? faults.slowNs : mostNs))
    }

    /// Sends `call` on `key` to the store; its effect and its answer come later, whether or not the caller still lives.
    private func send<T: Sendable>(
        _ key: String, isWrite: Bool, _ call: @escaping @Sendable () async -> Result<T, StoreError>
    ) async -> Result<T, StoreError> {
        let isRecord = key.hasPrefix("servers/")
        if faults.isDown || roll(faults.failBefore) {
            if isRecord { troubledNs = world.nowNs }
            await world.sleep(latencyNs)
            return .failure(StoreError(.unavailable, "simulated: out of reach"))
        }
        var slowNs = key.hasPrefix("manifests/") && !isWrite ? faults.slowPageNs : 0
        // The answer is lost: the same call again, as an HTTP client's own retry would make it, is not ours to simulate.
        var isLost = roll(faults.loseAnswer)
        var hangs: Obstacle?
        if let obstacle = obstacles?.first(key, isWrite: isWrite) {
            if isRecord { recordsHeldUp += 1 }
            defer {
                if isRecord {
                    recordsHeldUp -= 1
                    noteTrouble()
                }
            }
            switch obstacle.effect {
            case .refuse:
                await world.sleep(latencyNs)
                return .failure(StoreError(.refused, "simulated: 403"))
            case .unavailable:
                await world.sleep(latencyNs)
                return .failure(StoreError(.unavailable, "simulated: 503"))
            case .hang(let inFront):
                if inFront { await obstacles!.wait(obstacle) } else { hangs = obstacle }
            case .timeOut:
                await world.sleep(world.chance.ns(0...10_000_000_000))
                if world.chance.one(in: 2) {
                    return .failure(StoreError(isWrite ? .unclear : .unavailable, "simulated: no answer in time"))
                }
                isLost = true
            case .slow(let ns): slowNs = ns
            }
        }
        let isHeadHanging = key.hasSuffix("/head") && roll(faults.hangingHeads)
        let there =
            isHeadHanging
            ? world.chance.ns(5_000_000_000...20_000_000_000) : slowNs > 0 ? world.chance.ns(0...slowNs) : latencyNs
        let back = slowNs > 0 ? world.chance.ns(0...slowNs) : latencyNs
        if isRecord, isLost || there + back > 500_000_000 { troubledNs = max(troubledNs, world.nowNs + there + back) }
        let (answersLate, answersNot) = (hangs, isLost)
        let result = await withCheckedContinuation { continuation in
            world.after(there) { [world, store] in
                store.net.run {
                    let result = await call()
                    world.after(back) {
                        continuation.resume(
                            returning: answersNot
                                ? .failure(StoreError(isWrite ? .unclear : .unavailable, "simulated: no answer"))
                                : result)
                    }
                }
            }
        }
        if let answersLate {
            await obstacles!.wait(answersLate)
            if isRecord { noteTrouble() }
        }
        return result
    }

    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        let memory = memory
        var object = try await send(key, isWrite: false) { () async -> Result<StoredObject, StoreError> in
            do throws(StoreError) { return .success(try await memory.get(key, range: range)) } catch {
                return .failure(error)
            }
        }.get()
        // What a transport may let through is bodies of objects that carry checksums of their own.
        guard key.hasPrefix("blocks/") || key.hasPrefix("manifests/"), !object.bytes.isEmpty else { return object }
        if roll(faults.corrupt) {
            object.bytes[world.chance.below(object.bytes.count)] ^= 1 << UInt8(world.chance.below(8))
        }
        if roll(faults.truncate) { object.bytes.removeLast(1 + world.chance.below(object.bytes.count)) }
        return object
    }

    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        let (store, sender, location, memory) = (store, sender, location, memory)
        return try await send(key, isWrite: true) { () async -> Result<ETag, StoreError> in
            do throws(StoreError) {
                let tag = try await memory.put(key, bytes, if: condition)
                store.onPut(sender, location, key, bytes)
                return .success(tag)
            } catch { return .failure(error) }
        }.get()
    }

    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        let memory = memory
        return try await send(prefix, isWrite: false) { () async -> Result<Listing, StoreError> in
            do throws(StoreError) {
                return .success(try await memory.list(prefix: prefix, after: after, folders: folders, limit: limit))
            } catch { return .failure(error) }
        }.get()
    }

    func delete(_ keys: [String]) async throws(StoreError) {
        let (store, sender, location, memory) = (store, sender, location, memory)
        try await send(keys.first ?? "", isWrite: true) { () async -> Result<Void, StoreError> in
            do throws(StoreError) {
                try await memory.delete(keys)
                for key in keys { store.onDelete(sender, location, key) }
                return .success(())
            } catch { return .failure(error) }
        }.get()
    }
}
