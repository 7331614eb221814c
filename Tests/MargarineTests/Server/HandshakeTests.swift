// Handshakes over real sockets whose clients go away, or are refused late, while the server is busy for them.

import Glibc
import Logging
@testable import Margarine
import NBDProtocol
import Runtime
import Synchronization
import Testing

@Suite struct HandshakeTests {
    @Test("row 30: what a client asked for is called off when it goes away")
    func questionsAreCalledOff() async throws {
        let bed = try Bed()
        for isOrderly in [true, false] {
            let client = bed.connect()
            client.say(option: NBD.OptionCode.list)
            try await bed.wait("it is asked") { bed.exports.isAsked }
            if !isOrderly { client.say(option: NBD.OptionCode.list) }
            client.hangUp()
            try await bed.wait("it is called off") { !bed.exports.isAsked && bed.server.connectionCount == 0 }
        }
    }

    @Test("also: what is granted after its client has gone lapses at once")
    func lateGrantsLapse() async throws {
        let bed = try Bed()
        let client = bed.connect()
        client.go("late")
        await bed.sleep(ms: 50)
        client.hangUp()
        try await bed.wait("the connection is over") { bed.server.connectionCount == 0 }
        #expect(bed.exports.granted == 0)
        try await bed.wait("it lapses") { bed.exports.granted == 1 && bed.exports.lapsed == 1 }
    }

    @Test("also: a handshake timer that fires while the device decides is not lost")
    func timersOutliveADeviceThatRefuses() async throws {
        let bed = try Bed { $0.handshakeTimeoutMs = 200 }
        let client = bed.connect()
        client.go("refusing")
        await bed.sleep(ms: 700)
        #expect(bed.exports.device.joins == 1)
        #expect(bed.server.connectionCount == 0 || !client.isClosed)
        // It says nothing more, and may not stay.
        try await bed.wait("its time is over") { client.isClosed && bed.server.connectionCount == 0 }
    }

    @Test("row 16: a client that goes away while the device decides is taken leave of at once")
    func joinersThatLeave() async throws {
        let bed = try Bed()
        let client = bed.connect()
        client.go("undecided")
        try await bed.wait("it joins") { bed.exports.device.joins == 1 }
        client.hangUp()
        try await bed.wait("it is left") { bed.exports.device.leaves == 1 && bed.server.connectionCount == 0 }
        // Too late.
        bed.loop.post { bed.exports.device.decide() }
        await bed.sleep(ms: 50)
        #expect(bed.exports.device.leaves == 1)
    }

    @Test("row 32: connections that are refused make two lines, however many they are")
    func refusalsAreToldOnce() throws {
        let now = Mutex<UInt64>(1)
        let loop = Loop(name: "driven", clock: { now.withLock { $0 } })
        var limits = ConnectionLimits()
        limits.connections = 1
        let lines = LogLines()
        let server = ServerContext(
            provider: SlowExports(loop: loop, environment: SystemEnvironment(workers: 1)), loop: loop, limits: limits,
            log: Logger(label: "lines") { _ in lines })
        var clients: [FileDescriptor] = []
        func welcome(_ address: String) {
            var ends: [Int32] = [-1, -1]
            let kind = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
            precondition(socketpair(AF_UNIX, kind, 0, &ends) == 0)
            clients = clients.prefix(1) + [FileDescriptor(owning: ends[1])]
            let far = FileDescriptor(owning: ends[0])
            loop.post { server.welcome(far, client: ClientIdentity(address: address, host: address)) }
            loop.step()
        }
        let hour: UInt64 = 3_600_000_000_000
        for _ in 0..<1000 { welcome("greedy") }
        now.withLock { $0 += hour }
        welcome("greedy")
        #expect(lines.all.count == 1)
        #expect(lines.all.first?.hasPrefix("connections refused") == true)
        now.withLock { $0 += hour }
        welcome("other")
        #expect(lines.all.count == 2)
        #expect(lines.all.last == "connections are not refused any more: 1000 were, in 2 h")
    }

    @Test("row 30: the loop that accepts does nothing for what the store is asked")
    func questionsRunElsewhere() async throws {
        let asking = try Loop(name: "asking")
        try asking.start()
        defer { asking.stop() }
        let bed = try Bed(asking: asking)
        let client = bed.connect()
        client.say(option: NBD.OptionCode.list)
        try await bed.wait("it is asked") { bed.exports.isAsked }
        #expect(bed.exports.askedOn === asking)
        client.hangUp()
        try await bed.wait("it is over") { bed.server.connectionCount == 0 && !bed.exports.isAsked }
    }

