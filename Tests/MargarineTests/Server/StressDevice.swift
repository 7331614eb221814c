// A disk that answers at once, later or with an error as chance will have it. It knows what it holds at each offset and what
// it has done, so that a wrong byte in a WRITE, and a reply that is not true, are found.

import Glibc
@testable import Margarine
import Runtime

/// What the disk holds: a function of the offset, with runs of zeroes, and long enough that nothing comes again near by.
enum StressContent {
    /// The next prime below the distance of two requests: each begins at another place of `bytes`.
    private static let period = 2_097_143
    private static let bytes: [UInt8] = {
        var random = SeededRandom(1)
        var bytes: [UInt8] = []
        while bytes.count < period { withUnsafeBytes(of: random.next()) { bytes += $0 } }
        bytes.removeLast(bytes.count - period)
        for range in [60 << 10..<230 << 10, 400 << 10..<600 << 10] {
            bytes.replaceSubrange(range, with: repeatElement(0, count: range.count))
        }
        return bytes + bytes
    }()

    /// The content from `offset` on.
    static func at(_ offset: UInt64, _ count: Int) -> ArraySlice<UInt8> {
        let start = Int(offset % UInt64(period))
        return bytes[start..<start + count]
    }

    static func isAt(_ offset: UInt64, _ count: Int, _ found: UnsafeRawPointer) -> Bool {
        at(offset, count).withUnsafeBytes { $0.baseAddress.map { memcmp($0, found, count) == 0 } ?? (count == 0) }
    }

    static func copy(_ offset: UInt64, _ count: Int, to buffer: UnsafeMutableRawPointer) {
        let room = UnsafeMutableRawBufferPointer(start: buffer, count: count)
        at(offset, count).withUnsafeBytes { room.copyMemory(from: $0) }
    }

    /// Data and holes take turns, a page each.
    static let extentBytes: UInt64 = 4096
}

final class StressDevice: BlockDevice, @unchecked Sendable {  // used by one thread
    static let reason = "the test would have it"
    /// Each request has this much to itself: its offset tells its cookie.
    static let bytesPerRequest: UInt64 = 2 << 20
    let sizeBytes: UInt64 = 1 << 40
    let isReadOnly = false

    /// Those that have joined and not left.
    var clients: [any DeviceClient] = []
    private var random: SeededRandom
    private let fault: StressFault
    private let disconnects: Bool
    /// It is gone, and tells so, but does not end its connections.
    var isGone = false
    private var held: [DeviceRequest] = []
    /// Writes taken in the turn under way, and in turns that are not in the journal, by their cookies.
    private var taken: [UInt64] = []
    private var pending: [(turn: UInt64, cookies: [UInt64])] = []
    private var turn: UInt64 = 0
    /// Cookies of the requests that were carried out: a success is told of these only, and of these no error.
    private(set) var done: Set<UInt64> = []

    init(_ random: SeededRandom, _ fault: StressFault, disconnects: Bool) {
        self.random = random
        self.fault = fault
        self.disconnects = disconnects
    }

    private static func cookie(_ offset: UInt64) -> UInt64 { offset / bytesPerRequest }

    // MARK: What connections ask

    func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
        let answer = answerNow()
        if case .done = answer {
            StressContent.copy(offset, lengthBytes, to: buffer)
            done.insert(Self.cookie(offset))
        }
        return answer
    }

    func tryWrite(
        offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
    ) -> Inline {
        check(offset, lengthBytes, buffer)
        checkIsHere(client)
        let answer = answerNow()
        if case .done = answer { taken.append(Self.cookie(offset)) }
        return answer
    }

    private func checkIsHere(_ client: any DeviceClient) {
        if !clients.contains(where: { $0 === client }) { fault.found("a request of a connection that has left") }
    }

    private func answerNow() -> Inline {
        if isGone { return .failed(.shutdown) }
        return switch random.below(10) {
        case 0: .failed(.io)
        case 1..<5: .later
        default: .done
        }
    }

    private func check(_ offset: UInt64, _ count: Int, _ buffer: UnsafeRawPointer) {
        if !StressContent.isAt(offset, count, buffer) { fault.found("wrong bytes in the WRITE at \(offset)") }
    }

    func endTurn(client: any DeviceClient) -> TurnEnd {
        let cookies = taken
        taken = []
        if disconnects, random.one(in: 100) { disconnect(client) }
        if isGone { return .failed(.shutdown) }
        switch random.below(6) {
        case 0: return .failed(.io)
        case 1, 2:
            done.formUnion(cookies)
            return .acknowledged
        default:
            turn += 1
            pending.append((turn, cookies))
            return .pending(turn: turn)
        }
    }

    func submit(_ request: DeviceRequest) {
        if request.kind == .write { checkPayload(request) }
        checkIsHere(request.client)
        held.append(request)
    }

    private func checkPayload(_ request: DeviceRequest) {
        guard let buffer = request.buffer else { return fault.found("a WRITE without a buffer") }
        check(request.offset, Int(request.lengthBytes), buffer)
    }

    func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {}

    func leave(_ client: any DeviceClient, clean: Bool) {
        forget(client)
        if clean, held.contains(where: { $0.client === client }) {
            fault.found("a connection left as clean with requests under way")
        }
    }

    private func forget(_ client: any DeviceClient) {
        let before = clients.count
        clients.removeAll { $0 === client }
        if clients.count != before - 1 { fault.found("a connection left twice") }
    }

    // MARK: What the run asks

    /// One of the requests that were not answered at once.
    func completeOne() {
        if held.isEmpty { return }
        let request = held.remove(at: random.below(held.count))
        // Its bytes are as they were.
        if request.kind == .write { checkPayload(request) }
        if isGone || random.one(in: 10) {
            request.error = isGone ? .shutdown : .io
        } else {
            if request.kind == .read, let buffer = request.buffer {
                StressContent.copy(request.offset, Int(request.lengthBytes), to: buffer)
            }
            if request.kind == .blockStatus { request.extents = extents(request.lengthBytes) }
            done.insert(request.cookie)
        }
        request.client.completed(request)
    }

    private func extents(_ lengthBytes: UInt64) -> [Extent] {
        stride(from: 0, to: lengthBytes, by: Int(StressContent.extentBytes)).map { at in
            let isHole = at / StressContent.extentBytes % 2 == 1
            return Extent(lengthBytes: min(StressContent.extentBytes, lengthBytes - at), isHole: isHole, isZero: isHole)
        }
    }

    /// The oldest turns come to the journal, or fail to.
    func journalSome() {
        guard let last = pending.randomElement(using: &random)?.turn else { return }
        let error: DeviceError? = isGone ? .shutdown : random.one(in: 8) ? .io : nil
        let count = pending.prefix { $0.turn <= last }.count
        if error == nil { for turn in pending[..<count] { done.formUnion(turn.cookies) } }
        pending.removeFirst(count)
        for client in clients { client.journaled(turn: last, error: error) }
    }

    func finish() {
        while !held.isEmpty { completeOne() }
        while !pending.isEmpty { journalSome() }
    }

    func disconnect(_ client: any DeviceClient) {
        guard clients.contains(where: { $0 === client }) else { return }
        forget(client)
        client.disconnect(reason: Self.reason)
    }
}
