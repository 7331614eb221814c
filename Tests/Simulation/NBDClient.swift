// The protocol as a client sees it, written after its document (doc/proto.md of NBD) and not after the server: bytes in,
// events out. It believes nothing: whatever the document does not allow a server is `broken`, and ends it.

import Runtime

@testable import Margarine

final class NBDClient {
    enum Event {
        case send([UInt8])
        case attached
        case refused(AttachError)
        /// A request is answered whole. 0: success.
        case answered(cookie: UInt64, error: UInt32)
        case broken(String)
    }

    /// What the bytes at hand are part of.
    private enum Step {
        case greeting
        case optionReply
        case optionData(code: UInt32, type: UInt32, count: Int)
        case exportName
        case magic
        case simple
        case chunk
        case chunkData(Chunk)
        /// Straight into a request's memory.
        case data(cookie: UInt64, at: Int, left: Int, isLast: Bool)
        case over
    }

    struct Chunk {
        var cookie: UInt64
        var type: UInt16
        var isLast: Bool
        var count: Int
    }

    struct Option {
        var code: UInt32
        var data: [UInt8]
    }

    /// A request that is not answered.
    private struct Pending {
        var request: SimRequest
        var mayFragment = true
        /// Of a READ: what came, as offsets into its memory.
        var parts: [Range<Int>] = []
        /// Of a BLOCK_STATUS.
        var extents: [SimRequest.Extent] = []
        var error: UInt32 = 0
    }

    // What this client does differently from others.
    private let wantsStructured: Bool
    private let wantsContext: Bool
    private let asksFirst: Bool
    private let saysNonsense: Bool
    private let usesExportName: Bool
    private let noZeroes: Bool
    /// Sends all options at once.
    private let isHasty: Bool

    private var step = Step.greeting
    private var input: [UInt8] = []
    private var events: [Event] = []
    private var eventsAt = 0
    private var options: [Option] = []
    /// Of `options`: the one whose reply is awaited.
    private var asked = 0
    private var hasInfo = false
    private var isStructured = false
    private var contextID: UInt32?
    /// Whether it may ask for the status of blocks.
    var hasContext: Bool { contextID != nil }
    private(set) var sizeBytes: UInt64 = 0
    private var pending: [UInt64: Pending] = [:]
    private var hasSaidDisconnect = false

    init(_ chance: inout Chance) {
        wantsStructured = !chance.one(in: 3)
        wantsContext = wantsStructured && !chance.one(in: 4)
        asksFirst = chance.one(in: 12)
        saysNonsense = chance.one(in: 12)
        usesExportName = chance.one(in: 12)
        noZeroes = chance.one(in: 2)
        isHasty = chance.one(in: 2)
    }

    func nextEvent() -> Event? {
        guard eventsAt < events.count else {
            events.removeAll(keepingCapacity: true)
            eventsAt = 0
            return nil
        }
        eventsAt += 1
        return events[eventsAt - 1]
    }

    // MARK: Requests

    func begin(_ export: String) {
        let name = [UInt8](export.utf8)
        var named: [UInt8] = []
        named.put(UInt32(name.count))
        named += name
        if saysNonsense { options.append(Option(code: 0x4d47, data: [1, 2, 3])) }
        if wantsStructured { options.append(Option(code: 8, data: [])) }
        if asksFirst { options.append(Option(code: 6, data: named + [0, 1, 0, 3])) }
        if wantsContext {
            let context = [UInt8]("base:allocation".utf8)
            var data = named
            data.put(UInt32(1))
            data.put(UInt32(context.count))
            options.append(Option(code: 10, data: data + context))
        }
        options.append(usesExportName ? Option(code: 1, data: name) : Option(code: 7, data: named + [0, 0]))
    }

    func encode(_ request: SimRequest, cookie: UInt64, _ chance: inout Chance) -> [UInt8] {
        var flags: UInt16 = request.fua ? 1 : 0
        let type: UInt16
        switch request.kind {
        case .read:
            type = 0
            if isStructured, chance.one(in: 4) { flags |= 4 }
        case .write: type = 1
        case .flush: type = 3
        case .trim: type = 4
        case .cache: type = 5
        case .writeZeroes:
            type = 6
            if chance.one(in: 2) { flags |= 2 }
        case .blockStatus:
            type = 7
            if request.onlyOneExtent { flags |= 8 }
        }
        pending[cookie] = Pending(request: request, mayFragment: flags & 4 == 0)
        let payload = request.kind == .write ? request.lengthBytes : 0
        var bytes: [UInt8] = []
        bytes.reserveCapacity(28 + payload)
        putHeader(&bytes, flags, type, cookie, request.offset, UInt32(request.lengthBytes))
        if payload > 0 { bytes.append(contentsOf: UnsafeRawBufferPointer(start: request.buffer, count: payload)) }
        return bytes
    }

