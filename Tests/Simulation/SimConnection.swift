// One connection of a client to a disk: what lies between an NBD client and the engine, with a network that delays, cuts and
// hides the cut from either end.

import Runtime

@testable import Margarine

/// A request on its way, its memory, and what came of it.
final class SimRequest: @unchecked Sendable {  // as its world
    enum Outcome: Sendable { case done, failed(DeviceError), cut }

    let kind: DeviceRequest.Kind
    let offset: UInt64
    let lengthBytes: Int
    let fua: Bool
    let buffer: UnsafeMutableRawPointer
    let device = DeviceRequest()
    fileprivate var continuation: CheckedContinuation<Outcome, Never>?

    init(_ kind: DeviceRequest.Kind, offset: UInt64 = 0, lengthBytes: Int = 0, fua: Bool = false) {
        self.kind = kind
        self.offset = offset
        self.lengthBytes = lengthBytes
        self.fua = fua
        let holdsBytes = kind == .read || kind == .write
        buffer = .allocate(byteCount: holdsBytes ? max(lengthBytes, 8) : 8, alignment: 16)
        device.kind = kind
        device.fua = fua
        device.offset = offset
        device.lengthBytes = UInt64(lengthBytes)
        device.buffer = holdsBytes ? buffer : nil
    }
    deinit { buffer.deallocate() }

    fileprivate func finish(_ outcome: Outcome) {
        continuation?.resume(returning: outcome)
        continuation = nil
    }
}

final class SimConnection: DeviceClient, @unchecked Sendable {  // as its world
    private let world: World
    let server: SimServer
    private let attached: AttachedDevice
    /// What has come out of the network and was not looked at.
    private var inbox: [SimRequest] = []
    /// Sent and not answered, as the client sees it.
    private var outstanding: [ObjectIdentifier: SimRequest] = [:]
    private var order: [SimRequest] = []
    /// With the device; kept until completed.
    private var submitted: [ObjectIdentifier: SimRequest] = [:]
    private var turns: [(turn: UInt64, requests: [SimRequest])] = []
    /// The client knows that it is broken.
    private(set) var isCut = false
    /// The server knows.
    private var hasReset = false
    private var hasLeft = false
    private var hasJoined = false

    init(_ world: World, _ server: SimServer, _ attached: AttachedDevice) {
        self.world = world
        self.server = server
        self.attached = attached
        server.connections.append(self)
    }

    private var device: any BlockDevice { attached.device }
    /// As the server told it.
    var sizeBytes: UInt64 { device.sizeBytes }

    // MARK: The client's end

    func join() async -> AttachError? {
        let error: AttachError? = await withCheckedContinuation { continuation in
            attached.loop.post { [self] in
                device.join(self, admission: attached.admission) { error in
                    self.hasJoined = error == nil
                    continuation.resume(returning: error)
                }
            }
        }
        return error ?? (isCut ? AttachError(.unavailable, "cut while joining") : nil)
    }

    /// Sends a request, and waits for its answer or for the connection to break.
    func run(_ request: SimRequest) async -> SimRequest.Outcome {
        if isCut { return .cut }
        return await withCheckedContinuation { continuation in
            request.continuation = continuation
            outstanding[ObjectIdentifier(request)] = request
            order.append(request)
            world.after(latencyNs) { [self] in
                guard !isCut, server.isAlive else { return }
                inbox.append(request)
                // Sometimes several are taken in at once.
                world.after(world.chance.ns(0...50_000)) { [self] in attached.loop.post { self.serve() } }
            }
        }
    }

    private var latencyNs: UInt64 { world.chance.ns(10_000...(world.chance.one(in: 50) ? 20_000_000 : 400_000)) }

    /// Breaks it. The server learns of it a while later, and meanwhile still works on what has arrived.
    func cut(noticed: Bool = true) {
        guard !isCut else { return }
        isCut = true
        world.note("cut")
        let waiting = order.filter { outstanding[ObjectIdentifier($0)] != nil }
        outstanding = [:]
        order = []
        for request in waiting { world.after(1_000) { request.finish(.cut) } }
        if noticed {
            world.after(world.chance.ns(10_000...(world.chance.one(in: 3) ? 800_000_000 : 2_000_000))) { [self] in
                hasReset = true
                attached.loop.post { self.reset() }
            }
        }
    }

    /// Ends it with DISC, once everything was answered.
    func disconnect() async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            attached.loop.post { [self] in
                isCut = true
                world.note("disconnect, joined \(hasJoined), left \(hasLeft)")
                if !hasLeft, hasJoined {
                    hasLeft = true
                    device.leave(self, clean: true)
                }
                continuation.resume()
            }
        }
    }

    /// What was sent and not answered, for people.
    var waiting: String {
        order.map {
            "\($0.kind) \($0.offset)+\($0.lengthBytes)\(submitted[ObjectIdentifier($0.device)] == nil ? "" : " (with the device)")"
        }
        .joined(separator: ", ")
    }

    // MARK: The server's end

    private func reset() {
        guard !hasLeft else { return }
        inbox = []
        hasLeft = true
        world.note("reset")
        if hasJoined { device.leave(self, clean: false) }
    }

    /// Takes in everything that has arrived, as one turn.
    private func serve() {
        guard !hasLeft, hasJoined else { return }
        let requests = inbox
        inbox = []
        if requests.isEmpty { return }
        var written: [SimRequest] = []
        for request in requests {
            if hasLeft { return }
            var inline = Inline.later
            switch request.kind {
            case .read:
                inline = device.tryRead(
                    offset: request.offset, lengthBytes: request.lengthBytes, into: request.buffer)
            case .write where !request.fua:
                inline = device.tryWrite(
                    offset: request.offset, lengthBytes: request.lengthBytes, from: request.buffer, client: self)
            default: break
            }
            switch inline {
            case .done where request.kind == .write: written.append(request)
            case .done: answer(request, nil)
            case .failed(let error): answer(request, error)
            case .later:
                request.device.client = self
                submitted[ObjectIdentifier(request.device)] = request
                device.submit(request.device)
            }
        }
        if written.isEmpty || hasLeft { return }
        switch device.endTurn(client: self) {
        case .acknowledged: for request in written { answer(request, nil) }
        case .failed(let error): for request in written { answer(request, error) }
        case .pending(let turn): turns.append((turn, written))
        }
    }

    private func answer(_ request: SimRequest, _ error: DeviceError?) {
        guard !hasLeft else { return }
        world.after(latencyNs) { [self] in
            guard !isCut, outstanding.removeValue(forKey: ObjectIdentifier(request)) != nil else { return }
            order.removeAll { $0 === request }
            request.finish(error.map { .failed($0) } ?? .done)
        }
    }

    func completed(_ request: DeviceRequest) {
        guard let mine = submitted.removeValue(forKey: ObjectIdentifier(request)) else {
            return world.violate("a request was completed twice")
        }
        answer(mine, request.error)
    }

    func journaled(turn: UInt64, error: DeviceError?) {
        guard !hasLeft else { return }
        let ready = turns.filter { $0.turn <= turn }
        turns.removeAll { $0.turn <= turn }
        for one in ready { for request in one.requests { answer(request, error) } }
    }

    func disconnect(reason: String) {
        guard !hasLeft else { return }
        world.note("\(server.id) ends a connection: \(reason)")
        hasLeft = true
        inbox = []
        world.after(latencyNs) { [self] in cut(noticed: false) }
    }

    func absorb() -> Bool {
        if hasReset {
            reset()
            return false
        }
        serve()
        return true
    }
}
