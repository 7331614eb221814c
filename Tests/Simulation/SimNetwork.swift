// The network between clients and servers: real pairs of sockets, whose one end a server has. What clients write arrives
// later, in other pieces, or not at all; what servers write likewise.
//
// Always holds:
// - The bytes of one direction of one connection stay in order; those of different connections overtake each other.
// - Bytes of a cut connection that reach its server do so at the instant of the cut, before the client can begin another
//   connection. Later ones are lost: a segment that outlives its connection is a documented limit, not simulated.
// - Servers' sockets are looked at when nothing else is left to do at an instant, which costs no time in the world.

import Glibc
import Runtime

@testable import Margarine

/// What connections are like in a run.
struct NetworkShape {
    var limits = ConnectionLimits()
    /// The common budget of a server; twice the largest request of a client at least.
    var budgetBytes = 64 << 20
    /// What a server's socket takes before the network does. nil: as the kernel likes it.
    var sendBufferBytes: Int32?

    init() {}

    /// Small bounds on some seeds, so that they are reached.
    init(_ chance: inout Chance) {
        limits.pooledBytesPerLoop = 1 << 20
        limits.ownBytesPerConnection = [4 << 10, 128 << 10].randomElement(using: &chance)!
        limits.requestsPerConnection = [2, 4, 64].randomElement(using: &chance)!
        limits.bytesPerConnection = [64 << 10, 512 << 10, 64 << 20].randomElement(using: &chance)!
        limits.turnBytes = [4 << 10, 64 << 10, 1 << 20].randomElement(using: &chance)!
        budgetBytes = [2 << 20, 64 << 20].randomElement(using: &chance)!
        sendBufferBytes = [8 << 10, 64 << 10, nil, nil, nil, nil].randomElement(using: &chance)!
    }
}

final class SimNetwork {
    private unowned let world: World
    /// Connections get cut while they begin, and clients read slowly.
    var isHostile = false
    private var wires: [SimWire] = []
    private var polls: [pollfd] = []
    fileprivate let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)

    init(_ world: World) { self.world = world }
    deinit { room.deallocate() }

    func add(_ wire: SimWire) { wires.append(wire) }

    /// Takes what servers have sent, and gives them what their sockets had no room for. True: something moved.
    func exchange() -> Bool {
        wires.removeAll { $0.isClosed }
        if wires.isEmpty { return false }
        polls.removeAll(keepingCapacity: true)
        for wire in wires { polls.append(wire.poll) }
        guard polls.withUnsafeMutableBufferPointer({ poll($0.baseAddress, nfds_t($0.count), 0) }) > 0 else {
            return false
        }
        var hasMoved = false
        for (wire, poll) in zip(wires, polls) where poll.revents != 0 && !wire.isClosed {
            if poll.revents & Int16(POLLOUT) != 0, wire.push() { hasMoved = true }
            if poll.revents & Int16(POLLIN | POLLHUP | POLLERR) != 0, wire.pull(room) { hasMoved = true }
        }
        return hasMoved
    }
}

/// The way between one client and its server.
final class SimWire: @unchecked Sendable {  // as its world
    /// Of what a server sent.
    private enum Piece {
        case bytes([UInt8])
        case end
    }

    private let world: World
    private unowned let server: SimServer
    /// The network's end of the pair, and the server's.
    private let near: FileDescriptor
    private let far: FileDescriptor
    /// What comes out at the client's end.
    private var received: (UnsafeRawBufferPointer) -> Void = { _ in }
    private var ended: () -> Void = {}

    /// Written by the client and not on its way yet.
    private var outbox: [UInt8] = []
    /// On its way to the server.
    private var flight: [ArraySlice<UInt8>] = []
    /// At the server's door, which is shut.
    private var landed: [UInt8] = []
    private var landedAt = 0
    private var lastArrivalNs: UInt64 = 0
    /// On its way to the client.
    private var answers: [Piece] = []
    private var lastAnswerNs: UInt64 = 0
    /// The client reads nothing for a while.
    private var isStalled = false
    private var hasEnded = false
    /// The client has given it up.
    private var isCut = false

