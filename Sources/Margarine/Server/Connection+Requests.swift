// From requests to the device and back: inline where the device can answer at once, else by a `DeviceRequest`.

import NBDProtocol
import Runtime

extension Connection {
    /// Reads up to here are put straight into the pack buffer.
    private static let packedReadBytes = 16 << 10
    /// Completed reads up to here are copied there: their buffer is free at once.
    private static let copiedReadBytes = 8 << 10
    /// In reads of at least this much, aligned runs of so many zeroes become holes.
    private static let holeBytes = 64 << 10
    /// What a request costs beside its buffer: its object, and the task and timer of one that is not answered at once.
    private static let requestBytes = 2 << 10

    private var dataHeaderBytes: Int { rules.structuredReplies ? Reply.dataBytes : Reply.simpleBytes }

    /// Counts `bytes` for a new request (which will need `whole` in the end). False: parsing stops here for now.
    func admit(_ bytes: Int, whole: Int) -> Bool {
        if held > 0, held + whole > share.limits.bytesPerConnection, outstanding > 0 || !send.pointee.isEmpty {
            pause = .requests
            pausedBytes = whole
            return false
        }
        if hold(bytes) { return true }
        wait(bytes, later: max(0, whole - bytes))
        return false
    }

    // MARK: Reading

    /// False: it has to wait.
    func read(_ header: RequestHeader) -> Bool {
        let length = Int(header.lengthBytes)
        if length > Self.packedReadBytes { return readOwned(header, length) }
        let space = dataHeaderBytes + length
        // A new pack buffer, and one for where the device can't answer at once: both or none. Who waited for the second with
        // the first in his hands would keep from himself, and all others, what that takes of the budget.
        let spare = send.pointee.needsPack(for: space) ? BufferPool.cost(length) : 0
        if spare > 0 {
            let whole = SendQueue.packBytes + spare
            guard admit(whole, whole: whole) else { return false }
        }
        let at = send.pointee.reserve(space, &share.pool)
        switch device.tryRead(offset: header.offset, lengthBytes: length, into: at + dataHeaderBytes) {
        case .done:
            putDataHeader(at, cookie: header.cookie, offset: header.offset, length, isLast: true)
            send.pointee.commit(space)
            counters.readBytes += UInt64(length)
            unhold(spare)
        case .later:
            if spare == 0 { guard admit(BufferPool.cost(length), whole: length) else { return false } }
            submitRead(header, share.pool.takeSmall(length))
        case .failed(let error):
            unhold(spare)
            refuse(header.cookie, isRead: true, error.wire)
        }
        counters.requests += 1
        return true
    }

    private func readOwned(_ header: RequestHeader, _ length: Int) -> Bool {
        guard admit(BufferPool.cost(length), whole: length) else { return false }
        counters.requests += 1
        guard let buffer = share.pool.take(length) else {
            refuseWithoutMemory(header.cookie, isRead: true, length)
            return true
        }
        switch device.tryRead(offset: header.offset, lengthBytes: length, into: buffer) {
        case .done:
            let fragments = !header.commandFlags.contains(.dontFragment)
            replyOwned(header.cookie, header.offset, length, buffer, mayFragment: fragments)
        case .later:
            submitRead(header, buffer)
        case .failed(let error):
            release(buffer, length)
            refuse(header.cookie, isRead: true, error.wire)
        }
        return true
    }

    private func submitRead(_ header: RequestHeader, _ buffer: UnsafeMutableRawPointer) {
        let request = newRequest(.read, header)
        request.buffer = buffer
        request.tag = header.commandFlags.contains(.dontFragment) ? 1 : 0
        device.submit(request)
    }

    @inline(__always)
    private func putDataHeader(
        _ at: UnsafeMutableRawPointer, cookie: UInt64, offset: UInt64, _ length: Int, isLast: Bool
    ) {
        if rules.structuredReplies {
            Reply.data(at, cookie: cookie, offset: offset, lengthBytes: UInt32(length), isLast: isLast)
        } else {
            Reply.simple(at, cookie: cookie, error: 0)
        }
    }

