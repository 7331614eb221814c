// The far end of a connection. Each reply is for a request that is open, whole, of the form that was agreed, with the bytes
// that the disk holds, and true: it tells a success if and only if the disk has done what was asked.

import Glibc
import Logging
@testable import Margarine
import NBDProtocol
import Runtime
import Testing

final class StressClient: @unchecked Sendable {  // used by one thread
    private struct Request {
        let command: NBD.Command
        let offset: UInt64
        let lengthBytes: Int
        /// Bytes of a READ that have come.
        var received = 0
    }

    let isStructured: Bool
    var connection: Connection?
    let log: Logger
    private let lines = LogLines()
    private let device: StressDevice
    private let fault: StressFault
    private let socket: FileDescriptor
    private let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 8)

    /// Not sent yet, from `sentBytes` on.
    private var output: [UInt8] = []
    private var sentBytes = 0
    /// Received, and not a whole reply yet.
    private var input: [UInt8] = []
    private var open: [UInt64: Request] = [:]
    private(set) var movedBytes = 0

    /// How the reasons begin for which its connection may end.
    var expected: [String] = []
    /// The server was asked to finish with it: what it had not read by then is not answered, and what is asked for from then
    /// on, `late`, never carried out.
    var isDrained = false
    private var late: Set<UInt64> = []
    private(set) var isOver = false
    private var hasDisconnected = false
    private var hasHungUp = false
    private var saysNoMore = false
    private var hasFinished = false
    /// No nonsense comes behind DISC.
    private var endsWithDisconnect = false
    private var isAtEnd = false

    init(_ socket: FileDescriptor, isStructured: Bool, _ device: StressDevice, _ fault: StressFault) {
        self.socket = socket
        self.isStructured = isStructured
        self.device = device
        self.fault = fault
        var log = Logger(label: "client") { [lines] _ in lines }
        log.logLevel = .info
        self.log = log
    }

    deinit { room.deallocate() }

    // MARK: What the run asks

    func ask(
        _ command: NBD.Command, _ flags: NBD.CommandFlags, _ cookie: UInt64, lengthBytes: Int, isInside: Bool
    ) {
        guard !saysNoMore, output.count < 8 << 20, command != .blockStatus || isStructured else { return }
        let isFlush = command == .flush
        let length = isFlush ? 0 : lengthBytes
        let offset = isFlush ? 0 : isInside ? cookie * StressDevice.bytesPerRequest : device.sizeBytes
        output.appendRequest(command, flags: flags, cookie: cookie, offset: offset, lengthBytes: length)
        if command == .write { output += StressContent.at(offset, length) }
        open[cookie] = Request(command: command, offset: offset, lengthBytes: length)
        if isDrained { late.insert(cookie) }
    }

    func disconnect() {
        if saysNoMore { return }
        saysNoMore = true
        hasDisconnected = true
        endsWithDisconnect = true
        output.appendRequest(.disconnect, cookie: 0, offset: 0, lengthBytes: 0)
    }

    /// Also behind DISC, where nobody reads it.
    func sayNonsense(_ count: Int) {
        saysNoMore = true
        endsWithDisconnect = false
        expected.append("a request without NBD_REQUEST_MAGIC")
        output += [UInt8](repeating: 0x41, count: count)
    }

    func hangUp() {
        hasHungUp = true
        expected += ["the client hung up", "the client went away", "sending", "receiving"]
        close()
    }

    /// It has said all it has to say, and still listens. Behind DISC that is no reason to end.
    func sayNoMore() {
        guard output.isEmpty, socket.raw >= 0 else { return }
        saysNoMore = true
        hasFinished = true
        if !endsWithDisconnect { expected += ["the client hung up", "the client went away"] }
        _ = shutdown(socket.raw, Int32(SHUT_WR))
    }

    func closeAtEnd() { if isAtEnd { close() } }

    /// A child that another test is starting may hold the socket a moment longer.
    private func close() {
        if socket.raw >= 0 { _ = shutdown(socket.raw, Int32(SHUT_RDWR)) }
        socket.close()
    }

    /// The connection says so.
    func ended() {
        if isOver { fault.found("a connection ended twice") }
        isOver = true
    }

    func send(_ atMost: Int) {
        let end = min(output.count, sentBytes + min(atMost, output.count))
        guard socket.raw >= 0, sentBytes < end else { return }
        let sent = output[sentBytes..<end].withUnsafeBytes { Sockets.send(socket.raw, $0) }
        guard case .bytes(let count) = sent else { return }
        sentBytes += count
        movedBytes += count
        guard sentBytes == output.count else { return }
        output.removeAll(keepingCapacity: true)
        sentBytes = 0
    }

    func receive(_ atMost: Int) {
        guard socket.raw >= 0 else { return }
        let part = UnsafeMutableRawBufferPointer(rebasing: room[..<min(atMost, room.count)])
        switch Sockets.receive(socket.raw, into: part) {
        case .bytes(let count):
            movedBytes += count
            input += UnsafeRawBufferPointer(rebasing: room[..<count])
            takeReplies()
        case .wouldBlock: break
        case .closed, .failed: isAtEnd = true
        }
    }

    // MARK: Judgement

    /// Nothing is to be waited for any more.
    var isSettled: Bool {
        if isOver { return isAtEnd || hasHungUp }
        // Who sends no whole request any more does not hear that the disk has gone.
        let mustEnd = isDrained && !(device.isGone && saysNoMore)
        return open.isEmpty && output.isEmpty && !hasDisconnected && !hasHungUp && !hasFinished && !mustEnd
    }

    /// When all has settled.
    func judge() {
        let reasons = lines.values(of: "reason")
        // Its DISC was behind what is not looked at any more.
        if isDrained, hasFinished { expected.append("the client went away") }
        if let reason = reasons.first(where: { reason in !expected.contains { reason.hasPrefix($0) } }) {
            fault.found("a connection ended: \(reason)")
        }
        if isOver, reasons.isEmpty, !hasDisconnected, !isDrained { fault.found("a connection ended without a word") }
        if !late.isDisjoint(with: device.done) { fault.found("what came after the drain was carried out") }
        if !isSettled {
            let unsent = output.count - sentBytes
            fault.found("nothing moves any more, \(open.count) requests are open, \(unsent) bytes unsent")
        }
        if !open.isEmpty, reasons.isEmpty, !isDrained, !hasHungUp {
            fault.found("\(open.count) requests from before DISC were not answered")
        }
    }

    // MARK: Replies

    private func takeReplies() {
        var at = 0
        while !fault.isFound, let end = takeReply(at) { at = end }
        if at > 0 { input.removeFirst(at) }
    }

    private func wire<T: FixedWidthInteger & BitwiseCopyable>(_ at: Int, as type: T.Type = T.self) -> T {
        input.withUnsafeBytes { T(bigEndian: $0.loadUnaligned(fromByteOffset: at, as: T.self)) }
    }

    /// Where the reply that begins at `at` ends; nil: it is not whole, or wrong.
    private func takeReply(_ at: Int) -> Int? {
        guard input.count - at >= Reply.simpleBytes else { return nil }
        let magic: UInt32 = wire(at)
        guard magic == NBD.Magic.simpleReply || magic == NBD.Magic.structuredReply else {
            fault.found("a reply begins with \(magic)")
            return nil
        }
        let cookie: UInt64 = wire(at + 8)
        guard let request = open[cookie] else {
            fault.found("a reply to \(cookie), which is not open")
            return nil
        }
        return magic == NBD.Magic.simpleReply ? takeSimple(at, cookie, request) : takeChunk(at, cookie, request)
    }

    private func takeSimple(_ at: Int, _ cookie: UInt64, _ request: Request) -> Int? {
        if request.command == .read, isStructured { fault.found("a simple reply to a READ") }
        let error: UInt32 = wire(at + 4)
        let bytes = request.command == .read && error == 0 ? request.lengthBytes : 0
        let end = at + Reply.simpleBytes + bytes
        guard input.count >= end else { return nil }
        checkData(at + Reply.simpleBytes, bytes, request)
        finish(cookie, request, error)
        return end
    }

    private func takeChunk(_ at: Int, _ cookie: UInt64, _ request: Request) -> Int? {
        guard input.count - at >= Reply.chunkBytes else { return nil }
        let body = at + Reply.chunkBytes
        let count = Int(wire(at + 16, as: UInt32.self))
        guard input.count - body >= count else { return nil }
        if !isStructured { fault.found("a structured reply, which was not agreed") }
        var request = request
        var error: UInt32 = 0
        let type: UInt16 = wire(at + 6)
        switch (type, request.command) {
        case (NBD.ChunkType.offsetData, .read) where count > 8:
            checkPlace(body, count - 8, request)
            checkData(body + 8, count - 8, request)
            request.received += count - 8
        case (NBD.ChunkType.offsetHole, .read) where count == 12:
            let bytes = Int(wire(body + 8, as: UInt32.self))
            checkPlace(body, bytes, request)
            if !StressContent.at(request.offset + UInt64(request.received), bytes).allSatisfy({ $0 == 0 }) {
                fault.found("a hole where there are data")
            }
            request.received += bytes
        case (NBD.ChunkType.blockStatus, .blockStatus): checkStatus(body, count, request)
        case (NBD.ChunkType.error, _) where count >= 6: error = wire(body)
        case (NBD.ChunkType.none, _) where count == 0: break
        default: fault.found("a chunk of type \(type), \(count) bytes, in reply to \(request.command)")
        }
        open[cookie] = request
        if wire(at + 4) & NBD.chunkDone != 0 {
            if request.command == .read, error == 0, request.received != request.lengthBytes {
                fault.found("\(request.received) bytes of \(request.lengthBytes) were read")
            }
            finish(cookie, request, error)
        }
        return body + count
    }

    /// This server sends a reply's chunks in the order of their bytes; the protocol would allow another one.
    private func checkPlace(_ at: Int, _ bytes: Int, _ request: Request) {
        if wire(at) != request.offset + UInt64(request.received) || request.received + bytes > request.lengthBytes {
            fault.found("a chunk is out of its place")
        }
    }

    private func checkData(_ at: Int, _ count: Int, _ request: Request) {
        let isRight = input[at..<at + count].withUnsafeBytes { bytes in
            bytes.baseAddress.map { StressContent.isAt(request.offset + UInt64(request.received), count, $0) }
        }
        if isRight == false { fault.found("wrong bytes in the reply to the READ at \(request.offset)") }
    }

    private func checkStatus(_ at: Int, _ count: Int, _ request: Request) {
        var bytes = 0
        for descriptor in 0..<(count - 4) / Reply.descriptorBytes {
            let place = at + 4 + descriptor * Reply.descriptorBytes
            let isRight =
                wire(place) == UInt32(min(Int(StressContent.extentBytes), request.lengthBytes - bytes))
                && wire(place + 4) == UInt32(descriptor % 2 == 1 ? 3 : 0)
            if !isRight { return fault.found("wrong extents") }
            bytes += Int(wire(place, as: UInt32.self))
        }
        if bytes != request.lengthBytes || wire(at) != NBD.allocationContextID { fault.found("wrong block status") }
    }

    private func finish(_ cookie: UInt64, _ request: Request, _ error: UInt32) {
        open[cookie] = nil
        if error == NBD.ErrorCode.shutdown.rawValue { fault.found("ESHUTDOWN") }
        let isNothing = request.lengthBytes == 0 && request.command != .flush && request.command != .blockStatus
        if late.contains(cookie), !device.isGone { fault.found("an answer to what came after the drain") }
        if device.done.contains(cookie) || isNothing {
            if error != 0 { fault.found("error \(error) for a \(request.command) that was done") }
        } else if error == 0 {
            fault.found("success for a \(request.command) that was not done")
        }
    }
}
