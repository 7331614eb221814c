// How a client attaches, and under which name: its own, or for a while that of somebody else who uses the disk meanwhile. It
// leaves in order or is cut, comes back early or late, and looks at the whole disk before it works on.

import Runtime

@testable import Margarine

/// Whom the client is attached as.
struct Who {
    let isNamed: Bool
    private var number = 1
    /// Somebody else.
    struct Guest {
        var name: String?
        var triesLeft: Int
        var wasServed = false
    }
    var guest: Guest?
    private var guests = 0

    init(isNamed: Bool) { self.isNamed = isNamed }

    var own: String? { isNamed ? "s\(number)" : nil }
    var session: String? { guest == nil ? own : guest!.name }
    var host: String { guest == nil ? "client" : "guest" }

    /// The own session can't go on.
    mutating func beginAnew() { number += 1 }
    mutating func beginGuest(_ chance: inout Chance) {
        guests += 1
        guest = Guest(name: chance.one(in: 3) ? nil : "g\(guests)", triesLeft: 1 + chance.below(6))
    }
}

/// Sessions that may never be served again.
struct Deaths {
    /// Under which name the client was last served, while that has not ended in order.
    var attached: String?
    private(set) var certain: [String] = []
    /// Once the head is stored again.
    private var pending: [String] = []
    /// Somebody else may have been served since.
    var othersMayHaveBeenServed = false
    /// `attached` was refused, and nobody else has been served: the disk went back.
    var wasRefused = false
    /// The disk was taken from its server.
    var wasTaken = false
    /// When a connection was last known to live.
    var lastLiveNs: UInt64 = 0
    var lastLiveTick: UInt64 = 0

    mutating func add(_ session: String, isCertain: Bool) {
        if isCertain { certain.append(session) } else { pending.append(session) }
    }
    mutating func headWasStored() {
        certain += pending
        pending = []
    }
    /// It was served again, which was allowed.
    mutating func remove(_ session: String) {
        pending.removeAll { $0 == session }
        certain.removeAll { $0 == session }
    }
    /// What a server knew beyond the head may be gone.
    mutating func forgetPending() { pending = [] }
}

extension SimClient {
    func attachments() async {
        while world.violation == nil {
            connections.removeAll { $0.isCut }
            if !connections.isEmpty { (deaths.lastLiveNs, deaths.lastLiveTick) = (world.nowNs, world.tick) }
            if busyWorkers == 0, !connections.isEmpty {
                isAttached = true
                return
            }
            if connections.isEmpty { await beAway() }
            if connections.count < shape.connections, connections.isEmpty || world.chance.one(in: 4) {
                await attach()
            }
            phase = "between"
            let hasLeftFileSystem = shape.content == .leftFileSystem && hasWrittenSuper && !isFileSystem
            let oneIn = hasLeftFileSystem ? 8 : who.session != nil ? 120 : 24
            let mayLeave = isHostile && world.nowNs >= isItselfUntilNs && !without.contains(.leaving)
            if mayLeave, !live.isEmpty, world.chance.one(in: oneIn) { await leave() }
            if isHostile, !live.isEmpty, world.chance.one(in: 150) { cutAll() }
            await world.sleep(world.chance.ns(100_000...max(30_000_000, min(thinkNs / 4, 2_000_000_000))))
        }
    }

    /// What its owner, and others, do while the client is not attached.
    private func beAway() async {
        phase = "away"
        if shape.isResized, world.chance.one(in: 8) {
            await quiesce()
            await resize(DiskShape.sizes.randomElement(using: &world.chance)!, world.chance.one(in: 2))
            paused = 0
        }
        if shape.goesBack, !shape.isResized, world.chance.one(in: 4) {
            await quiesce()
            await goBack()
            paused = 0
        }
        if who.guest?.wasServed == true, world.chance.one(in: 2) || !isHostile { who.guest = nil }
        if who.guest == nil, let own = who.own, deaths.certain.contains(own) { who.beginAnew() }
        guard isHostile else { return }
        if world.nowNs < awayUntilNs { await world.sleep(awayUntilNs - world.nowNs) }
        if !without.contains(.comebacks), world.chance.one(in: 4) { await tryTheDead() }
        if world.nowNs < isItselfUntilNs { return }
        if who.guest == nil, !without.contains(.guests), world.chance.one(in: 6) {
            who.beginGuest(&world.chance)
            if world.chance.one(in: 2) { hinder() }
            // Now and then the window ends before.
            await world.sleep(world.chance.ns(0...(world.chance.one(in: 3) ? 1_500_000_000 : 1_000_000)))
        } else if !hasFlooded, !without.contains(.flood), !deaths.certain.isEmpty, world.chance.one(in: 24) {
            hasFlooded = true
            await flood()
        }
    }

    // MARK: Attaching