    /// Replies with the bytes of a counted buffer, which becomes the send queue's or goes back.
    private func replyOwned(
        _ cookie: UInt64, _ offset: UInt64, _ length: Int, _ buffer: UnsafeMutableRawPointer, mayFragment: Bool
    ) {
        counters.readBytes += UInt64(length)
        if length <= Self.copiedReadBytes {
            let at = reserve(dataHeaderBytes + length)
            putDataHeader(at, cookie: cookie, offset: offset, length, isLast: true)
            (at + dataHeaderBytes).copyMemory(from: buffer, byteCount: length)
            send.pointee.commit(dataHeaderBytes + length)
            release(buffer, length)
            return
        }
        if rules.structuredReplies, mayFragment, length >= Self.holeBytes {
            replyWithHoles(cookie, offset, length, buffer)
            return
        }
        putDataHeader(reserve(dataHeaderBytes), cookie: cookie, offset: offset, length, isLast: true)
        send.pointee.commit(dataHeaderBytes)
        send.pointee.append(buffer, length, owned: buffer, bufferBytes: length)
    }

    /// One chunk for each run of data or of whole zero pieces.
    private func replyWithHoles(_ cookie: UInt64, _ offset: UInt64, _ length: Int, _ buffer: UnsafeMutableRawPointer) {
        var at = 0
        var isOwned = false
        while at < length {
            // A piece ends at a multiple of its size in the export, so that holes lie where the client's own blocks do.
            let isHole = isZeroPiece(buffer, at, length, offset)
            var end = pieceEnd(at, length, offset)
            while end < length, isZeroPiece(buffer, end, length, offset) == isHole {
                end = pieceEnd(end, length, offset)
            }
            let isLast = end == length
            if isHole {
                Reply.hole(
                    reserve(Reply.holeBytes), cookie: cookie, offset: offset + UInt64(at),
                    lengthBytes: UInt32(end - at),
                    isLast: isLast)
                send.pointee.commit(Reply.holeBytes)
            } else {
                putDataHeader(
                    reserve(Reply.dataBytes), cookie: cookie, offset: offset + UInt64(at), end - at, isLast: isLast)
                send.pointee.commit(Reply.dataBytes)
                send.pointee.append(
                    buffer + at, end - at, owned: isLast ? buffer : nil, bufferBytes: isLast ? length : 0)
                isOwned = isLast
            }
            at = end
        }
        if isOwned { return }
        // The last chunk is a hole: the buffer goes when the hole has gone, behind all its data.
        send.pointee.append(buffer, 0, owned: buffer, bufferBytes: length)
    }

    private func pieceEnd(_ at: Int, _ length: Int, _ offset: UInt64) -> Int {
        let into = Int(truncatingIfNeeded: (offset &+ UInt64(at)) & UInt64(Self.holeBytes - 1))
        return min(length, at + Self.holeBytes - into)
    }

    /// Whether the piece that begins at `at` is whole and all zeroes. Data are found out at their first words.
    private func isZeroPiece(_ buffer: UnsafeMutableRawPointer, _ at: Int, _ length: Int, _ offset: UInt64) -> Bool {
        let end = pieceEnd(at, length, offset)
        guard end - at == Self.holeBytes else { return false }
        var index = at
        while index < end {
            let bits =
                buffer.loadUnaligned(fromByteOffset: index, as: SIMD8<UInt64>.self)
                | buffer.loadUnaligned(fromByteOffset: index + 64, as: SIMD8<UInt64>.self)
            if bits != .zero { return false }
            index += 128
        }
        return true
    }

    // MARK: Writing

    /// A WRITE with its whole payload in the receive buffer. False: it has to wait.
    func write(_ header: RequestHeader, from bytes: UnsafeMutableRawPointer) -> Bool {
        let length = Int(header.lengthBytes)
        let isFUA = header.commandFlags.contains(.fua)
        let answer =
            isFUA
            ? Inline.later : device.tryWrite(offset: header.offset, lengthBytes: length, from: bytes, client: self)
        switch answer {
        case .done:
            taken(header, length)
        case .later:
            guard admit(BufferPool.cost(length), whole: length) else { return false }
            guard let buffer = share.pool.take(length) else {
                refuseWithoutMemory(header.cookie, isRead: false, length)
                break
            }
            buffer.copyMemory(from: bytes, byteCount: length)
            submitWrite(header, buffer)
        case .failed(let error):
            refuse(header.cookie, isRead: false, error.wire)
        }
        counters.requests += 1
        return true
    }

