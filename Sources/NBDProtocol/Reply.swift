// Replies of the transmission phase, written straight into send buffers. Each function writes exactly the bytes that
// its length constant names; the caller has the room.

/// Writers of reply headers and of the small replies.
package enum Reply {
    @inlinable package static var simpleBytes: Int { 16 }
    /// Header of a structured reply chunk.
    @inlinable package static var chunkBytes: Int { 20 }
    /// Header and offset of an OFFSET_DATA chunk; its data follow.
    @inlinable package static var dataBytes: Int { 28 }
    @inlinable package static var holeBytes: Int { 32 }
    /// Header of a BLOCK_STATUS chunk with the context's number; descriptors of 8 bytes follow.
    @inlinable package static var statusBytes: Int { 24 }
    @inlinable package static var descriptorBytes: Int { 8 }

    /// A simple reply; `error` 0 means success, and the data of a READ follow.
    @inlinable @inline(__always)
    package static func simple(_ to: UnsafeMutableRawPointer, cookie: UInt64, error: UInt32) {
        to.putWire(NBD.Magic.simpleReply, at: 0)
        to.putWire(error, at: 4)
        to.putWire(cookie, at: 8)
    }

    @inlinable @inline(__always)
    package static func chunk(
        _ to: UnsafeMutableRawPointer, cookie: UInt64, type: UInt16, isLast: Bool, payloadBytes: UInt32
    ) {
        to.putWire(NBD.Magic.structuredReply, at: 0)
        to.putWire(isLast ? NBD.chunkDone : 0, at: 4)
        to.putWire(type, at: 6)
        to.putWire(cookie, at: 8)
        to.putWire(payloadBytes, at: 16)
    }

    /// NBD_REPLY_TYPE_NONE: success, nothing more.
    @inlinable package static func none(_ to: UnsafeMutableRawPointer, cookie: UInt64) {
        chunk(to, cookie: cookie, type: NBD.ChunkType.none, isLast: true, payloadBytes: 0)
    }

    /// NBD_REPLY_TYPE_OFFSET_DATA up to where its `lengthBytes` of data begin.
    @inlinable @inline(__always)
    package static func data(
        _ to: UnsafeMutableRawPointer, cookie: UInt64, offset: UInt64, lengthBytes: UInt32, isLast: Bool
    ) {
        chunk(to, cookie: cookie, type: NBD.ChunkType.offsetData, isLast: isLast, payloadBytes: lengthBytes + 8)
        to.putWire(offset, at: 20)
    }

    /// NBD_REPLY_TYPE_OFFSET_HOLE: `lengthBytes` zeroes (never none).
    @inlinable package static func hole(
        _ to: UnsafeMutableRawPointer, cookie: UInt64, offset: UInt64, lengthBytes: UInt32, isLast: Bool
    ) {
        chunk(to, cookie: cookie, type: NBD.ChunkType.offsetHole, isLast: isLast, payloadBytes: 12)
        to.putWire(offset, at: 20)
        to.putWire(lengthBytes, at: 28)
    }

    /// NBD_REPLY_TYPE_ERROR with a message; `errorBytes` tells the room it takes. The only error chunk of its reply.
    package static func error(_ to: UnsafeMutableRawPointer, cookie: UInt64, code: NBD.ErrorCode, message: StaticString)
    {
        let textBytes = message.utf8CodeUnitCount
        chunk(to, cookie: cookie, type: NBD.ChunkType.error, isLast: true, payloadBytes: UInt32(6 + textBytes))
        to.putWire(code.rawValue, at: 20)
        to.putWire(UInt16(textBytes), at: 24)
        (to + 26).copyMemory(from: message.utf8Start, byteCount: textBytes)
    }

    package static func errorBytes(_ message: StaticString) -> Int { chunkBytes + 6 + message.utf8CodeUnitCount }

    /// NBD_REPLY_TYPE_BLOCK_STATUS of `base:allocation` up to where its descriptors begin. The last chunk of its reply.
    package static func status(_ to: UnsafeMutableRawPointer, cookie: UInt64, descriptors: Int) {
        chunk(
            to, cookie: cookie, type: NBD.ChunkType.blockStatus, isLast: true,
            payloadBytes: UInt32(4 + descriptors * descriptorBytes))
        to.putWire(NBD.allocationContextID, at: 20)
    }

    /// One descriptor: NBD_STATE_HOLE is bit 0, NBD_STATE_ZERO bit 1.
    package static func descriptor(_ to: UnsafeMutableRawPointer, lengthBytes: UInt32, isHole: Bool, isZero: Bool) {
        to.putWire(lengthBytes, at: 0)
        to.putWire((isHole ? 1 : 0) | (isZero ? 2 : 0) as UInt32, at: 4)
    }
}
