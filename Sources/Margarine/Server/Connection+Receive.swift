// From bytes to requests: one receive, everything that came is parsed, one end of turn, one send.

import Glibc
import NBDProtocol
import Runtime

extension Connection {
    /// Granted of a payload before any of it is read: at least what one receive can bring of it along with its header. So a
    /// header alone keeps no memory from others.
    private static let firstGrantBytes = 512 << 10
    private static let hungUp = "the client hung up without DISC"

    /// One turn on what the socket has. False when it had nothing.
    @discardableResult
    func receive() -> Bool {
        share.begin(self)
        var more = false
        if payload != nil {
            more = receivePayload()
        } else {
            if carryCount > 0 { share.receiveBase.copyMemory(from: carry, byteCount: carryCount) }
            let room = UnsafeMutableRawBufferPointer(
                start: share.receiveBase + carryCount, count: share.receiveBytes - carryCount)
            switch Sockets.receive(fd, into: room) {
            case .bytes(let count):
                counters.receivedBytes += UInt64(count)
                let total = carryCount + count
                carryCount = 0
                parse(share.receiveBase, total)
                more = true
            case .wouldBlock: break
            case .closed: end(Self.hungUp)
            case .failed(let error): end("receiving: \(String(cString: strerror(error)))")
            }
        }
        finishTurn()
        return more && state == .serving
    }

    /// The rest of a payload goes straight to its buffer, and what follows it to the receive buffer.
    private func receivePayload() -> Bool {
        guard var current = payload else { return false }
        let length = Int(current.header.lengthBytes)
        if current.received == current.granted {
            // All of the rest, so that nobody waits with half of a payload in his hands.
            let rest = length - current.granted
            guard hold(rest) else {
                wait(rest)
                return false
            }
            current.granted = length
        }
        let wanted = current.granted - current.received
        share.vectors[0] = iovec(iov_base: current.buffer + current.received, iov_len: wanted)
        share.vectors[1] = iovec(iov_base: share.receiveBase, iov_len: share.receiveBytes)
        let count = readv(fd, share.vectors.baseAddress, current.granted == length && !isHeld ? 2 : 1)
        guard count > 0 else {
            payload = current
            if count == 0 {
                end(Self.hungUp)
            } else if errno != EAGAIN && errno != EINTR {
                end("receiving: \(String(cString: strerror(errno)))")
            }
            return false
        }
        counters.receivedBytes += UInt64(count)
        current.received += min(count, wanted)
        payload = current
        if current.received == length {
            finishPayload()
            if count > wanted, endReason == nil { parse(share.receiveBase, count - wanted) }
        }
        return true
    }

    /// Goes on with what was received before a pause.
    func resume() {
        willResume = false
        guard state == .serving, pause == .turn, mayParse, let leftover else { return }
        share.begin(self)
        pause = .none
        parse(leftover + leftoverAt, leftoverBytes - leftoverAt)
        finishTurn()
    }

    /// Ends a turn: one end of turn at the device for all it took inline, one send for all replies. Sending earlier, every
    /// 128 KiB, halved the rate of 128 KiB reads: the client wakes for each piece and goes to sleep again.
    private func finishTurn() {
        if takenCount > 0 { endDeviceTurn() }
        if endReason == nil { flush() }
        share.end()
        if let reason = endReason {
            endReason = nil
            end(reason)
            return
        }
        returnPromised()
        settle()
    }

    /// Parses the last `count` bytes that were received: the receive buffer's, or what is left over of an earlier turn.
    private func parse(_ base: UnsafeMutableRawPointer, _ count: Int) {
        device.beginTurn()
        // While the connection is held off, requests that begin here or behind wait.
        let newFrom = isHeld ? Int(heldFrom) - (Int(counters.receivedBytes) - count) : .max
        var at = 0
        var work = 0
        let turnBytes = share.limits.turnBytes
        let outstandingLimit = share.limits.requestsPerConnection
        while endReason == nil, !isDeaf {
            // What the first request was granted and did not need is not the next one's, which stands in line for its own:
            // with a part of the exception in its hands it would wait for ever for the rest.
            if at > 0 { returnPromised() }
            if skip > 0 {
                let part = min(skip, count - at)
                skip -= part
                at += part
                if skip > 0 { break }
                answerSkipped()
            }
            // Not within a request: the rest of its payload is read though it comes later.
            if at >= newFrom, payload == nil {
                pause = .held
                break
            }
            guard count - at >= RequestHeader.lengthBytes else { break }
            if work >= turnBytes {
                pause = .turn
                break
            }
            // Only one that is held off goes on while its client takes no replies; so this bounds them.
            if outstanding >= outstandingLimit || (isBlocked && held >= share.limits.bytesPerConnection) {
                pause = .requests
                pausedBytes = 0
                break
            }
            guard let header = RequestHeader(base + at) else {
                end("a request without NBD_REQUEST_MAGIC")
                return
            }
            let behind = at + RequestHeader.lengthBytes
            let room = count - behind
            let length = Int(header.lengthBytes)
            let verdict = rules.judge(header)
            if isDraining, verdict != .accept(.disconnect) {
                leaveUnanswered()
                break
            }
            switch verdict {
            case .accept(.read):
                guard read(header) else { break }
                work += length
                at = behind
                continue
            case .accept(.write):
                let part = min(room, length)
                if part == length {
                    guard write(header, from: base + behind) else { break }
                } else {
                    guard beginPayload(header, from: base + behind, part) else { break }
                }
                work += part
                at = behind + part
                continue
            case .accept(.disconnect):
                counters.requests += 1
                state = .ending
                releaseInput()
                return
            case .accept(let command):
                guard submit(command, header) else { break }
                at = behind
                continue
            case .nothingToDo(let command):
                counters.requests += 1
                if command == .read && rules.structuredReplies {
                    Reply.none(reserve(Reply.chunkBytes), cookie: header.cookie)
                    send.pointee.commit(Reply.chunkBytes)
                } else {
                    acknowledge(header.cookie)
                }
                at = behind
                continue
            case .refuse(let error):
                counters.requests += 1
                guard header.payloadBytes <= share.limits.skippedPayloadBytes else {
                    end("a WRITE of \(header.payloadBytes) bytes")
                    return
                }
                // Answered once its payload is off the stream: then there is one reply, and the stream is whole.
                skip = header.payloadBytes
                skipReply = (header, error)
                at = behind
                if skip == 0 { answerSkipped() }
                continue
            }
            // Only a request that has to wait for memory comes here: it stays where it is.
            break
        }
        keep(base, at, count)
    }

