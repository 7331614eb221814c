// The answers of S3 servers: documents, pages of listings, errors.

@testable import ObjectStore

extension FuzzTarget {
    static let xml = FuzzTarget(name: "xml", maxInputBytes: 4096) { input in
        let bytes = [UInt8](input)
        guard let root = XMLElement.parse(bytes) else { return }
        try require(depth(root) <= 16, "a document \(depth(root)) deep")
        var text = ""
        write(root, to: &text)
        guard let again = XMLElement.parse(Array(text.utf8)) else { throw Finding("not read back: \(text)") }
        try require(again == root, "read back otherwise: \(text)")
        for after in [nil, "blocks/0b"] { try listing(bytes, after: after) }
    }

    private static func listing(_ bytes: [UInt8], after: String?) throws {
        var page = S3Page(prefix: "blocks/", after: after)
        let token: String?
        do { token = try page.add(bytes, storePrefix: "store/") } catch { return }
        try require(token?.isEmpty != true, "an empty token")
        for (last, next) in zip(page.items, page.items.dropFirst()) {
            try require(Array(last.key.utf8).lexicographicallyPrecedes(Array(next.key.utf8)), "keys out of order")
        }
        for key in page.items.map(\.key) + page.folders.map({ String($0.dropLast()) }) {
            try require(isValidKey(key), "'\(key)' is no key")
            try require((key + "/").hasPrefix("blocks/"), "'\(key)' was not asked for")
        }
        for item in page.items {
            if let after {
                try require(Array(after.utf8).lexicographicallyPrecedes(Array(item.key.utf8)), "a key too early")
            }
        }
    }

    private static func depth(_ element: XMLElement) -> Int { 1 + (element.children.map(depth).max() ?? 0) }

    /// The document again, in the plainest way.
    private static func write(_ element: XMLElement, to text: inout String) {
        text += "<\(element.name)>"
        for scalar in element.text.unicodeScalars {
            switch scalar {
            case "<": text += "&lt;"
            case "&": text += "&amp;"
            default: text.unicodeScalars.append(scalar)
            }
        }
        for child in element.children { write(child, to: &text) }
        text += "</\(element.name)>"
    }
}