    @Test("row 32: of too many handshakes the oldest goes of the address that has most")
    func theGreediestGives() async throws {
        let bed = try Bed { $0.handshakes = 8 }
        let honest = bed.connect(from: "honest")
        let crowd = (0..<50).map { _ in bed.connect(from: "greedy") }
        try await bed.wait("the oldest of the crowd have gone") { crowd.prefix(43).allSatisfy { $0.isClosed } }
        #expect(bed.server.connectionCount == 8 && !honest.isClosed)
        #expect(crowd.suffix(7).allSatisfy { !$0.isClosed })
        // Also of those who ask from many addresses, one each.
        let others = (0..<20).map { bed.connect(from: "\($0)") }
        try await bed.wait("there are no more") { crowd.prefix(49).allSatisfy { $0.isClosed } }
        for client in [honest] + crowd + others { client.hangUp() }
    }

    @Test("row 32: one address leaves connections for others")
    func oneAddressLeavesConnections() async throws {
        let bed = try Bed { $0.connections = 8 }
        let crowd = (0..<20).map { _ in bed.connect(from: "greedy") }
        try await bed.wait("some are refused") { crowd.count { $0.isClosed } == 12 }
        #expect(bed.server.connectionCount == 8)
        let others = (0..<16).map { bed.connect(from: "\($0)") }
        try await bed.wait("the others are there") { bed.server.connectionCount == 24 }
        #expect(others.allSatisfy { !$0.isClosed })
        let last = bed.connect(from: "last")
        try await bed.wait("there is an end") { last.isClosed }
        crowd.first { !$0.isClosed }?.hangUp()
        try await bed.wait("its place is free") { bed.server.connectionCount == 23 }
        let next = bed.connect(from: "greedy")
        try await bed.wait("it is taken") { bed.server.connectionCount == 24 }
        #expect(!next.isClosed)
        for client in crowd + others + [last, next] { client.hangUp() }
    }

    @Test("row 36: a listener that ends leaves the socket that has taken its path")
    func anothersPathIsLeftAlone() async throws {
        let bed = try Bed()
        let folder = TestFolder()
        let path = folder.file("s")
        func listener() -> Listener {
            Listener(provider: bed.exports, loop: bed.loop, log: Logger(label: "bed") { _ in SwiftLogNoOpLogHandler() })
        }
        let (first, second) = (listener(), listener())
        try await first.listen(on: .unix(path: path))
        unlink(path)
        try await second.listen(on: .unix(path: path))
        await first.stopAccepting()
        _ = try Sockets.connect(.unix(path: path))
        await second.stopAccepting()
        #expect(access(path, F_OK) != 0)
    }

    // MARK: The bed

    private struct TooLate: Error {}

    private final class Bed: Sendable {
        let loop: Loop
        let environment = SystemEnvironment(workers: 1)
        let exports: SlowExports
        let server: ServerContext

        init(asking: Loop? = nil, _ change: (inout ConnectionLimits) -> Void = { _ in }) throws {
            loop = try Loop(name: "doors")
            try loop.start()
            exports = SlowExports(loop: loop, environment: environment)
            var limits = ConnectionLimits()
            change(&limits)
            let log = Logger(label: "bed") { _ in SwiftLogNoOpLogHandler() }
            server = ServerContext(provider: exports, loop: loop, asking: asking, limits: limits, log: log)
        }

        deinit { loop.stop() }

        func sleep(ms: UInt64) async { await environment.sleep(ns: ms * 1_000_000) }

        func wait(_ what: Comment, until isTrue: () -> Bool) async throws {
            for _ in 0..<300 {
                if isTrue() { return }
                await sleep(ms: 10)
            }
            Issue.record(what)
            throw TooLate()
        }

        func connect(from address: String? = nil) -> RawClient {
            var ends: [Int32] = [-1, -1]
            let kind = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
            precondition(socketpair(AF_UNIX, kind, 0, &ends) == 0)
            let far = FileDescriptor(owning: ends[0])
            let client = address.map { ClientIdentity(address: $0, host: $0) }
            loop.post { [server] in server.welcome(far, client: client) }
            return RawClient(ends[1])
        }
    }

