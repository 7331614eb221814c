// What tests of the server's connections share.

import Glibc
@testable import Margarine
import NBDProtocol
import Runtime
import Testing

extension Sockets {
    /// Two ends of one connection, which nobody has to accept.
    static func pair() throws -> (FileDescriptor, FileDescriptor) {
        var ends: [Int32] = [-1, -1]
        let kind = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
        try #require(socketpair(AF_UNIX, kind, 0, &ends) == 0)
        return (FileDescriptor(owning: ends[0]), FileDescriptor(owning: ends[1]))
    }
}

extension Array where Element == UInt8 {
    /// Appends the header of a request.
    mutating func appendRequest(
        _ command: NBD.Command, flags: NBD.CommandFlags = [], cookie: UInt64, offset: UInt64, lengthBytes: Int
    ) {
        appendWire(NBD.Magic.request)
        appendWire(flags.rawValue)
        appendWire(command.rawValue)
        appendWire(cookie)
        appendWire(offset)
        appendWire(UInt32(lengthBytes))
    }
}

/// For connections that are made without a handshake.
struct NoExports: ExportProvider {
    func list() async throws(AttachError) -> [ExportInfo] { [] }
    func describe(_ exportName: String) async throws(AttachError) -> ExportInfo {
        throw AttachError(.unknown, "no export")
    }
    func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
        throw AttachError(.unknown, "no export")
    }
}
