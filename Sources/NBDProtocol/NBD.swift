// The numbers of the NBD protocol, by the names that its document (NetworkBlockDevice/nbd, doc/proto.md) gives them.
//
// This module is a pure codec: no I/O, no allocation for a request or its reply. Everything that a client sends is
// judged here (`ClientFlags`, `ClientOption`, `RequestRules`) and nowhere else; what comes out of it is valid.

/// Namespace of the protocol's constants. All integers on the wire are big-endian.
package enum NBD {
    package enum Magic {
        /// `NBDMAGIC`, the first eight bytes of a server's greeting.
        package static let greeting: UInt64 = 0x4e42_444d_4147_4943
        /// `IHAVEOPT`: the second eight bytes of the greeting, and the beginning of each option.
        package static let option: UInt64 = 0x4948_4156_454f_5054
        package static let optionReply: UInt64 = 0x0003_e889_0455_65a9
        @inlinable package static var request: UInt32 { 0x2560_9513 }
        @inlinable package static var simpleReply: UInt32 { 0x6744_6698 }
        @inlinable package static var structuredReply: UInt32 { 0x668e_33ef }
    }

    /// Option codes (client to server, handshake).
    package enum OptionCode {
        package static let exportName: UInt32 = 1
        package static let abort: UInt32 = 2
        package static let list: UInt32 = 3
        package static let startTLS: UInt32 = 5
        package static let info: UInt32 = 6
        package static let go: UInt32 = 7
        package static let structuredReply: UInt32 = 8
        package static let listMetaContext: UInt32 = 9
        package static let setMetaContext: UInt32 = 10
    }

    /// Types of option replies (server to client, handshake).
    package enum ReplyCode: UInt32, Sendable {
        case ack = 1
        case server = 2
        case info = 3
        case metaContext = 4
        case errorUnsupported = 0x8000_0001
        case errorPolicy = 0x8000_0002
        case errorInvalid = 0x8000_0003
        case errorPlatform = 0x8000_0004
        case errorUnknown = 0x8000_0006
        case errorShutdown = 0x8000_0007
        case errorTooBig = 0x8000_0009
    }

    package enum InfoCode {
        package static let export: UInt16 = 0
        package static let name: UInt16 = 1
        package static let description: UInt16 = 2
        package static let blockSize: UInt16 = 3
    }

    /// Commands of the transmission phase.
    @frozen package enum Command: UInt16, Sendable {
        case read = 0
        case write = 1
        case disconnect = 2
        case flush = 3
        case trim = 4
        case cache = 5
        case writeZeroes = 6
        case blockStatus = 7
    }

    @frozen package struct CommandFlags: OptionSet, Sendable {
        package let rawValue: UInt16
        @inlinable package init(rawValue: UInt16) { self.rawValue = rawValue }
        @inlinable package static var fua: Self { Self(rawValue: 1 << 0) }
        @inlinable package static var noHole: Self { Self(rawValue: 1 << 1) }
        @inlinable package static var dontFragment: Self { Self(rawValue: 1 << 2) }
        @inlinable package static var onlyOneExtent: Self { Self(rawValue: 1 << 3) }
        @inlinable package static var fastZero: Self { Self(rawValue: 1 << 4) }
    }

    package struct TransmissionFlags: OptionSet, Sendable {
        package let rawValue: UInt16
        package init(rawValue: UInt16) { self.rawValue = rawValue }
        package static let hasFlags = Self(rawValue: 1 << 0)
        package static let readOnly = Self(rawValue: 1 << 1)
        package static let sendFlush = Self(rawValue: 1 << 2)
        package static let sendFUA = Self(rawValue: 1 << 3)
        package static let sendTrim = Self(rawValue: 1 << 5)
        package static let sendWriteZeroes = Self(rawValue: 1 << 6)
        package static let sendDontFragment = Self(rawValue: 1 << 7)
        package static let canMultiConn = Self(rawValue: 1 << 8)
        package static let sendCache = Self(rawValue: 1 << 10)
        package static let sendFastZero = Self(rawValue: 1 << 11)

        /// What this server announces. DF only after structured replies (the document: "MUST leave this flag clear if
        /// structured replies have not been negotiated"), nothing that writes on a read-only export.
        package static func offered(isReadOnly: Bool, structuredReplies: Bool) -> Self {
            var flags: Self = [.hasFlags, .sendFlush, .sendFUA, .canMultiConn, .sendCache]
            if isReadOnly {
                flags.insert(.readOnly)
            } else {
                flags.formUnion([.sendTrim, .sendWriteZeroes, .sendFastZero])
            }
            if structuredReplies { flags.insert(.sendDontFragment) }
            return flags
        }
    }

    /// Error values of replies in the transmission phase.
    @frozen package enum ErrorCode: UInt32, Sendable {
        case permission = 1
        case io = 5
        case noMemory = 12
        case invalid = 22
        case noSpace = 28
        case overflow = 75
        case notSupported = 95
        case shutdown = 108
    }

    /// Types of structured reply chunks.
    package enum ChunkType {
        @inlinable package static var none: UInt16 { 0 }
        @inlinable package static var offsetData: UInt16 { 1 }
        @inlinable package static var offsetHole: UInt16 { 2 }
        @inlinable package static var blockStatus: UInt16 { 5 }
        @inlinable package static var error: UInt16 { 0x8001 }
    }

    /// The only flag of a structured reply chunk: it is the last one of its request.
    @inlinable package static var chunkDone: UInt16 { 1 }

    /// The one metadata context there is, and the number this server gives it.
    package static let allocationContext = "base:allocation"
    package static let allocationContextID: UInt32 = 1

    /// Size constraints announced by NBD_INFO_BLOCK_SIZE.
    package static let minimumBlockBytes: UInt32 = 1
    package static let preferredBlockBytes: UInt32 = 4096
    @inlinable package static var maximumPayloadBytes: UInt32 { 32 << 20 }

    /// No string of the protocol may be longer ("Conventions").
    package static let maximumStringBytes = 4096
}
