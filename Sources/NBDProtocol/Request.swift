// Requests of the transmission phase. `RequestRules.judge` is the one place where they are checked; what it accepts
// lies within the export, is permitted, and carries only flags that its command knows.

/// The 28 bytes of a request, as they came.
@frozen package struct RequestHeader: Sendable, Equatable {
    @inlinable package static var lengthBytes: Int { 28 }
    package let flags: UInt16
    package let type: UInt16
    package let cookie: UInt64
    package let offset: UInt64
    package let lengthBytes: UInt32

    @inlinable package init(flags: UInt16, type: UInt16, cookie: UInt64, offset: UInt64, lengthBytes: UInt32) {
        self.flags = flags
        self.type = type
        self.cookie = cookie
        self.offset = offset
        self.lengthBytes = lengthBytes
    }

    /// Reads 28 bytes; nil when they do not begin with the magic number.
    @inlinable @inline(__always) package init?(_ bytes: UnsafeRawPointer) {
        guard bytes.wire(0, as: UInt32.self) == NBD.Magic.request else { return nil }
        flags = bytes.wire(4)
        type = bytes.wire(6)
        cookie = bytes.wire(8)
        offset = bytes.wire(16)
        lengthBytes = bytes.wire(24)
    }

    @inlinable package var commandFlags: NBD.CommandFlags { NBD.CommandFlags(rawValue: flags) }

    /// Bytes that follow the header: only a WRITE has any. Also of a request that is refused, so they must be taken off
    /// the stream whatever becomes of it.
    @inlinable package var payloadBytes: Int { type == NBD.Command.write.rawValue ? Int(lengthBytes) : 0 }
}

/// What to do with a request.
@frozen package enum Verdict: Sendable, Equatable {
    case accept(NBD.Command)
    /// Right, and over before it began: an access of no bytes.
    case nothingToDo(NBD.Command)
    /// Answer with this error; the payload is read and thrown away.
    case refuse(NBD.ErrorCode)
}

/// What a connection negotiated, and what its export is: all that is needed to judge a request.
@frozen package struct RequestRules: Sendable {
    package let sizeBytes: UInt64
    package let isReadOnly: Bool
    package let structuredReplies: Bool
    package let allocationContext: Bool
    package let maximumPayloadBytes: UInt32

    @inlinable package init(
        sizeBytes: UInt64, isReadOnly: Bool, structuredReplies: Bool, allocationContext: Bool,
        maximumPayloadBytes: UInt32 = NBD.maximumPayloadBytes
    ) {
        self.sizeBytes = sizeBytes
        self.isReadOnly = isReadOnly
        self.structuredReplies = structuredReplies
        self.allocationContext = allocationContext
        self.maximumPayloadBytes = maximumPayloadBytes
    }

    /// One error for each fault ("Error values"): EINVAL for an unknown command, a flag the command does not have, or a
    /// range past the end; ENOSPC instead for what writes there; EPERM for what writes to a read-only export.
    @inlinable package func judge(_ header: RequestHeader) -> Verdict {
        guard let command = NBD.Command(rawValue: header.type) else { return .refuse(.invalid) }
        guard header.commandFlags.isSubset(of: allowedFlags(command)) else {
            // DISC has no reply to carry an error.
            return command == .disconnect ? .accept(.disconnect) : .refuse(.invalid)
        }
        let isInside = header.offset <= sizeBytes && UInt64(header.lengthBytes) <= sizeBytes - header.offset
        switch command {
        case .disconnect:
            return .accept(.disconnect)
        case .flush:
            return header.offset == 0 && header.lengthBytes == 0 ? .accept(.flush) : .refuse(.invalid)
        case .read:
            if header.lengthBytes > maximumPayloadBytes { return .refuse(structuredReplies ? .overflow : .invalid) }
            if !isInside { return .refuse(.invalid) }
        case .write:
            if isReadOnly { return .refuse(.permission) }
            if header.lengthBytes > maximumPayloadBytes { return .refuse(.invalid) }
            if !isInside { return .refuse(.noSpace) }
        case .writeZeroes:
            if isReadOnly { return .refuse(.permission) }
            if !isInside { return .refuse(.noSpace) }
        case .trim:
            if isReadOnly { return .refuse(.permission) }
            if !isInside { return .refuse(.invalid) }
        case .cache:
            if !isInside { return .refuse(.invalid) }
        case .blockStatus:
            // A status reply describes one byte at least, so there is no right answer about none.
            if !allocationContext || !isInside || header.lengthBytes == 0 { return .refuse(.invalid) }
        }
        return header.lengthBytes == 0 ? .nothingToDo(command) : .accept(command)
    }

    /// FUA goes with every command ("the server MUST accept all commands with this bit set").
    @inlinable @inline(__always) func allowedFlags(_ command: NBD.Command) -> NBD.CommandFlags {
        switch command {
        case .read: structuredReplies ? [.fua, .dontFragment] : .fua
        case .writeZeroes: [.fua, .noHole, .fastZero]
        case .blockStatus: [.fua, .onlyOneExtent]
        case .write, .disconnect, .flush, .trim, .cache: .fua
        }
    }
}
