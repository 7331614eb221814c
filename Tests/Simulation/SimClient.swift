// A host with one disk: workers that write, read, trim and flush at the same time, over connections that break, through
// servers that die. It holds what it sees against the model.

import Runtime

@testable import Margarine

/// What may have been lost since the client was last attached, by what happened to the server. Ordered.
enum Loss: Int, Comparable {
    /// Nothing but what follows the last safe point, when the resume window has ended.
    case window
    /// What was not flushed, as far as the durability goes.
    case power
    /// Everything on scratch.
    case scratch
    static func < (a: Loss, b: Loss) -> Bool { a.rawValue < b.rawValue }
}

enum DiskShape {
    /// Sizes that end within a slice, a block and a page.
    static let sizes: [UInt64] = [(33 << 20) + 4096, 36 << 20, 40 << 20, (44 << 20) + 512]
}

final class SimClient: @unchecked Sendable {  // as its world
    struct Shape {
        var workers = 4
        var connections = 2
        var durability = Durability.scratch
        /// Safe points may come at any instant, when a journal is full.
        var anyInstant = false
        var isNamed = true
        var rule = SafePointRule.flush
        /// The disk gets smaller and larger.
        var isResized = false
        /// Its owner goes back to earlier generations.
        var goesBack = false
    }
    /// How long a worker waits between two operations at most.
    var thinkNs: UInt64 = 0

    let world: World
    let loop: Loop
    let disk: String
    let model: Model
    let shape: Shape
    /// The server to attach to.
    var server: () -> SimServer?
    private(set) var connections: [SimConnection] = []
    private var sessionNumber = 1
    private var abandoned: [UInt32] = []
    private var abandonedSafePoints: [Int] = []
    /// Sizes that the disk had since the client was last told one.
    private var sizes: Set<UInt64>
    var superGeneration: UInt64 = 1
    /// One transaction of the file system is committed at a time.
    private var isCommitting = false
    private var isAttaching = false
    private var paused = 0
    private(set) var busyWorkers = 0
    private(set) var operations = 0
    private(set) var attachments = 0
    private(set) var rollBacks = 0
    let operationLimit: Int

    // What must have survived.
    private var loss = Loss.window
    /// When the last acknowledged safe point began: a roll-back goes no further.
    private var safeTo: UInt64 = 0
    /// The same for the last one that is flushed as well.
    private var flushedTo: UInt64 = 0
    /// The same for the generation in the store.
    private(set) var committedTo: UInt64 = 0

    init(
        _ world: World, disk: String, sizeBytes: UInt64, shape: Shape, operationLimit: Int,
        model: Model? = nil, server: @escaping () -> SimServer?
    ) {
        self.world = world
        self.disk = disk
        self.shape = shape
        self.server = server
        self.operationLimit = operationLimit
        self.model = model ?? Model(sizeBytes: sizeBytes)
        if model != nil { (safeTo, flushedTo, committedTo) = (world.tick, world.tick, world.tick) }
        sizes = [sizeBytes]
        loop = world.makeClock("client-\(disk)").makeLoop("client-\(disk)")
    }

    func start() {
        busyWorkers = shape.workers
        loop.run { [self] in await attachments() }
        for _ in 0..<shape.workers { loop.run { [self] in await work() } }
    }

    // MARK: Going back

    /// Makes the disk what it was at some earlier generation, as its owner does.
    var goBack: () async -> Void = {}
    /// What the disk must show when it is next looked at: it has been taken back to a generation.
    private var expected: [UInt32: UInt32]?

    func wentBack(to seen: [UInt32: UInt32]) { expected = seen }

    /// Whether the disk is as the generation was that it was taken back to.
    private func hasGoneBack(_ found: [UInt32: UInt32], _ expected: [UInt32: UInt32], at now: UInt64) {
        for (granule, value) in found.sorted(by: { $0.key < $1.key }) where value != expected[granule] ?? 0 {
            return world.violate(
                "taken back to a generation, granule \(granule) shows \(value) instead of \(expected[granule] ?? 0)")
        }
        model.goneBack(to: expected, at: now)
        (safeTo, flushedTo, committedTo, rolledBackAt) = (now, now, now, now)
        self.expected = nil
        world.note("was taken back")
    }

