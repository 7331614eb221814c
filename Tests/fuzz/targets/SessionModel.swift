// A session as the protocol document has it (github.com/NetworkBlockDevice/nbd, doc/proto.md): what must come back for what a
// client says. Nothing here is the server's; numbers are the document's.

/// What is owed for one request.
enum ExpectedReply {
    case done
    case error(UInt32)
    case data(offset: UInt64, bytes: [UInt8], inOneChunk: Bool)
    case status([(lengthBytes: UInt32, flags: UInt32)])
}

/// What is owed in the handshake, in this order.
enum ExpectedOption {
    /// A reply of this type; with these data where they are not only words.
    case reply(option: UInt32, type: UInt32, data: [UInt8]?)
    /// The bare answer to EXPORT_NAME.
    case bare([UInt8])
}

struct SessionModel {
    enum Ending {
        /// The server waits for more.
        case waits
        /// It has closed; everything owed was sent.
        case closes
        /// It has closed on a fault of the client; answers under way may be lost.
        case breaks
    }

    static let tightOptionBytes = 64
    static let tightSkippedBytes = 256
    static let tightOptions = 6

    /// What is sent: as given, but for the cookies, which are numbered so that answers can be told apart.
    private(set) var stream: [UInt8]
    private(set) var options: [ExpectedOption] = []
    /// By cookie.
    private(set) var replies: [ExpectedReply] = []
    private(set) var ending = Ending.waits
    private(set) var structured = false

    private let mode: SessionMode
    private var at = 0
    private var noZeroes = false
    private var contextName: String?
    private var hasContext = false
    private var isReadOnly = false
    private let disk = SessionMemory.model

    init(_ stream: [UInt8], mode: SessionMode) {
        self.stream = stream
        self.mode = mode
        disk.reset()
    }

    private var left: Int { stream.count - at }

    private func number(_ offset: Int, bytes: Int) -> UInt64 {
        stream[at + offset..<at + offset + bytes].reduce(0) { $0 << 8 | UInt64($1) }
    }