    /// After it the server says nothing more, where all was answered before.
    func encodeDisconnect(_ chance: inout Chance) -> [UInt8] {
        hasSaidDisconnect = pending.isEmpty
        var bytes: [UInt8] = []
        putHeader(&bytes, 0, 2, chance.next(), 0, 0)
        return bytes
    }

    private func putHeader(
        _ bytes: inout [UInt8], _ flags: UInt16, _ type: UInt16, _ cookie: UInt64, _ offset: UInt64, _ length: UInt32
    ) {
        bytes.put(UInt32(0x2560_9513))
        bytes.put(flags)
        bytes.put(type)
        bytes.put(cookie)
        bytes.put(offset)
        bytes.put(length)
    }

    // MARK: Bytes

    /// How many bytes the step at hand takes, before those that go to a request's memory.
    private var wanted: Int {
        switch step {
        case .greeting: 18
        case .optionReply, .chunk: 20
        case .optionData(_, _, let count): count
        case .exportName: noZeroes ? 10 : 134
        case .magic: 4
        case .simple: 16
        case .chunkData(let chunk): chunk.type == 1 ? 8 : chunk.count
        case .data, .over: 0
        }
    }

    func feed(_ bytes: UnsafeRawBufferPointer) {
        var at = 0
        while true {
            switch step {
            case .over: return
            case .data(let cookie, let place, let left, let isLast):
                let count = min(left, bytes.count - at)
                if count > 0, let target = pending[cookie]?.request.buffer {
                    (target + place).copyMemory(from: bytes.baseAddress! + at, byteCount: count)
                }
                at += count
                if count < left {
                    step = .data(cookie: cookie, at: place + count, left: left - count, isLast: isLast)
                    return
                }
                step = .magic
                if isLast { finish(cookie) }
            default:
                let count = min(wanted - input.count, bytes.count - at)
                if count > 0 {
                    if hasSaidDisconnect { return fail("bytes after DISC") }
                    input.append(contentsOf: UnsafeRawBufferPointer(rebasing: bytes[at..<at + count]))
                    at += count
                }
                if input.count < wanted { return }
                let keeps = handle()
                if !keeps { input.removeAll(keepingCapacity: true) }
            }
        }
    }

    private func fail(_ what: String) {
        step = .over
        events.append(.broken(what))
    }

    private func integer<T: FixedWidthInteger & BitwiseCopyable>(_ at: Int, _ type: T.Type = T.self) -> T {
        input.withUnsafeBytes { T(bigEndian: $0.loadUnaligned(fromByteOffset: at, as: T.self)) }
    }

    /// True: the bytes stay, and more of the same message are to come.
    private func handle() -> Bool {
        switch step {
        case .greeting: greeted()
        case .optionReply:
            let code: UInt32 = integer(8)
            let count: UInt32 = integer(16)
            if integer(0, UInt64.self) != 0x0003_e889_0455_65a9 {
                fail("an option reply without its magic")
            } else if asked >= options.count || code != options[asked].code {
                fail("a reply to option \(code), which was not asked")
            } else if count > 8192 {
                fail("an option reply of \(count) bytes")
            } else {
                step = .optionData(code: code, type: integer(12), count: Int(count))
            }
        case .optionData(let code, let type, _): replied(code, type)
        case .exportName:
            if input[10...].contains(where: { $0 != 0 }) { return failed("zeroes that are none") }
            take(size: integer(0), flags: integer(8))
            transmit()
        case .magic:
            switch integer(0, UInt32.self) {
            case 0x6744_6698: step = .simple
            case 0x668e_33ef: step = .chunk
            case let magic: fail("a reply begins with \(String(magic, radix: 16))")
            }
            return true
        case .simple: simpleReply()
        case .chunk: chunkHeader()
        case .chunkData(let chunk): chunkData(chunk)
        case .data, .over: break
        }
        return false
    }

    private func failed(_ what: String) -> Bool {
        fail(what)
        return false
    }

    // MARK: Handshake

    private func greeted() {
        guard integer(0, UInt64.self) == 0x4e42_444d_4147_4943, integer(8, UInt64.self) == 0x4948_4156_454f_5054 else {
            return fail("another greeting")
        }
        guard integer(16, UInt16.self) == 3 else { return fail("other handshake flags") }
        var bytes: [UInt8] = []
        bytes.put(UInt32(noZeroes ? 3 : 1))
        for option in isHasty ? options[...] : options[..<1] { put(option, &bytes) }
        events.append(.send(bytes))
        step = options[0].code == 1 ? .exportName : .optionReply
    }

    private func put(_ option: Option, _ bytes: inout [UInt8]) {
        bytes.put(UInt64(0x4948_4156_454f_5054))
        bytes.put(option.code)
        bytes.put(UInt32(option.data.count))
        bytes += option.data
    }

