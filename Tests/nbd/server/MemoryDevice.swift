// A device in memory for tests and figures of the NBD server. It can be told to answer late, in pieces or never, so that
// every way through a connection is taken.

import Glibc
import Margarine
import Runtime

/// How a device of memory answers.
struct Behaviour: Sendable {
    /// Reads and writes that memory could answer at once are.
    var answersInline = true
    /// Writes taken inline are acknowledged this much later (nil: at once).
    var journalNs: UInt64?
    /// Requests that begin at or above this offset take `slowNs`.
    var slowFrom = UInt64.max
    var slowNs: UInt64 = 300_000_000
    /// Requests that begin here never end, until the client leaves.
    var stuckAt = UInt64.max
    /// Requests that begin here end with this error.
    var failsAt = UInt64.max
    var error = DeviceError.io
    /// Who joins is disconnected, and refused only then.
    var disconnectsJoiners = false
    /// A write that begins here ends the connection.
    var disconnectsAt = UInt64.max
}

/// Owned by its loop.
final class MemoryDevice: BlockDevice, @unchecked Sendable {
    let sizeBytes: UInt64
    let isReadOnly: Bool
    private let loop: Loop
    private let behaviour: Behaviour
    /// Reserved, and memory only where written.
    private let memory: UnsafeMutableRawPointer
    private let memoryBytes: UInt64
    /// One bit for each piece of 64 KiB that was written.
    private var isWritten: [Bool]
    private var stuck: [DeviceRequest] = []
    private var turn: UInt64 = 0

    private static let pieceBytes: UInt64 = 64 << 10

    /// With `memoryBytes` below the size, what lies above it reads as zeroes and forgets its writes.
    init(
        sizeBytes: UInt64, memoryBytes: UInt64? = nil, isReadOnly: Bool = false, loop: Loop,
        behaviour: Behaviour = Behaviour()
    ) {
        self.sizeBytes = sizeBytes
        self.isReadOnly = isReadOnly
        self.loop = loop
        self.behaviour = behaviour
        self.memoryBytes = memoryBytes ?? sizeBytes
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        let mapped = mmap(nil, Int(self.memoryBytes), PROT_READ | PROT_WRITE, flags, -1, 0)
        guard let mapped, mapped != MAP_FAILED else {
            fatalError("no memory for a device of \(self.memoryBytes) bytes")
        }
        memory = mapped
        isWritten = Array(repeating: false, count: Int((self.memoryBytes + Self.pieceBytes - 1) / Self.pieceBytes))
    }

    // MARK: Inline

    private func answersNow(_ offset: UInt64) -> Bool {
        behaviour.answersInline && offset < behaviour.slowFrom && offset != behaviour.stuckAt
            && offset != behaviour.failsAt
            && offset != behaviour.disconnectsAt
    }

