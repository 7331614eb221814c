// Connections over real sockets while memory is short.

import Glibc
import Logging
@testable import Margarine
import NBDProtocol
import Runtime
import Synchronization
import Testing

@Suite struct ConnectionMemoryTests {
    private static let quiet = Logger(label: "quiet") { _ in SwiftLogNoOpLogHandler() }
    private static let capacity = 1 << 20

    /// An idle connection kept it until its next request.
    @Test func memoryThatWasWaitedForAndNotNeededGoesBack() async throws {
        let bed = try Bed()
        let connection = try await bed.connection(on: bed.loops[0], memory: .short)
        bed.send(write: 8 << 10, of: 8 << 10, to: connection)
        try await bed.wait("it waits, and is answered") { bed.device.tries == 2 && bed.hasReply(connection) }
        try await bed.wait("nothing is held") { bed.context.availableBytes == 0 }
    }

    /// With one request under way, and no need of what others hold, it stood in their line for the next one.
    @Test func whatIsItsOwnIsNotWaitedFor() async throws {
        let bed = try Bed { $0.ownBytesPerConnection = 10 << 10 }
        bed.device.holds.store(true, ordering: .relaxed)
        let connection = try await bed.connection(on: bed.loops[0], memory: .gone)
        bed.send(write: 8 << 10, of: 8 << 10, to: connection)
        bed.send(write: 4 << 10, of: 4 << 10, to: connection)
        var submitted: Int { bed.device.submitted.load(ordering: .relaxed) }
        try await bed.wait("one is under way, and the other one waits") { submitted == 1 }
        bed.loops[0].post { bed.device.release() }
        try await bed.wait("so is the other one") { submitted == 2 }
        bed.loops[0].post { bed.device.release() }
        try await bed.wait("both are answered") {
            Sockets.arrivedBytes(bed.client(of: connection)) == 2 * Reply.simpleBytes
        }
    }

    /// It had the one as the exception, and waited for the other for ever: nobody got the exception any more.
    @Test func aReadWaitsForItsReplyAndItsBufferTogether() async throws {
        let bed = try Bed()
        bed.device.holds.store(true, ordering: .relaxed)
        let connection = try await bed.connection(on: bed.loops[0], memory: .short)
        bed.send(Bed.request(.read, 4 << 10), to: connection)
        try await bed.wait("it is under way") { bed.device.submitted.load(ordering: .relaxed) == 1 }
        bed.loops[0].post { bed.device.release() }
        try await bed.wait("it is answered") { bed.received(connection) == Reply.simpleBytes + (4 << 10) }
        try await bed.wait("nothing is held") { bed.context.availableBytes == 0 }
    }

    /// The same: what the first was granted and did not need was kept for the second, which waited for more.
    @Test func whatOneRequestDidNotNeedIsNotKeptWhileTheNextWaits() async throws {
        let bed = try Bed()
        let connection = try await bed.connection(on: bed.loops[0], memory: .short)
        bed.send(Bed.request(.write, 100 << 10, of: 100 << 10) + Bed.request(.read, 300 << 10), to: connection)
        var received = 0
        try await bed.wait("both are answered") {
            received += bed.received(connection)
            return received == 2 * Reply.simpleBytes + (300 << 10)
        }
        try await bed.wait("nothing is held") { bed.context.availableBytes == 0 }
    }

    /// It was the exception, and nobody else was served as long as the journal of a disk had no room.
    @Test func whatOneRequestDidNotNeedIsNotKeptWhileOthersAreUnanswered() async throws {
        let bed = try Bed { $0.requestsPerConnection = 1 }
        bed.device.isJournalFull.store(true, ordering: .relaxed)
        let connection = try await bed.connection(on: bed.loops[0], memory: .short)
        bed.send(Bed.request(.write, 100 << 10, of: 100 << 10) + Bed.request(.flush, 0), to: connection)
        try await bed.wait("it is taken, and not answered") { bed.device.tries == 2 }
        let other = try await bed.connection(on: bed.loops[0], memory: .short)
        bed.send(Bed.request(.read, 20 << 10), to: other)
        try await bed.wait("another one has its turn") { bed.received(other) == Reply.simpleBytes + (20 << 10) }
    }

