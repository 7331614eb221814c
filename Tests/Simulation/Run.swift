// One run: a world with a store, two servers and one or two disks, what goes wrong in it, and what is checked throughout.

import BlockCache
import ObjectStore
import Runtime

@testable import Margarine

struct RunReport: Codable {
    var seed: UInt64
    var operations = 0
    var steps: UInt64 = 0
    var virtualMs: UInt64 = 0
    var hash: UInt64 = 0
    var generations = 0
    var attachments = 0
    var rollBacks = 0
    var faults: [String: Int] = [:]
    var collections = 0
    var collected: UInt64 = 0
    var forks = 0
    /// Objects copied to another location.
    var copied: UInt64 = 0
    var violation: Violation?
}

final class Run: @unchecked Sendable {  // as its world
    let world: World
    let store: SimStore
    let observer: Observer
    /// What the store names, object by object.
    let named: Named
    private var shape = ServerShape()
    private(set) var clients: [SimClient] = []
    /// By machine. nil: it is down.
    private var servers: [SimServer?] = []
    /// What lies on each machine's scratch disk, and how often the machine was started.
    private var disks: [(scratch: MemoryScratch, boots: Int)] = []
    /// A server is who has its scratch directory: an empty one makes a new server.
    private var wipes = [0, 0]
    private var home: [Int] = []
    private(set) var heads: [String: Head] = [:]
    private var places: [String: Int] = [:]
    /// What each manifest shows, by the id of its root.
    private(set) var contents: [ObjectID: [UInt32: UInt32]] = [:]
    /// The same, by `GenerationRecord.place`.
    private var shown: [String: [UInt32: UInt32]] = [:]
    // The life of disks (Life.swift). nil: none of it in this world.
    var life: Life?
    private var generations = 0
    private var faults: [String: Int] = [:]
    private(set) var isCalm = false
    private let operations: Int
    private let isHostile: Bool

    init(seed: UInt64, operations: Int, fault: Fault?, trace: Bool) {
        world = World(seed: seed)
        world.isTracing = trace
        self.operations = operations
        store = SimStore(world, locations: world.chance.one(in: 3) ? 2 : 1)
        observer = Observer(store)
        named = Named(observer)
        isHostile = !world.chance.one(in: 8)
        shape.fault = fault
        trustsStoredBytes = fault == .unverifiedSlice
        shape.commitIntervalMs = [20, 200, 2_000].randomElement(using: &world.chance)!
        let isTight = world.chance.one(in: 4)
        if isTight {
            shape.journalPerDiskBytes = 4 << 20
            shape.journalBytes = 6 << 20
            shape.dirtyBytes = 1 << 20
        } else if world.chance.one(in: 2) {
            shape.dirtyBytes = 1 << 20
        }
        shape.cacheBytes = [2 << 20, 4 << 20, 16 << 20].randomElement(using: &world.chance)!
        shape.blockFileBytes = [0, 8 << 20, 64 << 20].randomElement(using: &world.chance)!
        shape.takeover = world.chance.one(in: 3) ? .force : .dead
        shape.network = NetworkShape(&world.chance)
        world.network.isHostile = isHostile
        for machine in 0..<2 {
            servers.append(nil)
            disks.append((makeScratch(), 0))
            _ = machine
        }
        for number in 0..<(world.chance.one(in: 3) ? 2 : 1) { addClient(number, isTight) }
        store.onPut = { [unowned self] sender, location, key, bytes in stored(sender, location, key, bytes) }
        store.onDelete = { [unowned self] sender, location, key in
            if life == nil { world.violate("\(sender) deleted \(key)") }
            world.note("\(sender) deletes \(key)")
            if let violation = named.deleted(location, key) { world.violate("\(sender): \(violation)") }
        }
        // Collection takes time: such a world is slow, and its clients take their time.
        if world.chance.one(in: 2) || Life.faults.contains(where: { $0 == fault }) {
            shape.deadlineMs = 5_000
            shape.beats = true
            life = Life(self, fault: fault)
            for client in clients { life!.slow(client, operations) }
        }
    }

    private static let scratchBytes: UInt64 = 400 << 20

    private func makeScratch() -> MemoryScratch {
        let scratch = MemoryScratch(capacityBytes: Self.scratchBytes, deliver: SimServer.makeDeliver(world))
        scratch.writesInline = world.chance.one(in: 2)
        return scratch
    }

