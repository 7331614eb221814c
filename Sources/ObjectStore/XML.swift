// The XML of S3's answers: elements, text, entities. A small and strict reader: what is not well formed, declares
// entities or nests deeply is no answer of S3. Namespaces and attributes carry nothing here and are skipped.

/// An element of an answer.
struct XMLElement: Sendable, Equatable {
    /// Without a namespace prefix.
    var name: String
    /// The text directly inside.
    var text = ""
    var children: [XMLElement] = []

    init(name: String) { self.name = name }

    func child(_ name: String) -> XMLElement? { children.first { $0.name == name } }
    func all(_ name: String) -> some Sequence<XMLElement> { children.lazy.filter { $0.name == name } }

    /// The document's outermost element, nil when it is not one whole, well-formed document.
    static func parse(_ bytes: [UInt8]) -> XMLElement? {
        var reader = XMLReader(bytes: bytes)
        return reader.document()
    }
}

private struct XMLReader {
    let bytes: [UInt8]
    var position = 0
    var elements = 0
    static let deepest = 16
    static let mostElements = 100_000

    init(bytes: [UInt8]) {
        self.bytes = bytes
        if bytes.starts(with: [0xef, 0xbb, 0xbf]) { position = 3 }
    }

    mutating func document() -> XMLElement? {
        guard skipBetweenElements(), let root = element(depth: 1), skipBetweenElements(), position == bytes.count else {
            return nil
        }
        return root
    }

    private func looksAt(_ text: StaticString) -> Bool {
        text.withUTF8Buffer { text in
            position + text.count <= bytes.count && (0..<text.count).allSatisfy { bytes[position + $0] == text[$0] }
        }
    }

    private mutating func take(_ text: StaticString) -> Bool {
        guard looksAt(text) else { return false }
        position += text.utf8CodeUnitCount
        return true
    }

    /// Moves behind `text`; false when it does not come any more.
    private mutating func skip(past text: StaticString) -> Bool {
        while position < bytes.count {
            if take(text) { return true }
            position += 1
        }
        return false
    }

    /// Spaces, comments and processing instructions, outside the root.
    private mutating func skipBetweenElements() -> Bool {
        while position < bytes.count {
            if isSpace(bytes[position]) {
                position += 1
            } else if take("<?") {
                guard skip(past: "?>") else { return false }
            } else if take("<!--") {
                guard skip(past: "-->") else { return false }
            } else {
                break
            }
        }
        return true
    }

    private mutating func element(depth: Int) -> XMLElement? {
        elements += 1
        guard depth <= Self.deepest, elements <= Self.mostElements, take("<"), let name = name() else { return nil }
        var element = XMLElement(name: localPart(name))
        guard !element.name.isEmpty, position < bytes.count, isSpace(bytes[position]) || looksAt("/>") || looksAt(">")
        else { return nil }
        // Attributes: only their quotes matter.
        while true {
            guard position < bytes.count else { return nil }
            if take("/>") { return element }
            if take(">") { break }
            let byte = bytes[position]
            position += 1
            if byte == UInt8(ascii: "\"") || byte == UInt8(ascii: "'") {
                while position < bytes.count, bytes[position] != byte { position += 1 }
                position += 1
            } else if byte == UInt8(ascii: "<") {
                return nil
            }
        }
        var text: [UInt8] = []
        while true {
            guard position < bytes.count else { return nil }
            if bytes[position] != UInt8(ascii: "<") {
                guard character(into: &text) else { return nil }
            } else if take("</") {
                guard self.name() == name else { return nil }
                while position < bytes.count, isSpace(bytes[position]) { position += 1 }
                guard take(">"), let valid = String(validating: text, as: UTF8.self) else { return nil }
                element.text = valid
                return element
            } else if take("<!--") {
                guard skip(past: "-->") else { return nil }
            } else if take("<![CDATA[") {
                let start = position
                guard skip(past: "]]>") else { return nil }
                text += bytes[start..<(position - 3)]
            } else if take("<?") {
                guard skip(past: "?>") else { return nil }
            } else {
                guard let child = self.element(depth: depth + 1) else { return nil }
                element.children.append(child)
            }
        }
    }

    private mutating func name() -> ArraySlice<UInt8>? {
        let start = position
        while position < bytes.count {
            switch bytes[position] {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"), UInt8(ascii: "-"), UInt8(ascii: "."),
                UInt8(ascii: ":"):
                position += 1
            default: return position > start ? bytes[start..<position] : nil
            }
        }
        return nil
    }

    private func localPart(_ name: ArraySlice<UInt8>) -> String {
        let start = name.lastIndex(of: UInt8(ascii: ":")).map { $0 + 1 } ?? name.startIndex
        return String(decoding: name[start...], as: UTF8.self)
    }

    /// One byte of text, or the character an entity stands for.
    private mutating func character(into text: inout [UInt8]) -> Bool {
        guard bytes[position] == UInt8(ascii: "&") else {
            text.append(bytes[position])
            position += 1
            return true
        }
        guard let end = bytes[position...].prefix(12).firstIndex(of: UInt8(ascii: ";")) else { return false }
        let entity = String(decoding: bytes[(position + 1)..<end], as: UTF8.self)
        position = end + 1
        switch entity {
        case "lt": text.append(UInt8(ascii: "<"))
        case "gt": text.append(UInt8(ascii: ">"))
        case "amp": text.append(UInt8(ascii: "&"))
        case "quot": text.append(UInt8(ascii: "\""))
        case "apos": text.append(UInt8(ascii: "'"))
        default:
            let number =
                entity.hasPrefix("#x")
                ? UInt32(entity.dropFirst(2), radix: 16) : entity.hasPrefix("#") ? UInt32(entity.dropFirst()) : nil
            guard let number, let scalar = Unicode.Scalar(number), number != 0 else { return false }
            text += Array(String(Character(scalar)).utf8)
        }
        return true
    }

    private func isSpace(_ byte: UInt8) -> Bool { byte == 0x20 || byte == 0x0a || byte == 0x0d || byte == 0x09 }
}