    /// Its client had given it up, and sent the same on another connection; here it took effect once there was memory, over
    /// what was written since.
    @Test(arguments: [false, true])
    func whatAClientGaveUpIsNotWaitedForMemoryWith(isKept: Bool) async throws {
        let bed = try Bed()
        let connection = try await bed.connection(on: bed.loops[0], memory: .gone)
        // With goodbye at its end the client may still listen.
        let goodbye = isKept ? Bed.request(.disconnect, 0) : []
        bed.send(Bed.request(.write, 8 << 10, of: 8 << 10) + goodbye, to: connection)
        try await bed.wait("it waits") { bed.device.tries == 1 }
        shutdown(bed.client(of: connection), Int32(SHUT_WR))
        if isKept {
            try await Task.sleep(for: .milliseconds(200))
            #expect(bed.ended.load(ordering: .relaxed) == 0)
        } else {
            try await bed.wait("it is over") { bed.ended.load(ordering: .relaxed) == 1 }
        }
        #expect(bed.device.tries == 1)
    }

    /// Its payload was not read any more, and after ten seconds it was closed as silent.
    @Test("row 16: a request of which a part had arrived when another connection joined is read to its end")
    func aRequestUnderWayIsReadToItsEnd() async throws {
        let bed = try Bed { $0.ownBytesPerConnection = 1 << 20 }
        bed.device.holds.store(true, ordering: .relaxed)
        let connection = try await bed.connection(on: bed.loops[0], memory: .contended)
        bed.loops[0].post {
            bed.send(write: 8 << 10, of: 4 << 10, to: connection)
            #expect(!connection.absorb(isFirst: true))
            let rest = [UInt8](repeating: 1, count: 4 << 10)
            #expect(rest.withUnsafeBytes { Sockets.send(bed.client(of: connection), $0) } == .bytes(rest.count))
            _ = connection.absorb(isFirst: false)
            #expect(bed.device.tries == 1)
        }
        try await bed.wait("it is written") { bed.device.tries == 1 }
    }

