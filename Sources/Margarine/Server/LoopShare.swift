// What all connections of one loop share: buffers, request objects, and the lists of those who have something to do at the end of the loop's turn.
//
// Always holds: at most one connection is in a turn at a time; the receive buffer, the vectors and the cookies are its own
// till that turn ends.

import Glibc
import Runtime

/// Owned by its loop.
final class LoopShare: @unchecked Sendable {
    let loop: Loop
    let limits: ConnectionLimits
    let budget: RequestBudget

    var pool: BufferPool
    let receiveBase: UnsafeMutableRawPointer
    let receiveBytes: Int
    let vectors: UnsafeMutableBufferPointer<iovec>
    /// Cookies of the writes that the current turn took inline.
    let cookies: UnsafeMutablePointer<UInt64>
    private(set) var active: Connection?

    /// Connections that are not over, with their pending requests: this keeps them alive.
    private(set) var connections: [ObjectIdentifier: Connection] = [:]
    private var idleRequests: [Unmanaged<DeviceRequest>] = []

    private var dirty: [Connection] = []
    private var resuming: [Connection] = []
    private var endOfTurnIsAsked = false
    private var stallTickIsSet = false
    private var trimIsSet = false

    private static let keptRequests = 1024
    private static let trimAfterNs: UInt64 = 5_000_000_000

    /// On the loop.
    init(loop: Loop, limits: ConnectionLimits, budget: RequestBudget) {
        self.loop = loop
        self.limits = limits
        self.budget = budget
        pool = BufferPool(limitBytes: limits.pooledBytesPerLoop, mapsAtMostBytes: limits.mapsAtMostBytes)
        let receive = loop.receiveBuffer
        receiveBase = receive.baseAddress!
        receiveBytes = receive.count
        vectors = .allocate(capacity: 256)
        cookies = .allocate(capacity: limits.requestsPerConnection)
    }

    deinit {
        for request in idleRequests { request.release() }
        vectors.deallocate()
        cookies.deallocate()
    }

    // MARK: Turns

    /// `connection` begins a turn. A device that calls `absorb` from within another connection's turn would overwrite the
    /// bytes being parsed, so that is a crash.
    func begin(_ connection: Connection) {
        loop.assertOwner()
        precondition(active == nil, "a turn within a turn")
        active = connection
    }

    func end() { active = nil }

    /// `connection` has replies to send when this turn of the loop ends.
    func markDirty(_ connection: Connection) {
        dirty.append(connection)
        askForEndOfTurn()
    }

    /// `connection` goes on with what it has received, after the others had their turn.
    func scheduleResume(_ connection: Connection) {
        resuming.append(connection)
        askForEndOfTurn()
    }

    private func askForEndOfTurn() {
        if endOfTurnIsAsked { return }
        endOfTurnIsAsked = true
        loop.atEndOfTurn { [unowned self] in endTurn() }
    }

    private func endTurn() {
        endOfTurnIsAsked = false
        var index = 0
        while index < dirty.count {
            dirty[index].flushReplies()
            index += 1
        }
        dirty.removeAll(keepingCapacity: true)
        // Who asks to resume again while these run has his turn next time.
        let now = resuming.count
        for index in 0..<now { resuming[index].resume() }
        resuming.removeFirst(now)
        if !dirty.isEmpty || !resuming.isEmpty { askForEndOfTurn() }
    }

    // MARK: Connections

    func add(_ connection: Connection) {
        loop.assertOwner()
        connections[ObjectIdentifier(connection)] = connection
    }

    func remove(_ connection: Connection) {
        loop.assertOwner()
        connections[ObjectIdentifier(connection)] = nil
    }

    // MARK: Requests

    func takeRequest() -> DeviceRequest {
        loop.assertOwner()
        if let request = idleRequests.popLast() { return request.takeUnretainedValue() }
        return Unmanaged.passRetained(DeviceRequest()).takeUnretainedValue()
    }

    /// The request is finished and its buffer is somebody else's.
    func recycle(_ request: DeviceRequest) {
        if idleRequests.count >= Self.keptRequests {
            Unmanaged.passUnretained(request).release()
            return
        }
        request.fua = false
        request.noHole = false
        request.fastZero = false
        request.onlyOneExtent = false
        request.isCancelled = false
        request.error = nil
        request.buffer = nil
        request.tag = 0
        request.deviceState = 0
        if request.deviceObject != nil { request.deviceObject = nil }
        if !request.extents.isEmpty { request.extents = [] }
        idleRequests.append(Unmanaged.passUnretained(request))
    }

    // MARK: Memory

    func giveBuffer(_ buffer: UnsafeMutableRawPointer, bytes: Int) {
        pool.give(buffer, bytes: bytes)
        setTrim()
    }

    /// Frees pooled buffers that load does not need any more.
    func setTrim() {
        if trimIsSet { return }
        trimIsSet = true
        loop.after(ns: Self.trimAfterNs) { [weak self] in
            guard let self else { return }
            trimIsSet = false
            if pool.trim() { setTrim() }
        }
    }

    /// Somebody waits for memory: looks each second for clients that stall.
    func memoryIsShort() {
        if stallTickIsSet { return }
        stallTickIsSet = true
        loop.after(ns: 1_000_000_000) { [weak self] in
            guard let self else { return }
            stallTickIsSet = false
            guard budget.isContended else { return }
            for connection in Array(connections.values) { connection.checkStall() }
            memoryIsShort()
        }
    }
}