    private func addClient(_ number: Int, _ isTight: Bool) {
        let size = DiskShape.sizes.randomElement(using: &world.chance)!
        var options = DiskOptions()
        options.safePoints = SafePointRule.allCases.randomElement(using: &world.chance)!
        options.durability = Durability.allCases.randomElement(using: &world.chance)!
        options.resumeWindowMs = [0, 300, 60_000].randomElement(using: &world.chance)!
        var client = SimClient.Shape()
        client.workers = 1 + world.chance.below(6)
        client.connections = 1 + world.chance.below(3)
        client.durability = options.durability
        client.anyInstant = isTight
        client.isNamed = !world.chance.one(in: 5)
        client.rule = options.safePoints
        client.isResized = world.chance.one(in: 3)
        let name = "d\(number)"
        client.goesBack = !client.isResized && world.chance.one(in: 2)
        add(
            SimClient(
                world, disk: name, sizeBytes: size, shape: client, operationLimit: operations,
                server: { [unowned self] in servers[home[number]] }))
        let head = Head(
            diskID: ObjectID(high: world.chance.next(), low: world.chance.next()), name: name, sizeBytes: size,
            options: options, createdAtMs: 0)
        heads[name] = head
        let memory = store.memories.randomElement(using: &world.chance)!
        store.net.run { _ = try? await memory.put(Head.key(disk: name), head.encoded(), if: .absent) }
        world.note("disk \(name): \(options.durability), window \(options.resumeWindowMs) ms, \(client)")
    }

    /// The next client, of a disk that is there or about to be.
    private func add(_ client: SimClient) {
        let number = clients.count
        let name = client.disk
        home.append(world.chance.below(2))
        clients.append(client)
        client.owner = { [unowned self] in heads[name]?.owner?.server }
        client.resize = { [unowned self] size, force in await resize(name, to: size, force: force) }
        client.goBack = { [unowned self] in await life?.goBack(client) }
        client.isElsewhere = { [unowned self] in
            guard let owner = heads[name]?.owner else { return false }
            return owner.server != servers[home[number]]?.id
        }
    }

    /// A client for a fork, whose first generation shows `seen`.
    func addClient(ofFork name: String, _ source: SimClient, _ head: Head, seen: [UInt32: UInt32]) {
        let number = clients.count
        let tick = world.nextTick()
        let model = Model(
            forkOf: source.model, sizeBytes: head.sizeBytes, seen: seen, at: tick,
            firstNumber: source.model.numbers + 100_000)
        var shape = source.shape
        shape.isResized = false
        let client = SimClient(
            world, disk: name, sizeBytes: head.sizeBytes, shape: shape, operationLimit: source.operationLimit / 2,
            model: model, server: { [unowned self] in servers[home[number]] })
        client.superGeneration = source.superGeneration
        client.thinkNs = source.thinkNs
        add(client)
        client.start()
    }

    // MARK: What the store sees

    private func stored(_ sender: String, _ location: Int, _ key: String, _ bytes: [UInt8]) {
        var record: GenerationRecord?
        if key.hasPrefix("disks/"), key.contains("/generations/") {
            do { record = try GenerationRecord.decode(bytes, key: key) } catch {
                return world.violate("\(sender): \(error)")
            }
        }
        guard key.hasPrefix("disks/"), key.hasSuffix("/head") else {
            if let violation = named.put(location, key, record) { world.violate("\(sender): \(violation)") }
            return
        }
        let name = String(key.dropFirst(6).dropLast(5))
        let next: Head
        do { next = try Head.decode(bytes, name: name) } catch { return world.violate("\(sender): \(error)") }
        world.note("\(sender) stores head of \(name): epoch \(next.epoch), generation \(next.generation)")
        if let violation = named.put(location, key, next.record) { world.violate("\(sender): \(violation)") }
        // A name that is free is used again at any location, with numbers of that location.
        let isElsewhere = places[name] != location && heads[name]?.deleted == true
        let last = isElsewhere ? nil : heads[name]
        places[name] = location
        heads[name] = next
        // Asked for while the client was there, and done when it was here again.
        for client in clients where client.disk == name && client.isElsewhere() { client.happened(.scratch) }
        if let last {
            if next.epoch < last.epoch || next.generation < last.generation {
                world.violate("\(sender) moved the head of \(name) back")
            }
            if next.epoch == last.epoch, let owner = last.owner, owner.server != sender {
                // To make a disk larger, to pin, to wish and to bring near what is there is all that anybody may do.
                var allowed = last
                allowed.sizeBytes = max(next.sizeBytes, last.sizeBytes)
                allowed.nonce = next.nonce
                allowed.options = next.options
                allowed.commitWanted = next.commitWanted
                for number in last.pinned { allowed.unpin(number) }
                for number in next.pinned { allowed.pin(number) }
                if let record = next.record, record.kind == .localized, record.generation == last.generation + 1 {
                    allowed.advance(to: record)
                }
                if sender != Self.operatorName || next != allowed {
                    world.violate("\(sender) wrote under the epoch of \(owner.server)")
                }
            }
            if next.sizeBytes != last.sizeBytes {
                if sender != Self.operatorName { world.violate("\(sender) changed the size of \(name)") }
                clients.first { $0.disk == name }?.sizeChanged(from: last.sizeBytes, to: next.sizeBytes)
            }
            if ![.resized, .rolledBack, .forked, .received].contains(next.record?.kind),
                next.generation > last.generation,
                next.epoch != last.epoch || next.record?.epoch != next.epoch
            {
                world.violate("\(sender) made a generation of \(name) and an epoch at once")
            }
        }
        if let record = next.record, record.generation > last?.generation ?? 0 {
            generations += 1
            let tick = world.nextTick()
            if [.forked, .rolledBack, .received, .localized].contains(record.kind) {
                again(name, next, record)
            } else if let client = clients.first(where: { $0.disk == name }) {
                switch observer.read(record, client.model.touched) {
                case .failure(let violation): world.violate(violation.description)
                case .success(let seen):
                    if let root = record.root { contents[root.id] = seen }
                    shown[record.place] = seen
                    client.committed(
                        seen, generation: record.generation, anyInstant: record.kind == .journalFull, at: tick)
                }
            }
        }
    }

