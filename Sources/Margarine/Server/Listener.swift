// The door: accepts connections, watches over their number, and tells them all when the daemon ends.

import Glibc
package import Logging
package import Runtime
import Synchronization

/// Serves a provider's exports on any number of sockets.
///
///     let listener = Listener(provider: disks, loop: loop, limits: ConnectionLimits(), log: log)
///     try await listener.listen(on: .tcp(host: "127.0.0.1", port: 10809))
///     ...
///     await listener.stopAccepting()
///     await listener.drain(timeoutMs: 10_000)
///
/// Handshakes run on `loop`; each connection then moves to its device's loop.
package final class Listener: Sendable {
    private let context: ServerContext

    /// - Parameter asking: the provider's tasks run there; nil: on `loop`, for providers that do next to nothing.
    package init(
        provider: any ExportProvider, loop: Loop, asking: Loop? = nil, limits: ConnectionLimits = ConnectionLimits(),
        log: Logger
    ) {
        context = ServerContext(provider: provider, loop: loop, asking: asking, limits: limits, log: log)
    }

    /// Begins to accept on `endpoint`; gives the endpoints with the ports that were really bound.
    @discardableResult
    package func listen(on endpoint: Endpoint, unixMode: UInt32 = 0o600) async throws -> [Endpoint] {
        let doors: [Door]
        if case .unix(let path) = endpoint {
            let (socket, file) = try Sockets.listen(unix: path, mode: unixMode)
            doors = [Door(socket: socket, file: file, context: context)]
        } else {
            doors = try Sockets.listen(endpoint).map { Door(socket: $0, context: context) }
        }
        let sockets = doors.map(\.socket)
        let bound = sockets.map { socket in
            if case .tcp(let host, _) = endpoint, let port = Sockets.localPort(socket) {
                Endpoint.tcp(host: host, port: port)
            } else {
                endpoint
            }
        }
        try await context.onLoop { [context] in
            for door in doors { try context.open(door) }
        }
        var different: [Endpoint] = []
        for endpoint in bound where !different.contains(endpoint) { different.append(endpoint) }
        return different
    }

    /// No connection is accepted any more; the listening sockets are closed, and files of unix sockets removed.
    package func stopAccepting() async {
        try? await context.onLoop { [context] in context.closeDoors() }
    }

    /// Ends all connections: what is in flight is finished and answered, requests that come meanwhile are not, unfinished
    /// handshakes are answered ESHUTDOWN. Returns when none is left; those that are after `timeoutMs` are cut. True if none
    /// had to be.
    @discardableResult
    package func drain(timeoutMs: UInt64) async -> Bool {
        await stopAccepting()
        return await context.drain(timeoutMs: timeoutMs)
    }

    /// The connections in their transmission phase, as their loops see them.
    package func sessions() async -> [ConnectionStatus] { await context.sessions() }

    /// Bytes of the common budget that nobody uses; negative while it is overdrawn.
    package var availableBytes: Int { context.availableBytes }

    /// Connections of any kind.
    package var connectionCount: Int { context.connectionCount }
}

/// One listening socket. Owned by the accepting loop.
final class Door: EventHandler, @unchecked Sendable {
    let socket: FileDescriptor
    /// Its name, where it is a unix socket.
    private let file: SocketFile?
    private unowned let context: ServerContext

    init(socket: FileDescriptor, file: SocketFile? = nil, context: ServerContext) {
        self.socket = socket
        self.file = file
        self.context = context
    }

    func ready(_ events: Events) { context.accept(self) }

    /// The name goes first: once the socket is closed, another daemon may have taken it.
    func close() {
        file?.remove()
        socket.close()
    }
}

/// What the listener, its handshakes and its connections share. `doors` and `handshakes` are owned by `loop`; the rest is
/// immutable or locked.
final class ServerContext: @unchecked Sendable {
    let provider: any ExportProvider
    let loop: Loop
    /// Where the provider is asked.
    let asking: Loop
    let limits: ConnectionLimits
    let log: Logger

    private struct Shared {
        var shares: [ObjectIdentifier: LoopShare] = [:]
        /// Sockets of clients, from accept to close; and how many of them each group has.
        var connections = 0
        var ofGroups: [String: Int] = [:]
        var waitingForNone: [CheckedContinuation<Void, Never>] = []
    }

    private let shared = Mutex(Shared())
    private let draining = Atomic<Bool>(false)
    private let budget: RequestBudget
    private let shortage: Shortage