    /// The timer of the one before ended it, and what came meanwhile was waited for as well.
    @Test func holdingOffLastsItsTime() throws {
        let now = Mutex<UInt64>(1)
        let loop = Loop(name: "driven", clock: { now.withLock { $0 } })
        let context = ServerContext(provider: NoExports(), loop: loop, limits: ConnectionLimits(), log: Self.quiet)
        let device = HesitantDevice()
        device.holds.store(true, ordering: .relaxed)
        let (near, far) = try Sockets.pair()
        func run(_ work: @escaping @Sendable () -> Void) {
            loop.post(work)
            for _ in 0..<100 where loop.isReady { loop.step() }
        }
        let made = Mutex<Connection?>(nil)
        run {
            let rules = RequestRules(
                sizeBytes: 1 << 30, isReadOnly: false, structuredReplies: false, allocationContext: false)
            let connection = Connection(
                socket: far, share: context.share(of: loop), device: device, rules: rules,
                client: ClientIdentity(address: "test", host: "test"), exportName: "test", log: Self.quiet, ended: {})
            connection.start(reply: [])
            #expect(connection.absorb(isFirst: true))
            #expect(!connection.isHeld, "it is idle")
            made.withLock { $0 = connection }
        }
        let connection = try #require(made.withLock { $0 })
        now.withLock { $0 += 60_000_000 }
        Bed.send(Bed.request(.write, 4 << 10, of: 4 << 10), to: near.raw)
        run { _ = connection.absorb(isFirst: true) }
        for (ms, isHeld) in [(50, true), (60, false)] as [(UInt64, Bool)] {
            now.withLock { $0 += ms * 1_000_000 }
            run {}
            run { #expect(connection.isHeld == isHeld) }
        }
        run {
            device.release()
            connection.end("over")
        }
    }

    /// Only the loops that had connections when memory became short looked for stalled clients.
    @Test func aLoopThatComesLaterCutsStalledClientsToo() async throws {
        let bed = try Bed { $0.stallSeconds = 1 }
        _ = try await bed.connection(on: bed.loops[0], memory: .contended)
        let stalled = try await bed.connection(on: bed.loops[1], memory: .contended)
        bed.send(write: 100 << 10, of: 64 << 10, to: stalled)
        try await bed.wait("it is cut") { bed.ended.load(ordering: .relaxed) == 1 }
    }

    /// As long as its client sent, nobody else was listened to.
    @Test func aHandshakeGivesOthersTheirTurn() throws {
        let loop = Loop(name: "driven", clock: { 1 })
        let context = ServerContext(provider: NoExports(), loop: loop, limits: ConnectionLimits(), log: Self.quiet)
        let (near, far) = try Sockets.pair()
        loop.post { context.welcome(far) }
        loop.step()
        var bytes: [UInt8] = [0, 0, 0, 3]
        for _ in 0..<200 {
            bytes.appendWire(NBD.Magic.option)
            bytes.appendWire(UInt32(99))
            bytes.appendWire(UInt32(0))
        }
        #expect(bytes.withUnsafeBytes { Sockets.send(near.raw, $0) } == .bytes(bytes.count))
        loop.descriptorsMayBeReady()
        loop.step()
        #expect(Sockets.arrivedBytes(far.raw) > 0, "not all at once")
        for _ in 0..<100 where loop.isReady { loop.step() }
        #expect(Sockets.arrivedBytes(far.raw) == 0)
    }

    /// Where the turn ended behind the header of an option without data, and nothing came behind it, it was never answered.
    @Test func theLastOptionOfATurnIsAnswered() throws {
        for count in 1...40 {
            let loop = Loop(name: "driven", clock: { 1 })
            let context = ServerContext(provider: NoExports(), loop: loop, limits: ConnectionLimits(), log: Self.quiet)
            let (near, far) = try Sockets.pair()
            loop.post { context.welcome(far) }
            loop.step()
            var bytes: [UInt8] = [0, 0, 0, 3]
            for number in 1...count {
                bytes.appendWire(NBD.Magic.option)
                bytes.appendWire(number == count ? NBD.OptionCode.abort : NBD.OptionCode.structuredReply)
                bytes.appendWire(UInt32(0))
            }
            #expect(bytes.withUnsafeBytes { Sockets.send(near.raw, $0) } == .bytes(bytes.count))
            loop.descriptorsMayBeReady()
            for _ in 0..<100 where loop.isReady { loop.step() }
            #expect(context.connectionCount == 0, "the last of \(count) ends the handshake")
        }
    }

    // MARK: The bed

    private final class Bed: Sendable {
        enum Memory {
            /// All of it is held by somebody.
            case short
            /// One waits who wants more than his share.
            case contended
            /// Both.
            case gone
        }

        let loops: [Loop]
        let context: ServerContext
        let device = HesitantDevice()
        let ended = Atomic<Int>(0)
        private let isFilled = Atomic<Bool>(false)
        private let near = Mutex<[ObjectIdentifier: FileDescriptor]>([:])

        init(_ change: (inout ConnectionLimits) -> Void = { _ in }) throws {
            loops = try (0..<2).map { try Loop(name: "disks-\($0)") }
            for loop in loops { try loop.start() }
            var limits = ConnectionLimits()
            limits.ownBytesPerConnection = 0
            change(&limits)
            context = ServerContext(
                provider: NoExports(), loop: loops[0], limits: limits, log: quiet, budgetBytes: capacity)
        }

        deinit { for loop in loops { loop.stop() } }

        /// A connection in its transmission phase.
        func connection(on loop: Loop, memory: Memory) async throws -> Connection {
            let (client, server) = try Sockets.pair()
            let connection = await withCheckedContinuation { done in
                loop.post { [self] in
                    let share = context.share(of: loop)
                    if !isFilled.exchange(true, ordering: .relaxed) { fill(share.budget, memory) }
                    let rules = RequestRules(
                        sizeBytes: 1 << 30, isReadOnly: false, structuredReplies: false, allocationContext: false)
                    let made = Connection(
                        socket: server, share: share, device: device, rules: rules,
                        client: ClientIdentity(address: "test", host: "test"), exportName: "test", log: quiet,
                        ended: { [self] in ended.add(1, ordering: .relaxed) })
                    made.start(reply: [])
                    done.resume(returning: made)
                }
            }
            near.withLock { $0[ObjectIdentifier(connection)] = client }
            return connection
        }

        private func fill(_ budget: RequestBudget, _ memory: Memory) {
            if memory != .contended { budget.force(capacity, budget.open("others")) }
            if memory != .short {
                for name in ["the exception", "in line"] {
                    _ = budget.wait(capacity, budget.open(name), granted: {})
                }
            }
        }

        /// The first `count` bytes of a WRITE of `length`.
        func send(write length: Int, of count: Int, to connection: Connection) {
            send(Bed.request(.write, length, of: count), to: connection)
        }

        func send(_ bytes: [UInt8], to connection: Connection) {
            Bed.send(bytes, to: client(of: connection))
        }

        static func send(_ bytes: [UInt8], to fd: Int32) {
            #expect(bytes.withUnsafeBytes { Sockets.send(fd, $0) } == .bytes(bytes.count))
        }

        /// A request for `length` bytes, with the first `count` of its payload.
        static func request(_ command: NBD.Command, _ length: Int, of count: Int = 0) -> [UInt8] {
            var bytes: [UInt8] = []
            bytes.appendRequest(command, cookie: 7, offset: 0, lengthBytes: length)
            return bytes + [UInt8](repeating: 1, count: count)
        }

        /// How many bytes of replies have come, which are read.
        func received(_ connection: Connection) -> Int {
            let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 8)
            defer { room.deallocate() }
            guard case .bytes(let count) = Sockets.receive(client(of: connection), into: room) else { return 0 }
            return count
        }

        func client(of connection: Connection) -> Int32 {
            near.withLock { $0[ObjectIdentifier(connection)]?.raw } ?? -1
        }

        func hasReply(_ connection: Connection) -> Bool {
            Sockets.arrivedBytes(client(of: connection)) == Reply.simpleBytes
        }

        func wait(_ what: Comment, until isTrue: () -> Bool) async throws {
            for _ in 0..<1000 {
                if isTrue() { return }
                try await Task.sleep(for: .milliseconds(10))
            }
            Issue.record(what)
        }
    }