    /// A generation that equals another one, of the same disk or of the one that it was forked from.
    private func again(_ name: String, _ head: Head, _ record: GenerationRecord) {
        var seen: [UInt32: UInt32] = [:]
        if record.kind == .received || record.kind == .localized {
            // Of objects of its own.
            guard let known = shown[record.origin!.place] else {
                return world.violate("\(name) shows what no generation was")
            }
            seen = known
            if let root = record.root { contents[root.id] = seen }
        } else if let root = record.root {
            guard let known = contents[root.id] else {
                return world.violate("\(name) begins as what no generation was")
            }
            seen = known
        }
        shown[record.place] = seen
        switch observer.read(record, seen.keys.sorted()) {
        case .failure(let violation): world.violate(violation.description)
        case .success(let found): if found != seen { world.violate("\(name) is not as \(record.origin!.disk) was") }
        }
        if record.kind == .rolledBack { clients.first { $0.disk == name }?.wentBack(to: seen) }
        if record.kind == .forked, let source = clients.first(where: { $0.disk == record.origin!.disk }),
            life!.wantsClient(name)
        {
            addClient(ofFork: name, source, head, seen: seen)
        }
    }

    // MARK: Whoever looks after the disks

    static let operatorName = "operator"
    private lazy var operatorClock = world.makeClock(Self.operatorName)

    func catalog() -> Catalog {
        let environment = SimEnvironment(world, operatorClock)
        let buckets = store.memories.indices.map { number in
            let bucket = SimBucket(world, store, sender: Self.operatorName, location: number)
            bucket.faults.loseAnswer = 20
            bucket.faults.failBefore = 20
            if life != nil { bucket.faults.slow = 6 }
            return bucket
        }
        let opened = store.open(
            buckets, environment, near: UInt8(world.chance.below(buckets.count)), deadlineMs: shape.deadlineMs)
        return Catalog(opened, process: { [shape] _ in shape.beats ? .outOfSight : .gone })
    }

    private func resize(_ disk: String, to sizeBytes: UInt64, force: Bool) async {
        do throws(CatalogError) {
            _ = try await catalog().resize(disk, to: sizeBytes, shrink: true, force: force)
            world.note("\(disk) has \(sizeBytes) bytes")
        } catch {
            world.note("\(disk) can't have \(sizeBytes) bytes: \(error.kind)")
        }
    }

    private func grow(_ client: SimClient) {
        guard client.shape.isResized, let now = heads[client.disk]?.sizeBytes,
            let size = DiskShape.sizes.filter({ $0 > now }).randomElement(using: &world.chance)
        else { return }
        count("growth of a disk")
        store.net.run { [self] in
            do throws(CatalogError) { _ = try await catalog().resize(client.disk, to: size) } catch {
                world.note("\(client.disk) can't grow: \(error.kind)")
            }
        }
    }

    // MARK: Servers

    func anyServer(using chance: inout Chance) -> SimServer? {
        servers.compactMap { $0 }.randomElement(using: &chance)
    }

