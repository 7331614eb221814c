// The small objects that people may want to read: store.json, heads, generation records, heartbeats. One JSON object
// each, whose first members are always the same, so that kind, version and damage are known before anything is used:
//
//     {"margarine":"head","format":1,"checksum":"<XXH3-64 of all bytes after this member's comma>",...}
//
// Always holds: what `open` returns was written whole by `seal`, and holds no member that this version does not know.

import CLibraries
import FoundationEssentials

enum ControlObject {
    /// Largest control object that is read.
    static let maxBytes = 256 << 10

    /// Deepest nesting that is decoded: the decoder calls itself at each level, and loops have small stacks.
    static let maxDepth = 16

    /// Times that can be told: 1970 to the year 9999, in milliseconds.
    static let times: ClosedRange<Int64> = 0...253_402_300_799_999
    /// Numbers that are counted up must stay below this, so that counting on never overflows.
    static let countLimit: UInt64 = 1 << 62

    /// The object's bytes. Keys are sorted: equal values give equal bytes.
    static func seal(_ value: some Encodable, kind: String, format: Int) -> [UInt8] {
        guard let body = try? encoder().encode(value), body.first == UInt8(ascii: "{"), body.count > 2 else {
            preconditionFailure("\(kind) cannot be told as JSON")
        }
        let rest = Array(body.dropFirst())
        return Array(head(kind, format).utf8) + Array(hex(checksum(rest)).utf8) + Array("\",".utf8) + rest
    }

    /// The value in `bytes`. `what` names the object for people.
    ///
    /// - Parameter oldest: the earliest format that `type` still reads.
    static func open<T: Codable>(
        _ type: T.Type, _ bytes: [UInt8], kind: String, format: Int, oldest: Int? = nil, what: String
    ) throws(CatalogError) -> T {
        guard bytes.count <= maxBytes else {
            throw CatalogError(.corrupt, "\(what) has \(bytes.count) bytes: not a \(kind)")
        }
        let heads = ((oldest ?? format)...format).map { Array(head(kind, $0).utf8) }
        guard let head = heads.first(where: { bytes.starts(with: $0) }) else {
            let start = "{\"margarine\":\"\(kind)\",\"format\":"
            if bytes.starts(with: Array(start.utf8)) {
                let version = String(
                    decoding: bytes.dropFirst(start.utf8.count).prefix { $0 >= 48 && $0 <= 57 }.prefix(9), as: UTF8.self
                )
                throw CatalogError(
                    .corrupt,
                    "\(what) has format version \(version), this Margarine reads version \(format): use a later one")
            }
            throw CatalogError(.corrupt, "\(what) is not a \(kind) of Margarine")
        }
        let rest = Array(bytes.dropFirst(head.count + 18))
        let sum = bytes.dropFirst(head.count).prefix(18)
        guard sum.elementsEqual(Array((hex(checksum(rest)) + "\",").utf8)) else {
            throw CatalogError(.corrupt, "\(what) fails its checksum")
        }
        guard depth(rest) < maxDepth else { throw CatalogError(.corrupt, "\(what) is nested too deep") }
        let body = Data([UInt8(ascii: "{")] + rest)
        do {
            let value = try JSONDecoder().decode(type, from: body)
            let own = try encoder().encode(value)
            // As this version writes it: nothing else is in it. What another one wrote is compared member by member.
            if own == body { return value }
            let known = try JSONDecoder().decode(Members.self, from: own)
            if let unknown = try JSONDecoder().decode(Members.self, from: body).firstNotIn(known) {
                throw CatalogError(.corrupt, "\(what) has the unknown member '\(unknown)': use a later Margarine")
            }
            return value
        } catch let error as CatalogError {
            throw error
        } catch {
            throw CatalogError(.corrupt, "\(what) cannot be read: \(error)")
        }
    }

    private static func encoder() -> JSONEncoder {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        return encoder
    }

    private static func head(_ kind: String, _ format: Int) -> String {
        "{\"margarine\":\"\(kind)\",\"format\":\(format),\"checksum\":\""
    }

    private static func checksum(_ bytes: [UInt8]) -> UInt64 {
        bytes.withUnsafeBytes { mg_xxh3($0.baseAddress, $0.count, 0) }
    }

    /// How many brackets are open at a time at most, in text that need not be JSON.
    private static func depth(_ bytes: [UInt8]) -> Int {
        var open = 0
        var deepest = 0
        var isString = false
        var isEscaped = false
        for byte in bytes {
            if isString {
                if !isEscaped, byte == UInt8(ascii: "\"") { isString = false }
                isEscaped = !isEscaped && byte == UInt8(ascii: "\\")
            } else if byte == UInt8(ascii: "\"") {
                isString = true
            } else if byte == UInt8(ascii: "[") || byte == UInt8(ascii: "{") {
                open += 1
                deepest = max(deepest, open)
            } else if byte == UInt8(ascii: "]") || byte == UInt8(ascii: "}") {
                open = max(0, open - 1)
            }
        }
        return deepest
    }

    private static func hex(_ value: UInt64) -> String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }
}

/// The names of a JSON value's members, at every depth.
private enum Members: Decodable {
    case object([String: Members])
    case array([Members])
    case plain

    init(from decoder: any Decoder) throws {
        if let object = try? decoder.singleValueContainer().decode([String: Members].self) {
            self = .object(object)
        } else if let array = try? decoder.singleValueContainer().decode([Members].self) {
            self = .array(array)
        } else {
            self = .plain
        }
    }

    /// A member of this value that `known` does not have.
    func firstNotIn(_ known: Members) -> String? {
        switch (self, known) {
        case (.object(let mine), .object(let theirs)):
            for (name, value) in mine.sorted(by: { $0.key < $1.key }) {
                guard let other = theirs[name] else { return name }
                if let inner = value.firstNotIn(other) { return name + "." + inner }
            }
            return nil
        case (.array(let mine), .array(let theirs)):
            for (a, b) in zip(mine, theirs) {
                if let inner = a.firstNotIn(b) { return inner }
            }
            return nil
        default: return nil
        }
    }
}
