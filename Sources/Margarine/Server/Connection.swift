// A connection in the transmission phase, from the reply that ends its handshake to its end.
//
// Always holds:
// - It is touched by its device's loop only.
// - Each request that was read is answered once, in any order, unless the connection ends before.
// - None is answered ESHUTDOWN: what a server that goes can't do any more stays without an answer, and the connection ends.
//   So the client asks again where it attaches next; an error would reach its file system.
// - What a client may make the server hold is bounded (`ConnectionLimits`): at a bound nothing more is read from it,
//   and nobody else notices.
// - `device.leave` is called once for each `join`, unless the device refused it or ended the connection itself.
// - The object lives until all its requests are completed; their buffers too.
//
// Beside this file: `Connection+Receive` (bytes to requests), `Connection+Requests` (requests to the device and back),
// `Connection+Send` (replies to the socket).

import Logging
import NBDProtocol
package import Runtime

/// Owned by its device's loop.
package final class Connection: EventHandler, DeviceClient, @unchecked Sendable {
    enum State: UInt8 {
        /// The device has not admitted it yet.
        case joining
        case serving
        /// DISC was received: what is outstanding is finished, nothing more is read.
        case ending
        /// Left; the last replies are on their way out.
        case closing
        case dead
    }

    /// Why received requests are not looked at for the moment.
    enum Pause: UInt8 {
        case none
        /// The turn was long enough; the next one comes by itself.
        case turn
        /// Too many or too large requests outstanding: goes on when some are answered.
        case requests
        /// In line for the common budget.
        case budget
        /// What was received came after the device asked for what had arrived (`absorb`).
        case held
    }

    /// The payload of a WRITE that comes in several pieces.
    struct Payload {
        var header: RequestHeader
        var buffer: UnsafeMutableRawPointer
        var received = 0
        /// Bytes of it that memory was granted for: a beginning, or all.
        var granted: Int
    }

    /// A turn of the device that is not in the journal yet.
    struct PendingTurn {
        var turn: UInt64
        var count: Int
    }

    private let socket: FileDescriptor
    let fd: Int32
    let share: LoopShare
    let device: any BlockDevice
    let rules: RequestRules
    let client: ClientIdentity
    let exportName: String
    let log: Logger
    private let ended: @Sendable () -> Void

    var state = State.joining
    var pause = Pause.none
    /// While paused for requests: the bytes that the first one in line needs.
    var pausedBytes = 0
    var isDraining = false
    /// A request was left without an answer because this server goes: nothing more that was sent is looked at, and the
    /// connection ends once what is outstanding is answered.
    private(set) var isDeaf = false
    /// The socket takes no more bytes: nothing is read until it does.
    var isBlocked = false
    var isDirty = false
    var willResume = false
    private var hasLeft = false
    private var isWatched = false
    private var watched: Events = []
    /// The last that its client will ever send is DISC.
    private var hasSaidGoodbye = false

    /// The beginning of a request's header: 27 bytes at most.
    let carry = UnsafeMutableRawPointer.allocate(byteCount: RequestHeader.lengthBytes, alignment: 8)
    var carryCount = 0
    /// Received bytes that a pause keeps from being parsed.
    var leftover: UnsafeMutableRawPointer?
    var leftoverBytes = 0
    var leftoverAt = 0
    var payload: Payload?
    /// Payload bytes of a refused WRITE still to come, and the error to answer then.
    var skip = 0
    var skipReply: (header: RequestHeader, error: NBD.ErrorCode?) = (
        RequestHeader(flags: 0, type: 0, cookie: 0, offset: 0, lengthBytes: 0), nil
    )
    /// Writes taken inline in this turn: their cookies are in `share.cookies`.
    var takenCount = 0

    /// Requests given to the device and not completed.
    var inFlight = 0
    /// Cookies of writes whose turn is not in the journal yet, in the order of `pendingTurns`.
    var pendingCookies: [UInt64] = []
    var pendingTurns: [PendingTurn] = []

    let send = UnsafeMutablePointer<SendQueue>.allocate(capacity: 1)

    /// Bytes of buffers held for this client, and how many of them the common budget was charged with.
    var held = 0
    var charged = 0
    private let account: RequestBudget.Account
    /// Of `charged`: granted to who waited, and not in use yet.
    private var promised = 0
    var waitID: UInt64?
    /// What it waits for.
    private var wanted = 0
    /// What may come beside a request that was granted its memory.
    private static let besideBytes = 128 << 10
    /// What `checkStall` last saw of `counters`, and for how many seconds it has hardly changed.
    private var seenBytes: UInt64 = 0
    private var stalledSeconds = 0

    var counters = ConnectionCounters()

    /// On the device's loop. `ended` is called once, when nothing is left of the connection.
    init(
        socket: FileDescriptor, share: LoopShare, device: any BlockDevice, rules: RequestRules, client: ClientIdentity,
        exportName: String, log: Logger, ended: @escaping @Sendable () -> Void
    ) {
        self.socket = socket
        fd = socket.raw
        self.share = share
        self.device = device
        self.rules = rules
        self.client = client
        self.exportName = exportName
        self.log = log
        self.ended = ended
        send.initialize(to: SendQueue())
        account = share.budget.open(client.group)
        share.add(self)
    }

    deinit {
        send.deinitialize(count: 1)
        send.deallocate()
        carry.deallocate()
    }

    // MARK: Beginning

    /// The device admitted it: sends `reply`, which ends the handshake, and serves.
    func start(reply: [UInt8]) {
        guard state == .joining else {
            // It ended while the device decided.
            leave(clean: false)
            return
        }
        state = .serving
        do { try watch(.readable) } catch {
            end("\(error)")
            return
        }
        log.info("attached", metadata: ["client": "\(client.address)", "export": "\(exportName)"])
        appendBytes(reply)
        flush()
        settle()
    }

    /// While the device decides: only to hear that the client has gone.
    func attend() {
        // Without this it is heard of later.
        if state == .joining { try? watch(.hangup) }
    }

    private func watch(_ events: Events) throws(ScratchError) {
        if isWatched { share.loop.rewatch(fd, events) } else { try share.loop.watch(fd, events, self) }
        isWatched = true
        watched = events
    }

    /// The device did not admit it: nothing is left of it but the socket, which goes back to the handshake. False: it ended
    /// meanwhile, and the socket with it.
    func abandon() -> Bool {
        share.loop.assertOwner()
        guard state == .joining else { return false }
        state = .dead
        isFinished = true
        unwatch()
        share.budget.close(account)
        share.remove(self)
        return true
    }

    // MARK: Events

    package func ready(_ events: Events) {
        share.loop.assertOwner()
        if events.contains(.writable), isBlocked {
            isBlocked = false
            flush()
            settle()
        }
        guard !events.isDisjoint(with: [.readable, .hangup]) else { return }
        switch state {
        case .serving where canRead:
            receive()
        case .serving:
            guard events.contains(.hangup) else { break }
            if watched.contains(.hangup), endsWithDisconnect() {
                // It may still listen. One that is broken is told of again.
                hasSaidGoodbye = true
                rewatch()
            } else {
                end("the client went away")
            }
        case .ending:
            // It does not wait for our replies; what it asked for before DISC is finished all the same.
            if events.contains(.hangup) { mute() }
        case .closing:
            discardInput()
        case .joining:
            guard events.contains(.hangup) else { break }
            if watched.contains(.hangup), Sockets.arrivedBytes(fd) > 0 {
                // It has said all it has to say, and may still listen.
                watched = []
                share.loop.rewatch(fd, [])
            } else {
                end("the client went away before it was served")
            }
        case .dead:
            break
        }
    }

    var canRead: Bool {
        state == .serving && !isDeaf && pause == .none && leftover == nil && (isHeld ? isTakingIn : !isBlocked)
    }
    /// Held off, and short of the place that it is read up to; then it is read though its client does not take replies, within
    /// the bounds of what it may hold.
    private var isTakingIn: Bool { isWithinRequest || !hasAllArrived }
    /// Whether what was received may be looked at.
    var mayParse: Bool { !isBlocked || isHeld }
    /// Some of a request has arrived, and not all of it.
    private var isWithinRequest: Bool { carryCount > 0 || payload != nil || skip > 0 }
    /// Requests that were read and not answered.
    var outstanding: Int { inFlight + pendingCookies.count + takenCount }

    /// Brings everything that depends on the state in line with it; the last thing after each activity.
    func settle() {
        // Whoever holds the memory that it waits for may go on for long, and then it would not be carried out either.
        if isDraining, pause == .budget { leaveUnanswered() }
        if isDeaf, state == .serving {
            releaseInput()
            returnPromised()
        }
        if state == .ending, outstanding == 0 {
            leave(clean: true)
            close(gently: false)
        } else if state == .serving, isDraining, outstanding == 0, send.pointee.isEmpty, payload == nil, skip == 0,
            leftover == nil, !hasMoreToRead
        {
            leave(clean: false)
            close(gently: true)
        }
        guard state == .serving || state == .ending || state == .closing else { return }
        if pause == .budget { waitNoMoreForOwn() }
        if state == .closing, send.pointee.isEmpty, !isLingering {
            die()
            return
        }
        if state == .serving, leftover != nil, mayParse {
            if pause == .requests, hasRoomAgain { pause = .turn }
            if pause == .turn, !willResume {
                willResume = true
                share.scheduleResume(self)
            }
        }
        rewatch()
    }

    /// Before it hangs up: what has arrived may be DISC, and then its client was done.
    private var hasMoreToRead: Bool { canRead && Sockets.arrivedBytes(fd) > 0 }

    /// Waits for what may take long, and is not read: its client may give it up meanwhile, and send the same requests on
    /// another connection. Then they must not take effect here, perhaps after newer ones.
    private var mayBeGivenUp: Bool {
        state == .serving && (pause == .budget || pause == .requests || isDeaf) && !isBlocked && !hasSaidGoodbye
    }

    private var hasRoomAgain: Bool {
        outstanding <= share.limits.requestsPerConnection / 2
            && held <= min(share.limits.bytesPerConnection / 2, share.limits.bytesPerConnection - pausedBytes)
            || outstanding == 0 && send.pointee.isEmpty
    }

    private func rewatch() {
        guard isWatched else { return }
        var wanted: Events = []
        if isBlocked { wanted.insert(.writable) }
        if canRead || isLingering { wanted.insert(.readable) }
        if mayBeGivenUp { wanted.insert(.hangup) }
        if wanted == watched { return }
        watched = wanted
        share.loop.rewatch(fd, wanted)
    }

    func unwatch() {
        guard isWatched else { return }
        isWatched = false
        share.loop.unwatch(fd)
    }

    // MARK: The device's wishes

    package func disconnect(reason: String) {
        share.loop.assertOwner()
        hasLeft = true
        end(reason)
    }

    package var movedBytes: UInt64 { counters.receivedBytes + counters.sentBytes }

    package func absorb(isFirst: Bool) -> Bool {
        share.loop.assertOwner()
        if state == .joining || state == .ending || state == .closing || isDeaf { return true }
        let isNew = isFirst || !isHeld
        if isNew {
            // What an earlier join held off has arrived by now.
            if isHeld { letGo() }
            guard state == .serving else { return state == .closing }
            heldFrom = counters.receivedBytes + UInt64(Sockets.arrivedBytes(fd))
        }
        holdOff()
        // Bounded, so that a client with a large payload does not hold up the loop.
        var rounds = 1024
        while state == .serving, canRead, rounds > 0, receive() { rounds -= 1 }
        if state == .ending { return true }
        guard state == .serving else { return false }
        let isWhole =
            hasAllArrived && !isWithinRequest && (pause == .held || (pause == .none && leftover == nil))
        if isNew, isWhole, outstanding == 0 { letGo() }
        return isWhole
    }

    /// A busy client that is alive would never be found between two requests: what it sends from now on waits in the
    /// socket while the device settles what had arrived, which it does by calling `absorb` again and again.
    private func holdOff() {
        isHeld = true
        holdTimer?.cancel()
        holdTimer = share.loop.after(ns: Self.holdNs) { [weak self] in self?.letGo() }
        settle()
    }

    private func letGo() {
        holdTimer?.cancel()
        holdTimer = nil
        isHeld = false
        if pause == .held { pause = leftover == nil ? .none : .turn }
        settle()
    }

    /// Requests that begin at `heldFrom` or behind it are not looked at.
    private(set) var isHeld = false
    /// A place in the stream of received bytes. A pause may keep the connection from coming so far for a while.
    private(set) var heldFrom: UInt64 = 0
    private var hasAllArrived: Bool { counters.receivedBytes >= heldFrom }
    private var holdTimer: LoopTimer?
    private static let holdNs: UInt64 = 100_000_000

    // MARK: Ending

    /// Finishes what is outstanding, then hangs up; requests that come meanwhile, or wait for memory, stay without an answer.
    func drain() {
        share.loop.assertOwner()
        isDraining = true
        if state == .joining { return }
        settle()
    }

    /// A request is not answered, for this server goes. `settle` follows.
    func leaveUnanswered() {
        isDraining = true
        isDeaf = true
    }

    /// After DISC the client has gone without waiting for the last replies.
    func mute() {
        isMute = true
        isBlocked = false
        unwatch()
        dropOutput()
    }
    private(set) var isMute = false

    /// Ends the connection at once: nothing more is read or sent.
    func end(_ reason: String) {
        guard state != .dead else { return }
        if share.active === self {
            // The turn under way still looks at this object's bytes; it ends the connection when it is done.
            if endReason == nil { endReason = reason }
            return
        }
        log.info("ended", metadata: ["client": "\(client.address)", "export": "\(exportName)", "reason": "\(reason)"])
        leave(clean: false)
        die()
    }

    /// Why the turn under way is the last one.
    var endReason: String?

    private func leave(clean: Bool) {
        if hasLeft { return }
        hasLeft = true
        if clean {
            log.info("detached", metadata: ["client": "\(client.address)", "export": "\(exportName)"])
        }
        device.leave(self, clean: clean)
    }

    /// The client still reads (or should hear the end of the stream before the reset that unread input causes).
    private var isLingering = false
    private var lingerTimer: LoopTimer?

    /// Sends what is queued, then closes. `gently`: bytes that the client has sent meanwhile are read over first.
    private func close(gently: Bool) {
        state = .closing
        releaseInput()
        isLingering = gently
        if gently { Sockets.shutdownSending(fd) }
        if gently || !send.pointee.isEmpty {
            lingerTimer = share.loop.after(ns: share.limits.lingerMs * 1_000_000) { [weak self] in self?.die() }
        }
    }

    private func discardInput() {
        let room = UnsafeMutableRawBufferPointer(start: share.receiveBase, count: share.receiveBytes)
        switch Sockets.receive(fd, into: room) {
        case .bytes, .wouldBlock: break
        case .closed, .failed: die()
        }
    }

    /// Nothing more goes in or out. What is in flight at the device keeps the object alive.
    private func die() {
        guard state != .dead else { return }
        state = .dead
        lingerTimer?.cancel()
        lingerTimer = nil
        holdTimer?.cancel()
        holdTimer = nil
        unwatch()
        socket.close()
        releaseInput()
        dropOutput()
        pendingCookies = []
        pendingTurns = []
        promised = 0
        unhold(0)
        finishIfFree()
    }

    private var isFinished = false

    func finishIfFree() {
        guard state == .dead, inFlight == 0, !isFinished else { return }
        isFinished = true
        precondition(held == 0 && charged == 0, "\(held) bytes unaccounted for")
        share.budget.close(account)
        share.setTrim()
        ended()
        share.remove(self)
    }

    // MARK: Stalls

    /// Each second while others wait for memory.
    func checkStall() {
        // Who waits for memory sends nothing because we do not read; but whether it takes its replies is its own doing.
        guard charged > 0, state != .dead, state != .joining, isBlocked || (payload != nil && waitID == nil) else {
            stalledSeconds = 0
            return
        }
        if movedBytes - seenBytes >= UInt64(max(share.limits.stallBytes, charged / share.limits.stallDivisor)) {
            seenBytes = movedBytes
            stalledSeconds = 0
            return
        }
        stalledSeconds += 1
        if stalledSeconds >= share.limits.stallSeconds {
            end("the client was too slow for the \(charged) bytes of memory that it held while others waited for some")
        }
    }

    // MARK: Memory

    /// Counts `bytes` more for this client. False: its line in the common budget begins (`wait`).
    func hold(_ bytes: Int) -> Bool {
        let over = held + bytes - share.limits.ownBytesPerConnection - charged
        if over > 0 {
            // Who was granted what he waited for does not wait again because something small came beside it; another
            // request does.
            if promised > 0, over <= Self.besideBytes {
                share.budget.force(over, account)
            } else if !share.budget.take(over, account) {
                return false
            }
            charged += over
        }
        held += bytes
        if promised > 0 { promised = max(0, promised - bytes) }
        return true
    }

    /// Counts `bytes` for what has to be held.
    func holdAnyway(_ bytes: Int) {
        let over = held + bytes - share.limits.ownBytesPerConnection - charged
        if over > 0 {
            share.budget.force(over, account)
            charged += over
        }
        held += bytes
    }

    func unhold(_ bytes: Int) {
        held -= bytes
        guard charged > 0 else { return }
        let free = charged - promised - max(0, held - share.limits.ownBytesPerConnection)
        guard free > 0 else { return }
        charged -= free
        share.budget.give(free, account)
    }

    /// Stands in line for `bytes`, with everything else of this connection paused. `later`: what the same request asks for
    /// once it has these.
    func wait(_ bytes: Int, later: Int = 0) {
        pause = .budget
        // What an earlier request was granted and did not need is not kept while another one waits: nobody would get the
        // exception that it may be.
        returnPromised()
        let over = held + bytes - share.limits.ownBytesPerConnection - charged
        precondition(over > 0 && waitID == nil)
        wanted = bytes
        // Marks the wait as begun in case the grant is posted before `wait` returns.
        waitID = 0
        let loop = share.loop
        waitID = share.budget.wait(over, later: later, account) { [self] in
            loop.post { self.granted(over) }
        }
    }

    private func granted(_ bytes: Int) {
        waitID = nil
        guard state == .serving else {
            share.budget.give(bytes, account)
            return
        }
        // Charged ahead of the hold that asked for it, which now finds it there.
        charged += bytes
        promised = bytes
        pause = leftover == nil ? .none : .turn
        settle()
    }

    /// Enough was answered meanwhile that what it waits for is within its own: nobody else has a say in that.
    private func waitNoMoreForOwn() {
        guard let id = waitID, held + wanted <= share.limits.ownBytesPerConnection + charged,
            share.budget.cancel(id)
        else { return }
        waitID = nil
        pause = leftover == nil ? .none : .turn
    }

    /// What was granted to who waited, and was not needed after all (the device took the write at once when it was asked
    /// again), goes back. The request that it is for comes first in the next turn, and has used it then or never will.
    @inline(__always)
    func returnPromised() {
        if promised == 0 { return }
        promised = 0
        unhold(0)
    }

    func cancelWait() {
        guard let id = waitID else { return }
        // If it was too late, `granted` gives it back.
        if share.budget.cancel(id) { waitID = nil }
    }
}
