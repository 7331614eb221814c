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
    private(set) var shape = ServerShape()
    private(set) var clients: [SimClient] = []
    /// By machine. nil: it is down.
    private(set) var servers: [SimServer?] = []
    /// What lies on each machine's scratch disk, and how often the machine was started.
    private var disks: [(scratch: MemoryScratch, boots: Int)] = []
    /// A server is who has its scratch directory: an empty one makes a new server.
    private var wipes = [0, 0]
    /// Of each machine, on its way to the store.
    let obstacles: [Obstacles]
    /// Of each client.
    var home: [Int] = []
    private(set) var heads: [String: Head] = [:]
    private var places: [String: Int] = [:]
    /// When a disk was last taken from its owner by force: he may go on until he renews his record.
    private(set) var robbedNs: [String: UInt64] = [:]
    /// What each manifest shows, by the id of its root.
    private(set) var contents: [ObjectID: [UInt32: UInt32]] = [:]
    /// The same, by `GenerationRecord.place`.
    private var shown: [String: [UInt32: UInt32]] = [:]
    // The life of disks (Life.swift). nil: none of it in this world.
    var life: Life?
    private var generations = 0
    var faults: [String: Int] = [:]
    /// Kinds of trouble that are left out.
    let without: Set<Trouble>
    private let changesOptions: Bool
    /// All begin at one server.
    private let isGathered: Bool
    /// The longest time from one trouble to the next.
    private(set) var longestPeaceNs: UInt64 = 16_000_000_000
    private(set) var isCalm = false
    /// A server whose scratch disk failed before is started anew. If its client had just ended, its session may stay in the head:
    /// it has lost nothing, and may go on.
    var isKilledInCalm = false
    /// No other trouble begins before: several disks are brought where they must be for one that is rare.
    var quietUntilNs: UInt64 = 0
    /// How often that was done.
    var stages = 0
    /// Servers find no manifest page in memory that they had before.
    var isForgetful = false
    private let operations: Int
    private let isHostile: Bool

    init(seed: UInt64, operations: Int, fault: Fault?, trace: Bool, without: Set<Trouble> = []) {
        let world = World(seed: seed)
        self.world = world
        world.isTracing = trace
        self.without = without
        obstacles = [Obstacles(world), Obstacles(world)]
        changesOptions = world.chance.one(in: 3)
        let isTight = world.chance.one(in: 4)
        // In tight worlds disks are in each other's way.
        let counts = isTight ? [1, 2, 2, 2, 3, 4] : [1, 1, 1, 2, 2, 3, 4]
        let count = counts.randomElement(using: &world.chance)!
        isGathered = isTight && !world.chance.one(in: 4)
        // All disks together have as much to do as one and a half alone.
        self.operations = count < 2 ? operations : operations * 3 / (2 * count)
        store = SimStore(world, locations: world.chance.one(in: 3) ? 2 : 1)
        observer = Observer(store)
        named = Named(observer)
        isHostile = !world.chance.one(in: 8)
        if isHostile, !without.contains(.widening) { world.widening = Widening.random(&world.chance) }
        shape.latencyNs = [8_000_000, 8_000_000, 8_000_000, 60_000_000].randomElement(using: &world.chance)!
        // With the least, a page stays until the next one comes.
        shape.manifestBytes = [0, 32 << 10, 4 << 20].randomElement(using: &world.chance)!
        // Where much goes wrong, nothing of it goes far.
        longestPeaceNs = [300, 1_500, 6_000, 20_000].randomElement(using: &world.chance)! * 1_000_000
        shape.loops = [1, 1, 2, 3].randomElement(using: &world.chance)!
        shape.releaseAfterMs = [30, 300, 5_000, 5_000].randomElement(using: &world.chance)!
        shape.fault = fault
        trustsStoredBytes = fault == .unverifiedSlice
        shape.commitIntervalMs = [20, 200, 2_000].randomElement(using: &world.chance)!
        shape.isTight = isTight
        if isTight {
            shape.journalPerDiskBytes = 4 << 20
            // With the least of them, whoever writes asks the others for room.
            shape.journalBytes = world.chance.one(in: 3) ? 6 << 20 : 2 << 20
            shape.dirtyBytes = world.chance.one(in: 2) ? 2 << 20 : 1 << 20
        } else if world.chance.one(in: 2) {
            shape.dirtyBytes = 1 << 20
        } else if world.chance.one(in: 3) {
            // Many segments.
            shape.journalPerDiskBytes = 16 << 20
            shape.journalBytes = 24 << 20
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
        for number in 0..<count { addClient(number, isTight) }
        // No room for the pages on the way to one block: nothing would ever be found there.
        let isDeep = clients.contains { $0.shape.isResized || $0.model.sizeBytes > 8 << 30 }
        if isDeep { shape.manifestBytes = max(shape.manifestBytes, 32 << 10) }
        store.onPut = { [unowned self] sender, location, key, bytes in stored(sender, location, key, bytes) }
        store.onDelete = { [unowned self] sender, location, key in
            if life == nil { world.violate("\(sender) deleted \(key)") }
            world.note("\(sender) deletes \(key)")
            if let violation = named.deleted(location, key) { world.violate("\(sender): \(violation)") }
        }
        // In some worlds clients take their time, and more happens to them than they do.
        if world.chance.one(in: 3) {
            let ns = world.chance.ns(10_000_000_000...60_000_000_000)
            for client in clients { client.takeTime(ns) }
        }
        // Collection takes time: such a world is slow.
        if world.chance.one(in: 8) || Life.faults.contains(where: { $0 == fault }) {
            shape.deadlineMs = 5_000
            life = Life(self, fault: fault)
            longestPeaceNs = 16_000_000_000
            for client in clients { client.takeTime(Life.durationNs) }
        }
    }

    static let scratchBytes: UInt64 = 400 << 20

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
        options.resumeWindowMs = (isTight ? [0, 300, 300, 60_000] : [0, 300, 60_000])
            .randomElement(using: &world.chance)!
        var client = SimClient.Shape()
        client.workers = 1 + world.chance.below(6)
        client.connections = 1 + world.chance.below(3)
        client.anyInstant = isTight
        client.isNamed = !world.chance.one(in: isTight ? 6 : 3)
        client.isLazy = world.chance.one(in: isTight ? 2 : 4)
        client.content =
            switch options.safePoints {
            case .flush: .plain
            case .btrfs: .fileSystem
            case .auto: [.plain, .fileSystem, .leftFileSystem].randomElement(using: &world.chance)!
            }
        client.isResized = world.chance.one(in: 3)
        let name = "d\(number)"
        client.goesBack = !client.isResized && world.chance.one(in: 2)
        add(
            SimClient(
                world, disk: name, sizeBytes: size, shape: client, options: options, operationLimit: operations,
                server: { [unowned self] in servers[home[number]] }))
        let head = Head(
            diskID: ObjectID(high: world.chance.next(), low: world.chance.next()), name: name, sizeBytes: size,
            options: options, createdAtMs: 0)
        heads[name] = head
        let memory = store.memories.randomElement(using: &world.chance)!
        store.net.run { _ = try? await memory.put(Head.key(disk: name), head.encoded(), if: .absent) }
        world.note(
            "disk \(name): \(options.safePoints), \(options.durability), window \(options.resumeWindowMs) ms, \(client)"
        )
    }

    /// The next client, of a disk that is there or about to be.
    private func add(_ client: SimClient) {
        let number = clients.count
        let name = client.disk
        home.append(isGathered ? 0 : world.chance.below(2))
        clients.append(client)
        client.isHostile = isHostile
        client.options.changesRule = changesOptions
        client.options.leavesAutoOut = without.contains(.staleSuperBlock)
        client.releaseAfterMs = shape.releaseAfterMs
        client.without = without
        client.slowDown = { [unowned self] in slowDown(number) }
        client.hinder = { [unowned self] in hinder(number) }
        client.count = { [unowned self] in count($0) }
        client.owner = { [unowned self] in heads[name]?.owner?.server }
        client.resize = { [unowned self] size, force in await resize(name, to: size, force: force) }
        client.goBack = { [unowned self] in await life?.goBack(client) }
        client.isElsewhere = { [unowned self] in
            guard let owner = heads[name]?.owner else { return false }
            return owner.server != servers[home[number]]?.id
        }
    }

    /// A client for a fork, whose first generation shows `seen`.
    private func addClient(ofFork name: String, _ source: SimClient, _ head: Head, seen: [UInt32: UInt32]) {
        let number = clients.count
        let model = Model(
            forkOf: source.model, sizeBytes: head.sizeBytes, seen: seen, at: world.nextTick(),
            firstNumber: source.model.numbers + 100_000)
        var shape = source.shape
        shape.isResized = false
        let client = SimClient(
            world, disk: name, sizeBytes: head.sizeBytes, shape: shape, options: head.options,
            operationLimit: source.operationLimit / 2, model: model, server: { [unowned self] in servers[home[number]] }
        )
        client.superGeneration = source.superGeneration
        client.thinkNs = source.thinkNs
        add(client)
        client.start()
    }

    // MARK: What the store sees

    private func stored(_ sender: String, _ location: Int, _ key: String, _ bytes: [UInt8]) {
        if key.hasPrefix("servers/") { fenced(sender, location, String(key.dropFirst(8)), bytes) }
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
        if let client = clients.first(where: { $0.disk == name }) {
            let isOwners = sender != Self.operatorName
            client.options.stored(next.options, isAdopted: isOwners, at: world.nextTick())
            if isOwners { client.deaths.headWasStored() }
            if !isOwners, next.epoch != last?.epoch { client.deaths.wasTaken = true }
        }
        // Asked for while the client was there, and done when it was here again.
        for client in clients where client.disk == name && client.isElsewhere() { client.happened(.scratch) }
        if let last {
            if sender == Self.operatorName, last.owner != nil, next.epoch != last.epoch { robbedNs[name] = world.nowNs }
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
                    // Of another size it shows what the one before showed.
                    if record.kind != .resized { client.isAtAnyInstant = record.kind == .journalFull }
                    client.committed(
                        seen, generation: record.generation, anyInstant: client.isAtAnyInstant, at: tick)
                }
            }
        }
    }

    /// Nobody declares a server dead that lives, and whose way to its record is good.
    private func fenced(_ sender: String, _ location: Int, _ id: String, _ bytes: [UInt8]) {
        let record = try? ControlObject.open(
            ServerRecord.self, bytes, kind: "server", format: ServerRecord.format, what: "the record of \(id)")
        guard let record else { return world.violate("\(sender) spoiled the record of \(id)") }
        if sender != id, record.fencedBy == nil, record.taken.isEmpty {
            world.violate("\(sender) renewed the record of \(id)")
        }
        guard record.fencedBy != nil else { return }
        count("a server that counts as dead")
        if let server = servers.compactMap({ $0 }).first(where: { $0.id == id }), server.couldRenew(at: location) {
            world.violate("\(sender) declared \(id) dead, which lives and could say so")
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
            life!.whenMade(name) { [self] in addClient(ofFork: name, source, head, seen: seen) }
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
        return Catalog(opened, process: { _ in .outOfSight })
    }

    private func resize(_ disk: String, to sizeBytes: UInt64, force: Bool) async {
        do throws(CatalogError) {
            _ = try await catalog().resize(disk, to: sizeBytes, shrink: true, force: force)
            world.note("\(disk) has \(sizeBytes) bytes")
        } catch {
            world.note("\(disk) can't have \(sizeBytes) bytes: \(error.kind)")
        }
    }

    func grow(_ client: SimClient) {
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

    func start(_ machine: Int) {
        guard servers[machine] == nil else { return }
        let (scratch, boots) = disks[machine]
        servers[machine] = SimServer(
            world, store, id: "m\(machine).\(wipes[machine])", scratch: scratch, bootID: "boot \(boots)", shape: shape,
            near: UInt8(machine % store.memories.count), obstacles: obstacles[machine])
        world.note("m\(machine) starts, boot \(boots)")
    }

    /// What the machine's scratch disk is once its server was killed.
    func stop(_ machine: Int, _ loss: Loss) {
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

    // MARK: The run

    func report() -> RunReport {
        for machine in 0..<2 { start(machine) }
        for client in clients { client.start() }
        if isHostile { world.after(world.chance.ns(1_000_000...longestPeaceNs)) { [self] in trouble() } }
        if changesOptions, !without.contains(.options) { changeOptions() }
        life?.begin(isHostile: isHostile)
        while world.violation == nil, !clients.allSatisfy({ $0.isDone }) {
            guard world.step() else {
                world.violate("nothing happens any more")
                break
            }
            if world.steps % 256 == 0 { checkBounds() }
            if !isCalm,
                world.nowNs > (life == nil ? 100 : 3_000) * 1_000_000_000
                    || clients.allSatisfy({ $0.operations * 10 > operations * 9 })
            {
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
        for obstacle in obstacles { obstacle.removeAll() }
        for server in servers {
            for bucket in server?.buckets ?? [] { bucket.faults = StoreFaults() }
            server?.goOn()
            server?.scratch.fail(.open, errno: nil)
            isForgetful = false
            server?.scratch.fail(.write, errno: nil)
        }
        for client in clients { (client.isHostile, client.thinkNs) = (false, 0) }
        world.widening = nil
        life?.calmDown()
        world.network.isHostile = false
        shape.takeover = .force
    }

    /// Clients end cleanly; then the last generation holds everything.
    private func finish() {
        let done = Flag()
        store.net.run { [self] in
            for client in clients { await client.disconnect() }
            done.isSet = true
        }
        let deadline = world.nowNs + 300_000_000_000
        var isOver = false
        while world.violation == nil, world.nowNs < deadline, !isOver, world.step() {
            isOver =
                world.steps % 32 == 0 && done.isSet && servers.allSatisfy { $0?.connectionCount ?? 0 == 0 }
                && clients.allSatisfy { isCommitted($0) }
        }
        if world.violation == nil, !isOver {
            return world.violate(
                "what clients left behind cleanly was not committed, and the disks given back, in 300 s: \(unfinished)"
            )
        }
        comeToRest()
        life?.finish()
    }

    /// What heads and servers say in the end, for people.
    private var unfinished: String {
        let states = servers.map { $0.map { "\($0.state), \($0.connectionCount) connections" } ?? "down" }
        let disks = clients.map { client in
            guard let head = heads[client.disk] else { return "\(client.disk) has no head" }
            let (owner, session) = (head.owner.map { "\($0)" }, head.session.map { "\($0)" })
            return "\(client.disk) has owner \(owner ?? "none"), session \(session ?? "none")"
        }
        return (states + disks).joined(separator: "; ")
    }

    /// Nobody uses anything any more: then servers hold nothing.
    private func comeToRest() {
        if without.contains(.leftovers) { return }
        let deadline = world.nowNs + 120_000_000_000
        func isBusy() -> Bool { servers.contains { $0?.leftover != nil } }
        while world.violation == nil, world.nowNs < deadline, world.steps % 32 != 0 || isBusy(), world.step() {}
        for case let server? in servers {
            guard world.violation == nil, let left = server.leftover else { continue }
            world.violate("\(server.id) holds \(left), and nobody uses it")
        }
    }

    private final class Flag: @unchecked Sendable {  // as its world
        var isSet = false
    }

    private func isCommitted(_ client: SimClient) -> Bool {
        guard let head = heads[client.disk], head.owner == nil, head.session == nil || isKilledInCalm else {
            return false
        }
        if foundCommitted[client.disk] == head { return true }
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
        foundCommitted[client.disk] = head
        return true
    }
    /// By disk: what was looked at in the end, and held everything.
    private var foundCommitted: [String: Head] = [:]
}

extension GenerationRecord {
    /// Names the generation among all of a world.
    fileprivate var place: String { "\(diskID)@\(generation)" }
}

extension GenerationRecord.Origin {
    fileprivate var place: String { "\(diskID)@\(generation)" }
}