    func attach() async {
        phase = "attaching"
        // All connections of a session go to one server.
        let isFirst = live.isEmpty
        guard let server = live.first?.server ?? server(), server.isAlive else { return }
        if isFirst { await quiesce() }
        defer { if isFirst { paused = 0 } }
        let session = who.session
        let export = session.map { "\(disk)?session=\($0)" } ?? disk
        let connection = SimConnection(world, server, host: who.host)
        if let error = await connection.attach(export) {
            world.note("attach of \(export) at \(server.id): \(error.kind)")
            if isFirst { refused(error, session, byServer: connection.wasRefused) }
            return
        }
        if session != deaths.attached { deaths.othersMayHaveBeenServed = true }
        // Meanwhile the others may have gone, or the client been sent elsewhere.
        if connection.isCut || isFirst != live.isEmpty || (isFirst && server !== self.server()) {
            return connection.cut()
        }
        // It goes on with sessions that it knows until it looks at the head; whoever cut the disk waits for that.
        if cutFrom != nil || expected != nil, owner() != server.id { return connection.cut() }
        attachments += 1
        if !sizes.contains(connection.sizeBytes) {
            world.violate("\(disk) has \(connection.sizeBytes) bytes of \(sizes.sorted())")
        }
        let before = world.nextTick()
        model.beginLook(at: before)
        defer { model.endLook(at: before) }
        if isFirst, !(await verify(connection, before)) {
            if !connection.isCut { connection.cut() }
            return
        }
        world.note("attached \(export) at \(server.id)")
        // A new size is known to those who attach after it; of one session's connections the smallest counts.
        model.sizeBytes = isFirst ? connection.sizeBytes : min(model.sizeBytes, connection.sizeBytes)
        connections.append(connection)
        wakeWorkers()
    }

    /// An attachment of `session` came to nothing. A failed one changes nothing for others.
    private func refused(_ error: AttachError, _ session: String?, byServer: Bool) {
        if !byServer, session != deaths.attached { deaths.othersMayHaveBeenServed = true }
        // Nothing here damages a journal: what power loss or a kill leaves of one is no damage.
        if byServer, error.description.contains("journal can't be taken up") {
            return world.violate("\(disk) is refused, and its journal is good: \(error)")
        }
        let isForEver = byServer && error.kind == .refused && error.description.contains("can't go on")
        if isForEver, let session {
            if session == deaths.attached {
                if isUnharmed, !without.contains(.refusals) {
                    return world.violate("session \(session) is refused, and nothing has happened to it: \(error)")
                }
                deaths.wasRefused = !deaths.othersMayHaveBeenServed
            }
            deaths.add(session, isCertain: true)
        }
        if who.guest != nil {
            who.guest!.triesLeft -= 1
            if isForEver || (who.guest!.triesLeft <= 0 && !who.guest!.wasServed) { who.guest = nil }
        } else if isForEver {
            who.beginAnew()
        }
    }

    /// No reason is known why the session that was last served should not go on.
    private var isUnharmed: Bool {
        // Clocks differ by a tenth, and a server may have noticed earlier that it was cut.
        let windowNs = UInt64(options.shortestWindowMs(since: deaths.lastLiveTick)) * 1_000_000
        return loss == .window && !isElsewhere() && !deaths.othersMayHaveBeenServed && !deaths.wasTaken
            && cutFrom == nil && expected == nil && windowNs >= 10_000_000_000
            && world.nowNs - deaths.lastLiveNs < windowNs / 100 * 80
    }

    /// The disk as it is after it was away: what the session must find, or what a loss may have left.
    private func verify(_ connection: SimConnection, _ before: UInt64) async -> Bool {
        let session = who.session
        let end = UInt32(connection.sizeBytes / UInt64(Pattern.granuleBytes))
        let touched = model.touched
        guard let found = await read(touched.filter { $0 < end }, connection), connection.server === server() else {
            return false
        }
        let now = world.nextTick()
        settle(at: before - 1)
        if let expected {
            hasGoneBack(found, expected, at: now)
            isResumed()
            return true
        }
        let (seen, cut) = withoutCut(found)
        let lost = seen.filter { !model.mayShow($0.value, $0.key, from: before, to: now) }.min { $0.key < $1.key }
        // A session that was declared lost leaves what its last safe point holds, and nothing else.
        let mustBeSafe = deaths.wasRefused
        // What was cut off is gone, also when the disk is larger again.
        let whole = seen.merging(cut, uniquingKeysWith: { $1 })
        if lost == nil, !mustBeSafe {
            model.observe(whole, at: now)
            // It was opened as the resize committed it.
            if !cut.isEmpty { model.addSafePoint(at: now) }
            world.note("nothing was lost")
            isResumed()
            return true
        }
        if let (granule, value) = lost, let session, deaths.attached == session {
            world.violate(
                "session \(session) goes on, and granule \(granule) shows \(value) instead of \(model.describe(granule))"
            )
            return false
        }
        let floor =
            switch loss {
            case .window: max(safeTo, rolledBackAt)
            case .power: max(flushedTo, storedTo, committedTo)
            case .scratch: max(storedTo, committedTo)
            }
        let (instants, culprit) = model.instants(of: seen, from: floor, upTo: before)
        if instants.isEmpty {
            world.violate(
                "after \(loss) the disk is as at no instant since \(floor)"
                    + (culprit.map { ": granule \($0) shows \(seen[$0]!), had \(model.describe($0))" } ?? ""))
            return false
        }
        // Nothing but the generation in the store may be left, which a full journal may have made.
        let isFullJournals = isAtAnyInstant && instants.ranges.contains { $0.contains(committedTo) }
        if !shape.anyInstant, !isFullJournals, instants.intersection(model.safeInstants(upTo: before)).isEmpty {
            world.violate("after \(loss) the disk is as at \(instants.ranges), which is no safe point")
            return false
        }
        rollBacks += 1
        world.note("rolled back to \(instants.ranges.first!)")
        model.observe(whole, at: now)
        model.addSafePoint(at: now)
        rolledBackAt = now
        if instants.ranges.last!.upperBound < flushedTo { flushedTo = max(storedTo, committedTo) }
        safeTo = flushedTo
        isResumed()
        return true
    }

