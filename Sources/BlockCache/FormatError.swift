// The border where stored bytes come in: what is wrong with them, said once for all formats of this room.

/// Why stored bytes are not what they should be.
public struct FormatError: Error, Sendable, Equatable, CustomStringConvertible {
    public enum Kind: Sendable, Equatable {
        /// Damaged, cut short, or not this object at all.
        case corrupt
        /// Written by a later Margarine: intact, perhaps, but not for this one to read.
        case unknownVersion
    }
    public let kind: Kind
    /// What was expected and what was found.
    public let description: String

    static func corrupt(_ what: String) -> FormatError { FormatError(kind: .corrupt, description: what) }
    static func version(_ found: UInt32, known: UInt32, of what: String) -> FormatError {
        FormatError(
            kind: .unknownVersion,
            description: "\(what) has format version \(found), this Margarine reads version \(known): use a later one")
    }
}
