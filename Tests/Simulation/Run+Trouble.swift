// What goes wrong in a world, and how much of it. Some of it in several steps, where one alone would seldom meet the other.

import BlockCache
import ObjectStore
import Runtime

@testable import Margarine

/// Kinds of trouble; `simulate --without` leaves some out.
enum Trouble: String, CaseIterable {
    case cut, cutAll, kill, powerLoss, scratchLoss, move, growth, outage, badWay, obstacle, clock, fullOnce, full,
        bitRot, coldPages
    case failingScratch, descriptors, stop, suspension, readers
    // Not of their own, but of what goes on all the time, or is looked at.
    case widening, options, staleSuperBlock, leaving, guests, comebacks, refusals, flood, leftovers

    /// How often, beside the others.
    var weight: Int {
        switch self {
        case .cut: 20
        case .cutAll: 14
        case .kill: 12
        case .powerLoss: 10
        case .scratchLoss: 4
        case .move: 6
        case .growth: 2
        case .outage: 5
        case .badWay: 8
        case .obstacle: 12
        case .clock: 4
        case .fullOnce: 3
        case .full: 4
        case .bitRot: 3
        case .coldPages: 4
        case .failingScratch: 2
        case .descriptors: 2
        case .stop: 5
        case .suspension: 1
        case .readers: 4
        default: 0
        }
    }
    static let total = allCases.reduce(0) { $0 + $1.weight }

    static func random(_ chance: inout Chance) -> Trouble {
        var left = chance.below(total)
        for kind in allCases {
            if left < kind.weight { return kind }
            left -= kind.weight
        }
        preconditionFailure("weights that do not add up")
    }
}

extension Run {
    func count(_ what: String) {
        faults[what, default: 0] += 1
        world.note("fault: \(what)")
    }

    func trouble() {
        guard !isCalm, world.violation == nil else { return }
        // A small scratch disk is full more often than others.
        let kind = shape.isTight && world.chance.one(in: stages < 3 ? 5 : 8) ? .full : Trouble.random(&world.chance)
        if !without.contains(kind), world.nowNs >= quietUntilNs {
            meet(kind, world.chance.below(2), clients.randomElement(using: &world.chance)!)
        }
        world.after(world.chance.ns(1_000_000...longestPeaceNs)) { [self] in trouble() }
    }

    private func meet(_ kind: Trouble, _ machine: Int, _ client: SimClient) {
        let server = servers[machine]
        switch kind {
        case .cut:
            count("cut of a connection")
            client.cutOne()
        case .cutAll:
            count("cut of all connections")
            if world.chance.one(in: 4) { client.goAway() } else { client.cutAll() }
        case .kill: restart(machine, .window, "kill")
        case .powerLoss: losePower(machine)
        case .scratchLoss: restart(machine, .scratch, "loss of the scratch disk")
        case .move: move(world.chance.below(clients.count))
        case .growth: grow(client)
        case .outage:
            guard let bucket = server?.buckets.randomElement(using: &world.chance), !bucket.faults.isDown
            else { return }
            count("outage of the store")
            bucket.faults.isDown = true
            world.after(world.chance.ns(10_000_000...20_000_000_000)) { bucket.faults.isDown = false }
        case .badWay:
            guard let bucket = server?.buckets.randomElement(using: &world.chance) else { return }
            count("a bad way to the store")
            bucket.faults = randomFaults()
        case .obstacle:
            count("single calls that hang, are refused, or are slow")
            obstacles[machine].add(.random(world, disk: client.disk))
            // Who meets it is mostly on the way.
            if world.chance.one(in: 3) { client.cutAll() }
        case .clock: setClock(server)
        case .fullOnce:
            guard let server else { return }
            count("scratch disk that is full once")
            server.scratch.failNext(.write, errno: 28)
        case .full: fill(client)
        case .coldPages: cool(machine)
        case .bitRot: rot(server)
        case .failingScratch:
            guard let server else { return }
            count("failing scratch disk")
            server.scratch.failNext(world.chance.one(in: 2) ? .sync : .write, errno: 5)
            // Whoever runs it sees that, and starts it anew.
            world.after(2_000_000_000) { [self] in restart(machine, .window, "kill") }
        case .descriptors:
            guard let server else { return }
            count("no descriptors")
            server.scratch.fail(.open, errno: 24)
            world.after(world.chance.ns(10_000_000...10_000_000_000)) { server.scratch.fail(.open, errno: nil) }
        case .stop: halt(machine, client)
        case .suspension:
            guard let server, !server.clock.isStopped else { return }
            count("suspension of a machine")
            server.clock.suspend()
            world.after(world.chance.ns(10_000_000...60_000_000_000)) { server.goOn() }
        case .readers: crowd(client)
        default: break
        }
    }