    // MARK: Its size

    /// The first granule behind an end that the disk had since it was last looked at: from here on it is zeroes.
    private var cutFrom: UInt32?
    /// Changes the size of the disk, as its owner does: by force or not.
    var resize: (UInt64, _ force: Bool) async -> Void = { _, _ in }
    /// The server that the head names.
    var owner: () -> String? = { nil }

    /// The head has another size.
    func sizeChanged(from old: UInt64, to new: UInt64) {
        sizes.insert(new)
        guard new < old else { return }
        cutFrom = min(cutFrom ?? .max, UInt32(new / UInt64(Pattern.granuleBytes)))
        happened(.scratch)
    }

    /// What can be held against the model, and the granules that were cut off since, as they must be.
    private func withoutCut(_ found: [UInt32: UInt32]) -> (seen: [UInt32: UInt32], cut: [UInt32: UInt32]) {
        guard let cutFrom else { return (found, [:]) }
        if let (granule, value) = found.first(where: { $0.key >= cutFrom && $0.value != 0 }) {
            world.violate("granule \(granule) shows \(value), which lay behind an old end of the disk")
        }
        let cut = Dictionary(uniqueKeysWithValues: model.touched.filter { $0 >= cutFrom }.map { ($0, UInt32(0)) })
        return (found.filter { $0.key < cutFrom }, cut)
    }

    /// Whether the store names another server than the client's as the owner of its disk.
    var isElsewhere: () -> Bool = { false }

    func happened(_ loss: Loss) { self.loss = max(self.loss, loss) }

    /// All operations were done, and nothing more is attached.
    var isDone: Bool { busyWorkers == 0 && isAttached }
    private var isAttached = false
    private var session: String? { shape.isNamed ? "s\(sessionNumber)" : nil }
    private var live: [SimConnection] { connections.filter { !$0.isCut } }

    // MARK: Attaching

    private func attachments() async {
        while world.violation == nil {
            connections.removeAll { $0.isCut }
            if busyWorkers == 0, !connections.isEmpty {
                isAttached = true
                return
            }
            if connections.isEmpty, shape.isResized, world.chance.one(in: 8) {
                await quiesce()
                await resize(DiskShape.sizes.randomElement(using: &world.chance)!, world.chance.one(in: 2))
                paused = 0
            }
            if connections.isEmpty, shape.goesBack, !shape.isResized, world.chance.one(in: 4) {
                await quiesce()
                await goBack()
                paused = 0
            }
            if connections.count < shape.connections, connections.isEmpty || world.chance.one(in: 4) {
                await attach()
            }
            await world.sleep(world.chance.ns(100_000...(thinkNs > 0 ? 2_000_000_000 : 30_000_000)))
        }
    }

    private func attach() async {
        // All connections of a session go to one server.
        let isFirst = live.isEmpty
        guard let server = live.first?.server ?? server(), server.isAlive else { return }
        if isFirst { await quiesce() }
        defer { if isFirst { paused = 0 } }
        let export = session.map { "\(disk)?session=\($0)" } ?? disk
        let result = await handshake(server, export)
        switch result {
        case .failure(let error):
            world.note("attach of \(export) at \(server.id): \(error.kind)")
            if isFirst, error.kind == .refused, error.description.contains("can't go on") { sessionNumber += 1 }
        case .success(let connection):
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
            if isFirst, !(await verify(connection, before)) {
                if !connection.isCut { connection.cut() }
                return
            }
            world.note("attached \(export) at \(server.id)")
            // A new size is known to those who attach after it; of one session's connections the smallest counts.
            model.sizeBytes = isFirst ? connection.sizeBytes : min(model.sizeBytes, connection.sizeBytes)
            connections.append(connection)
        }
    }

    private func handshake(_ server: SimServer, _ export: String) async -> Result<SimConnection, AttachError> {
        let connection = SimConnection(world, server)
        let error = await connection.attach(export)
        return error.map { .failure($0) } ?? .success(connection)
    }

