// The one table between what disks say and what NBD can say.

package import NBDProtocol

extension DeviceError {
    /// The error value of a reply.
    package var wire: NBD.ErrorCode {
        switch self {
        case .io: .io
        case .noSpace: .noSpace
        case .invalid: .invalid
        case .notPermitted: .permission
        case .notSupported: .notSupported
        case .outOfMemory: .noMemory
        case .shutdown: .shutdown
        }
    }
}

extension NBD.ErrorCode {
    /// What a structured error reply says to people.
    package var message: StaticString {
        switch self {
        case .permission: "the export is read-only"
        case .io: "the disk could not do it; the server's log has the reason"
        case .noMemory: "out of memory"
        case .invalid: "unknown command or flag, or a range outside the export"
        case .noSpace: "the range ends past the end of the export"
        case .overflow: "more than 32 MiB in one request"
        case .notSupported: "not faster than writing zeroes"
        case .shutdown: "the server is shutting down"
        }
    }
}

extension AttachError.Kind {
    /// The option reply that refuses an export.
    package var wire: NBD.ReplyCode {
        switch self {
        case .unknown: .errorUnknown
        case .refused: .errorPolicy
        case .invalid: .errorInvalid
        case .shutdown: .errorShutdown
        case .unavailable: .errorPlatform
        }
    }
}