    func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
        guard answersNow(offset) else { return .later }
        read(offset, UInt64(lengthBytes), into: buffer)
        return .done
    }

    func tryWrite(offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient) -> Inline {
        if offset == behaviour.disconnectsAt {
            client.disconnect(reason: "a write to \(offset)")
            return .failed(.shutdown)
        }
        guard answersNow(offset) else { return .later }
        write(offset, UInt64(lengthBytes), from: buffer)
        return .done
    }

    func endTurn(client: any DeviceClient) -> TurnEnd {
        guard let delay = behaviour.journalNs else { return .acknowledged }
        turn += 1
        let turn = turn
        let client = Unchecked(client)
        later(delay) { client.value.journaled(turn: turn, error: nil) }
        return .pending(turn: turn)
    }

    // MARK: Later

    func submit(_ request: DeviceRequest) {
        if request.offset == behaviour.stuckAt {
            stuck.append(request)
            return
        }
        let request = Unchecked(request)
        later(request.value.offset >= behaviour.slowFrom ? behaviour.slowNs : 0) { [self] in serve(request.value) }
    }

    private func later(_ ns: UInt64, _ work: @escaping @Sendable () -> Void) {
        if ns == 0 { loop.post(work) } else { loop.after(ns: ns, work) }
    }

    private func serve(_ request: DeviceRequest) {
        let (offset, length) = (request.offset, request.lengthBytes)
        if request.isCancelled {
            request.error = .shutdown
        } else if offset == behaviour.failsAt {
            request.error = behaviour.error
        } else {
            switch request.kind {
            case .read: read(offset, length, into: request.buffer!)
            case .write: write(offset, length, from: request.buffer!)
            case .trim, .writeZeroes: zero(offset, length)
            case .flush, .cache: break
            case .blockStatus: request.extents = extents(offset, length, onlyOne: request.onlyOneExtent)
            }
        }
        request.client.completed(request)
    }

    func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        if behaviour.disconnectsJoiners {
            client.disconnect(reason: "nobody may join")
            let ready = Unchecked(ready)
            later(1_000_000) { ready.value(AttachError(.refused, "nobody may join")) }
        } else if (admission as? MemoryAdmission)?.isLapsed == true {
            ready(AttachError(.refused, "the admission lapsed"))
        } else {
            ready(nil)
        }
    }

    func leave(_ client: any DeviceClient, clean: Bool) {
        for request in stuck where request.client === client {
            request.error = .shutdown
            let request = Unchecked(request)
            loop.post { request.value.client.completed(request.value) }
        }
        stuck.removeAll { $0.client === client }
    }

    // MARK: Bytes

    private func read(_ offset: UInt64, _ length: UInt64, into buffer: UnsafeMutableRawPointer) {
        let inside = offset < memoryBytes ? min(length, memoryBytes - offset) : 0
        if inside > 0 { buffer.copyMemory(from: memory + Int(offset), byteCount: Int(inside)) }
        if inside < length { memset(buffer + Int(inside), 0, Int(length - inside)) }
    }

    private func write(_ offset: UInt64, _ length: UInt64, from buffer: UnsafeRawPointer) {
        guard offset < memoryBytes else { return }
        let inside = min(length, memoryBytes - offset)
        (memory + Int(offset)).copyMemory(from: buffer, byteCount: Int(inside))
        for piece in (offset / Self.pieceBytes)...((offset + inside - 1) / Self.pieceBytes) {
            isWritten[Int(piece)] = true
        }
    }

    private func zero(_ offset: UInt64, _ length: UInt64) {
        guard offset < memoryBytes else { return }
        let end = offset + min(length, memoryBytes - offset)
        let firstPage = (offset + 4095) & ~4095
        let lastPage = end & ~4095
        guard firstPage < lastPage else {
            memset(memory + Int(offset), 0, Int(end - offset))
            return
        }
        memset(memory + Int(offset), 0, Int(firstPage - offset))
        madvise(memory + Int(firstPage), Int(lastPage - firstPage), MADV_DONTNEED)
        memset(memory + Int(lastPage), 0, Int(end - lastPage))
        let first = (offset + Self.pieceBytes - 1) / Self.pieceBytes
        let last = end / Self.pieceBytes
        if first < last { for piece in first..<last { isWritten[Int(piece)] = false } }
    }

    private func extents(_ offset: UInt64, _ length: UInt64, onlyOne: Bool) -> [Extent] {
        var found: [Extent] = []
        var at = offset
        while at < offset + length {
            let isData = at < memoryBytes && isWritten[Int(at / Self.pieceBytes)]
            var end = at < memoryBytes ? (at / Self.pieceBytes + 1) * Self.pieceBytes : offset + length
            while end < memoryBytes, end < offset + length, isWritten[Int(end / Self.pieceBytes)] == isData {
                end += Self.pieceBytes
            }
            end = min(end, sizeBytes)
            found.append(Extent(lengthBytes: end - at, isHole: !isData, isZero: !isData))
            if onlyOne { break }
            at = end
        }
        return found
    }
}

/// Passes a value of one loop to a closure that runs on the same loop.
struct Unchecked<T>: @unchecked Sendable {
    let value: T
    init(_ value: T) { self.value = value }
}