    private func replied(_ code: UInt32, _ type: UInt32) {
        step = .optionReply
        if type & 0x8000_0000 != 0 {
            if type == 0x8000_0001, code == 0x4d47 { return next() }
            guard let text = String(validating: input, as: UTF8.self) else { return fail("a message that is no text") }
            // What the export is or not, only the last option needs to know.
            switch (code, type) {
            case (6, 0x8000_0002...0x8000_0007), (10, 0x8000_0002...0x8000_0007): return next()
            case (7, 0x8000_0002): events.append(.refused(AttachError(.refused, text)))
            case (7, 0x8000_0004): events.append(.refused(AttachError(.unavailable, text)))
            case (7, 0x8000_0006): events.append(.refused(AttachError(.unknown, text)))
            case (7, 0x8000_0007): events.append(.refused(AttachError(.shutdown, text)))
            default: return fail("option \(code) is refused with \(String(type, radix: 16)): \(text)")
            }
            step = .over
            return
        }
        switch (code, type) {
        case (8, 1):
            guard input.isEmpty else { return fail("an ACK with data") }
            isStructured = true
            next()
        case (6, 1), (10, 1):
            guard input.isEmpty, code == 10 || hasInfo else { return fail("an ACK with data, or without INFO") }
            hasInfo = false
            if code == 10, contextID == nil { return fail("base:allocation is not there") }
            next()
        case (7, 1):
            guard input.isEmpty, hasInfo else { return fail("an ACK with data, or without INFO") }
            transmit()
        case (6, 3), (7, 3):
            guard input.count >= 2 else { return fail("INFO of \(input.count) bytes") }
            switch integer(0, UInt16.self) {
            case 0:
                guard input.count == 12, !hasInfo else { return fail("INFO_EXPORT of \(input.count) bytes, or twice") }
                hasInfo = true
                take(size: integer(2), flags: integer(10))
            case 3:
                guard input.count == 14, integer(2, UInt32.self) == 1 else { return fail("another minimum block size") }
            default: return fail("INFO that was not asked for")
            }
        case (10, 4):
            guard contextID == nil, input.dropFirst(4).elementsEqual("base:allocation".utf8) else {
                return fail("another context")
            }
            contextID = integer(0)
        default: fail("option \(code) is answered \(type)")
        }
    }

    /// The option at hand is answered.
    private func next() {
        asked += 1
        step = options[asked].code == 1 ? .exportName : .optionReply
        if isHasty { return }
        var bytes: [UInt8] = []
        put(options[asked], &bytes)
        events.append(.send(bytes))
    }

    private func take(size: UInt64, flags: UInt16) {
        sizeBytes = size
        // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO; DF with structured replies.
        let expected: UInt16 = 0b1101_0110_1101 | (isStructured ? 0b1000_0000 : 0)
        // READ_ONLY, and nothing that writes.
        let readOnly: UInt16 = 0b101_0000_1111 | (isStructured ? 0b1000_0000 : 0)
        if flags != expected, flags != readOnly { fail("transmission flags \(String(flags, radix: 2))") }
    }

    private func transmit() {
        if case .over = step { return }
        step = .magic
        events.append(.attached)
    }

    // MARK: Replies

    /// An error that a right request may meet: EIO, ENOMEM, ENOSPC. Not ESHUTDOWN: a server that goes hangs up, and what it
    /// has not answered is asked again.
    private func isAllowed(_ error: UInt32) -> Bool { [5, 12, 28].contains(error) }

    private func simpleReply() {
        let error: UInt32 = integer(4)
        let cookie: UInt64 = integer(8)
        guard let waiting = pending[cookie] else { return fail("an answer to \(cookie), which was not asked") }
        if isStructured, waiting.request.kind == .read || waiting.request.kind == .blockStatus {
            return fail("a simple reply to \(waiting.request.kind)")
        }
        step = .magic
        guard error == 0 else {
            guard isAllowed(error) else { return fail("\(waiting.request.kind) fails with \(error)") }
            pending[cookie]?.error = error
            return finish(cookie)
        }
        guard waiting.request.kind == .read, waiting.request.lengthBytes > 0 else { return finish(cookie) }
        pending[cookie]?.parts = [0..<waiting.request.lengthBytes]
        step = .data(cookie: cookie, at: 0, left: waiting.request.lengthBytes, isLast: true)
    }

