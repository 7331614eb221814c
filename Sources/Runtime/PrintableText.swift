// Text from outside (names, addresses, errors of stores and libraries) fit for a line of a log or a terminal.

extension StringProtocol {
    /// The same text without anything that a terminal obeys or that could begin another line: control characters (C0,
    /// DEL, C1), line and paragraph separators, and what changes the direction of writing become `\u{1b}` and the like.
    public var printable: String {
        if utf8.allSatisfy({ $0 >= 0x20 && $0 < 0x7f }) { return String(self) }
        var text = ""
        for scalar in unicodeScalars {
            if scalar.isUnprintable {
                text += "\\u{\(String(scalar.value, radix: 16))}"
            } else {
                text.unicodeScalars.append(scalar)
            }
        }
        return text
    }
}

extension Unicode.Scalar {
    /// Judged by scalars: CR LF is one character, and neither of its halves may pass.
    fileprivate var isUnprintable: Bool {
        switch value {
        case 0..<0x20, 0x7f..<0xa0, 0x2028, 0x2029: true
        // Marks, embeddings, overrides and isolates of direction.
        case 0x061c, 0x200e, 0x200f, 0x202a...0x202e, 0x2066...0x2069: true
        default: false
        }
    }
}