    private mutating func put(_ value: UInt64, _ offset: Int, bytes: Int) {
        for index in 0..<bytes {
            stream[at + offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (bytes - 1 - index)))
        }
    }

    mutating func read() {
        guard left >= 4 else { return }
        let flags = number(0, bytes: 4)
        guard flags & ~3 == 0 else {
            ending = .breaks
            return
        }
        noZeroes = flags & 2 != 0
        at = 4
        var isOver = false
        var count = 0
        while !isOver { isOver = readOption(&count) }
    }

    // MARK: Options

    /// True when there are no more.
    private mutating func readOption(_ count: inout Int) -> Bool {
        guard left >= 16 else { return true }
        if mode.contains(.repaired) { put(0x4948_4156_454f_5054, 0, bytes: 8) }
        guard number(0, bytes: 8) == 0x4948_4156_454f_5054 else { return breaks() }
        let option = UInt32(number(8, bytes: 4))
        let length = Int(number(12, bytes: 4))
        count += 1
        let isTight = mode.contains(.tight)
        if count > (isTight ? Self.tightOptions : 256) { return breaks() }
        let isLong = length > (isTight ? Self.tightOptionBytes : 64 << 10)
        if isLong, option == 1 || length > (isTight ? Self.tightSkippedBytes : 32 << 20) { return breaks() }
        guard left >= 16 + length else { return true }
        let data = Array(stream[at + 16..<at + 16 + length])
        at += 16 + length
        if isLong {
            refuse(option, Self.isKnown(option) ? 0x8000_0009 : 0x8000_0001)
            return false
        }
        switch option {
        case 1: return exportName(data)
        case 2:
            options.append(.reply(option: 2, type: 1, data: []))
            ending = .closes
            return true
        case 3: if data.isEmpty { list() } else { refuse(3, 0x8000_0003) }
        case 6, 7: return infoOrGo(option, data)
        case 8:
            if data.isEmpty { structured = true }
            if data.isEmpty { acknowledge(8) } else { refuse(8, 0x8000_0003) }
        case 9, 10: contexts(option, data)
        default: refuse(option, 0x8000_0001)
        }
        return false
    }

    private static func isKnown(_ option: UInt32) -> Bool { [1, 2, 3, 6, 7, 8, 9, 10].contains(option) }

    private mutating func breaks() -> Bool {
        ending = .breaks
        return true
    }

    private mutating func refuse(_ option: UInt32, _ type: UInt32) {
        options.append(.reply(option: option, type: type, data: nil))
    }

    private mutating func acknowledge(_ option: UInt32) { options.append(.reply(option: option, type: 1, data: [])) }

    private static func wire<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
        stride(from: T.bitWidth - 8, through: 0, by: -8).map { UInt8(truncatingIfNeeded: value >> T($0)) }
    }

    /// "A string ... UTF-8 ... MUST NOT contain NUL ... no longer than 4096 bytes".
    private static func text(_ bytes: some Collection<UInt8>) -> String? {
        guard bytes.count <= 4096, !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }

    private static func flags(readOnly: Bool, structured: Bool) -> UInt16 {
        // HAS_FLAGS, FLUSH, FUA, MULTI_CONN, CACHE; READ_ONLY or TRIM, WRITE_ZEROES, FAST_ZERO; DF.
        0x1 | 0x4 | 0x8 | 0x100 | 0x400 | (readOnly ? 0x2 : 0x20 | 0x40 | 0x800) | (structured ? 0x80 : 0)
    }

    private mutating func exportName(_ data: [UInt8]) -> Bool {
        guard let text = Self.text(data), let name = SessionExports.find(text), name != "lapsed" else {
            return breaks()
        }
        let bare =
            Self.wire(UInt64(SessionDevice.size))
            + Self.wire(Self.flags(readOnly: name == "ro", structured: structured))
        options.append(.bare(bare + [UInt8](repeating: 0, count: noZeroes ? 0 : 124)))
        return transmit(text, name)
    }

    private mutating func list() {
        for name in SessionExports.names {
            let bytes = Array(name.utf8)
            options.append(
                .reply(
                    option: 3, type: 2, data: Self.wire(UInt32(bytes.count)) + bytes + Array("the export \(name)".utf8))
            )
        }
        acknowledge(3)
    }

    private mutating func infoOrGo(_ option: UInt32, _ data: [UInt8]) -> Bool {
        func size(_ at: Int, _ count: Int) -> Int { data[at..<at + count].reduce(0) { $0 << 8 | Int($1) } }
        guard data.count >= 6, case let length = size(0, 4), data.count >= 6 + length,
            let text = Self.text(data[4..<4 + length]), case let asked = size(4 + length, 2),
            data.count == 6 + length + 2 * asked
        else {
            refuse(option, 0x8000_0003)
            return false
        }
        guard let name = SessionExports.find(text) else {
            refuse(option, 0x8000_0006)
            return false
        }
        if option == 7, name == "lapsed" {
            refuse(7, 0x8000_0002)
            return false
        }
        let infos = Set((0..<asked).map { size(6 + length + 2 * $0, 2) })
        let flags = Self.flags(readOnly: name == "ro", structured: structured)
        func info(_ code: UInt16, _ bytes: [UInt8]) {
            options.append(.reply(option: option, type: 3, data: Self.wire(code) + bytes))
        }
        info(0, Self.wire(UInt64(SessionDevice.size)) + Self.wire(flags))
        if infos.contains(1) { info(1, Array(name.utf8)) }
        if infos.contains(2) { info(2, Array("the export \(name)".utf8)) }
        if infos.contains(3) { info(3, Self.wire(UInt32(1)) + Self.wire(UInt32(4096)) + Self.wire(UInt32(32 << 20))) }
        acknowledge(option)
        return option == 7 ? transmit(text, name) : false
    }

    private mutating func contexts(_ option: UInt32, _ data: [UInt8]) {
        func size(_ at: Int) -> Int { data[at..<at + 4].reduce(0) { $0 << 8 | Int($1) } }
        var queries: [String] = []
        var isRight = false
        var export = ""
        if data.count >= 8, case let length = size(0), data.count >= 8 + length,
            let text = Self.text(data[4..<4 + length])
        {
            export = text
            var place = 8 + length
            isRight = true
            for _ in 0..<size(4 + length) {
                guard data.count - place >= 4, case let bytes = size(place), data.count - place - 4 >= bytes,
                    let query = Self.text(data[place + 4..<place + 4 + bytes])
                else {
                    isRight = false
                    break
                }
                queries.append(query)
                place += 4 + bytes
            }
            if place != data.count { isRight = false }
        }
        let isSet = option == 10
        guard isRight else { return refuse(option, 0x8000_0003) }
        if isSet { contextName = nil }
        if isSet, !structured { return refuse(option, 0x8000_0003) }
        guard SessionExports.find(export) != nil else { return refuse(option, 0x8000_0006) }
        let isNamed = queries.contains("base:allocation")
        if isSet ? isNamed : isNamed || queries.isEmpty || queries.contains("base:") {
            let number: UInt32 = isSet ? 1 : 0
            options.append(.reply(option: option, type: 4, data: Self.wire(number) + Array("base:allocation".utf8)))
        }
        if isSet, isNamed { contextName = export }
        acknowledge(option)
    }

    // MARK: Requests

    private mutating func transmit(_ text: String, _ name: String) -> Bool {
        isReadOnly = name == "ro"
        hasContext = contextName == text
        while readRequest() {}
        return true
    }

    /// False when there are no more.
    private mutating func readRequest() -> Bool {
        guard left >= 28 else { return false }
        if mode.contains(.repaired) { put(0x2560_9513, 0, bytes: 4) }
        guard number(0, bytes: 4) == 0x2560_9513 else { return !breaks() }
        let flags = UInt16(number(4, bytes: 2))
        let type = number(6, bytes: 2)
        let offset = number(16, bytes: 8)
        let length = Int(number(24, bytes: 4))
        put(UInt64(replies.count), 8, bytes: 8)
        let payload = type == 1 ? length : 0
        let reply = judge(type, flags, offset, length)
        if type == 2 {
            ending = .closes
            return false
        }
        // More than the server is ready to throw away.
        if case .error = reply, payload > 64 << 20 { return !breaks() }
        guard left - 28 >= payload else { return false }
        let start = Int(truncatingIfNeeded: offset)
        if case .done = reply {
            switch type {
            case 1: stream.withUnsafeBytes { if length > 0 { disk.write(start, $0.baseAddress! + at + 28, length) } }
            case 4, 6: disk.zero(start, length)
            default: break
            }
        }
        replies.append(reply)
        at += 28 + payload
        return true
    }

    private func judge(_ type: UInt64, _ flags: UInt16, _ offset: UInt64, _ length: Int) -> ExpectedReply {
        let invalid = ExpectedReply.error(22)
        // FUA is allowed everywhere; DF, NO_HOLE and FAST_ZERO, REQ_ONE where they mean something.
        let allowed: [UInt64: UInt16] = [0: structured ? 5 : 1, 1: 1, 3: 1, 4: 1, 5: 1, 6: 0x13, 7: 9]
        guard type != 2, let known = allowed[type], flags & ~known == 0 else { return invalid }
        let size = UInt64(SessionDevice.size)
        let isInside = offset <= size && UInt64(length) <= size - offset
        switch type {
        case 3: return offset == 0 && length == 0 ? .done : invalid
        case 0:
            if length > 32 << 20 { return .error(structured ? 75 : 22) }
            if !isInside { return invalid }
            let bytes = Array(UnsafeRawBufferPointer(start: disk.bytes + Int(offset), count: length))
            return .data(offset: offset, bytes: bytes, inOneChunk: flags & 4 != 0)
        case 1:
            if isReadOnly { return .error(1) }
            if length > 32 << 20 { return invalid }
            return isInside ? .done : .error(28)
        case 6: return isReadOnly ? .error(1) : isInside ? .done : .error(28)
        case 4: return isReadOnly ? .error(1) : isInside ? .done : invalid
        case 5: return isInside ? .done : invalid
        default:
            guard hasContext, isInside, length > 0 else { return invalid }
            var runs: [(lengthBytes: UInt32, flags: UInt32)] = []
            var at = offset
            let end = offset + UInt64(length)
            while at < end, runs.isEmpty || flags & 8 == 0 {
                let next = min(end, (at >> 14 + 1) << 14)
                runs.append((UInt32(next - at), SessionDevice.isHole(at: at) ? 3 : 0))
                at = next
            }
            return .status(runs)
        }
    }
}
