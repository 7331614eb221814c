// A collector of the simulated world: the daemon's, on a clock, a way to the store and a scratch disk of its own. It is killed
// and begins anew like a server.

import ObjectStore
import Runtime

@testable import Margarine

final class SimCollector: @unchecked Sendable {  // as its world
    let id: String
    private let world: World
    private let clock: World.Clock
    let environment: SimEnvironment
    let buckets: [SimBucket]
    private(set) var isAlive = true
    /// Rounds that were completed, and those that were not.
    private(set) var completed = 0
    private(set) var failed = 0
    /// Objects and generation records that it deleted.
    private(set) var deleted: UInt64 = 0

    struct Shape {
        /// At most this long between two rounds.
        var pauseNs: UInt64 = 20_000_000_000
        var deadAfterMs: Int64 = 20_000
        var fault: Fault?
        /// How long it takes at most to ask for a manifest page, and to get it. With seconds, a round takes longer than the
        /// grace period. 0: as long as anything else.
        var slowPageNs: UInt64 = 0
        var checkpointMs: Int64 = 0
    }

    private let scratch: MemoryScratch

    /// - Parameter scratch: what one before it has left.
    init(_ world: World, _ store: SimStore, id: String, scratch: MemoryScratch?, shape: Shape) {
        self.world = world
        self.id = id
        clock = world.makeClock(id, rate: 900 + UInt64(world.chance.below(201)))
        environment = SimEnvironment(world, clock)
        environment.wallOffsetMs += Int64(world.chance.below(10_000_000)) - 5_000_000
        buckets = (0..<store.memories.count).map { SimBucket(world, store, sender: id, location: $0) }
        for bucket in buckets { bucket.faults.slowPageNs = shape.slowPageNs }
        let loop = clock.makeLoop(id)
        let scratch =
            scratch ?? MemoryScratch(capacityBytes: 64 << 20, deliver: SimServer.makeDeliver(world))
        self.scratch = scratch
        let simulated = store.open(buckets, environment, near: 0)
        var options = CollectionOptions()
        options.partitionBits = 2
        options.requests = shape.slowPageNs > 0 ? 1 : 1 + world.chance.below(8)
        options.deadAfterMs = shape.deadAfterMs
        options.beatMs = shape.deadAfterMs / 6
        options.checkpointMs = shape.checkpointMs
        options.server = id
        options.host = id
        let collector = Collector(store: simulated, scratch: scratch, options: options, fault: shape.fault)
        loop.run { [self] in
            while self.isAlive {
                await environment.sleep(ns: world.chance.ns(1_000_000_000...shape.pauseNs))
                do throws(CatalogError) {
                    let summary = try await collector.run()
                    completed += 1
                    deleted += summary.deleted + summary.generations.removed
                    world.note(
                        "\(id) has collected: \(summary.blocks.deleted) blocks, \(summary.pages.deleted) pages, \(summary.generations.removed) generations"
                    )
                } catch {
                    failed += 1
                    world.note("\(id) has not collected: \(error)")
                }
            }
        }
    }

    /// Gives what is left on its scratch disk.
    @discardableResult
    func kill(losesPower: Bool = false) -> MemoryScratch {
        isAlive = false
        world.stop(clock)
        return losesPower ? scratch.powerCut(random: &world.chance) : scratch.kill()
    }

    /// One bit of what it has on scratch is another one.
    func rot() {
        guard let file = (try? scratch.list("gc"))?.randomElement(using: &world.chance),
            let size = scratch.contents("gc/\(file)")?.count, size > 0
        else { return }
        scratch.flipBit("gc/\(file)", at: UInt64(world.chance.below(size)))
    }
}
