// The border between connections and disks. Protocol code above it knows nothing of layers; disks below it know
// nothing of NBD. Everything here is called on the device's loop only, so nothing here takes a lock.
//
// Two ways through: what can be answered from memory is answered before the call returns, with no object made for
// it; all else becomes a `DeviceRequest` that the device completes later, in any order.

package import Runtime

/// Why a request failed, in the terms NBD can say. One table (`Server/NBDErrors.swift`) maps it to the wire.
package enum DeviceError: UInt8, Sendable {
    case io
    case noSpace
    case invalid
    case notPermitted
    case notSupported
    case outOfMemory
    /// The disk was lost (taken over, rolled back, shut down): this connection can't go on.
    case shutdown
}

/// What came of a try to answer at once.
package enum Inline: Sendable {
    /// Done: a read's bytes are in the buffer; a write is taken and is acknowledged at the end of the turn.
    case done
    /// Needs I/O or room: make a `DeviceRequest` and `submit` it.
    case later
    case failed(DeviceError)
}

/// A run of equal allocation status (base:allocation).
package struct Extent: Sendable, Equatable {
    package var lengthBytes: UInt64
    package var isHole: Bool
    package var isZero: Bool
    package init(lengthBytes: UInt64, isHole: Bool, isZero: Bool) {
        self.lengthBytes = lengthBytes
        self.isHole = isHole
        self.isZero = isZero
    }
}

/// A request that was not answered inline. Made (or reused) by the connection, which keeps `buffer` valid until
/// `completed`, also when the connection dies before that.
package final class DeviceRequest {
    package enum Kind: UInt8, Sendable { case read, write, trim, writeZeroes, flush, cache, blockStatus }
    package var kind: Kind = .read
    /// Force unit access: reply only once this request's effect is as durable as a flush would make it.
    package var fua = false
    /// writeZeroes: the range must stay allocated (NBD_CMD_FLAG_NO_HOLE).
    package var noHole = false
    /// writeZeroes: fail with `.notSupported` unless faster than writing (NBD_CMD_FLAG_FAST_ZERO).
    package var fastZero = false
    /// blockStatus: stop after one extent (NBD_CMD_FLAG_REQ_ONE).
    package var onlyOneExtent = false
    package var offset: UInt64 = 0
    package var lengthBytes: UInt64 = 0
    /// read: where the bytes go; write: the payload. `lengthBytes` long.
    package var buffer: UnsafeMutableRawPointer?
    /// The answer to blockStatus: adjacent runs from `offset` on, at least one. Of more than `mostExtents` the first are told:
    /// NBD's document allows to answer for less than was asked.
    package var extents: [Extent] = []
    package static let mostExtents = 8192
    /// nil after success.
    package var error: DeviceError?
    /// Set by `BlockDevice.leave`: must not take effect any more; still completed once the buffer is free.
    package var isCancelled = false
    package unowned(unsafe) var client: (any DeviceClient)!
    /// The connection's own: the NBD cookie, and where its reply goes.
    package var cookie: UInt64 = 0
    package var tag: Int = 0
    /// The device's own.
    package var deviceState: UInt64 = 0
    package var deviceObject: AnyObject?
    package init() {}
}

/// A connection, as its device sees it.
package protocol DeviceClient: AnyObject {
    /// Bytes that went over its wire in either direction: where it does not grow, the client makes no progress.
    var movedBytes: UInt64 { get }
    /// `request` is finished: `error`, `extents` and the read buffer are set. Called on the device's loop, never from
    /// within `submit`.
    func completed(_ request: DeviceRequest)
    /// All writes and trims taken inline in turns that `endTurn` numbered up to `turn` are in the journal (error nil), or
    /// could not be put there. Also told to clients that had none. Never called from within `endTurn`; ignored after `leave`.
    func journaled(turn: UInt64, error: DeviceError?)
    /// The device ends this connection: it lost the disk, or rolled it back. Close without answering anything more.
    /// The device has left it by this: no `leave` follows, and what was submitted is completed as after `leave`. Allowed
    /// at any time, also before `ready` and from within any call of this connection.
    func disconnect(reason: String)
    /// Takes in what has already arrived on the socket, as if it had just become readable. Used before a new connection of
    /// the same session is served. false: the connection is dead, or holds an unfinished request. Makes the calls that any
    /// received bytes make (`tryWrite`, `submit`, `endTurn`; `leave` where it finds the connection dead) before it returns,
    /// also where the client does not take its replies, so it must not be called from within a call of any connection but `join`. What had arrived is decided by the first
    /// call for a join, as `isFirst` says; a client that is busy begins no request that came later for 100 ms after each
    /// call, so that one which is alive can be found between two.
    func absorb(isFirst: Bool) -> Bool
}