    private func start(_ machine: Int) {
        guard servers[machine] == nil else { return }
        let (scratch, boots) = disks[machine]
        servers[machine] = SimServer(
            world, store, id: "m\(machine).\(wipes[machine])", scratch: scratch, bootID: "boot \(boots)",
            shape: shape,
            near: UInt8(machine % store.memories.count),
            isAlive: { [unowned self] id in
                // A heartbeat tells little: one that lives may look dead for a while.
                guard let server = servers.first(where: { $0?.id == id }), server != nil else { return false }
                return !world.chance.one(in: 20)
            })
        world.note("m\(machine) starts, boot \(boots)")
    }

    /// What the machine's scratch disk is once its server was killed.
    private func stop(_ machine: Int, _ loss: Loss) {
        guard let server = servers[machine] else { return }
        server.kill()
        servers[machine] = nil
        let left: MemoryScratch
        switch loss {
        case .window: left = server.scratch.kill()
        case .power: left = server.scratch.powerCut(random: &world.chance)
        case .scratch:
            left = makeScratch()
            wipes[machine] += 1
        }
        left.writesInline = world.chance.one(in: 2)
        disks[machine] = (left, disks[machine].boots + (loss == .power ? 1 : 0))
        for (number, client) in clients.enumerated() where home[number] == machine { client.happened(loss) }
    }

    // MARK: What goes wrong

    func count(_ what: String) {
        faults[what, default: 0] += 1
        world.note("fault: \(what)")
    }

    private func trouble() {
        guard !isCalm, world.violation == nil else { return }
        defer {
            world.after(world.chance.ns(1_000_000...(life == nil ? 400_000_000 : 16_000_000_000))) { [self] in trouble()
            }
        }
        let machine = world.chance.below(2)
        let client = clients.randomElement(using: &world.chance)!
        switch world.chance.below(100) {
        case 0..<20:
            count("cut of a connection")
            client.cutOne()
        case 20..<32:
            count("cut of all connections")
            client.cutAll()
        case 32..<46: restart(machine, .window, "kill")
        case 46..<56: restart(machine, .power, "loss of power")
        case 56..<60: restart(machine, .scratch, "loss of the scratch disk")
        case 60..<66: move(world.chance.below(clients.count))
        case 66..<68: grow(client)
        case 68..<74:
            guard let bucket = servers[machine]?.buckets.randomElement(using: &world.chance), !bucket.faults.isDown
            else { return }
            count("outage of the store")
            bucket.faults.isDown = true
            world.after(world.chance.ns(10_000_000...20_000_000_000)) { bucket.faults.isDown = false }
        case 74..<84:
            guard let bucket = servers[machine]?.buckets.randomElement(using: &world.chance) else { return }
            count("a bad way to the store")
            bucket.faults = randomFaults()
        case 84..<90:
            guard let server = servers[machine] else { return }
            count("jump of a wall clock")
            server.environment.wallOffsetMs += Int64(world.chance.below(7_200_000)) - 3_600_000
        case 90..<95:
            guard let server = servers[machine] else { return }
            count("full scratch disk")
            server.scratch.failNext(.write, errno: 28)
        case 95..<98:
            guard let server = servers[machine],
                let file = (try? server.scratch.list("blocks"))?.randomElement(using: &world.chance),
                let size = server.scratch.contents("blocks/\(file)")?.count, size > 0
            else { return }
            count("bit rot in a block file")
            server.scratch.flipBit("blocks/\(file)", at: UInt64(world.chance.below(size)))
        default:
            guard let server = servers[machine] else { return }
            count("failing scratch disk")
            server.scratch.failNext(world.chance.one(in: 2) ? .sync : .write, errno: 5)
            // Whoever runs it sees that, and starts it anew.
            world.after(2_000_000_000) { [self] in restart(machine, .window, "kill") }
        }
    }

    func randomFaults() -> StoreFaults {
        var faults = StoreFaults()
        func rate() -> Int { [0, 0, 8, 30].randomElement(using: &world.chance)! }
        faults.failBefore = rate()
        faults.loseAnswer = rate()
        faults.corrupt = rate()
        faults.truncate = rate()
        faults.slow = rate()
        return faults
    }

    private func restart(_ machine: Int, _ loss: Loss, _ what: String) {
        guard servers[machine] != nil else { return }
        count(what)
        stop(machine, loss)
        world.after(world.chance.ns(1_000_000...3_000_000_000)) { [self] in start(machine) }
    }

    /// A client goes to the other server. What the first one has not committed is lost to it.
    private func move(_ number: Int) {
        count("move to another server")
        clients[number].cutAll()
        clients[number].happened(.scratch)
        home[number] = 1 - home[number]
    }