    init(
        _ world: World, _ server: SimServer, host: String, received: @escaping (UnsafeRawBufferPointer) -> Void,
        ended: @escaping () -> Void
    ) {
        self.world = world
        self.server = server
        self.received = received
        self.ended = ended
        var ends: [Int32] = [-1, -1]
        let kind = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
        guard socketpair(AF_UNIX, kind, 0, &ends) == 0 else { fatalError("socketpair: errno \(errno)") }
        near = FileDescriptor(owning: ends[0])
        far = FileDescriptor(owning: ends[1])
        if var bytes = server.network.sendBufferBytes {
            setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &bytes, 4)
            setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &bytes, 4)
        }
        world.network.add(self)
        world.after(latencyNs) { [self] in if server.isAlive { server.accept(far, host: host) } }
    }

    private var latencyNs: UInt64 { world.chance.ns(10_000...(world.chance.one(in: 50) ? 20_000_000 : 400_000)) }

    var isClosed: Bool { near.raw < 0 }
    /// What the network wants to know of its end.
    var poll: pollfd {
        let wanted = (isStalled ? 0 : POLLIN) | (landed.isEmpty ? 0 : POLLOUT)
        return pollfd(fd: wanted == 0 ? -1 : near.raw, events: Int16(wanted), revents: 0)
    }

    /// Ends of pieces, the last one included: mostly one piece, else cut anywhere, often within the first header.
    private func cuts(_ count: Int) -> [Int] {
        guard count > 1, world.chance.one(in: 4) else { return [count] }
        let places = (0...world.chance.below(3)).map { _ in
            1 + world.chance.below(world.chance.one(in: 2) ? min(count - 1, 64) : count - 1)
        }
        return Set(places).sorted() + [count]
    }

    // MARK: To the server

    func send(_ bytes: [UInt8]) {
        guard !isCut else { return }
        let isFirst = outbox.isEmpty
        outbox += bytes
        // Sometimes several go together.
        if isFirst { world.after(world.chance.ns(0...50_000)) { [self] in depart() } }
    }

    private func depart() {
        guard !isCut else { return }
        let bytes = outbox
        outbox = []
        var at = 0
        lastArrivalNs = max(lastArrivalNs, world.nowNs + latencyNs)
        for end in cuts(bytes.count) {
            flight.append(bytes[at..<end])
            at = end
            world.after(lastArrivalNs - world.nowNs) { [self] in arrive() }
            lastArrivalNs += world.chance.ns(0...100_000)
        }
    }

    private func arrive() {
        guard !isCut, !isClosed else { return }
        landed += flight.removeFirst()
        _ = push()
    }

    /// True: the server's socket took some.
    fileprivate func push() -> Bool {
        guard landedAt < landed.count else { return false }
        switch landed.withUnsafeBytes({ Sockets.send(near.raw, UnsafeRawBufferPointer(rebasing: $0[landedAt...])) }) {
        case .bytes(let count):
            landedAt += count
            if landedAt == landed.count {
                landed.removeAll(keepingCapacity: true)
                landedAt = 0
            }
            server.socketsMayBeReady()
            return true
        case .wouldBlock:
            return false
        case .closed, .failed:
            // The server has hung up; what it said before is still to be read.
            landed = []
            landedAt = 0
            return false
        }
    }

    // MARK: To the client

    /// True: the server had sent some.
    fileprivate func pull(_ room: UnsafeMutableRawBufferPointer) -> Bool {
        guard !isStalled, !hasEnded else { return false }
        switch Sockets.receive(near.raw, into: room) {
        case .bytes(let count):
            server.socketsMayBeReady()
            if isCut { return true }
            forward(UnsafeRawBufferPointer(rebasing: room[..<count]))
            if world.network.isHostile, world.chance.one(in: 300) { stall() }
            return true
        case .wouldBlock:
            return false
        case .closed, .failed:
            hangUp()
            return true
        }
    }

    private func forward(_ bytes: UnsafeRawBufferPointer) {
        var at = 0
        lastAnswerNs = max(lastAnswerNs, world.nowNs + latencyNs)
        for end in cuts(bytes.count) {
            answers.append(.bytes([UInt8](bytes[at..<end])))
            at = end
            world.after(lastAnswerNs - world.nowNs) { [self] in deliver() }
            lastAnswerNs += world.chance.ns(0...100_000)
        }
    }

    private func deliver() {
        guard !isCut else { return }
        switch answers.removeFirst() {
        case .bytes(let bytes): bytes.withUnsafeBytes { received($0) }
        case .end: ended()
        }
    }

    private func stall() {
        isStalled = true
        world.after(world.chance.ns(1_000_000...300_000_000)) { [self] in isStalled = false }
    }

    /// The server has closed its end. The client hears of that behind all that was sent.
    private func hangUp() {
        if hasEnded { return }
        hasEnded = true
        near.close()
        if isCut { return }
        lastAnswerNs = max(lastAnswerNs, world.nowNs + latencyNs)
        answers.append(.end)
        world.after(lastAnswerNs - world.nowNs) { [self] in deliver() }
    }

    // MARK: Ending

    /// The client gives it up. Some of what was under way still arrives. The server notices a while later (or at once,
    /// where it ended the connection itself).
    func cut(noticed: Bool) {
        guard !isCut else { return }
        if noticed, !isClosed {
            for piece in flight { landed += piece }
            let left = landed.count - landedAt
            switch world.chance.below(3) {
            case 0: landed.removeLast(left)
            case 1: landed.removeLast(left == 0 ? 0 : world.chance.below(left))
            default: break
            }
            while push() {}
        }
        isCut = true
        forget()
        // Its machine is gone, or takes what comes and throws it away.
        isStalled = world.chance.one(in: 2)
        if noticed {
            world.after(world.chance.ns(10_000...(world.chance.one(in: 3) ? 800_000_000 : 2_000_000))) { [self] in
                close()
            }
        } else {
            close()
        }
    }

    private func forget() {
        outbox = []
        flight = []
        landed = []
        landedAt = 0
        answers = []
        received = { _ in }
        ended = {}
    }

    private func close() {
        if isClosed { return }
        near.close()
        if server.isAlive { server.socketsMayBeReady() }
    }

    /// The server's process is gone: what it had sent may still arrive.
    func serverDied() {
        far.close()
        isStalled = false
        if !isCut { while !isClosed, pull(world.network.room) {} }
        if !isClosed { hangUp() }
    }
}
