// Bytes written as the protocol document writes them.

@testable import NBDProtocol

/// The bytes of hexadecimal text; spaces and line ends mean nothing.
func hex(_ text: String) -> [UInt8] {
    let digits = text.filter(\.isHexDigit)
    precondition(digits.count % 2 == 0)
    var bytes: [UInt8] = []
    var index = digits.startIndex
    while index < digits.endIndex {
        let next = digits.index(index, offsetBy: 2)
        bytes.append(UInt8(digits[index..<next], radix: 16)!)
        index = next
    }
    return bytes
}

func ascii(_ text: String) -> [UInt8] { Array(text.utf8) }

func option(_ code: UInt32, _ data: [UInt8]) -> ClientOption {
    data.withUnsafeBytes { ClientOption(code: code, data: $0) }
}

/// What `write` stores at the beginning of a buffer of `count` bytes.
func stored(_ count: Int, _ write: (UnsafeMutableRawPointer) -> Void) -> [UInt8] {
    var bytes = [UInt8](repeating: 0xee, count: count + 8)
    bytes.withUnsafeMutableBytes { write($0.baseAddress!) }
    precondition(bytes[count...].allSatisfy { $0 == 0xee }, "wrote past its length")
    return Array(bytes[..<count])
}