    /// Says what it is told to, and listens to nothing.
    private final class RawClient: Sendable {
        private let socket: FileDescriptor
        private var fd: Int32 { socket.raw }
        init(_ fd: Int32) {
            socket = FileDescriptor(owning: fd)
            send([0, 0, 0, 3])
        }

        private func send(_ bytes: [UInt8]) {
            // The server may have hung up already.
            _ = bytes.withUnsafeBytes { Glibc.send(fd, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
        }

        func say(option: UInt32, _ data: [UInt8] = []) {
            var bytes: [UInt8] = []
            bytes.appendWire(NBD.Magic.option)
            bytes.appendWire(option)
            bytes.appendWire(UInt32(data.count))
            send(bytes + data)
        }

        func go(_ export: String) {
            var data: [UInt8] = []
            data.appendWire(UInt32(export.utf8.count))
            say(option: NBD.OptionCode.go, data + Array(export.utf8) + [0, 0])
        }

        /// Once, whoever hangs up again: the number may be another test's by then.
        func hangUp() { socket.close() }

        /// The server has hung up; what it said before is read over.
        var isClosed: Bool {
            var room = [UInt8](repeating: 0, count: 4096)
            while true {
                let count = recv(fd, &room, room.count, 0)
                if count == 0 { return true }
                if count < 0 { return errno != EAGAIN }
            }
        }
    }

    /// `late` is granted one second after it was asked for, whoever has gone.
    private final class SlowExports: ExportProvider, Sendable {
        final class Grant: Sendable {
            let onEnd: @Sendable () -> Void
            init(onEnd: @escaping @Sendable () -> Void) { self.onEnd = onEnd }
            deinit { onEnd() }
        }

        private let counts = Mutex((asked: 0, granted: 0, lapsed: 0))
        private let loop: Loop
        private let environment: SystemEnvironment
        let device = UndecidedDevice()

        init(loop: Loop, environment: SystemEnvironment) {
            self.loop = loop
            self.environment = environment
        }

        private let place = Mutex<Loop?>(nil)
        /// The loop on which the list was asked for last.
        var askedOn: Loop? { place.withLock { $0 } }
        var isAsked: Bool { counts.withLock { $0.asked > 0 } }
        var granted: Int { counts.withLock { $0.granted } }
        var lapsed: Int { counts.withLock { $0.lapsed } }

        func list() async throws(AttachError) -> [ExportInfo] {
            counts.withLock { $0.asked += 1 }
            place.withLock { $0 = Loop.current }
            await environment.sleep(ns: 60_000_000_000)
            counts.withLock { $0.asked -= 1 }
            return []
        }

        func describe(_ exportName: String) async throws(AttachError) -> ExportInfo {
            throw AttachError(.unknown, "no export")
        }

        func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
            if exportName == "late" {
                await Task { await environment.sleep(ns: 1_000_000_000) }.value
                counts.withLock { $0.granted += 1 }
            }
            if exportName == "refusing" {
                loop.post { [loop, device] in
                    loop.after(ns: 600_000_000) { device.decide(AttachError(.refused, "not you")) }
                }
            }
            return AttachedDevice(
                device: device, loop: loop, admission: Grant { [self] in counts.withLock { $0.lapsed += 1 } })
        }
    }

    /// Lets those who join wait until it is told what to answer.
    private final class UndecidedDevice: BlockDevice, @unchecked Sendable {  // `waiting` is touched on the loop only
        let sizeBytes: UInt64 = 1 << 20
        let isReadOnly = false
        private let counts = Mutex((joins: 0, leaves: 0))
        var joins: Int { counts.withLock { $0.joins } }
        var leaves: Int { counts.withLock { $0.leaves } }

        func decide(_ error: AttachError? = nil) {
            let all = waiting
            waiting = []
            for one in all { one(error) }
        }
        private var waiting: [(AttachError?) -> Void] = []

        func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline { .later }
        func tryWrite(
            offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
        ) -> Inline { .later }
        func endTurn(client: any DeviceClient) -> TurnEnd { .acknowledged }
        func submit(_ request: DeviceRequest) {}
        func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
            counts.withLock { $0.joins += 1 }
            waiting.append(ready)
        }
        func leave(_ client: any DeviceClient, clean: Bool) { counts.withLock { $0.leaves += 1 } }
    }
}
