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
    static let sizes: [UInt64] = [
        (33 << 20) + 4096, 36 << 20, 40 << 20, (44 << 20) + 512,
        // Mostly empty: of many blocks, and of several manifest pages.
        (1 << 30) + 4096, (20 << 30) + 512,
    ]
}

final class SimClient: @unchecked Sendable {  // as its world
    struct Shape {
        var workers = 4
        var connections = 2
        /// Safe points may come at any instant, when a journal is full.
        var anyInstant = false
        var isNamed = true
        /// It writes much between two flushes.
        var isLazy = false
        /// What it writes: plain bytes, a file system that ends transactions, or first the one and later the other, which
        /// leaves a super block behind.
        var content = Content.plain
        /// The disk gets smaller and larger.
        var isResized = false
        /// Its owner goes back to earlier generations.
        var goesBack = false
    }
    enum Content { case plain, fileSystem, leftFileSystem }
    /// How long a worker waits between two operations at most.
    var thinkNs: UInt64 = 0

    let world: World
    let loop: Loop
    let disk: String
    let model: Model
    let shape: Shape
    /// The server to attach to.
    var server: () -> SimServer?
    var connections: [SimConnection] = []
    /// What may be in force, by what the head said when.
    var options: PossibleOptions
    var abandoned: [UInt32] = []
    var abandonedSafePoints: [Int] = []
    /// Sizes that the disk had since the client was last told one.
    var sizes: Set<UInt64>
    var superGeneration: UInt64 = 1
    /// One transaction of the file system is committed at a time.
    private var isCommitting = false
    /// Workers begin nothing while it is not 0.
    var paused = 0 {
        didSet { wakeWorkers() }
    }
    /// Those that have nothing to work on: paused, or without a connection.
    private var idleWorkers: [CheckedContinuation<Void, Never>] = []
    private(set) var busyWorkers = 0
    private(set) var operations = 0
    var attachments = 0
    var rollBacks = 0
    let operationLimit: Int

    // What must have survived.
    var loss = Loss.window
    /// When the last acknowledged safe point began: a roll-back goes no further.
    var safeTo: UInt64 = 0
    /// The same for the last one that a loss of power must leave.
    var flushedTo: UInt64 = 0
    /// The same for the last one that a flush has said is in the store.
    var storedTo: UInt64 = 0
    /// The same for the generation in the store.
    var committedTo: UInt64 = 0
    /// That one was made because a journal was full, not at a safe point.
    var isAtAnyInstant = false
    /// When it last found the disk gone back: no further back than that without a loss of another kind.
    var rolledBackAt: UInt64 = 0
    /// Whom it is attached as.
    var who: Who
    /// A super block was written since the session began.
    var hasWrittenSuper = false
    /// Something went wrong on purpose, or may.
    var isHostile = false
    /// How long it may be before a server gives a disk back that nobody uses.
    var releaseAfterMs: Int64 = 5_000
    var deaths = Deaths()
    var hasFlooded = false
    /// It does not attach before.
    var awayUntilNs: UInt64 = 0
    /// It neither leaves nor becomes somebody else before.
    var isItselfUntilNs: UInt64 = 0
    /// It writes as much as it can until then, and flushes seldom.
    private var burstsUntilNs: UInt64 = 0
    private var isBursting: Bool { world.nowNs < burstsUntilNs }
    /// It empties slices, fills others, and asks what is a hole.
    var isLooking = false
    /// Kinds of trouble that it does not make.
    var without: Set<Trouble> = []
    /// Heads can't be written for a while.
    var hinder: () -> Void = {}
    /// They take long.
    var slowDown: () -> Void = {}
    /// Notes a kind of trouble.
    var count: (String) -> Void = { _ in }

    init(
        _ world: World, disk: String, sizeBytes: UInt64, shape: Shape, options: DiskOptions, operationLimit: Int,
        model: Model? = nil, server: @escaping () -> SimServer?
    ) {
        self.world = world
        self.disk = disk
        self.shape = shape
        self.server = server
        self.operationLimit = operationLimit
        self.model = model ?? Model(sizeBytes: sizeBytes)
        self.options = PossibleOptions(options)
        who = Who(isNamed: shape.isNamed)
        if model != nil { (safeTo, flushedTo, committedTo) = (world.tick, world.tick, world.tick) }
        sizes = [sizeBytes]
        loop = world.makeClock("client-\(disk)").makeLoop("client-\(disk)")
    }

