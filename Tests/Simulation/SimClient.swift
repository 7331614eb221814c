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

final class SimClient: @unchecked Sendable {  // as its world
    struct Shape {
        var workers = 4
        var connections = 2
        var durability = Durability.scratch
        /// Safe points may come at any instant, when a journal is full.
        var anyInstant = false
        var isNamed = true
    }

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
    private var isAttaching = false
    private var paused = 0
    private(set) var busyWorkers = 0
    private(set) var operations = 0
    private(set) var attachments = 0
    private(set) var rollBacks = 0
    let operationLimit: Int

    // What must have survived.
    private var loss = Loss.window
    /// Everything acknowledged before this is flushed.
    private var flushedTo: UInt64 = 0
    /// The same for the generation in the store.
    private(set) var committedTo: UInt64 = 0

    init(
        _ world: World, disk: String, sizeBytes: UInt64, shape: Shape, operationLimit: Int,
        server: @escaping () -> SimServer?
    ) {
        self.world = world
        self.disk = disk
        self.shape = shape
        self.server = server
        self.operationLimit = operationLimit
        model = Model(sizeBytes: sizeBytes)
        loop = world.makeClock("client-\(disk)").makeLoop("client-\(disk)")
    }

    func start() {
        busyWorkers = shape.workers
        loop.run { [self] in await attachments() }
        for _ in 0..<shape.workers { loop.run { [self] in await work() } }
    }

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
            if connections.count < shape.connections, connections.isEmpty || world.chance.one(in: 4) {
                await attach()
            }
            await world.sleep(world.chance.ns(100_000...30_000_000))
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
            attachments += 1
            let before = world.nextTick()
            if isFirst, !(await verify(connection, before)) {
                if !connection.isCut { connection.cut() }
                return
            }
            world.note("attached \(export) at \(server.id)")
            connections.append(connection)
        }
    }

    private func handshake(_ server: SimServer, _ export: String) async -> Result<SimConnection, AttachError> {
        // A server that dies never answers.
        await withCheckedContinuation { continuation in
            let once = Once<Result<SimConnection, AttachError>>(continuation)
            world.after(40_000_000_000) { once.finish(.failure(AttachError(.unavailable, "no answer"))) }
            server.loop.run { [world, loop] in
                do throws(AttachError) {
                    let attached = try await server.manager.attach(
                        export, client: ClientIdentity(address: "client:1", host: "client"))
                    let connection = SimConnection(world, server, attached)
                    let error = await connection.join()
                    loop.post {
                        if !once.finish(error.map { .failure($0) } ?? .success(connection)) { connection.cut() }
                    }
                } catch { loop.post { once.finish(.failure(error)) } }
            }
        }
    }

    /// Waits until no worker has anything under way; they wait until `paused` is 0 again.
    private func quiesce() async {
        paused = 1
        while underWay > 0 { await world.sleep(100_000) }
    }
    private var underWay = 0

    /// The disk as it is after it was away: what the session must find, or what a loss may have left.
    private func verify(_ connection: SimConnection, _ before: UInt64) async -> Bool {
        guard let seen = await read(model.touched, connection), connection.server === server() else { return false }
        let now = world.nextTick()
        for write in abandoned { model.settle(write, at: before - 1) }
        abandoned = []
        let lost = seen.sorted { $0.key < $1.key }.first { !model.mayShow($0.value, $0.key, from: before, to: now) }
        // A session that was declared lost leaves what its last safe point holds, and nothing else.
        let mustBeSafe = shape.isNamed && attachedSession != nil && attachedSession != session
        if lost == nil, !mustBeSafe {
            model.observe(seen, at: now)
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
        case (.window, _): floor = max(flushedTo, rolledBackAt)
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
        model.observe(seen, at: now)
        model.addSafePoint(at: now)
        rolledBackAt = now
        if instants.ranges.last!.upperBound < flushedTo { flushedTo = committedTo }
        isResumed()
        return true
    }

    private func isResumed() {
        loss = .window
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
                await world.sleep(world.chance.ns(50_000...2_000_000))
                continue
            }
            operations += 1
            underWay += 1
            await operate(connection)
            underWay -= 1
            if world.chance.one(in: 8) { await world.sleep(world.chance.ns(10_000...5_000_000)) }
        }
        busyWorkers -= 1
    }

    private func operate(_ connection: SimConnection) async {
        switch world.chance.below(100) {
        case 0..<55: await write(connection, .write)
        case 55..<80: await read(connection)
        case 80..<88: await flush(connection)
        case 88..<94: await write(connection, .trim)
        default: await write(connection, .writeZeroes)
        }
    }

    /// Some granules, mostly where others are too, and where slices, blocks and the disk end.
    private func pick(pagesOnly: Bool) -> Range<UInt32> {
        let size = UInt32(model.sizeBytes / 256)
        let zones: [UInt32] = [0, 2048 - 64, 65_536 - 96, 65_536 * 2 - 32, size - 256, 5000]
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
        start = min(start, size - 16)
        return start..<min(size, start + UInt32(count))
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
        let safePoint = fua ? model.beginSafePoint(at: start) : nil
        let outcome = await connection.run(request)
        let end = world.nextTick()
        world.note("\(kind) \(number) \(granules)\(fua ? " fua" : "") \(outcome)")
        switch outcome {
        case .done:
            model.acknowledge(number, at: end)
            if let safePoint {
                model.endSafePoint(safePoint, at: end)
                flushedTo = max(flushedTo, start)
            }
        case .failed, .cut:
            // Neither done nor undone; the connection can't be trusted with an order after that.
            model.abandon(number)
            abandoned.append(number)
        }
    }

    private func flush(_ connection: SimConnection) async {
        let start = world.nextTick()
        let safePoint = model.beginSafePoint(at: start)
        let outcome = await connection.run(SimRequest(.flush))
        world.note("flush \(outcome)")
        if case .done = outcome {
            model.endSafePoint(safePoint, at: world.nextTick())
            flushedTo = max(flushedTo, start)
        }
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
        while live.isEmpty, world.violation == nil {
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

/// A continuation that several may want to resume; the first does.
final class Once<T: Sendable>: @unchecked Sendable {  // as its world
    private var continuation: CheckedContinuation<T, Never>?
    init(_ continuation: CheckedContinuation<T, Never>) { self.continuation = continuation }
    /// false: it was resumed before.
    @discardableResult
    func finish(_ value: T) -> Bool {
        guard let waiting = continuation.take() else { return false }
        waiting.resume(returning: value)
        return true
    }
}