    /// Nothing of what was given up before `tick` can take effect any more.
    private func settle(at tick: UInt64) {
        for write in abandoned { model.settle(write, at: tick) }
        for place in abandonedSafePoints { model.settleSafePoint(place, at: tick) }
        abandoned = []
        abandonedSafePoints = []
    }

    private func isResumed() {
        let session = who.session
        // A server that serves a session without knowing that another one has the disk loses all that is new on it.
        let isStale = isElsewhere()
        loss = isStale ? .scratch : .window
        cutFrom = nil
        forget()
        if let old = deaths.attached, old != session, !isStale {
            // An unnamed one is not in the head before that is next stored.
            deaths.add(old, isCertain: session != nil)
        }
        if session == nil || session != deaths.attached { hasWrittenSuper = hasWrittenSuper && session == nil }
        if let session { deaths.remove(session) }
        deaths.attached = session
        deaths.othersMayHaveBeenServed = false
        deaths.wasRefused = false
        deaths.wasTaken = false
        who.guest?.wasServed = true
    }

    // MARK: Leaving, and coming back

    /// Ends the session in order, mostly with a flush before, and comes back about when the disk is given back.
    private func leave() async {
        phase = "leaving"
        await quiesce()
        defer { paused = 0 }
        phase = "flushing before it leaves"
        if let connection = live.first, !world.chance.one(in: 4) { _ = await flush(connection) }
        phase = "disconnecting"
        let safePoint = model.beginSafePoint(at: world.nextTick())
        let leaving = live
        var isClean = !leaving.isEmpty
        for connection in leaving {
            if !(await connection.disconnect()) || !connection.server.isAlive { isClean = false }
        }
        // Whether it was its end or not, the session is not held to anything any more.
        deaths.attached = nil
        connections = []
        if isClean {
            model.endSafePoint(safePoint, at: world.nextTick())
            hasWrittenSuper = false
        } else {
            abandonedSafePoints.append(safePoint)
        }
        world.note("left\(isClean ? "" : ", perhaps")")
        if who.guest == nil, world.chance.one(in: 2) { who.beginAnew() }
        let releaseNs = UInt64(releaseAfterMs) * 1_000_000
        switch world.chance.below(5) {
        case 0: break
        case 1: await world.sleep(world.chance.ns(0...releaseNs * 2))
        default:
            // It is given back so long after it was committed.
            await world.sleep(world.chance.ns(releaseNs / 100 * 85...releaseNs / 100 * 115 + 200_000_000))
            if world.chance.one(in: 2) { slowDown() }
        }
    }

    /// Whoever was told that it can't go on, or was replaced, is refused for ever.
    private func tryTheDead() async {
        guard let session = deaths.certain.randomElement(using: &world.chance) else { return }
        await tryDead(session)
    }

    private func tryDead(_ session: String) async {
        guard let server = server(), server.isAlive, owner() == server.id, !isElsewhere() else { return }
        let connection = SimConnection(world, server)
        let error = await connection.attach("\(disk)?session=\(session)")
        world.note("\(session) comes back: \(error.map { "\($0.kind)" } ?? "admitted")")
        guard error == nil else { return }
        // One that has been robbed does not know yet.
        if owner() == server.id {
            world.violate("session \(session) was lost or replaced, and is admitted")
        }
        connection.cut()
    }

    /// So many others attach and are cut that nobody can remember all of them.
    private func flood() async {
        guard let server = server(), server.isAlive else { return }
        count("a flood of sessions")
        await quiesce()
        defer { paused = 0 }
        var admitted = 0
        for number in 0..<300 where admitted < 66 && isHostile && world.violation == nil {
            deaths.othersMayHaveBeenServed = true
            let connection = SimConnection(world, server)
            if await connection.attach("\(disk)?session=x\(number)") == nil { admitted += 1 }
            connection.cut()
            if !server.isAlive { break }
        }
        world.note("\(admitted) others were admitted")
        deaths.attached = nil
        who.guest = nil
        who.beginAnew()
        for session in deaths.certain.suffix(8) { await tryDead(session) }
    }
}
