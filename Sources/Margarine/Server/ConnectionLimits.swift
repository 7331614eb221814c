// Every bound of the server side of NBD, in one place. What is not here is bounded by the protocol.

/// How much clients may use. One value for all connections of a daemon.
package struct ConnectionLimits: Sendable {
    /// Connections at a time of one client address (`ClientIdentity.group`), unfinished handshakes included. Further ones are
    /// closed as they come.
    package var connections = 1024
    /// So many more are there for other addresses when one has all its own.
    package var connectionsForOthers: Int { max(16, connections / 4) }
    /// Handshakes at a time that wait for their clients. One more, and the oldest of the address that has most of them is
    /// closed: an honest handshake takes milliseconds.
    package var handshakes = 128
    /// Time a client has for its handshake; what the server takes to answer does not count.
    package var handshakeTimeoutMs: UInt64 = 30_000
    /// Data of one option that are looked at. Longer ones are read over and answered NBD_REP_ERR_TOO_BIG ...
    package var optionBytes = 64 << 10
    /// ... up to here; beyond, the connection is closed.
    package var skippedOptionBytes = 32 << 20
    /// Options of one handshake.
    package var options = 256
    /// The answer to NBD_OPT_LIST; a longer one becomes NBD_REP_ERR_TOO_BIG.
    package var listReplyBytes = 16 << 20

    /// Requests of one connection that are not answered yet. At the bound nothing more is read from it.
    package var requestsPerConnection = 1024
    /// Request and reply buffers of one connection; a single request is served however large.
    package var bytesPerConnection = 64 << 20
    /// What each connection has of its own, whatever others do. Above it the common budget is asked. At most this much; less
    /// where memory is small.
    package var ownBytesPerConnection = 128 << 10
    /// Request and reply buffers of all connections together, beyond what each has of its own, shared out by
    /// `RequestBudget`: the more hold some, the less each may have.
    package var budgetBytes = 512 << 20
    /// Payload of a refused WRITE that is read over; above it the connection is closed.
    package var skippedPayloadBytes = 64 << 20
    /// Payload and reply bytes that one connection moves before the next one has its turn.
    package var turnBytes = 1 << 20

    /// A connection that holds common memory while others wait for some, and in this time moves less than `stallBytes` or
    /// this part of what it holds, is closed.
    package var stallSeconds = 10
    package var stallBytes = 64 << 10
    package var stallDivisor = 32
    /// How long the last replies of an ended connection may take to leave.
    package var lingerMs: UInt64 = 2_000
    /// Buffers that one loop keeps for the next request.
    package var pooledBytesPerLoop = 16 << 20
    /// Larger buffers can't be had, as on a machine without memory: for tests.
    package var mapsAtMostBytes = Int.max
    /// A TCP peer that is silent for so long is taken for dead.
    package var deadPeerMs: Int32 = 25_000

    package init() {}
}