    /// All that it does is to take about so long.
    func takeTime(_ ns: UInt64) { thinkNs = 2 * ns * UInt64(shape.workers) / UInt64(max(operationLimit, 1)) }

    func start() {
        busyWorkers = shape.workers
        loop.run { [self] in await attachments() }
        for _ in 0..<shape.workers { loop.run { [self] in await work() } }
    }

    // MARK: Going back

    /// Makes the disk what it was at some earlier generation, as its owner does.
    var goBack: () async -> Void = {}
    /// What the disk must show when it is next looked at: it has been taken back to a generation.
    var expected: [UInt32: UInt32]?

    func wentBack(to seen: [UInt32: UInt32]) { expected = seen }

    /// Whether the disk is as the generation was that it was taken back to.
    func hasGoneBack(_ found: [UInt32: UInt32], _ expected: [UInt32: UInt32], at now: UInt64) {
        for (granule, value) in found.sorted(by: { $0.key < $1.key }) where value != expected[granule] ?? 0 {
            return world.violate(
                "taken back to a generation, granule \(granule) shows \(value) instead of \(expected[granule] ?? 0)")
        }
        model.goneBack(to: expected, at: now)
        (safeTo, flushedTo, storedTo, committedTo, rolledBackAt) = (now, now, now, now, now)
        self.expected = nil
        world.note("was taken back")
    }

    // MARK: Its size

    /// The first granule behind an end that the disk had since it was last looked at: from here on it is zeroes.
    var cutFrom: UInt32?
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
    func withoutCut(_ found: [UInt32: UInt32]) -> (seen: [UInt32: UInt32], cut: [UInt32: UInt32]) {
        guard let cutFrom else { return (found, [:]) }
        if let (granule, value) = found.first(where: { $0.key >= cutFrom && $0.value != 0 }) {
            world.violate("granule \(granule) shows \(value), which lay behind an old end of the disk")
        }
        let cut = Dictionary(uniqueKeysWithValues: model.touched.filter { $0 >= cutFrom }.map { ($0, UInt32(0)) })
        return (found.filter { $0.key < cutFrom }, cut)
    }

    /// Whether the store names another server than the client's as the owner of its disk.
    var isElsewhere: () -> Bool = { false }

    func happened(_ loss: Loss) {
        self.loss = max(self.loss, loss)
        if loss > .window { deaths.forgetPending() }
    }

    /// All operations were done, and nothing more is attached.
    var isDone: Bool { busyWorkers == 0 && isAttached }
    var isAttached = false
    var live: [SimConnection] { connections.filter { !$0.isCut } }
    private(set) var underWay = 0 {
        didSet { if underWay == 0 { quiescing.take()?.resume() } }
    }
    /// Who waits until nothing is under way.
    private var quiescing: CheckedContinuation<Void, Never>?