    // MARK: The run

    func report() -> RunReport {
        for machine in 0..<2 { start(machine) }
        for client in clients { client.start() }
        if isHostile { world.after(50_000_000) { [self] in trouble() } }
        life?.begin(isHostile: isHostile)
        while world.violation == nil, !clients.allSatisfy({ $0.isDone }) {
            guard world.step() else {
                world.violate("nothing happens any more")
                break
            }
            if world.steps % 256 == 0 { checkBounds() }
            if !isCalm, world.nowNs > 3_000_000_000_000 || clients.allSatisfy({ $0.operations * 10 > operations * 9 }) {
                calmDown()
            }
            if isCalm, world.nowNs > calmAtNs + 600_000_000_000 {
                world.violate(
                    "no progress in 600 s without faults: \(clients.map(\.state)), \(servers.map { $0?.state ?? "down" })"
                )
            }
        }
        if !isCalm { calmDown() }
        if world.violation == nil { finish() }
        var report = RunReport(seed: world.seed)
        report.operations = clients.reduce(0) { $0 + $1.operations }
        report.steps = world.steps
        report.virtualMs = world.nowNs / 1_000_000
        report.hash = world.hash
        report.generations = generations
        report.attachments = clients.reduce(0) { $0 + $1.attachments }
        report.rollBacks = clients.reduce(0) { $0 + $1.rollBacks }
        report.faults = faults
        life?.add(to: &report)
        report.violation = world.violation
        for server in servers { server?.kill() }
        return report
    }

    private var calmAtNs: UInt64 = 0

    /// From here on nothing goes wrong any more, and everything must come to an end.
    private func calmDown() {
        isCalm = true
        calmAtNs = world.nowNs
        world.note("calm")
        for machine in 0..<2 { world.after(4_000_000_000) { [self] in start(machine) } }
        for server in servers { for bucket in server?.buckets ?? [] { bucket.faults = StoreFaults() } }
        life?.calmDown()
        world.network.isHostile = false
        shape.takeover = .force
    }

    private func checkBounds() {
        for case let server? in servers {
            let arena = server.context.arena
            if arena.inUse > arena.capacity { world.violate("\(server.id) holds \(arena.inUse) dirty pages") }
            let journals = server.context.journals
            if journals.usedBytes > journals.limitBytes + (2 << 20) {
                world.violate("\(server.id) holds \(journals.usedBytes) bytes of journals")
            }
            // Journals, block files, a block that comes while another one goes, and room for the journals' next segments.
            let used = Self.scratchBytes - ((try? server.scratch.freeBytes()) ?? 0)
            if used > journals.limitBytes + shape.blockFileBytes + (48 << 20) {
                world.violate("\(server.id) holds \(used) bytes on scratch")
            }
        }
    }

    /// Clients end cleanly; then the last generation holds everything.
    private func finish() {
        let done = Flag()
        store.net.run { [self] in
            for client in clients { await client.disconnect() }
            done.isSet = true
        }
        let deadline = world.nowNs + 300_000_000_000
        while world.violation == nil, world.nowNs < deadline, world.step() {
            if done.isSet, servers.allSatisfy({ $0?.connectionCount ?? 0 == 0 }),
                clients.allSatisfy({ isCommitted($0) })
            {
                return life?.finish() ?? ()
            }
        }
        if world.violation == nil { world.violate("what clients left behind cleanly was not committed in 300 s") }
    }

    private final class Flag: @unchecked Sendable {  // as its world
        var isSet = false
    }

    private func isCommitted(_ client: SimClient) -> Bool {
        guard let head = heads[client.disk], head.owner == nil, head.session == nil else { return false }
        let end = UInt32(client.model.sizeBytes / UInt64(Pattern.granuleBytes))
        let touched = client.model.touched.filter { $0 < end }
        var seen = Dictionary(uniqueKeysWithValues: touched.map { ($0, UInt32(0)) })
        if let record = head.record {
            guard case .success(let stored) = observer.read(record, touched) else { return false }
            seen = stored
        }
        let now = world.tick
        for (granule, value) in seen.sorted(by: { $0.key < $1.key })
        where !client.model.mayShow(value, granule, from: now, to: now) {
            world.violate(
                "at the end granule \(granule) of \(client.disk) shows \(value), had \(client.model.describe(granule))")
        }
        return true
    }
}

extension GenerationRecord {
    /// Names the generation among all of a world.
    fileprivate var place: String { "\(diskID)@\(generation)" }
}

extension GenerationRecord.Origin {
    fileprivate var place: String { "\(diskID)@\(generation)" }
}