    /// Has no room for the first write, and then it has.
    private final class HesitantDevice: BlockDevice {
        let sizeBytes: UInt64 = 1 << 30
        let isReadOnly = false
        private let count = Atomic<Int>(0)
        /// Requests are kept until `release`.
        let holds = Atomic<Bool>(false)
        let isJournalFull = Atomic<Bool>(false)
        /// On the connection's loop.
        private nonisolated(unsafe) var held: [DeviceRequest] = []
        let submitted = Atomic<Int>(0)
        var tries: Int { count.load(ordering: .relaxed) }

        func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
            holds.load(ordering: .relaxed) ? .later : .done
        }
        func tryWrite(
            offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
        ) -> Inline {
            let isFirst = count.add(1, ordering: .relaxed).newValue == 1
            return isFirst || holds.load(ordering: .relaxed) ? .later : .done
        }
        func endTurn(client: any DeviceClient) -> TurnEnd {
            isJournalFull.load(ordering: .relaxed) ? .pending(turn: 1) : .acknowledged
        }
        func submit(_ request: DeviceRequest) {
            if !holds.load(ordering: .relaxed) { Issue.record("nothing is submitted") }
            held.append(request)
            submitted.add(1, ordering: .relaxed)
        }
        func release() {
            let done = held
            held = []
            for request in done { request.client.completed(request) }
        }
        func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {}
        func leave(_ client: any DeviceClient, clean: Bool) {}
    }
}