    /// Heads of a disk can't be written at its server for a while, when somebody else is about to attach.
    func hinder(_ number: Int) {
        if without.contains(.obstacle) { return }
        // One that is refused at once changes as little as one that waits for long.
        let effects: [Obstacle.Effect] = [
            .refuse, .refuse, .unavailable, .timeOut, .hang(inFront: world.chance.one(in: 2)),
        ]
        count("somebody attaches, and the head can't be written")
        obstacles[home[number]].add(
            Obstacle(
                kind: .head, disk: clients[number].disk, writes: true,
                effect: effects.randomElement(using: &world.chance)!,
                untilNs: world.nowNs + world.chance.ns(50_000_000...25_000_000_000)))
    }

    /// Heads of a disk take long at its server, when a client has left it and comes back.
    func slowDown(_ number: Int) {
        if without.contains(.obstacle) { return }
        count("a disk whose head takes long, given back")
        obstacles[home[number]].add(
            Obstacle(
                kind: .head, disk: clients[number].disk, writes: nil,
                effect: .slow(world.chance.ns(20_000_000...2_000_000_000)),
                untilNs: world.nowNs + 4_000_000_000))
    }

    func randomFaults() -> StoreFaults {
        var faults = StoreFaults()
        func rate() -> Int { [0, 0, 8, 30].randomElement(using: &world.chance)! }
        faults.failBefore = rate()
        faults.loseAnswer = rate()
        faults.corrupt = rate()
        faults.truncate = rate()
        faults.slow = rate()
        faults.hangingHeads = [0, 0, 0, 4].randomElement(using: &world.chance)!
        return faults
    }

    // MARK: Machines

    private func restart(_ machine: Int, _ loss: Loss, _ what: String, longestNs: UInt64 = 3_000_000_000) {
        guard servers[machine] != nil else { return }
        if isCalm { isKilledInCalm = true }
        count(what)
        stop(machine, loss)
        world.after(world.chance.ns(1_000_000...longestNs)) { [self] in start(machine) }
    }

    /// Often something comes before the first one has been got over: a second one, or a kill, which leaves everything that
    /// recovery did not remove. And often when much is in the journals, of which nothing was synced.
    private func losePower(_ machine: Int) {
        guard world.chance.one(in: 2) else { return restart(machine, .power, "loss of power") }
        let fillsUp = world.chance.one(in: 2) && !without.contains(.obstacle)
        let firstNs = fillsUp ? world.chance.ns(100_000_000...3_000_000_000) : 0
        let secondNs = firstNs + world.chance.ns(50_000_000...5_000_000_000)
        if fillsUp { fillJournals(machine, firstNs, untilNs: world.chance.one(in: 2) ? firstNs : secondNs) }
        let second = world.chance.one(in: 2) ? Loss.power : .window
        for (ns, loss) in [(firstNs, Loss.power), (secondNs, second)] {
            world.after(ns) { [self] in
                let what = loss == .power ? "loss of power" : "kill"
                if !isCalm { restart(machine, loss, what, longestNs: 200_000_000) }
            }
        }
    }

