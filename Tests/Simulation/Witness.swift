// A connection that stays at a server which sleeps while another one takes its disk: what is asked there from then on must not
// be answered, where servers prove that the disk is theirs before they answer.

import Runtime

@testable import Margarine

extension Run {
    /// Leaves one of a client's connections at its server, and has it ask on. false: there is none without a request.
    func leaveWitness(of client: SimClient) -> Bool {
        guard let witness = client.giveAway() else { return false }
        count("a connection that stays at a server which is left")
        let end = world.nowNs + 120_000_000_000
        store.net.run { [self] in
            while !isCalm, !witness.isCut, world.nowNs < end, world.violation == nil {
                let owner = heads[client.disk]?.owner?.server
                let isTaken = owner != nil && owner != witness.server.id && !isRobbed(client.disk)
                // A flush may be a safe point, of which the model must know unless nobody can see it any more.
                let request =
                    isTaken && world.chance.one(in: 2)
                    ? SimRequest(.flush) : SimRequest(.read, offset: 0, lengthBytes: 4096)
                if case .done = await witness.run(request), isTaken, shape.provesOwnership, shape.takeover == .dead {
                    world.violate(
                        "\(witness.server.id) answers a \(request.kind) that it got after \(owner!) had taken \(client.disk)"
                    )
                }
                await world.sleep(world.chance.ns(100_000...40_000_000))
            }
            witness.cut()
        }
        return true
    }
}

extension Run {
    /// Force waits for nobody: whoever had the disk answers until he renews his record, or his lease is over.
    private func isRobbed(_ disk: String) -> Bool {
        robbedNs[disk].map { world.nowNs < $0 + UInt64(shape.deadAfterMs) * 1_300_000 } ?? false
    }
}

extension SimClient {
    /// A connection on which nothing is under way, which is not the client's any more.
    func giveAway() -> SimConnection? {
        guard let idle = live.first(where: { $0.waiting.isEmpty }) else { return nil }
        connections.removeAll { $0 === idle }
        return idle
    }
}