    /// Reads whole granules. nil: the connection broke.
    func read(_ granules: [UInt32], _ connection: SimConnection) async -> [UInt32: UInt32]? {
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
            case .failed:
                // The store is away: asked again.
                if world.violation != nil { return nil }
                await world.sleep(1_000_000)
                continue
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

    func burst(for ns: UInt64) { burstsUntilNs = world.nowNs + ns }

    private func work() async {
        while world.violation == nil, operations < operationLimit {
            guard paused == 0, let connection = live.randomElement(using: &world.chance) else {
                await withCheckedContinuation { idleWorkers.append($0) }
                await world.sleep(world.chance.ns(50_000...max(2_000_000, min(thinkNs / 8, 500_000_000))))
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

    /// There may be something to work on.
    func wakeWorkers() {
        if paused != 0 || idleWorkers.isEmpty || live.isEmpty { return }
        let idle = idleWorkers
        idleWorkers = []
        for worker in idle { worker.resume() }
    }

    /// Waits until no worker has anything under way; they begin nothing until `paused` is 0 again.
    func quiesce() async {
        paused = 1
        if underWay > 0 { await withCheckedContinuation { quiescing = $0 } }
    }

    private func operate(_ connection: SimConnection) async {
        if isBursting, !world.chance.one(in: 8) { return await write(connection, .write) }
        if isLooking, !world.chance.one(in: 8) { return await look(connection) }
        switch world.chance.below(100) {
        case 0..<52: await write(connection, .write)
        case 52..<72: await read(connection)
        case 72..<79: await status(connection)
        case 79: await cache(connection)
        case 80..<88 where shape.isLazy && !world.chance.one(in: 12): await write(connection, .write)
        case 80..<88: await makeSafePoint(connection)
        case 88..<94: await write(connection, .trim)
        default: await write(connection, .writeZeroes)
        }
    }

    /// Slices of which nothing is stored get their first bytes, and others are emptied, while somebody asks what is a hole.
    private func look(_ connection: SimConnection) async {
        switch world.chance.below(7) {
        case 0: await write(connection, .trim)
        case 1, 2: await write(connection, .write)
        case 3: await makeSafePoint(connection)
        default: await status(connection)
        }
    }

    private func makeSafePoint(_ connection: SimConnection) async {
        if !isFileSystem || isCommitting || world.chance.one(in: 4) {
            _ = await flush(connection)
        } else {
            await commitTransaction(connection)
        }
    }

    /// Some granules, mostly where others are too, and where slices, blocks and the disk end.
    private func pick(pagesOnly: Bool) -> Range<UInt32> {
        let size = UInt32(model.sizeBytes / 256)
        // A file system leaves its super block to its commits.
        let first = shape.content == .plain ? 0 : SuperBlockPattern.granules.upperBound
        // Here and there a slice of which nothing is stored, or all of one.
        if pagesOnly, world.chance.one(in: isLooking ? 2 : 12) {
            let slice = UInt32(1 + world.chance.below(8))
            return slice * 2048..<(slice + 1) * 2048
        }
        if !pagesOnly, world.chance.one(in: isLooking ? 2 : 10) {
            let slice = isLooking ? 1 + world.chance.below(8) : world.chance.below(Int(size / 2048))
            let start = UInt32(slice) * 2048 + 512
            return start..<start + UInt32(16 * (1 + world.chance.below(3)))
        }
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
        var granules = pick(pagesOnly: kind == .trim)
        if isBursting, kind == .write {
            // No more than the smallest dirty memory takes at once.
            let longest = min(UInt32(model.sizeBytes / 256), granules.lowerBound + 3072)
            let end = min(longest, granules.upperBound + UInt32(world.chance.below(1024)))
            granules = granules.lowerBound..<max(granules.upperBound, end)
        }
        let fua = kind == .write && !isBursting && world.chance.one(in: 12)
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
        let safePoint = fua && options.mayTakeFlushes(since: start) ? model.beginSafePoint(at: start) : nil
        let outcome = await connection.run(request)
        world.note("\(kind) \(number) \(granules)\(fua ? " fua" : "") \(outcome)")
        ended(number, safePoint, outcome)
        if case .done = outcome, fua, options.takeFlushes(since: start) { reached(start, flushSince: start) }
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

    /// A safe point that began at `tick` was acknowledged; with `flushSince` by something that is as durable as a flush.
    private func reached(_ tick: UInt64, flushSince: UInt64?) {
        safeTo = max(safeTo, tick)
        guard let flushSince else { return }
        let durabilities = options.all(since: flushSince).map(\.durability)
        if !durabilities.contains(.memory) { flushedTo = max(flushedTo, tick) }
        if durabilities.allSatisfy({ $0 == .store }) { storedTo = max(storedTo, tick) }
    }

    func flush(_ connection: SimConnection) async -> Bool {
        let start = world.nextTick()
        // Under `auto` super blocks are safe points besides.
        let safePoint = options.mayTakeFlushes(since: start) ? model.beginSafePoint(at: start) : nil
        let safeBefore = safeTo
        let outcome = await connection.run(SimRequest(.flush))
        world.note("flush \(outcome)")
        guard case .done = outcome else {
            if let safePoint { abandonedSafePoints.append(safePoint) }
            return false
        }
        if let safePoint { model.endSafePoint(safePoint, at: world.nextTick()) }
        reached(options.takeFlushes(since: start) ? start : safeBefore, flushSince: start)
        return true
    }

    /// Whether it ends transactions now.
    var isFileSystem: Bool {
        switch shape.content {
        case .plain: false
        case .fileSystem: true
        case .leftFileSystem: operations < operationLimit / 4
        }
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
        hasWrittenSuper = true
        let number = model.begin(SuperBlockPattern.granules, isZero: false, at: start)
        SuperBlockPattern.fill(request.buffer, write: number, generation: superGeneration, isLog: isLog)
        let safePoint = model.beginSafePoint(at: start)
        let outcome = await other.run(request)
        world.note(
            "super block \(superGeneration)\(isLog ? " log" : "")\(fua ? " fua" : ""), write \(number) \(outcome)")
        ended(number, safePoint, outcome)
        guard case .done = outcome else { return }
        if options.takeSuperBlocks(since: start) { reached(start, flushSince: fua ? start : nil) }
        // Without FUA a flush follows.
        if !fua, other.isCut || world.chance.one(in: 4) { return }
        if !fua { _ = await flush(other) }
    }

    private func read(_ connection: SimConnection) async {
        let granules = pick(pagesOnly: false)
        let request = SimRequest(
            .read, offset: UInt64(granules.lowerBound) * 256, lengthBytes: granules.count * Pattern.granuleBytes)
        let start = world.nextTick()
        model.beginLook(at: start)
        defer { model.endLook(at: start) }
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

    /// What the server says is a hole, or zeroes, must be what a read may show as zeroes.
    private func status(_ connection: SimConnection) async {
        guard connection.hasContext else { return await read(connection) }
        var granules = pick(pagesOnly: false)
        if world.chance.one(in: 2) {
            let start = world.chance.one(in: 2) ? 0 : granules.lowerBound
            granules = start..<min(start + 1 << 23, UInt32(model.sizeBytes / 256))
        }
        let request = SimRequest(
            .blockStatus, offset: UInt64(granules.lowerBound) * 256,
            lengthBytes: granules.count * Pattern.granuleBytes, onlyOneExtent: world.chance.one(in: 4))
        let start = world.nextTick()
        model.beginLook(at: start)
        defer { model.endLook(at: start) }
        let outcome = await connection.run(request)
        let end = world.nextTick()
        world.note("status of \(granules) \(outcome), \(request.extents.count) extents")
        guard case .done = outcome else { return }
        var at = UInt64(granules.lowerBound) * 256
        for extent in request.extents {
            let range = at..<min(at + UInt64(extent.lengthBytes), UInt64(granules.upperBound) * 256)
            at = range.upperBound
            if extent.flags & 3 == 0 { continue }
            for granule in model.touched(in: UInt32(range.lowerBound / 256)..<UInt32((range.upperBound + 255) / 256))
            where !model.mayShow(0, granule, from: start, to: end) {
                return world.violate(
                    "status \(start)-\(end): granule \(granule) is \(extent.flags & 1 == 0 ? "zeroes" : "a hole"), had \(model.describe(granule))"
                )
            }
        }
    }

    /// Advice, which changes nothing.
    private func cache(_ connection: SimConnection) async {
        let granules = pick(pagesOnly: false)
        let outcome = await connection.run(
            SimRequest(
                .cache, offset: UInt64(granules.lowerBound) * 256, lengthBytes: granules.count * Pattern.granuleBytes))
        world.note("cache \(granules) \(outcome)")
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
        forget()
    }

    /// Whatever is lost, the disk goes back no further than this.
    func forget() { model.forget(before: min(committedTo, max(safeTo, rolledBackAt))) }

    /// Ends every connection as a client does that is done; attaches for it where a server took them away meanwhile.
    func disconnect() async {
        // Whose flush fails has a server that lost its scratch disk, and waits until somebody starts it anew.
        let deadline = world.nowNs + 120_000_000_000
        while world.violation == nil {
            if let connection = live.first, await flush(connection) { break }
            if world.nowNs > deadline { world.violate("\(disk) takes no flush any more, and nothing is wrong") }
            cutAll()
            connections = []
            await attach()
            await world.sleep(1_000_000_000)
        }
        let safePoint = model.beginSafePoint(at: world.nextTick())
        for connection in live { await connection.disconnect(mustHangUp: true) }
        model.endSafePoint(safePoint, at: world.nextTick())
    }

    /// What it waits for, for people.
    var state: String {
        "\(disk): \(operations) operations, \(underWay) under way, \(phase), \(live.count) connections: \(live.map(\.waiting))"
    }
    /// What the client is about, beside its workers, for people.
    var phase = ""

    func cutAll() { for connection in connections { connection.cut() } }

    /// Its host has gone: it comes back later than a short window lasts, mostly.
    func goAway() {
        cutAll()
        awayUntilNs = world.nowNs + world.chance.ns(100_000_000...3_000_000_000)
    }
    func cutOne() { live.randomElement(using: &world.chance)?.cut() }
}