    /// No block can be stored for a while, and for a moment before power is lost clients write much.
    private func fillJournals(_ machine: Int, _ lossNs: UInt64, untilNs: UInt64) {
        count("blocks that can't be stored, and then a loss of power")
        obstacles[machine].add(
            Obstacle(
                kind: .block, disk: nil, writes: true, effect: .hang(inFront: true), untilNs: world.nowNs + untilNs))
        let there = clients.indices.filter { home[$0] == machine }.map { clients[$0] }
        let burstNs = min(lossNs, world.chance.ns(20_000_000...400_000_000))
        world.after(lossNs - burstNs) { for client in there { client.burst(for: burstNs) } }
    }

    /// A client goes to the other server. What the first one has not committed is lost to it.
    private func move(_ number: Int) {
        count("move to another server")
        // The one that is left may sleep through it.
        if world.chance.one(in: 2), !without.contains(.stop) {
            _ = leaveWitness(of: clients[number])
            halt(home[number], clients[number])
        }
        clients[number].cutAll()
        clients[number].happened(.scratch)
        home[number] = 1 - home[number]
    }

    /// SIGSTOP, and a while later SIGCONT.
    private func halt(_ machine: Int, _ client: SimClient) {
        guard let server = servers[machine], !server.clock.isStopped else { return }
        count("stop of a server")
        server.clock.isStopped = true
        server.stoppedAtNs = world.nowNs
        let longest: UInt64 = world.chance.one(in: 2) ? 1_000_000_000 : 45_000_000_000
        world.after(world.chance.ns(1_000_000...longest)) { [self] in
            server.goOn()
            world.note("\(server.id) goes on")
            if world.chance.one(in: 4) { client.cutAll() }
        }
    }

    /// By hours, or back by minutes.
    private func setClock(_ server: SimServer?) {
        guard let server else { return }
        count("jump of a wall clock")
        server.environment.wallOffsetMs +=
            world.chance.one(in: 2)
            ? Int64(world.chance.below(7_200_000)) - 3_600_000 : -Int64(world.chance.below(600_000))
    }

    /// A scratch disk stays full for a while, or only one disk's journal finds no room while others do, and those may be
    /// filling up. Clients are cut meanwhile, and go back, and the server may not live to see the end of it.
    private func fill(_ any: SimClient) {
        guard let number = clients.firstIndex(where: { $0 === any }) else { return }
        let machine = home[number]
        let there = clients.indices.filter { home[$0] == machine }
        let lastsNs = world.chance.ns(10_000_000...15_000_000_000)
        if shape.journalBytes < shape.journalPerDiskBytes, there.count > 1, stages < 3, !world.chance.one(in: 4) {
            // One that is soon rolled back, and may not go on after that.
            let short = there.filter { heads[clients[$0].disk].map { $0.options.resumeWindowMs < 1_000 } ?? false }
            let named = short.filter {
                clients[$0].who.own != nil && clients[$0].who.guest == nil && !clients[$0].live.isEmpty
            }
            let first = (named.isEmpty ? short : named).randomElement(using: &world.chance).map { clients[$0] }
            return fillBeside(machine, first ?? any, for: 1_000_000_000 + lastsNs / 4)
        }
        var firstNs: UInt64 = 0
        if shape.isTight, !world.chance.one(in: 4), !without.contains(.obstacle) {
            count("blocks that can't be stored, and then a full scratch disk")
            firstNs = world.chance.ns(0...(world.chance.one(in: 4) ? 600_000_000 : 60_000_000))
            obstacles[machine].add(
                Obstacle(
                    kind: .block, disk: nil, writes: true, effect: .hang(inFront: true),
                    untilNs: world.nowNs + firstNs + partNs(of: lastsNs)))
        }
        world.after(firstNs) { [self] in if !isCalm { fill(machine, any, for: lastsNs) } }
    }

