// Heads and generation records: JSON under a checksum. What is accepted can be written again, and means the same.

@testable import Margarine

extension FuzzTarget {
    /// JSON is Foundation's: it takes what it needs, within reason.
    private static let jsonBytes = 1 << 20

    static let head = FuzzTarget(name: "head", maxInputBytes: 4096, allocationBaseBytes: jsonBytes) { input in
        try eitherWay(input, kind: "head") { bytes in
            guard let head = try? Head.decode(bytes, name: "demo") else { return }
            try require(try Head.decode(head.encoded(), name: "demo") == head, "a head is read back otherwise")
            try require(head.record?.generation ?? head.generation == head.generation, "a head of another generation")
        }
    }

    static let record = FuzzTarget(name: "record", maxInputBytes: 4096, allocationBaseBytes: jsonBytes) { input in
        try eitherWay(input, kind: "generation") { bytes in
            guard let record = try? GenerationRecord.decode(bytes, key: "k") else { return }
            try require(
                try GenerationRecord.decode(record.encoded(), key: "k") == record, "a record is read back otherwise")
        }
    }

    /// As it is, and with the checksum made right.
    private static func eitherWay(
        _ input: UnsafeRawBufferPointer, kind: String, _ look: ([UInt8]) throws -> Void
    ) throws {
        var bytes = [UInt8](input)
        try look(bytes)
        let start = "{\"margarine\":\"\(kind)\",\"format\":1,\"checksum\":\"".utf8.count
        guard bytes.count > start + 18 else { return }
        let sum = bytes[(start + 18)...].withUnsafeBytes { xxh3($0) }
        for digit in 0..<16 {
            bytes[start + digit] = Array("0123456789abcdef".utf8)[Int(sum >> UInt64(60 - 4 * digit) & 15)]
        }
        try look(bytes)
    }
}
