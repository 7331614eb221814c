// Connections over socket pairs on a loop without a thread: what clients, device and clock do next comes from a seed.
// Whatever it is, each request is answered once and truly, or its connection ends for a reason that it tells; nobody waits
// for ever, and at the end all memory is back. `StressClient` looks at the replies, `StressDevice` at what comes to the disk.
//
// The clock is the test's own, and nothing waits: a slow machine takes the same steps.

import Glibc
import Logging
@testable import Margarine
import NBDProtocol
import Runtime
import Synchronization
import Testing

@Suite struct ConnectionStressTests {
    /// Some of them hang where a READ does not ask for its reply and its buffer together (0, 4, 6, 8 …), and where somebody who
    /// waits keeps what an earlier request did not need (22, 27, 44, 52), or his received bytes count in that (552).
    /// One by one, so that the seed is known of a crash too.
    @Test(.serialized, arguments: Array(0..<60) + [552])
    func everyRequestIsAnsweredAndAllMemoryComesBack(seed: UInt64) throws {
        try StressRun(seed).run()
    }

    /// Clients finish, and the server is stopped in the middle, or the disk is gone and says so: nothing that came later is
    /// carried out, nobody is answered ESHUTDOWN, and every connection ends.
    @Test(.serialized, arguments: Array(StressRun.endingFrom..<StressRun.endingFrom + 60))
    func everyConnectionEndsWithTheServer(seed: UInt64) throws {
        try StressRun(seed).run()
    }
}

/// The first thing that was not as it should be: what comes behind it is its consequence.
final class StressFault {
    private let seed: UInt64
    private(set) var isFound = false
    init(seed: UInt64) { self.seed = seed }

    func found(_ what: String) {
        if isFound { return }
        isFound = true
        Issue.record("seed \(seed): \(what)")
    }
}

private final class StressRun: @unchecked Sendable {  // used by one thread
    private var random: SeededRandom
    private let fault: StressFault
    private let clock: Clock
    private let loop: Loop
    private let limits: ConnectionLimits
    private let capacity: Int
    private let context: ServerContext
    private let device: StressDevice
    private var clients: [StressClient] = []
    /// Clients hang up, stall and send nonsense; the device disconnects them.
    private let isRough: Bool
    private let isEnding: Bool
    /// In how many steps the server goes, or the disk; from then on nothing new is answered.
    private var stepsLeft: Int
    private let isDiskGone: Bool
    private var isFlushDue = false
    private var lastCookie: UInt64 = 0

    init(_ seed: UInt64) throws {
        var random = SeededRandom(seed)
        let fault = StressFault(seed: seed)
        let clock = Clock()
        loop = Loop(name: "driven", clock: { clock.ns.withLock { $0 } })
        var limits = ConnectionLimits()
        limits.ownBytesPerConnection = random.pick([0, 16 << 10, 128 << 10])
        limits.bytesPerConnection = random.pick([128 << 10, 1 << 20, 64 << 20])
        limits.requestsPerConnection = random.pick([2, 8, 1024])
        limits.turnBytes = random.pick([32 << 10, 1 << 20])
        limits.stallSeconds = random.pick([2, 10])
        // No client that sent DISC loses its last replies because it reads late.
        limits.lingerMs = 100_000
        if random.one(in: 4) { limits.mapsAtMostBytes = 256 << 10 }
        capacity = random.pick([20 << 10, 200 << 10, 2 << 20, 64 << 20])
        isRough = random.one(in: 3)
        isEnding = seed >= Self.endingFrom
        stepsLeft = isEnding && !random.one(in: 4) ? 1 + random.below(50) : .max
        isDiskGone = isEnding && random.one(in: 4)
        context = ServerContext(
            provider: NoExports(), loop: loop, limits: limits, log: Logger(label: "quiet") { _ in LogLines() },
            budgetBytes: capacity)
        device = StressDevice(SeededRandom(seed &+ 1_000_000), fault, disconnects: isRough)
        self.random = random
        self.fault = fault
        self.clock = clock
        self.limits = limits
    }

    func run() throws {
        for _ in 0...random.below(6) { try connect() }
        for _ in 0..<50 + random.below(550) where !fault.isFound { step() }
        settle()
        end()
    }

    private func connect() throws {
        let (near, far) = try Sockets.pair()
        let client = StressClient(near, isStructured: random.one(in: 2), device, fault)
        if isRough { client.expected.append(StressDevice.reason) }
        clients.append(client)
        let group = "\(random.below(3))"
        onLoop { [self] in
            let rules = RequestRules(
                sizeBytes: device.sizeBytes, isReadOnly: false, structuredReplies: client.isStructured,
                allocationContext: client.isStructured)
            let connection = Connection(
                socket: far, share: context.share(of: loop), device: device, rules: rules,
                client: ClientIdentity(address: group, host: group), exportName: "test", log: client.log,
                ended: { [weak client] in client?.ended() })
            device.clients.append(connection)
            client.connection = connection
            connection.start(reply: [])
        }
        advance(10)
        try #require(client.connection != nil)
    }

    // MARK: Steps

    /// Seeds from here on: those below are to find what they found.
    static let endingFrom: UInt64 = 10_000