    /// One writes much and flushes nothing, until its journal is the one that others will ask for room. That finds none itself
    /// then, and its client goes. Once it was rolled back the others write, until they ask. Nothing else goes wrong meanwhile,
    /// or it would seldom come to that.
    private func fillBeside(_ machine: Int, _ client: SimClient, for lastsNs: UInt64) {
        guard let server = servers[machine] else { return }
        count("journals that fill up side by side")
        stages += 1
        quietUntilNs = world.nowNs + 8_000_000_000
        client.isItselfUntilNs = quietUntilNs
        client.burst(for: 4_000_000_000)
        clearWay(machine)
        store.net.run { [self] in
            for _ in 0..<1500 {
                await world.sleep(world.chance.ns(500_000...4_000_000))
                guard !isCalm, servers[machine] === server, !server.clock.isStopped else { return quietUntilNs = 0 }
                if await server.isInTheWay(client.disk) { break }
            }
            // What no journal takes stays in the dirty memory, and the others need some.
            client.burst(for: 0)
            quietUntilNs = world.nowNs + lastsNs + 5_000_000_000
            client.isItselfUntilNs = quietUntilNs
            fill(machine, client, for: lastsNs, alone: true)
            for _ in 0..<100 where servers[machine] === server && !server.clock.isStopped {
                if await server.owesRollBack(client.disk) {
                    count("a roll-back that finds no room in its journal")
                    break
                }
                await world.sleep(10_000_000)
            }
            clearWay(machine)
            if !without.contains(.obstacle) {
                obstacles[machine].add(
                    Obstacle(
                        kind: .block, disk: nil, writes: true, effect: .hang(inFront: true),
                        untilNs: world.nowNs + partNs(of: lastsNs)))
            }
            for other in clients.indices where home[other] == machine && clients[other] !== client {
                clients[other].burst(for: lastsNs)
            }
        }
    }

    /// Nothing is in the way of what a server asks of the store.
    private func clearWay(_ machine: Int) {
        obstacles[machine].removeAll()
        for bucket in servers[machine]?.buckets ?? [] { bucket.faults.isDown = false }
    }

    /// Blocks can be stored again with the end of it, or commits go on while there still is no room.
    private func partNs(of lastsNs: UInt64) -> UInt64 {
        world.chance.one(in: 2) ? lastsNs : world.chance.ns(0...lastsNs)
    }

    private func fill(_ machine: Int, _ client: SimClient, for lastsNs: UInt64, alone: Bool = false) {
        guard let server = servers[machine] else { return }
        var path = ""
        if alone || !world.chance.one(in: 3), let head = heads[client.disk] {
            path = DiskOpener.journalFolder(client.disk, head.diskID)
        }
        count(path.isEmpty ? "full scratch disk" : "no room for one disk's journal")
        server.scratch.fail(.write, errno: 28, path: path)
        if alone || !world.chance.one(in: 4) {
            let staysAway = alone || world.chance.one(in: 2)
            let longestNs: UInt64 = alone ? 1_000_000 : 200_000_000
            world.after(world.chance.ns(0...longestNs)) { if staysAway { client.goAway() } else { client.cutAll() } }
        }
        let isKilled = !world.chance.one(in: alone ? 8 : path.isEmpty ? 2 : 4)
        world.after(lastsNs) { [self] in
            if isKilled, servers[machine] === server, !isCalm { restart(machine, .window, "kill") }
            server.scratch.fail(.write, errno: nil)
        }
    }

    /// A server's manifest pages are pushed out again and again for a while, and take long to come. Its clients ask what is a
    /// hole meanwhile.
    private func cool(_ machine: Int) {
        if isForgetful { return }
        count("manifest pages that are not kept, and take long")
        let endNs = world.nowNs + world.chance.ns(100_000_000...4_000_000_000)
        obstacles[machine].add(
            Obstacle(
                kind: .page, disk: nil, writes: false, effect: .slow(world.chance.ns(50_000_000...1_500_000_000)),
                untilNs: endNs))
        isForgetful = true
        let there = clients.indices.filter { home[$0] == machine }.map { clients[$0] }
        for client in there { client.isLooking = true }
        world.after(endNs - world.nowNs) { for client in there { client.isLooking = false } }
        forget(machine, untilNs: endNs)
    }