    /// Waits until no worker has anything under way; they wait until `paused` is 0 again.
    private func quiesce() async {
        paused = 1
        while underWay > 0 { await world.sleep(100_000) }
    }
    private var underWay = 0

    /// The disk as it is after it was away: what the session must find, or what a loss may have left.
    private func verify(_ connection: SimConnection, _ before: UInt64) async -> Bool {
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
        let lost = seen.sorted { $0.key < $1.key }.first { !model.mayShow($0.value, $0.key, from: before, to: now) }
        // A session that was declared lost leaves what its last safe point holds, and nothing else.
        let mustBeSafe = shape.isNamed && attachedSession != nil && attachedSession != session
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
        if let (granule, value) = lost, attachedSession == session, shape.isNamed {
            world.violate(
                "session \(session!) goes on, and granule \(granule) shows \(value) instead of \(model.describe(granule))"
            )
            return false
        }
        let floor: UInt64
        switch (loss, shape.durability) {
        case (.window, _): floor = max(safeTo, rolledBackAt)
        case (.power, .scratch), (.power, .store), (.scratch, .store): floor = flushedTo
        case (.power, .memory), (.scratch, .scratch), (.scratch, .memory): floor = committedTo
        }
        let (instants, culprit) = model.instants(of: seen, from: floor, upTo: before)
        if instants.isEmpty {
            world.violate(
                "after \(loss) the disk is as at no instant since \(floor)"
                    + (culprit.map { ": granule \($0) shows \(seen[$0]!), had \(model.describe($0))" } ?? ""))
            return false
        }
        if !shape.anyInstant, instants.intersection(model.safeInstants(upTo: before)).isEmpty {
            world.violate("after \(loss) the disk is as at \(instants.ranges), which is no safe point")
            return false
        }
        rollBacks += 1
        world.note("rolled back to \(instants.ranges.first!)")
        model.observe(whole, at: now)
        model.addSafePoint(at: now)
        rolledBackAt = now
        if instants.ranges.last!.upperBound < flushedTo { flushedTo = committedTo }
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
        // A server that serves a session without knowing that another one has the disk loses all that is new on it.
        loss = isElsewhere() ? .scratch : .window
        cutFrom = nil
        attachedSession = session
    }
    /// Under which session the client was last served.
    private var attachedSession: String?
    /// When it last found the disk gone back: no further back than that without a loss of another kind.
    private var rolledBackAt: UInt64 = 0

    /// Reads whole granules. nil: the connection broke.
    private func read(_ granules: [UInt32], _ connection: SimConnection) async -> [UInt32: UInt32]? {
        var seen: [UInt32: UInt32] = [:]
        var i = 0
        while i < granules.count {
            var end = i + 1
            while end < granules.count, granules[end] == granules[end - 1] + 1, end - i < 4096 { end += 1 }
            let range = granules[i]..<granules[end - 1] + 1
            let request = SimRequest(
                .read, offset: UInt64(range.lowerBound) * 256, lengthBytes: range.count * Pattern.granuleBytes)
            switch await connection.run(request) {
            case .cut: return nil
            case .failed: continue  // the store is away: asked again
            case .done: break
            }
            for granule in range {
                let bytes = request.buffer + Int(granule - range.lowerBound) * Pattern.granuleBytes
                guard let write = Pattern.write(bytes, granule: granule) else {
                    world.violate("granule \(granule) shows bytes that nobody wrote")
                    return nil
                }
                seen[granule] = write
            }
            i = end
        }
        return seen
    }

    // MARK: Working

    private func work() async {
        while world.violation == nil, operations < operationLimit {
            guard paused == 0, let connection = live.randomElement(using: &world.chance) else {
                await world.sleep(world.chance.ns(50_000...(thinkNs > 0 ? 500_000_000 : 2_000_000)))
                continue
            }
            operations += 1
            underWay += 1
            await operate(connection)
            underWay -= 1
            if world.chance.one(in: 8) { await world.sleep(world.chance.ns(10_000...5_000_000)) }
            if thinkNs > 0 { await world.sleep(world.chance.ns(0...thinkNs)) }
        }
        busyWorkers -= 1
    }