    private func step() {
        stepsLeft -= 1
        if stepsLeft == 0 { endService() }
        let client = clients[random.below(clients.count)]
        if isEnding, random.one(in: 50) {
            if random.one(in: 2) { client.disconnect() }
            client.send(.max)
            client.sayNoMore()
        }
        switch random.below(20) {
        case 0..<4: ask(client)
        case 4..<8: client.send(random.pick([1, 27, 28, 100, 4 << 10, 64 << 10, 1 << 20]))
        case 8..<11: client.receive(random.pick([16, 4 << 10, 1 << 20]))
        case 11, 12: onLoop { [self] in for _ in 0...random.below(7) { device.completeOne() } }
        case 13: onLoop { [self] in device.journalSome() }
        case 14: pass(ms: random.pick([1, 50, 200]))
        case 15, 16: onLoop { [self] in _ = client.connection?.absorb(isFirst: random.one(in: 3)) }
        case 17: if random.one(in: 20) { client.disconnect() }
        case 18: if isRough, random.one(in: 2) { trouble(client) }
        default: if isRough, random.one(in: 20) { drain(client) }
        }
        loop.descriptorsMayBeReady()
        advance(random.below(4))
    }

    private func ask(_ client: StressClient) {
        let sizes = [0, 512, 4 << 10, 16 << 10, 60 << 10, 192 << 10, 300 << 10, 700 << 10, 1500 << 10]
        let commands: [NBD.Command] = [
            .read, .read, .write, .write, .write, .flush, .trim, .writeZeroes, .cache, .blockStatus,
        ]
        for _ in 0...random.below(11) {
            lastCookie += 1
            let command = random.pick(commands)
            // The small ones more often.
            let size = sizes[min(random.below(sizes.count), random.below(sizes.count))]
            let length = max(0, size + random.below(3) - 1)
            let flags: NBD.CommandFlags = random.one(in: 6) ? .fua : []
            client.ask(command, flags, lastCookie, lengthBytes: length, isInside: !random.one(in: 15))
        }
    }

    private func trouble(_ client: StressClient) {
        switch random.below(8) {
        case 0: client.hangUp()
        case 1: client.sayNonsense(random.below(100))
        case 2:
            onLoop { [self] in client.connection.map(device.disconnect) }
        default: pass(ms: 1000)
        }
    }

    private func drain(_ client: StressClient) {
        onLoop {
            client.connection?.drain()
            client.isDrained = true
        }
    }

    /// The server goes, or the disk: then a connection hears of it by its next request only.
    private func endService() {
        onLoop { [self] in
            device.isGone = isDiskGone
            for client in clients {
                if !isDiskGone { client.connection?.drain() }
                client.isDrained = true
            }
        }
        if isDiskGone { isFlushDue = true }
    }

    private func onLoop(_ work: @escaping @Sendable () -> Void) {
        loop.post(work)
        advance(1 + random.below(5))
    }

    private func advance(_ steps: Int) {
        for _ in 0..<steps where loop.isReady {
            loop.step(timersFirst: random.one(in: 4), messagesFirst: random.one(in: 2))
        }
    }

    private func pass(ms: UInt64) { clock.ns.withLock { $0 += ms * 1_000_000 } }

    // MARK: The end

    /// Everybody sends and reads all he can, and the device finishes everything: then there is nothing to wait for.
    private func settle() {
        let mayStall = clock.ns.withLock { $0 } >= UInt64(limits.stallSeconds - 1) * 1_000_000_000
        if mayStall { for client in clients { client.expected.append("the client was too slow") } }
        if isFlushDue {
            for client in clients { client.ask(.flush, [], lastCookie + 1, lengthBytes: 0, isInside: true) }
        }
        var idleRounds = 0
        var moved = 0
        while idleRounds < 200, !fault.isFound, !clients.allSatisfy(\.isSettled) {
            for client in clients {
                client.send(.max)
                client.receive(1 << 20)
                client.closeAtEnd()
            }
            onLoop { [device] in device.finish() }
            loop.descriptorsMayBeReady()
            advance(50)
            pass(ms: 5)
            let before = moved
            moved = clients.reduce(0) { $0 + $1.movedBytes }
            idleRounds = moved == before ? idleRounds + 1 : 0
        }
        for client in clients { client.judge() }
    }

    private func end() {
        for client in clients { client.hangUp() }
        for _ in 0..<20 {
            loop.descriptorsMayBeReady()
            onLoop { [device] in device.finish() }
            advance(100)
            pass(ms: 10_000)
        }
        if !clients.allSatisfy(\.isOver) { fault.found("a connection is not over though its client hung up") }
        if !device.clients.isEmpty { fault.found("the device was not left") }
        let lost = capacity - context.availableBytes
        if lost != 0 { fault.found("\(lost) bytes of \(capacity) did not come back") }
        for client in clients { client.connection = nil }
    }

    private final class Clock: Sendable {
        let ns = Mutex<UInt64>(1)
    }
}

extension SeededRandom {
    mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &self) }
    mutating func one(in count: Int) -> Bool { below(count) == 0 }
    mutating func pick<T>(_ choices: [T]) -> T { choices[below(choices.count)] }
}
