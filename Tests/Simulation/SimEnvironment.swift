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
    /// The same with the time in which the machine was suspended.
    var bootNs: UInt64 { clock.bootNs }
    var wallMs: Int64 { wallOffsetMs + Int64(world.nowNs / 1_000_000) }
    func randomBits() -> UInt64 { world.chance.next() }

    func sleep(ns: UInt64) async {
        if Task.isCancelled { return }
        let deadline = clock.nowNs + ns
        await world.sleep(clock.worldNs(deadline) - world.nowNs + world.delay())
        // Meanwhile the machine may have been suspended.
        while clock.nowNs < deadline { await world.sleep(clock.worldNs(deadline) - world.nowNs) }
    }

    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        if world.chance.one(in: 2) { await world.sleep(world.chance.ns(1_000...300_000) + world.delay()) }
        return work()
    }
}