    private func operate(_ connection: SimConnection) async {
        switch world.chance.below(100) {
        case 0..<55: await write(connection, .write)
        case 55..<80: await read(connection)
        case 80..<88:
            if shape.rule == .flush || isCommitting || world.chance.one(in: 4) {
                _ = await flush(connection)
            } else {
                await commitTransaction(connection)
            }
        case 88..<94: await write(connection, .trim)
        default: await write(connection, .writeZeroes)
        }
    }

    /// Some granules, mostly where others are too, and where slices, blocks and the disk end.
    private func pick(pagesOnly: Bool) -> Range<UInt32> {
        let size = UInt32(model.sizeBytes / 256)
        // A file system leaves its super block to its commits.
        let first = shape.rule == .flush ? 0 : SuperBlockPattern.granules.upperBound
        let zones: [UInt32] = [first, 2048 - 64, 65_536 - 96, 65_536 * 2 - 32, size - 256, 5000]
        var count: Int
        switch world.chance.below(20) {
        case 0..<7: count = 1 + world.chance.below(16)
        case 7..<17: count = 16 * (1 + world.chance.below(4))
        case 17..<19: count = 16 * (1 + world.chance.below(24))
        default: count = 1 + world.chance.below(3000)
        }
        var start = zones.randomElement(using: &world.chance)! + UInt32(world.chance.below(192))
        if pagesOnly || world.chance.one(in: 2) {
            start &= ~15
            count = max(16, count & ~15)
        }
        // Of a page that the end of the disk cuts, trimming may leave the part.
        let end = pagesOnly ? size & ~15 : size
        start = min(start, end - 16)
        return start..<min(end, start + UInt32(count))
    }

    private func write(_ connection: SimConnection, _ kind: DeviceRequest.Kind) async {
        let granules = pick(pagesOnly: kind == .trim)
        let fua = kind == .write && world.chance.one(in: 12)
        let request = SimRequest(
            kind, offset: UInt64(granules.lowerBound) * 256, lengthBytes: granules.count * Pattern.granuleBytes,
            fua: fua)
        let start = world.nextTick()
        let number = model.begin(granules, isZero: kind != .write, at: start)
        if kind == .write {
            for granule in granules {
                Pattern.fill(
                    request.buffer + Int(granule - granules.lowerBound) * Pattern.granuleBytes, write: number,
                    granule: granule)
            }
        }
        let safePoint = fua && shape.rule != .btrfs ? model.beginSafePoint(at: start) : nil
        let outcome = await connection.run(request)
        world.note("\(kind) \(number) \(granules)\(fua ? " fua" : "") \(outcome)")
        ended(number, safePoint, outcome)
        if case .done = outcome, fua, shape.rule != .btrfs { reached(start, isFlushed: true) }
    }

    /// What came of a write, and of the safe point that it makes.
    private func ended(_ number: UInt32, _ safePoint: Int?, _ outcome: SimRequest.Outcome) {
        let end = world.nextTick()
        if case .done = outcome {
            model.acknowledge(number, at: end)
            if let safePoint { model.endSafePoint(safePoint, at: end) }
        } else {
            // Neither done nor undone; the connection can't be trusted with an order after that.
            model.abandon(number)
            abandoned.append(number)
            if let safePoint { abandonedSafePoints.append(safePoint) }
        }
    }

    /// A safe point that began at `tick` was acknowledged.
    private func reached(_ tick: UInt64, isFlushed: Bool) {
        safeTo = max(safeTo, tick)
        if isFlushed { flushedTo = max(flushedTo, tick) }
    }

    private func flush(_ connection: SimConnection) async -> Bool {
        let start = world.nextTick()
        // Under `auto` super blocks are safe points besides.
        let safePoint = shape.rule == .btrfs ? nil : model.beginSafePoint(at: start)
        let safeBefore = shape.rule == .btrfs ? safeTo : start
        let outcome = await connection.run(SimRequest(.flush))
        world.note("flush \(outcome)")
        guard case .done = outcome else {
            if let safePoint { abandonedSafePoints.append(safePoint) }
            return false
        }
        if let safePoint { model.endSafePoint(safePoint, at: world.nextTick()) }
        reached(safeBefore, isFlushed: true)
        return true
    }

