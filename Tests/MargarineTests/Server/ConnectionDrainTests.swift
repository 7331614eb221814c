// Connections that end because their server goes: what they still hear, and what they wait for no more.

import Glibc
import Logging
@testable import Margarine
import NBDProtocol
import Runtime
import Testing

@Suite struct ConnectionDrainTests {
    /// Its end was taken for a broken one, and with no window to come back within, all was undone that had no safe point.
    @Test(arguments: [false, true])
    func aGoodbyeThatHasArrivedIsHeard(isLate: Bool) throws {
        let bed = try Bed()
        bed.send(.flush)
        bed.run()
        bed.run { bed.connection?.drain() }
        #expect(bed.device.left == [], "one is under way")
        // The loop hears first that it is finished, then that there is more to read.
        bed.send(isLate ? .flush : .disconnect)
        bed.loop.post { bed.device.release() }
        bed.loop.step(messagesFirst: true)
        bed.run()
        #expect(bed.device.left == [!isLate])
        #expect(bed.device.count == 1, "what came late is not carried out")
        #expect(bed.received() == Reply.simpleBytes)
        #expect(bed.isAtEnd)
    }

    /// After a request that is left without an answer nothing was read any more, and that its client had gone was not seen.
    @Test func aClientThatGoesIsNotWaitedFor() throws {
        let bed = try Bed()
        bed.send(.flush)
        bed.run()
        bed.run { bed.connection?.drain() }
        bed.send(.flush)
        bed.run()
        #expect(bed.device.left == [], "one is under way")
        shutdown(bed.near.raw, Int32(SHUT_WR))
        bed.run()
        #expect(bed.device.left == [false])
        bed.run { bed.device.release() }
    }

    /// It stood in line for what it would not have used, and the drain took as long as those who had the memory; be it for a
    /// request that was not begun, or for the rest of a payload.
    @Test(arguments: [false, true])
    func nobodyWaitsForMemory(isBegun: Bool) throws {
        let bed = try Bed()
        if !isBegun { bed.fill() }
        bed.send(.write, 600 << 10, of: isBegun ? 10 << 10 : 600 << 10)
        bed.run()
        if isBegun {
            bed.fill()
            bed.send(payload: 590 << 10)
            bed.run()
        }
        #expect(bed.connection?.pause == .budget)
        bed.run { bed.connection?.drain() }
        #expect(bed.device.left == [false])
        #expect(bed.device.count == 0)
        #expect(bed.context.availableBytes == -Bed.capacity, "the others have it all, and nobody else any")
    }

    /// A device that has gone and does not end its connections itself.
    @Test func aDeviceThatIsGoneIsAnsweredForByTheEnd() throws {
        let bed = try Bed()
        bed.send(.flush)
        bed.send(.read, 4 << 10)
        bed.run()
        bed.run { bed.device.release(.shutdown) }
        #expect(bed.received() == 0)
        #expect(bed.device.left == [false])
        #expect(bed.isAtEnd)
    }

    // MARK: The bed

    /// One connection on a loop without a thread.
    private final class Bed: @unchecked Sendable {  // used by one thread
        let loop = Loop(name: "driven", clock: { 1 })
        let context: ServerContext
        let device = PatientDevice()
        let near: FileDescriptor
        private(set) var connection: Connection?
        var budget: RequestBudget { share.budget }
        private var share: LoopShare!

        static let capacity = 4 << 20

        init() throws {
            let quiet = Logger(label: "quiet") { _ in SwiftLogNoOpLogHandler() }
            var limits = ConnectionLimits()
            limits.ownBytesPerConnection = 0
            context = ServerContext(
                provider: NoExports(), loop: loop, limits: limits, log: quiet, budgetBytes: Self.capacity)
            let (near, far) = try Sockets.pair()
            self.near = near
            run { [self] in
                share = context.share(of: loop)
                let rules = RequestRules(
                    sizeBytes: 1 << 30, isReadOnly: false, structuredReplies: false, allocationContext: false)
                let made = Connection(
                    socket: far, share: share, device: device, rules: rules,
                    client: ClientIdentity(address: "test", host: "test"), exportName: "test", log: quiet, ended: {})
                made.start(reply: [])
                connection = made
            }
        }

        func run(_ work: @escaping @Sendable () -> Void = {}) {
            loop.post(work)
            loop.descriptorsMayBeReady()
            for _ in 0..<100 where loop.isReady { loop.step() }
        }

        /// Others have all memory, and the exception, and wait for more.
        func fill() {
            budget.force(Self.capacity, budget.open("others"))
            for name in ["the exception", "in line"] {
                _ = budget.wait(Self.capacity, budget.open(name), granted: {})
            }
        }

        /// The header of a request, and the first `count` bytes of its payload, as the socket takes them.
        func send(_ command: NBD.Command, _ length: Int = 0, of count: Int = 0) {
            var bytes: [UInt8] = []
            bytes.appendRequest(command, cookie: 7, offset: 0, lengthBytes: length)
            send(bytes)
            send(payload: count)
        }

        func send(payload count: Int) { send([UInt8](repeating: 1, count: count)) }

        private func send(_ bytes: [UInt8]) {
            var rest = bytes[...]
            var isFull = false
            while !rest.isEmpty {
                if case .bytes(let sent) = rest.withUnsafeBytes({ Sockets.send(near.raw, $0) }) {
                    rest = rest.dropFirst(sent)
                    isFull = false
                } else if isFull {
                    return
                } else {
                    isFull = true
                    run()
                }
            }
        }

        func received() -> Int {
            if case .bytes(let count) = receive() { count } else { 0 }
        }

        var isAtEnd: Bool {
            if case .closed = receive() { true } else { false }
        }

        private func receive() -> IOResult {
            withUnsafeTemporaryAllocation(byteCount: 1 << 16, alignment: 8) { Sockets.receive(near.raw, into: $0) }
        }
    }

    /// Carries out nothing before `release`.
    private final class PatientDevice: BlockDevice, @unchecked Sendable {  // used by one thread
        let sizeBytes: UInt64 = 1 << 30
        let isReadOnly = false
        private var held: [DeviceRequest] = []
        private(set) var count = 0
        /// For each connection that left whether it did so cleanly.
        private(set) var left: [Bool] = []

        func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline { .later }
        func tryWrite(
            offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
        ) -> Inline { .later }
        func endTurn(client: any DeviceClient) -> TurnEnd { .acknowledged }
        func submit(_ request: DeviceRequest) {
            held.append(request)
            count += 1
        }
        func release(_ error: DeviceError? = nil) {
            let done = held
            held = []
            for request in done {
                request.error = error
                request.client.completed(request)
            }
        }
        func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {}
        func leave(_ client: any DeviceClient, clean: Bool) { left.append(clean) }
    }
}
