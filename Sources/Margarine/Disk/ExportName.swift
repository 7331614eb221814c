// What clients write as export names: `NAME`, `NAME?session=ID`, `NAME@GENERATION`.

/// A parsed export name.
package struct ExportName: Equatable, Sendable {
    package var disk: String
    /// `?session=`: names the attachment, so that it can be refused after its disk went back.
    package var session: String?
    /// `@`: one committed generation, read-only.
    package var generation: UInt64?

    package init(_ text: String) throws(AttachError) {
        var rest = text[...]
        if let mark = rest.firstIndex(of: "?") {
            let query = rest[rest.index(after: mark)...]
            rest = rest[..<mark]
            guard query.hasPrefix("session=") else {
                throw AttachError(.invalid, "export name '\(text)': only '?session=ID' may follow the name")
            }
            let id = String(query.dropFirst("session=".count))
            guard DiskName.isValid(id) else {
                throw AttachError(
                    .invalid,
                    "export name '\(text)': a session is 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit"
                )
            }
            session = id
        }
        if let at = rest.firstIndex(of: "@") {
            let digits = rest[rest.index(after: at)...]
            // One way to write each: a snapshot is known by its name.
            guard digits.utf8.allSatisfy({ (0x30...0x39).contains($0) }), digits.first != "0",
                let number = UInt64(digits), session == nil
            else {
                throw AttachError(
                    .invalid, "export name '\(text)': a generation is written NAME@NUMBER, and takes no session")
            }
            generation = number
            rest = rest[..<at]
        }
        disk = String(rest)
        guard DiskName.isValid(disk) else { throw AttachError(.unknown, "there is no disk '\(disk)'") }
    }
}