    /// A WRITE whose payload came to a counted buffer.
    func writeOwned(_ header: RequestHeader, _ buffer: UnsafeMutableRawPointer) {
        let length = Int(header.lengthBytes)
        let isFUA = header.commandFlags.contains(.fua)
        let answer =
            isFUA
            ? Inline.later : device.tryWrite(offset: header.offset, lengthBytes: length, from: buffer, client: self)
        switch answer {
        case .done:
            release(buffer, length)
            taken(header, length)
        case .later:
            submitWrite(header, buffer)
        case .failed(let error):
            release(buffer, length)
            refuse(header.cookie, isRead: false, error.wire)
        }
    }

    private func submitWrite(_ header: RequestHeader, _ buffer: UnsafeMutableRawPointer) {
        let request = newRequest(.write, header)
        request.buffer = buffer
        device.submit(request)
    }

    private func taken(_ header: RequestHeader, _ length: Int) {
        share.cookies[takenCount] = header.cookie
        takenCount += 1
        counters.writtenBytes += UInt64(length)
    }

    /// The writes of this turn go to the journal together.
    func endDeviceTurn() {
        let count = takenCount
        let end = device.endTurn(client: self)
        takenCount = 0
        switch end {
        case .acknowledged:
            for index in 0..<count { acknowledge(share.cookies[index]) }
        case .pending(let turn):
            pendingTurns.append(PendingTurn(turn: turn, count: count))
            pendingCookies.append(contentsOf: UnsafeBufferPointer(start: share.cookies, count: count))
        case .failed(let error):
            for index in 0..<count { refuse(share.cookies[index], isRead: false, error.wire) }
        }
    }

    package func journaled(turn: UInt64, error: DeviceError?) {
        share.loop.assertOwner()
        guard state == .serving || state == .ending else { return }
        // A device tells all its clients, and several of our turns may have gone to its journal as one.
        let turns = pendingTurns.prefix { $0.turn <= turn }.count
        if turns == 0 { return }
        let count = pendingTurns[..<turns].reduce(0) { $0 + $1.count }
        for cookie in pendingCookies[..<count] {
            if let error {
                refuse(cookie, isRead: false, error.wire)
            } else {
                acknowledge(cookie)
            }
        }
        pendingCookies.removeFirst(count)
        pendingTurns.removeFirst(turns)
        repliesAreDue()
    }

    // MARK: All else

    /// FLUSH, TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS. False: it has to wait.
    func submit(_ command: NBD.Command, _ header: RequestHeader) -> Bool {
        let kind: DeviceRequest.Kind
        switch command {
        case .flush: kind = .flush
        case .trim: kind = .trim
        case .writeZeroes: kind = .writeZeroes
        case .cache: kind = .cache
        case .blockStatus: kind = .blockStatus
        case .read, .write, .disconnect: preconditionFailure("\(command) has its own way")
        }
        let flags = header.commandFlags
        let cost = Self.cost(kind, UInt64(header.lengthBytes), onlyOne: flags.contains(.onlyOneExtent))
        guard admit(cost, whole: cost) else { return false }
        counters.requests += 1
        let request = newRequest(kind, header)
        request.noHole = flags.contains(.noHole)
        request.fastZero = flags.contains(.fastZero)
        request.onlyOneExtent = flags.contains(.onlyOneExtent)
        device.submit(request)
        return true
    }