    private func answerSkipped() {
        guard let error = skipReply.error else { return }
        skipReply.error = nil
        refuse(skipReply.header.cookie, isRead: skipReply.header.type == NBD.Command.read.rawValue, error)
    }

    /// Keeps what was not parsed: less than a header beside the connection, more in a buffer of its own.
    private func keep(_ base: UnsafeMutableRawPointer, _ at: Int, _ count: Int) {
        if isDeaf { return releaseInput() }
        let rest = count - at
        // Nor is it kept, in a pause, from all who wait; and received bytes are not counted in it.
        returnPromised()
        // Without a whole header left there is nothing to come back for.
        if pause == .turn, rest < RequestHeader.lengthBytes { pause = .none }
        if let leftover, base == leftover + leftoverAt {
            leftoverAt += at
            if pause != .none { return }
            precondition(rest < RequestHeader.lengthBytes || endReason != nil)
            if endReason == nil { keepCarry(base + at, rest) }
            releaseLeftover()
            return
        }
        guard endReason == nil, rest > 0 else { return }
        if pause == .none {
            keepCarry(base + at, rest)
            return
        }
        guard let buffer = share.pool.take(rest) else { return end("no memory for what it sent") }
        holdAnyway(BufferPool.cost(rest))
        buffer.copyMemory(from: base + at, byteCount: rest)
        leftover = buffer
        leftoverBytes = rest
        leftoverAt = 0
    }

    private func keepCarry(_ base: UnsafeMutableRawPointer, _ count: Int) {
        precondition(count < RequestHeader.lengthBytes)
        carry.copyMemory(from: base, byteCount: count)
        carryCount = count
    }

    private func releaseLeftover() {
        guard let buffer = leftover else { return }
        share.giveBuffer(buffer, bytes: leftoverBytes)
        unhold(BufferPool.cost(leftoverBytes))
        leftover = nil
        leftoverBytes = 0
        leftoverAt = 0
    }

    /// A WRITE whose payload is not all there. False: it has to wait for memory.
    private func beginPayload(_ header: RequestHeader, from bytes: UnsafeRawPointer, _ count: Int) -> Bool {
        let length = Int(header.lengthBytes)
        let granted = min(length, Self.firstGrantBytes)
        guard admit(granted, whole: length) else { return false }
        counters.requests += 1
        guard let buffer = share.pool.take(length) else {
            unhold(granted)
            // Answered once the payload is off the stream.
            skip = length - count
            skipReply = (header, .noMemory)
            return true
        }
        buffer.copyMemory(from: bytes, byteCount: count)
        payload = Payload(header: header, buffer: buffer, received: count, granted: granted)
        return true
    }

    /// The payload is complete.
    private func finishPayload() {
        guard let current = payload else { return }
        device.beginTurn()
        payload = nil
        let length = Int(current.header.lengthBytes)
        // From here on it counts like any buffer of its length.
        if length < BufferPool.smallestBytes { holdAnyway(BufferPool.smallestBytes - length) }
        writeOwned(current.header, current.buffer)
    }

    /// Whether the last of what has arrived, and was not looked at yet, is DISC.
    func endsWithDisconnect() -> Bool {
        let size = RequestHeader.lengthBytes
        guard let unread = Sockets.peekEnd(fd, size) else { return true }
        var last = unread
        if let leftover {
            let kept = UnsafeRawBufferPointer(start: leftover + leftoverAt, count: leftoverBytes - leftoverAt)
            last = kept.suffix(size - unread.count) + unread
        }
        guard last.count == size, let header = last.withUnsafeBytes({ RequestHeader($0.baseAddress!) }) else {
            return false
        }
        return header.type == NBD.Command.disconnect.rawValue
    }

    /// Gives back everything that came in and was not made a request yet.
    func releaseInput() {
        releaseLeftover()
        carryCount = 0
        skip = 0
        skipReply.error = nil
        if let current = payload {
            payload = nil
            share.giveBuffer(current.buffer, bytes: Int(current.header.lengthBytes))
            unhold(current.granted)
        }
        cancelWait()
        pause = .none
    }
}