    private var doors: [Door] = []
    /// In the order of their coming.
    private var handshakes: [Handshake] = []
    private var shortOfDescriptors = Episode()
    /// Those among them that wait for their clients.
    private var waitingCount = 0
    private var waitingOfGroups: [String: Int] = [:]

    /// Passes on that memory is short; there so that the budget can be made first.
    private final class Shortage: Sendable {
        let call = Mutex<(@Sendable () -> Void)?>(nil)
    }

    private var refusing = Episode()

    private static let acceptsPerTurn = 64
    private static let handshakeGraceMs: UInt64 = 1_000
    private static let pauseWithoutDescriptorsNs: UInt64 = 100_000_000
    /// What fails again within this is the same trouble.
    private static let quietNs: UInt64 = 5_000_000_000

    /// - Parameter budgetBytes: for simulation: that much, though it be less than the largest request.
    init(
        provider: any ExportProvider, loop: Loop, asking: Loop? = nil, limits: ConnectionLimits, log: Logger,
        budgetBytes: Int? = nil
    ) {
        self.provider = provider
        self.loop = loop
        self.asking = asking ?? loop
        self.limits = limits
        self.log = log
        let shortage = Shortage()
        self.shortage = shortage
        // Below this the largest request could never be served.
        budget = RequestBudget(bytes: budgetBytes ?? max(limits.budgetBytes, 2 * BufferPool.largestBytes)) {
            shortage.call.withLock { $0 }?()
        }
        shortage.call.withLock { call in
            call = { [weak self] in
                for share in self?.allShares() ?? [] { share.loop.post { share.memoryIsShort() } }
            }
        }
    }

    var isDraining: Bool { draining.load(ordering: .acquiring) }
    var connectionCount: Int { shared.withLock { $0.connections } }

    var availableBytes: Int { budget.availableBytes }

    /// What the connections of `loop` share. On that loop.
    func share(of loop: Loop) -> LoopShare {
        let id = ObjectIdentifier(loop)
        if let share = shared.withLock({ $0.shares[id] }) { return share }
        let share = LoopShare(loop: loop, limits: limits, budget: budget)
        shared.withLock { $0.shares[id] = share }
        // It is not among those that were told.
        if budget.isContended { share.memoryIsShort() }
        return share
    }

    private func allShares() -> [LoopShare] { shared.withLock { Array($0.shares.values) } }

    /// Runs `work` on the accepting loop.
    func onLoop<T: Sendable>(_ work: @escaping @Sendable () throws -> T) async throws -> T {
        try await withCheckedThrowingContinuation { done in
            loop.post { done.resume(with: Result(catching: work)) }
        }
    }

    // MARK: Accepting (on the loop)

    func open(_ door: Door) throws {
        try loop.watch(door.socket.raw, .readable, door)
        doors.append(door)
    }

    func closeDoors() {
        for door in doors {
            loop.unwatch(door.socket.raw)
            door.close()
        }
        doors = []
    }

    func accept(_ door: Door) {
        for _ in 0..<Self.acceptsPerTurn {
            switch Sockets.accept(door.socket) {
            case .wouldBlock:
                return
            case .connection(let socket):
                if let over = shortOfDescriptors.worked(nowNs: loop.nowNs, quietNs: Self.quietNs) {
                    log.notice("connections are accepted again, after \(over.durationMs / 1000) s")
                }
                welcome(socket)
            case .failed(let error) where error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM:
                let reason = String(cString: strerror(error))
                if shortOfDescriptors.failed(reason, nowNs: loop.nowNs) {
                    let limit = error == EMFILE || error == ENFILE ? "the limit of open files" : "the limit of memory"
                    log.error("cannot accept: \(reason); clients wait until that is over; raise \(limit)")
                }
                pause(door)
                return
            case .failed:
                continue  // the client has gone already
            }
        }
    }

    /// Without descriptors a level-triggered loop would spin.
    private func pause(_ door: Door) {
        loop.rewatch(door.socket.raw, [])
        loop.after(ns: Self.pauseWithoutDescriptorsNs) { [self] in
            if doors.contains(where: { $0 === door }) { loop.rewatch(door.socket.raw, .readable) }
        }
    }