/// How `endTurn` ended.
package enum TurnEnd: Sendable {
    /// Everything taken inline in this turn may be acknowledged.
    case acknowledged
    /// `journaled(turn:)` will tell.
    case pending(turn: UInt64)
    case failed(DeviceError)
}

/// A disk, or one generation of it, as connections use it.
package protocol BlockDevice: AnyObject, Sendable {
    var sizeBytes: UInt64 { get }
    var isReadOnly: Bool { get }

    /// A connection begins with what it has just received: what follows in the same turn came before this.
    func beginTurn()
    /// Reads into `buffer` if all bytes are in memory. The range lies within the device.
    func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline
    /// Takes the write if that needs no I/O but the journal's. The bytes are copied before it returns. Not for FUA.
    func tryWrite(offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient) -> Inline
    /// Ends the turn of `client`: one journal append for all it wrote inline.
    func endTurn(client: any DeviceClient) -> TurnEnd
    /// Starts any request. Completed later through `client.completed`.
    func submit(_ request: DeviceRequest)

    /// `client` begins to send requests, under what `ExportProvider.attach` admitted. The device calls `ready` (later or
    /// before it returns) when the first request may be served, with an error when the admission no longer stands.
    func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void)
    /// The connection is over. Its requests that have not taken effect never will. `clean`: it ended with DISC and everything
    /// of it was completed before. Called once for each `join`, unless the device refused it or called `disconnect`; also before
    /// `ready`, when the client goes away meanwhile: then it does not matter any more what `ready` says.
    /// Afterwards every request that was submitted is still `completed`, and nothing else is called on the client.
    func leave(_ client: any DeviceClient, clean: Bool)
}

extension BlockDevice {
    package func beginTurn() {}
}

/// What a client learns before it attaches.
package struct ExportInfo: Sendable {
    package var name: String
    package var sizeBytes: UInt64
    package var isReadOnly: Bool
    package var description: String
    package init(name: String, sizeBytes: UInt64, isReadOnly: Bool, description: String) {
        self.name = name
        self.sizeBytes = sizeBytes
        self.isReadOnly = isReadOnly
        self.description = description
    }
}

/// Why an export can't be had.
package struct AttachError: Error, Sendable, CustomStringConvertible {
    package enum Kind: Sendable {
        /// No such export (NBD_REP_ERR_UNKNOWN).
        case unknown
        /// It exists, and this client may not have it now: in use, or rolled back under this session (NBD_REP_ERR_POLICY).
        case refused
        /// The name can't be one (NBD_REP_ERR_INVALID).
        case invalid
        /// The daemon is draining (NBD_REP_ERR_SHUTDOWN).
        case shutdown
        /// The store is out of reach; nothing is known of the export (NBD_REP_ERR_PLATFORM).
        case unavailable
    }
    package var kind: Kind
    package var description: String
    package init(_ kind: Kind, _ description: String) {
        self.kind = kind
        self.description = description
    }
}

/// Who is at the other end of a connection.
package struct ClientIdentity: Sendable, Hashable {
    /// For people: `127.0.0.1:40112`, `unix:pid 812`.
    package var address: String
    /// Equal for connections that may belong to one client: the peer's IP address, or its process on a unix socket.
    package var host: String
    /// Whom limits are counted against; see `Peer.group`.
    package var group: String
    /// Connections of equal `host` are certainly one client: they come from one process.
    package var isProcess: Bool
    package init(address: String, host: String, group: String? = nil, isProcess: Bool = false) {
        self.address = address
        self.host = host
        self.group = group ?? host
        self.isProcess = isProcess
    }

    package init(_ peer: Peer) {
        self.init(address: peer.name, host: peer.host, group: peer.group, isProcess: peer.isProcess)
    }
}

package struct AttachedDevice: Sendable {
    package var device: any BlockDevice
    /// The loop that owns the device: the connection moves there.
    package var loop: Loop
    /// Passed to `join`, on that loop.
    package var admission: any AnyObject & Sendable
    package init(device: any BlockDevice, loop: Loop, admission: any AnyObject & Sendable) {
        self.device = device
        self.loop = loop
        self.admission = admission
    }
}

/// What the handshake asks. Called from any loop's tasks.
package protocol ExportProvider: Sendable {
    func list() async throws(AttachError) -> [ExportInfo]
    func describe(_ exportName: String) async throws(AttachError) -> ExportInfo
    /// Takes the disk for this server if need be. The result's `admission` lapses by itself when it is never joined.
    func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice
}
