// A server's clock, chance and workers in the simulated world.

import Runtime

final class SimEnvironment: Environment, @unchecked Sendable {  // as its world
    private let world: World
    private let clock: World.Clock
    /// Wall clocks jump; monotonic ones only drift.
    var wallOffsetMs: Int64 = 1_700_000_000_000

    init(_ world: World, _ clock: World.Clock) {
        self.world = world
        self.clock = clock
    }

    var nowNs: UInt64 { clock.nowNs }
    var wallMs: Int64 { wallOffsetMs + Int64(world.nowNs / 1_000_000) }
    func randomBits() -> UInt64 { world.chance.next() }

    func sleep(ns: UInt64) async {
        if Task.isCancelled { return }
        await world.sleep(ns * 1000 / clock.rate + 1)
    }

    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        if world.chance.one(in: 2) { await world.sleep(world.chance.ns(1_000...300_000)) }
        return work()
    }
}