    /// What a request without a buffer is counted as while it is at the device: the request itself with what carries it out,
    /// and the extents that it may end with. 0 for the others: their buffers count.
    private static func cost(_ kind: DeviceRequest.Kind, _ lengthBytes: UInt64, onlyOne: Bool) -> Int {
        switch kind {
        case .read, .write: 0
        case .flush, .trim, .writeZeroes, .cache: requestBytes
        case .blockStatus where onlyOne: requestBytes
        case .blockStatus:
            requestBytes + min(DeviceRequest.mostExtents, Int(lengthBytes / 4096) + 2) * MemoryLayout<Extent>.stride
        }
    }

    private func newRequest(_ kind: DeviceRequest.Kind, _ header: RequestHeader) -> DeviceRequest {
        let request = share.takeRequest()
        request.kind = kind
        request.fua = header.commandFlags.contains(.fua)
        request.offset = header.offset
        request.lengthBytes = UInt64(header.lengthBytes)
        request.cookie = header.cookie
        request.client = self
        inFlight += 1
        return request
    }

    package func completed(_ request: DeviceRequest) {
        share.loop.assertOwner()
        precondition(inFlight > 0)
        inFlight -= 1
        let length = Int(request.lengthBytes)
        let cookie = request.cookie
        if state == .serving || state == .ending {
            if let error = request.error {
                refuse(cookie, isRead: request.kind == .read, error.wire)
                if let buffer = request.buffer { release(buffer, length) }
            } else {
                switch request.kind {
                case .read:
                    replyOwned(cookie, request.offset, length, request.buffer!, mayFragment: request.tag == 0)
                case .write:
                    counters.writtenBytes += request.lengthBytes
                    release(request.buffer!, length)
                    acknowledge(cookie)
                case .blockStatus:
                    replyStatus(request)
                case .trim, .writeZeroes, .flush, .cache:
                    acknowledge(cookie)
                }
            }
            repliesAreDue()
        } else if let buffer = request.buffer {
            release(buffer, length)
        }
        let cost = Self.cost(request.kind, request.lengthBytes, onlyOne: request.onlyOneExtent)
        if cost > 0 { unhold(cost) }
        share.recycle(request)
        finishIfFree()
    }

    /// Descriptors for exactly the range asked, or for less of it when there are too many.
    private func replyStatus(_ request: DeviceRequest) {
        var runs: [Extent] = []
        var left = request.lengthBytes
        for extent in request.extents where left > 0 {
            let bytes = min(extent.lengthBytes, left)
            if bytes == 0 { continue }
            left -= bytes
            if let last = runs.last, last.isHole == extent.isHole, last.isZero == extent.isZero {
                runs[runs.count - 1].lengthBytes += bytes
            } else if runs.count == (request.onlyOneExtent ? 1 : DeviceRequest.mostExtents) {
                break
            } else {
                runs.append(Extent(lengthBytes: bytes, isHole: extent.isHole, isZero: extent.isZero))
            }
        }
        precondition(!runs.isEmpty, "a block status without extents")
        let space = Reply.statusBytes + runs.count * Reply.descriptorBytes
        let isPacked = space <= SendQueue.packBytes
        if !isPacked { holdAnyway(BufferPool.cost(space)) }
        guard let at = isPacked ? reserve(space) : share.pool.take(space) else {
            refuseWithoutMemory(request.cookie, isRead: false, space)
            return
        }
        Reply.status(at, cookie: request.cookie, descriptors: runs.count)
        var place = at + Reply.statusBytes
        for run in runs {
            Reply.descriptor(place, lengthBytes: UInt32(run.lengthBytes), isHole: run.isHole, isZero: run.isZero)
            place += Reply.descriptorBytes
        }
        if isPacked {
            send.pointee.commit(space)
        } else {
            send.pointee.append(at, space, owned: at, bufferBytes: space)
        }
    }

    /// The system has no memory for the buffer of `length` that was counted for a request.
    private func refuseWithoutMemory(_ cookie: UInt64, isRead: Bool, _ length: Int) {
        unhold(BufferPool.cost(length))
        refuse(cookie, isRead: isRead, .noMemory)
    }

    private func release(_ buffer: UnsafeMutableRawPointer, _ length: Int) {
        share.giveBuffer(buffer, bytes: length)
        unhold(BufferPool.cost(length))
    }
}
