// What a server said, held against what it owed.

import Glibc

struct SessionReader {
    private let bytes: [UInt8]
    private let model: SessionModel
    private var at = 0
    /// Requests that were answered, and how far the chunked answers are.
    private var answered: Set<UInt64> = []
    private var parts: [UInt64: Part] = [:]

    private struct Part {
        var bytes: [UInt8]
        var isThere: [Bool]
        var chunks = 0
    }

    init(_ bytes: [UInt8], _ model: SessionModel) {
        self.bytes = bytes
        self.model = model
    }

    private var left: Int { bytes.count - at }

    private mutating func number(_ count: Int) throws -> UInt64 {
        try require(left >= count, "an answer is cut short")
        defer { at += count }
        return bytes[at..<at + count].reduce(0) { $0 << 8 | UInt64($1) }
    }

    private mutating func take(_ count: Int) throws -> ArraySlice<UInt8> {
        try require(left >= count, "an answer is cut short")
        defer { at += count }
        return bytes[at..<at + count]
    }

    mutating func check(isClosed: Bool) throws {
        try require(try number(8) == 0x4e42_444d_4147_4943, "no NBDMAGIC")
        try require(try number(8) == 0x4948_4156_454f_5054, "no IHAVEOPT")
        try require(try number(2) == 3, "other handshake flags")
        for (index, expected) in model.options.enumerated() { try option(expected, index) }
        do {
            while left > 0 { try reply() }
        } catch {
            // What was on its way when the client broke the protocol may be cut anywhere.
            guard case .breaks = model.ending, left < 28 else { throw error }
        }
        if case .breaks = model.ending {
        } else {
            let missing = model.replies.indices.filter { !answered.contains(UInt64($0)) }
            try require(missing.isEmpty, "requests \(missing) of \(model.replies.count) were not answered")
        }
        let closes = if case .waits = model.ending { false } else { true }
        try require(isClosed == closes, closes ? "it does not close" : "it closes")
    }

    // MARK: Options

    private mutating func option(_ expected: ExpectedOption, _ index: Int) throws {
        switch expected {
        case .bare(let bytes): try require(isSame(try take(bytes.count), bytes), "another answer to EXPORT_NAME")
        case .reply(let option, let type, let data):
            try require(try number(8) == 0x3e8_8904_5565_a9, "no option reply where number \(index) was due")
            let found = try number(4)
            try require(found == option, "a reply to option \(found), due was one to \(option)")
            let foundType = try number(4)
            try require(foundType == type, "to option \(option) a reply of type \(foundType), due was \(type)")
            let length = Int(try number(4))
            let words = try take(length)
            if let data {
                try require(words.elementsEqual(data), "to option \(option) a reply of type \(type) with other data")
            } else {
                try require(String(validating: words, as: UTF8.self) != nil && length <= 4096, "words that are no text")
            }
        }
    }

    // MARK: Replies

    private func expected(_ cookie: UInt64) throws -> ExpectedReply {
        guard cookie < UInt64(model.replies.count) else {
            throw Finding("an answer to request \(cookie), which there is not")
        }
        try require(!answered.contains(cookie), "request \(cookie) is answered twice")
        return model.replies[Int(cookie)]
    }

    private mutating func reply() throws {
        switch try number(4) {
        case 0x6744_6698: try simple()
        case 0x668e_33ef: try chunk()
        case let magic: throw Finding("0x\(String(magic, radix: 16)) where a reply was due")
        }
    }

    private mutating func simple() throws {
        let error = UInt32(try number(4))
        let cookie = try number(8)
        let due = try expected(cookie)
        answered.insert(cookie)
        switch due {
        case .done: try require(error == 0, "request \(cookie) failed with \(error)")
        case .error(let code):
            try require(!model.structured, "a simple reply to a request that failed")
            try require(error == code, "request \(cookie) ended with \(error), due was \(code)")
        case .data(_, let bytes, _):
            try require(!model.structured, "a simple reply to READ")
            try require(error == 0, "READ \(cookie) failed with \(error)")
            try require(isSame(try take(bytes.count), bytes), "READ \(cookie) has other bytes")
        case .status: throw Finding("a simple reply to BLOCK_STATUS")
        }
    }

    private mutating func chunk() throws {
        try require(model.structured, "a chunk, though structured replies were not negotiated")
        let isLast = try number(2) & 1 == 1
        let type = try number(2)
        let cookie = try number(8)
        let length = Int(try number(4))
        let due = try expected(cookie)
        let end = at + length
        switch (type, due) {
        case (0, .data(_, let bytes, _)): try require(bytes.isEmpty && isLast, "nothing, for a READ of \(bytes.count)")
        case (1, .data(let offset, let bytes, let inOne)), (2, .data(let offset, let bytes, let inOne)):
            let place = try number(8)
            let count = type == 1 ? length - 8 : Int(try number(4))
            try require(count > 0, "an empty chunk")
            try require(place >= offset && Int(place - offset) + count <= bytes.count, "a chunk outside its READ")
            var part =
                parts.removeValue(forKey: cookie)
                ?? Part(
                    bytes: Array(repeating: 0, count: bytes.count), isThere: Array(repeating: false, count: bytes.count)
                )
            let data = type == 1 ? try take(count) : ArraySlice(repeatElement(0, count: count))
            let start = Int(place - offset)
            try require(!part.isThere[start..<start + count].contains(true), "bytes that were sent before")
            part.isThere.replaceSubrange(start..<start + count, with: repeatElement(true, count: count))
            part.bytes.replaceSubrange(start..<start + count, with: data)
            part.chunks += 1
            if isLast {
                try require(!part.isThere.contains(false) && part.bytes == bytes, "READ \(cookie) has other bytes")
                try require(part.chunks == 1 || !inOne, "READ \(cookie) with DF came in \(part.chunks) chunks")
            } else {
                parts[cookie] = part
            }
        case (5, .status(let runs)):
            try require(isLast && length == 4 + 8 * runs.count, "a status of \(length) bytes for \(runs.count) runs")
            try require(try number(4) == 1, "another context")
            for run in runs {
                try require(try number(4) == UInt64(run.lengthBytes), "a run of another length")
                try require(try number(4) == UInt64(run.flags), "a run of another state")
            }
        case (0x8001, .error(let code)):
            try require(isLast, "an error that is not the end")
            let found = try number(4)
            try require(found == UInt64(code), "request \(cookie) ended with \(found), due was \(code)")
            let words = Int(try number(2))
            try require(words == length - 6, "an error of another length")
            try require(String(validating: try take(words), as: UTF8.self) != nil, "an error that is no text")
        default: throw Finding("to request \(cookie) a chunk of type \(type), due was \(due)")
        }
        try require(at == end, "a chunk of another length")
        if isLast { answered.insert(cookie) }
    }

    private func isSame(_ found: ArraySlice<UInt8>, _ due: [UInt8]) -> Bool {
        found.withUnsafeBytes { found in
            due.withUnsafeBytes { due in
                found.count == due.count
                    && (due.isEmpty || memcmp(found.baseAddress!, due.baseAddress!, due.count) == 0)
            }
        }
    }
}
