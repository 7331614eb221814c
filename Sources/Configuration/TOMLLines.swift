// Where each key of a TOML document stands. TOMLKit tells positions of syntax errors only; this looks the rest up in
// text that it has already parsed, so the syntax is known to be right and no more than keys are recognised here.

/// Key path to line number.
struct TOMLLines {
    private var lines: [[String]: Int] = [:]

    init(_ text: String) {
        var scanner = Scanner(bytes: Array(text.utf8))
        var table: [String] = []
        while let statement = scanner.statement() {
            switch statement.kind {
            case .table:
                table = statement.path
                note(table, statement.line)
            case .key: note(table + statement.path, statement.line)
            }
        }
    }

    /// The line of a key or table; where it is written in another way (inside an inline table), its parent's.
    func line(of path: [String]) -> Int {
        var path = path[...]
        while !path.isEmpty {
            if let line = lines[Array(path)] { return line }
            path = path.dropLast()
        }
        return 1
    }

    /// No setting lies deeper; a key of a thousand parts must not cost a thousand times its length.
    private static let maxDepth = 8

    /// Dotted keys and headers define all their prefixes; the first mention counts.
    private mutating func note(_ path: [String], _ line: Int) {
        for count in 1...Self.maxDepth where count <= path.count {
            let prefix = Array(path.prefix(count))
            if lines[prefix] == nil { lines[prefix] = line }
        }
    }

    private struct Statement {
        enum Kind { case table, key }
        var kind: Kind
        var path: [String]
        var line: Int
    }

    private struct Scanner {
        let bytes: [UInt8]
        var at = 0
        var line = 1

        private var byte: UInt8? { at < bytes.count ? bytes[at] : nil }
        private func char(_ c: Character) -> UInt8 { c.asciiValue ?? 0 }

        private mutating func step() {
            if byte == 10 { line += 1 }
            at += 1
        }

        /// The next header or key; its value is skipped.
        mutating func statement() -> Statement? {
            while let byte {
                if byte == 32 || byte == 9 || byte == 10 || byte == 13 {
                    step()
                } else if byte == char("#") {
                    skipComment()
                } else if byte == char("[") {
                    while self.byte == char("[") { step() }
                    let start = line
                    let path = keyPath()
                    while let byte = self.byte, byte != 10 { _ = byte; step() }
                    return Statement(kind: .table, path: path, line: start)
                } else {
                    let start = line
                    let path = keyPath()
                    skipValue()
                    return Statement(kind: .key, path: path, line: start)
                }
            }
            return nil
        }

        private mutating func skipComment() {
            while let byte, byte != 10 { _ = byte; step() }
        }

        /// `a.b."c d"`, up to `=` or `]`.
        private mutating func keyPath() -> [String] {
            var path: [String] = []
            var part: [UInt8] = []
            while let byte, byte != char("="), byte != char("]"), byte != 10 {
                if byte == char("\"") || byte == char("'") {
                    part += string()
                } else if byte == char(".") {
                    path.append(String(decoding: part, as: UTF8.self))
                    part = []
                    step()
                } else {
                    if byte != 32 && byte != 9 && byte != 13 { part.append(byte) }
                    step()
                }
            }
            path.append(String(decoding: part, as: UTF8.self))
            return path
        }

        /// A quoted string of any of TOML's four kinds; gives its bytes, escapes as they are.
        private mutating func string() -> [UInt8] {
            guard let quote = byte else { return [] }
            let isTriple = at + 2 < bytes.count && bytes[at + 1] == quote && bytes[at + 2] == quote
            let width = isTriple ? 3 : 1
            for _ in 0..<width { step() }
            var content: [UInt8] = []
            while let byte {
                if byte == char("\\") && quote == char("\"") {
                    content.append(byte)
                    step()
                    if let escaped = self.byte { content.append(escaped) }
                    step()
                } else if byte == quote && (!isTriple || bytes[at...].prefix(3).allSatisfy { $0 == quote }) {
                    for _ in 0..<width { step() }
                    // A multi-line string may end with one or two quotes of its own.
                    while isTriple, self.byte == quote { step() }
                    return content
                } else {
                    content.append(byte)
                    step()
                }
            }
            return content
        }

        /// From `=` to the end of the statement's line; brackets may span lines.
        private mutating func skipValue() {
            var depth = 0
            while let byte {
                if byte == char("\"") || byte == char("'") {
                    _ = string()
                } else if byte == char("#") {
                    skipComment()
                } else {
                    if byte == char("[") || byte == char("{") { depth += 1 }
                    if byte == char("]") || byte == char("}") { depth -= 1 }
                    step()
                    if byte == 10 && depth <= 0 { return }
                }
            }
        }
    }
}