    private func chunkHeader() {
        let flags: UInt16 = integer(4)
        let chunk = Chunk(
            cookie: integer(8), type: integer(6), isLast: flags == 1, count: Int(integer(16, UInt32.self)))
        guard isStructured else { return fail("a structured reply") }
        guard flags <= 1 else { return fail("chunk flags \(flags)") }
        guard let waiting = pending[chunk.cookie] else {
            return fail("a chunk for \(chunk.cookie), which was not asked")
        }
        let kind = waiting.request.kind
        let isRight =
            switch chunk.type {
            case 0: chunk.isLast && chunk.count == 0
            case 1: kind == .read && chunk.count > 8 && chunk.count <= 8 + waiting.request.lengthBytes
            case 2: kind == .read && chunk.count == 12
            case 5: kind == .blockStatus && contextID != nil && chunk.count >= 12 && chunk.count % 8 == 4
            case 0x8001: chunk.count >= 6 && chunk.count <= 6 + 4096
            default: false
            }
        guard isRight else { return fail("a chunk of type \(chunk.type) with \(chunk.count) bytes for \(kind)") }
        step = .chunkData(chunk)
    }

    private func chunkData(_ chunk: Chunk) {
        guard let waiting = pending[chunk.cookie] else { return fail("a chunk without its request") }
        step = .magic
        switch chunk.type {
        case 1:
            guard let at = part(chunk, waiting, offset: integer(0), chunk.count - 8) else { return }
            step = .data(cookie: chunk.cookie, at: at, left: chunk.count - 8, isLast: chunk.isLast)
            return
        case 2:
            let count = Int(integer(8, UInt32.self))
            guard let at = part(chunk, waiting, offset: integer(0), count) else { return }
            (waiting.request.buffer + at).initializeMemory(as: UInt8.self, repeating: 0, count: count)
        case 5: statusData(chunk, waiting)
        case 0x8001:
            let error: UInt32 = integer(0)
            guard isAllowed(error) else { return fail("\(waiting.request.kind) fails with \(error)") }
            guard Int(integer(4, UInt16.self)) == chunk.count - 6 else { return fail("an error's message is cut") }
            guard waiting.error == 0 else { return fail("two errors") }
            pending[chunk.cookie]?.error = error
        default: break
        }
        if chunk.isLast { finish(chunk.cookie) }
    }

    /// Descriptors of a BLOCK_STATUS: only the last may go on behind the end of what was asked for, and none where one was
    /// asked for.
    private func statusData(_ chunk: Chunk, _ waiting: Pending) {
        let request = waiting.request
        guard integer(0, UInt32.self) == contextID, waiting.extents.isEmpty else {
            return fail("the status of another context, or twice")
        }
        var extents: [SimRequest.Extent] = []
        var left = request.lengthBytes
        for at in stride(from: 4, to: chunk.count, by: 8) {
            let count = Int(integer(at, UInt32.self))
            guard count > 0, left > 0 else { return fail("an extent of \(count) bytes, where \(left) are left") }
            extents.append(.init(lengthBytes: count, flags: integer(at + 4)))
            left -= count
        }
        if request.onlyOneExtent, extents.count != 1 || left < 0 {
            return fail("\(extents.count) extents where one was asked for, \(-left) bytes too long")
        }
        pending[chunk.cookie]?.extents = extents
    }

    /// Counts bytes of a READ as come. nil: they may not.
    private func part(_ chunk: Chunk, _ waiting: Pending, offset: UInt64, _ count: Int) -> Int? {
        let request = waiting.request
        guard count > 0, offset >= request.offset,
            offset + UInt64(count) <= request.offset + UInt64(request.lengthBytes)
        else {
            fail("a chunk of \(offset)+\(count) for a read of \(request.offset)+\(request.lengthBytes)")
            return nil
        }
        let range = Int(offset - request.offset)..<Int(offset - request.offset) + count
        if waiting.parts.contains(where: { $0.overlaps(range) }) {
            fail("bytes that came twice")
            return nil
        }
        if !waiting.mayFragment, range.count != request.lengthBytes {
            fail("a fragment in spite of DF")
            return nil
        }
        pending[chunk.cookie]?.parts.append(range)
        return range.lowerBound
    }

    private func finish(_ cookie: UInt64) {
        guard let done = pending.removeValue(forKey: cookie) else { return }
        let count = done.parts.reduce(0) { $0 + $1.count }
        if done.request.kind == .read, done.error == 0, count != done.request.lengthBytes {
            return fail("\(count) bytes for a read of \(done.request.lengthBytes)")
        }
        if done.request.kind == .blockStatus, done.error == 0 {
            if done.extents.isEmpty { return fail("a status without extents") }
            done.request.extents = done.extents
        }
        events.append(.answered(cookie: cookie, error: done.error))
    }
}

extension [UInt8] {
    /// As it stands on the wire.
    fileprivate mutating func put<T: FixedWidthInteger>(_ value: T) {
        for shift in stride(from: T.bitWidth - 8, through: 0, by: -8) {
            append(UInt8(truncatingIfNeeded: value >> T(shift)))
        }
    }
}
