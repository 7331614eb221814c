// What the tests of manifests and the catalog share: a seeded world, and entries made of chance.

import BlockCache
import Margarine
import ObjectStore
import Runtime
import Synchronization

/// splitmix64: the same numbers for the same seed.
struct SeededGenerator: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}

/// Time that a test sets or that somebody sleeps away, chance from a seed, no waiting, no other threads.
final class SeededEnvironment: Environment {
    private struct State {
        var generator: SeededGenerator
        var wallMs: Int64
        var asleep: [@Sendable () async -> Void] = []
    }
    private let state: Mutex<State>
    init(seed: UInt64 = 1, wallMs: Int64 = 1_800_000_000_000) {
        state = Mutex(State(generator: SeededGenerator(seed: seed), wallMs: wallMs))
    }
    var nowNs: UInt64 { UInt64(wallMs) * 1_000_000 }
    var wallMs: Int64 {
        get { state.withLock { $0.wallMs } }
        set { state.withLock { $0.wallMs = newValue } }
    }
    func randomBits() -> UInt64 { state.withLock { $0.generator.next() } }
    func sleep(ns: UInt64) async {
        let asleep = state.withLock { state in
            state.wallMs += Int64((ns + 999_999) / 1_000_000)
            return state.asleep
        }
        for body in asleep { await body() }
        await Task.yield()
    }
    /// Calls `body` whenever somebody has slept: for what others do meanwhile.
    func whileAsleep(_ body: @escaping @Sendable () async -> Void) { state.withLock { $0.asleep.append(body) } }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}

/// A bucket in memory, what was asked of it, and faults in front.
struct TestStore {
    let memory = MemoryBucket()
    let counters = StoreCounters()
    let faulty: FaultyBucket
    let environment: SeededEnvironment
    init(seed: UInt64 = 1) {
        environment = SeededEnvironment(seed: seed)
        faulty = FaultyBucket(
            CountingBucket(memory, counters: counters, environment: environment), environment: environment)
    }
    func cache(budgetBytes: Int = 64 << 20) -> ManifestCache {
        ManifestCache(Locations([faulty]), budgetBytes: budgetBytes)
    }
    /// Objects put and objects got since the start.
    var puts: UInt64 { counters.snapshot.put.started }
    var gets: UInt64 { counters.snapshot.get.started }
    func write(_ edit: ManifestEdit) async throws -> Manifest {
        try await edit.write(to: faulty, location: 0, environment: environment)
    }
}

extension BlockEntry {
    /// Some entry that a commit could have made.
    static func random(using g: inout SeededGenerator) -> BlockEntry {
        var entry = BlockEntry(base: nil, deltas: [])
        let deltas = Int.random(in: 0...BlockEntry.maxDeltas, using: &g)
        if deltas == 0 || Bool.random(using: &g) {
            entry.base = BaseRef(
                id: ObjectID(high: g.next(), low: g.next()), location: 0,
                lengthBytes: UInt32.random(in: 1...16_000_000, using: &g),
                nonzeroSlices: UInt32.random(in: 1 ... .max, using: &g))
        }
        for _ in 0..<deltas {
            let touched = UInt32.random(in: 1 ... .max, using: &g)
            entry.deltas.append(
                DeltaRef(
                    id: ObjectID(high: g.next() & 3, low: 7), location: UInt8(g.next() & 1),
                    offsetBytes: UInt32.random(in: 1 ... .max, using: &g),
                    lengthBytes: UInt32.random(in: 1...100_000, using: &g), touchedSlices: touched,
                    zeroedSlices: touched & UInt32(truncatingIfNeeded: g.next())))
        }
        // One that reads as zeroes would be no entry.
        return entry.nonzeroSlices == 0 ? random(using: &g) : entry
    }
}
