// Replies to the socket: small ones side by side in pack buffers, large ones from their own, all by one sendmsg.

import Glibc
import NBDProtocol
import Runtime

extension Connection {
    /// Room for a reply that is owed, whatever the budget says.
    @inline(__always)
    func reserve(_ count: Int) -> UnsafeMutableRawPointer {
        if send.pointee.needsPack(for: count) { holdAnyway(SendQueue.packBytes) }
        return send.pointee.reserve(count, &share.pool)
    }

    /// Success without data.
    @inline(__always)
    func acknowledge(_ cookie: UInt64) {
        Reply.simple(reserve(Reply.simpleBytes), cookie: cookie, error: 0)
        send.pointee.commit(Reply.simpleBytes)
    }

    /// An error: a chunk with a message once structured replies are agreed (never a simple reply to READ then).
    /// ESHUTDOWN is not sent: see `leaveUnanswered`.
    func refuse(_ cookie: UInt64, isRead: Bool, _ error: NBD.ErrorCode) {
        if error == .shutdown { return leaveUnanswered() }
        counters.errors += 1
        if rules.structuredReplies {
            let message = error.message
            let space = Reply.errorBytes(message)
            Reply.error(reserve(space), cookie: cookie, code: error, message: message)
            send.pointee.commit(space)
        } else {
            Reply.simple(reserve(Reply.simpleBytes), cookie: cookie, error: error.rawValue)
            send.pointee.commit(Reply.simpleBytes)
        }
    }

    /// Bytes that are none of the above: the end of the handshake.
    func appendBytes(_ bytes: [UInt8]) {
        var rest = bytes[...]
        while !rest.isEmpty {
            let part = rest.prefix(SendQueue.packBytes)
            let at = reserve(part.count)
            part.withUnsafeBytes { at.copyMemory(from: $0.baseAddress!, byteCount: part.count) }
            send.pointee.commit(part.count)
            rest = rest.dropFirst(part.count)
        }
    }

    /// Replies came up outside a turn of this connection: they leave together when the loop's turn ends.
    func repliesAreDue() {
        if isDirty { return }
        isDirty = true
        share.markDirty(self)
    }

    /// By the loop's share, at the end of its turn.
    func flushReplies() {
        isDirty = false
        if state == .dead { return }
        flush()
        settle()
    }

    /// Sends what the socket takes.
    func flush() {
        if isMute {
            dropOutput()
            return
        }
        guard !isBlocked, state != .dead else { return }
        while !send.pointee.isEmpty {
            let (vectors, bytes) = send.pointee.fill(share.vectors)
            let count: Int
            switch Sockets.send(fd, UnsafeMutableBufferPointer(rebasing: share.vectors[..<vectors])) {
            case .bytes(let sent):
                count = sent
            case .wouldBlock:
                isBlocked = true
                return
            case .closed:
                preconditionFailure("sending tells no end")
            case .failed(let error):
                if state == .ending { mute() } else { end("sending: \(String(cString: strerror(error)))") }
                return
            }
            counters.sentBytes += UInt64(count)
            let returned = send.pointee.advance(count, &share.pool)
            if returned > 0 { unhold(returned) }
            if count < bytes {
                isBlocked = true
                return
            }
        }
        share.setTrim()
    }

    func dropOutput() {
        let returned = send.pointee.clear(&share.pool)
        if returned > 0 { unhold(returned) }
    }
}
