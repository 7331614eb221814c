// What a connection has done, for `margined status`.

/// Plain counters, touched by the connection's loop.
package struct ConnectionCounters: Sendable {
    package var requests: UInt64 = 0
    package var errors: UInt64 = 0
    /// Bytes of the export that were read and written.
    package var readBytes: UInt64 = 0
    package var writtenBytes: UInt64 = 0
    /// Bytes on the wire.
    package var receivedBytes: UInt64 = 0
    package var sentBytes: UInt64 = 0
    package init() {}
}

/// One connection in the transmission phase at one instant.
package struct ConnectionStatus: Sendable {
    package var client: ClientIdentity
    package var exportName: String
    package var counters: ConnectionCounters
    /// Requests that were read and not answered.
    package var outstanding: Int
    /// Bytes of request and reply buffers.
    package var heldBytes: Int
}

extension Connection {
    /// On its loop.
    var status: ConnectionStatus {
        ConnectionStatus(
            client: client, exportName: exportName, counters: counters, outstanding: outstanding, heldBytes: held)
    }
}
