// One connection of a client to a disk: an NBD client at one end of the simulated network, at whose other end a server has
// its own code. It is cut at any byte, and either end may not know of it for a while.

import Runtime

@testable import Margarine

/// A request, its memory, and what came of it.
final class SimRequest: @unchecked Sendable {  // as its world
    /// `failed`: with the error value of the reply.
    enum Outcome: Sendable { case done, failed(UInt32), cut }

    let kind: DeviceRequest.Kind
    let offset: UInt64
    let lengthBytes: Int
    let fua: Bool
    let onlyOneExtent: Bool
    /// A run of equal status, as the wire says it.
    struct Extent: Sendable {
        var lengthBytes: Int
        var flags: UInt32
    }
    /// The answer to BLOCK_STATUS.
    var extents: [Extent] = []
    let buffer: UnsafeMutableRawPointer
    fileprivate var continuation: CheckedContinuation<Outcome, Never>?

    init(
        _ kind: DeviceRequest.Kind, offset: UInt64 = 0, lengthBytes: Int = 0, fua: Bool = false,
        onlyOneExtent: Bool = false
    ) {
        self.kind = kind
        self.onlyOneExtent = onlyOneExtent
        self.offset = offset
        self.lengthBytes = lengthBytes
        self.fua = fua
        let holdsBytes = kind == .read || kind == .write
        buffer = .allocate(byteCount: holdsBytes ? max(lengthBytes, 8) : 8, alignment: 16)
    }
    deinit { buffer.deallocate() }

    fileprivate func finish(_ outcome: Outcome) {
        continuation?.resume(returning: outcome)
        continuation = nil
    }
}

final class SimConnection: @unchecked Sendable {  // as its world
    private let world: World
    let server: SimServer
    private let client: NBDClient
    private var wire: SimWire!
    /// Sent and not answered, in order.
    private var outstanding: [(cookie: UInt64, request: SimRequest)] = []
    private var attaching: CheckedContinuation<AttachError?, Never>?
    private var leaving: CheckedContinuation<Void, Never>?
    private(set) var isCut = false
    /// The server itself has refused it.
    private(set) var wasRefused = false

    /// - Parameter host: where the client is.
    init(_ world: World, _ server: SimServer, host: String = "client") {
        self.world = world
        self.server = server
        client = NBDClient(&world.chance)
        wire = SimWire(
            world, server, host: host, received: { [weak self] in self?.receive($0) },
            ended: { [weak self] in self?.hungUp() })
        server.connections.removeAll { $0.isOver }
        server.connections.append(self)
    }

    /// Nothing is left of it at either end.
    private var isOver: Bool { isCut && wire.isClosed }
    /// The size of the export, as the server told it.
    var sizeBytes: UInt64 { client.sizeBytes }
    /// Whether it may ask for the status of blocks.
    var hasContext: Bool { client.hasContext }

    // MARK: What the client does

    /// The handshake. nil: the export is attached.
    func attach(_ export: String) async -> AttachError? {
        await withCheckedContinuation { continuation in
            attaching = continuation
            client.begin(export)
            if !server.isAlive { wire.serverDied() }
            // A server that dies never answers.
            world.after(40_000_000_000) { [weak self] in self?.attached(AttachError(.unavailable, "no answer")) }
            if world.network.isHostile, world.chance.one(in: 24) {
                world.after(world.chance.ns(0...2_000_000)) { [weak self] in
                    self?.attached(AttachError(.unavailable, "cut within the handshake"))
                }
            }
        }
    }

    private func attached(_ error: AttachError?) {
        guard let waiting = attaching.take() else { return }
        if error != nil { cut() }
        waiting.resume(returning: error)
    }

    /// Sends a request, and waits for its answer or for the connection to break.
    func run(_ request: SimRequest) async -> SimRequest.Outcome {
        if isCut { return .cut }
        return await withCheckedContinuation { continuation in
            request.continuation = continuation
            let cookie = world.chance.next()
            outstanding.append((cookie, request))
            wire.send(client.encode(request, cookie: cookie, &world.chance))
        }
    }

    /// Breaks it. The server learns of it a while later, and meanwhile still works on what has arrived.
    func cut(noticed: Bool = true) {
        guard !isCut else { return }
        isCut = true
        world.note("cut")
        let waiting = outstanding
        outstanding = []
        for (_, request) in waiting { world.after(1_000) { request.finish(.cut) } }
        wire.cut(noticed: noticed)
        attached(AttachError(.unavailable, "cut while attaching"))
        leaving.take()?.resume()
    }

    /// Ends it with DISC, once everything was answered, and waits until the server has hung up. false: that is not known.
    ///
    /// - Parameter mustHangUp: in a minute.
    @discardableResult
    func disconnect(mustHangUp: Bool = false) async -> Bool {
        if isCut { return false }
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            world.note("disconnect")
            leaving = continuation
            wire.send(client.encodeDisconnect(&world.chance))
            world.after(60_000_000_000) { [weak self] in
                guard let self, leaving != nil else { return }
                if mustHangUp { world.violate("\(server.id) does not hang up after DISC") }
                cut()
            }
        }
        return hasHungUp
    }
    private var hasHungUp = false

    /// What was sent and not answered, for people.
    var waiting: String {
        outstanding.map { "\($0.request.kind) \($0.request.offset)+\($0.request.lengthBytes)" }.joined(separator: ", ")
    }

    // MARK: What comes from the network

    private func receive(_ bytes: UnsafeRawBufferPointer) {
        client.feed(bytes)
        while !isCut, let event = client.nextEvent() {
            switch event {
            case .send(let bytes): wire.send(bytes)
            case .attached: attached(nil)
            case .refused(let error):
                wasRefused = true
                attached(error)
            case .answered(let cookie, let error): answered(cookie, error)
            case .broken(let what):
                world.violate("\(server.id) speaks no NBD: \(what)")
                cut()
            }
        }
    }

    private func answered(_ cookie: UInt64, _ error: UInt32) {
        guard let place = outstanding.firstIndex(where: { $0.cookie == cookie }) else {
            return world.violate("\(server.id) answers what was not asked")
        }
        outstanding.remove(at: place).request.finish(error == 0 ? .done : .failed(error))
    }

    private func hungUp() {
        if leaving == nil { world.note("\(server.id) ends a connection") } else { hasHungUp = true }
        cut(noticed: false)
    }

    /// The server was killed. What it had sent may be lost with it, or still arrive.
    func serverDied() {
        if !isCut, world.chance.one(in: 2) { cut(noticed: false) }
        wire.serverDied()
    }
}
