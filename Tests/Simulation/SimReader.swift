// Somebody who has a generation attached read-only for a while: it must stay readable, whatever history lets go meanwhile.

import BlockCache
import Runtime

@testable import Margarine

final class SimReader: @unchecked Sendable {  // as its world
    private let world: World
    private let connection: SimConnection
    private let record: GenerationRecord
    private let seen: [UInt32: UInt32]
    /// Those of `seen`, ascending.
    private let granules: [UInt32]

    /// - Parameter seen: what the generation shows.
    init(_ world: World, _ server: SimServer, _ record: GenerationRecord, seen: [UInt32: UInt32]) {
        self.world = world
        self.record = record
        let end = UInt32(record.sizeBytes / UInt64(Pattern.granuleBytes))
        self.seen = seen.filter { $0.key < end }
        granules = self.seen.keys.sorted()
        connection = SimConnection(world, server)
    }

    /// Reads now and then for `durationNs`, or until `isOver`. `named` holds the generation as if a head named it.
    func run(
        _ disk: String, _ named: Named, for durationNs: UInt64, pauseNs: UInt64 = 40_000_000_000, isOver: () -> Bool
    ) async {
        let export = "\(disk)@\(record.generation)"
        guard await connection.attach(export) == nil else { return }
        let hold = "reader of \(export), \(world.nextTick())"
        if let missing = named.hold(hold, record, isHeld: { [self] in !connection.isCut }) {
            world.violate(missing.description)
        }
        let end = world.nowNs + durationNs
        while world.nowNs < end, !isOver(), !connection.isCut, world.violation == nil {
            guard let granule = granules.randomElement(using: &world.chance) else { break }
            let wasNamed = isNamed(export)
            let request = SimRequest(.read, offset: UInt64(granule) * 256, lengthBytes: Pattern.granuleBytes)
            if case .done = await connection.run(request) {
                if !wasNamed, !isNamed(export), !connection.isCut, connection.server.isAlive {
                    world.violate("\(connection.server.id) serves \(export), and its heartbeat does not name it")
                }
                let value = Pattern.write(request.buffer, granule: granule)
                if value != seen[granule] {
                    world.violate(
                        "\(export) shows \(value.map(String.init) ?? "garbage") in granule \(granule) instead of \(seen[granule]!)"
                    )
                }
            }
            await world.sleep(world.chance.ns(pauseNs / 40...pauseNs))
        }
        named.release(hold)
        if world.chance.one(in: 2) { await connection.disconnect() } else { connection.cut() }
    }

    /// Whether the server would say in a heartbeat that it reads the generation.
    private func isNamed(_ export: String) -> Bool {
        let reading = connection.server.manager.reading
        return reading.contains(export) || reading.contains(ServerRecord.readsEverything)
    }
}