    private func forget(_ machine: Int, untilNs: UInt64) {
        guard isForgetful, world.nowNs < untilNs else { return isForgetful = false }
        for context in servers[machine]?.contexts ?? [] { context.manifests.evict(to: 0) }
        world.after(world.chance.ns(10_000_000...300_000_000)) { [self] in forget(machine, untilNs: untilNs) }
    }

    private func rot(_ server: SimServer?) {
        guard let server, let file = (try? server.scratch.list("blocks"))?.randomElement(using: &world.chance),
            let size = server.scratch.contents("blocks/\(file)")?.count, size > 0
        else { return }
        count("bit rot in a block file")
        server.scratch.flipBit("blocks/\(file)", at: UInt64(world.chance.below(size)))
    }

    // MARK: People

    /// Several come and go at one generation.
    private func crowd(_ client: SimClient) {
        guard let head = heads[client.disk], let record = head.record, let root = record.root,
            let seen = contents[root.id], let server = anyServer(using: &world.chance)
        else { return }
        count("readers that come and go")
        for _ in 0..<(2 + world.chance.below(3)) {
            store.net.run { [self] in
                for _ in 0..<12 where server.isAlive && !isCalm && world.violation == nil {
                    let reader = SimReader(world, server, record, seen: seen)
                    await reader.run(client.disk, named, for: world.chance.ns(0...3_000_000), pauseNs: 1_000_000) {
                        isCalm
                    }
                    await world.sleep(world.chance.ns(0...4_000_000))
                }
            }
        }
    }

    /// An owner changes his mind.
    func changeOptions() {
        world.after(world.chance.ns(50_000_000...max(longestPeaceNs * 4, 4_000_000_000))) { [self] in
            guard !isCalm, world.violation == nil else { return }
            let client = clients.randomElement(using: &world.chance)!
            var change = Catalog.OptionsChange()
            switch world.chance.below(3) {
            case 0: change.safePoints = SafePointRule.allCases.randomElement(using: &world.chance)!
            case 1: change.durability = Durability.allCases.randomElement(using: &world.chance)!
            default: change.resumeWindowMs = [0, 300, 60_000].randomElement(using: &world.chance)!
            }
            count("change of options")
            store.net.run { [self, change] in
                do throws(CatalogError) { _ = try await catalog().set(client.disk, change) } catch {
                    world.note("\(client.disk) can't be changed: \(error.kind)")
                }
            }
            changeOptions()
        }
    }

    // MARK: Bounds

    func checkBounds() {
        for case let server? in servers {
            for context in server.contexts where context.arena.inUse > context.arena.capacity {
                world.violate("\(server.id) holds \(context.arena.inUse) dirty pages")
            }
            // Frames and layers, and what one request adds.
            for context in server.contexts
            where context.arena.heldBytes > context.arena.capacity * Geometry.pageBytes + (2 << 20) {
                world.violate(
                    "\(server.id) holds \(context.arena.heldBytes) bytes of dirty memory, \(context.arena.overheadBytes) of layers"
                )
            }
            if server.freeRequestBytes < -(4 << 20) {
                world.violate("\(server.id) has overdrawn its requests' memory by \(-server.freeRequestBytes) bytes")
            }
            let journals = server.contexts[0].journals
            // Each loop may take the last room at once with the others.
            if journals.usedBytes > journals.limitBytes + UInt64(shape.loops) * (2 << 20) {
                world.violate("\(server.id) holds \(journals.usedBytes) bytes of journals")
            }
            // Journals, block files, a block that comes while another one goes, and room for the journals' next segments.
            let used = Self.scratchBytes - ((try? server.scratch.freeBytes()) ?? 0)
            if used > journals.limitBytes + shape.blockFileBytes + (48 << 20) {
                world.violate("\(server.id) holds \(used) bytes on scratch")
            }
        }
    }
}