    /// As btrfs ends a transaction, or an fsync: a flush, and then the super block, perhaps on another connection. Other
    /// writes go on beside it.
    private func commitTransaction(_ connection: SimConnection) async {
        isCommitting = true
        defer { isCommitting = false }
        guard await flush(connection), let other = live.randomElement(using: &world.chance) else { return }
        let isLog = superGeneration > 1 && world.chance.one(in: 3)
        if !isLog { superGeneration += 1 }
        let fua = world.chance.one(in: 2)
        let request = SimRequest(.write, offset: SuperBlock.offset, lengthBytes: SuperBlock.lengthBytes, fua: fua)
        let start = world.nextTick()
        let number = model.begin(SuperBlockPattern.granules, isZero: false, at: start)
        SuperBlockPattern.fill(request.buffer, write: number, generation: superGeneration, isLog: isLog)
        let safePoint = model.beginSafePoint(at: start)
        let outcome = await other.run(request)
        world.note(
            "super block \(superGeneration)\(isLog ? " log" : "")\(fua ? " fua" : ""), write \(number) \(outcome)")
        ended(number, safePoint, outcome)
        guard case .done = outcome else { return }
        reached(start, isFlushed: fua)
        // Without FUA a flush follows.
        if !fua, other.isCut || world.chance.one(in: 4) { return }
        if !fua { _ = await flush(other) }
    }

    private func read(_ connection: SimConnection) async {
        let granules = pick(pagesOnly: false)
        let request = SimRequest(
            .read, offset: UInt64(granules.lowerBound) * 256, lengthBytes: granules.count * Pattern.granuleBytes)
        let start = world.nextTick()
        let outcome = await connection.run(request)
        let end = world.nextTick()
        world.note("read \(granules) \(outcome)")
        guard case .done = outcome else { return }
        for granule in granules {
            let bytes = request.buffer + Int(granule - granules.lowerBound) * Pattern.granuleBytes
            let value = Pattern.write(bytes, granule: granule)
            if let value, model.mayShow(value, granule, from: start, to: end) { continue }
            return world.violate(
                "read \(start)-\(end): granule \(granule) shows \(value.map(String.init) ?? "garbage"), had \(model.describe(granule))"
            )
        }
    }

    // MARK: The end, and what others see

    /// A generation in the store holds `seen`.
    func committed(_ seen: [UInt32: UInt32], generation: UInt64, anyInstant: Bool, at tick: UInt64) {
        let seen = withoutCut(seen).seen
        let (instants, culprit) = model.instants(of: seen, from: committedTo, upTo: tick)
        if instants.isEmpty {
            return world.violate(
                "generation \(generation) is as at no instant since \(committedTo)"
                    + (culprit.map { ": granule \($0) shows \(seen[$0]!), had \(model.describe($0))" } ?? ""))
        }
        let allowed = anyInstant ? instants : instants.intersection(model.safeInstants(upTo: tick))
        guard let first = allowed.first else {
            return world.violate("generation \(generation) is as at \(instants.ranges), which is no safe point")
        }
        committedTo = first
    }

    /// Ends every connection as a client does that is done; attaches for it where a server took them away meanwhile.
    func disconnect() async {
        while world.violation == nil {
            // Whose flush fails has a server that lost its scratch disk, and waits until somebody starts it anew.
            if let connection = live.first, await flush(connection) { break }
            cutAll()
            connections = []
            await attach()
            await world.sleep(50_000_000)
        }
        let safePoint = model.beginSafePoint(at: world.nextTick())
        for connection in live { await connection.disconnect() }
        model.endSafePoint(safePoint, at: world.nextTick())
    }

    /// What it waits for, for people.
    var state: String { "\(disk): \(operations) operations, \(live.count) connections: \(live.map(\.waiting))" }

    func cutAll() { for connection in connections { connection.cut() } }
    func cutOne() { live.randomElement(using: &world.chance)?.cut() }
}