    /// Begins the handshake of a client that was accepted; who it is, the socket tells where nobody else does.
    func welcome(_ socket: FileDescriptor, client: ClientIdentity? = nil) {
        let client = client ?? ClientIdentity(Peer(socket))
        guard takePlace(client.group) else {
            noteRefusal(client)
            socket.close()
            return
        }
        if let over = refusing.worked(nowNs: loop.nowNs, quietNs: Self.quietNs) {
            log.notice(
                "connections are not refused any more: \(over.count) were, in \(DurationMs.readable(over.durationMs))")
        }
        Sockets.tune(socket, deadAfterMs: limits.deadPeerMs)
        let handshake = Handshake(socket: socket, client: client, server: self, loop: loop, log: log)
        handshakes.append(handshake)
        handshake.start()
        if waitingCount > limits.handshakes { makeRoom() }
    }

    private func takePlace(_ group: String) -> Bool {
        shared.withLock { shared in
            let own = shared.ofGroups[group, default: 0]
            guard own < limits.connections, shared.connections < limits.connections + limits.connectionsForOthers
            else { return false }
            shared.connections += 1
            shared.ofGroups[group] = own + 1
            return true
        }
    }

    /// One line for each of the first few addresses, however often they come, and one when it is over.
    private func noteRefusal(_ client: ClientIdentity) {
        guard refusing.failed(client.group, nowNs: loop.nowNs) else { return }
        log.warning(
            "connections refused: one client address may have \(limits.connections), all together \(limits.connections + limits.connectionsForOthers)",
            metadata: ["client": "\(client.address)"])
    }

    /// Of too many handshakes that wait for their clients, the oldest goes of the address that has most of them: who opens
    /// connections in a loop is in his own way only.
    private func makeRoom() {
        guard let most = waitingOfGroups.values.max() else { return }
        handshakes.first { $0.isWaitingForClient && waitingOfGroups[$0.client.group] == most }?
            .close("too many unfinished handshakes")
    }

    /// A handshake of `group` begins to wait for its client, or no longer does.
    func waits(_ isWaiting: Bool, _ group: String) {
        let count = waitingOfGroups[group, default: 0] + (isWaiting ? 1 : -1)
        precondition(count >= 0)
        waitingOfGroups[group] = count == 0 ? nil : count
        waitingCount += isWaiting ? 1 : -1
    }

    /// A handshake ended, and its socket is closed.
    func ended(_ handshake: Handshake) {
        moved(handshake)
        connectionEnded(handshake.client)
    }

    /// A handshake ended in a connection.
    func moved(_ handshake: Handshake) { handshakes.removeAll { $0 === handshake } }

    // MARK: All connections (any thread)

    func connectionEnded(_ client: ClientIdentity) {
        let waiting = shared.withLock { shared in
            shared.connections -= 1
            let own = shared.ofGroups[client.group, default: 0] - 1
            precondition(shared.connections >= 0 && own >= 0)
            shared.ofGroups[client.group] = own == 0 ? nil : own
            guard shared.connections == 0 else { return [CheckedContinuation<Void, Never>]() }
            defer { shared.waitingForNone = [] }
            return shared.waitingForNone
        }
        for continuation in waiting { continuation.resume() }
    }

    func drain(timeoutMs: UInt64) async -> Bool {
        draining.store(true, ordering: .releasing)
        for share in allShares() {
            share.loop.post { for connection in Array(share.connections.values) { connection.drain() } }
        }
        loop.post { [self] in
            loop.after(ns: min(timeoutMs, Self.handshakeGraceMs) * 1_000_000) { [self] in
                for handshake in Array(handshakes) { handshake.close("draining") }
            }
            loop.after(ns: timeoutMs * 1_000_000) { [self] in cutAll() }
        }
        await withCheckedContinuation { continuation in
            let isNone = shared.withLock { shared in
                if shared.connections == 0 { return true }
                shared.waitingForNone.append(continuation)
                return false
            }
            if isNone { continuation.resume() }
        }
        return connectionCount == 0
    }

    /// Those who were not done in time. What they still have at their device does not hold up the end.
    private func cutAll() {
        for share in allShares() {
            share.loop.post {
                for connection in Array(share.connections.values) { connection.end("not drained in time") }
            }
        }
        let waiting = shared.withLock { shared in
            defer { shared.waitingForNone = [] }
            return shared.waitingForNone
        }
        for continuation in waiting { continuation.resume() }
    }

    func sessions() async -> [ConnectionStatus] {
        var all: [ConnectionStatus] = []
        for share in allShares() {
            all += await withCheckedContinuation { done in
                share.loop.post { done.resume(returning: share.connections.values.map(\.status)) }
            }
        }
        return all
    }
}
