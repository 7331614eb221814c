// The exports behind the sessions that are fuzzed: small disks in memory that answer at once or later, as the input says.

import Glibc
@testable import Margarine
import Runtime

/// How a session is to be taken in: the first byte of its input.
struct SessionMode: OptionSet, Sendable {
    let rawValue: UInt8
    /// Structured replies are negotiated (requests only; handshakes say for themselves).
    static let structured = SessionMode(rawValue: 1)
    /// base:allocation is selected.
    static let contexts = SessionMode(rawValue: 2)
    static let readOnly = SessionMode(rawValue: 4)
    /// Requests to even offsets are answered later.
    static let later = SessionMode(rawValue: 8)
    /// Limits so small that each is met.
    static let tight = SessionMode(rawValue: 16)
    /// What the client says comes in pieces.
    static let pieces = SessionMode(rawValue: 32)
    /// Magic numbers are made right.
    static let repaired = SessionMode(rawValue: 64)
    /// Writes are in the journal some time after their turn.
    static let journaled = SessionMode(rawValue: 128)
}

/// Owned by its loop.
final class SessionDevice: BlockDevice, @unchecked Sendable {
    static let size = (80 << 10) + 513
    let sizeBytes = UInt64(SessionDevice.size)
    let isReadOnly: Bool
    private let mode: SessionMode
    private let loop: Loop
    private let memory = SessionMemory.device
    private var turn: UInt64 = 0
    /// `join`s less `leave`s.
    private(set) var clients = 0

    init(isReadOnly: Bool, mode: SessionMode, loop: Loop) {
        self.isReadOnly = isReadOnly
        self.mode = mode
        self.loop = loop
        memory.reset()
    }

    /// What all exports say of themselves: holes and data in turns of 16 KiB.
    static func isHole(at offset: UInt64) -> Bool { offset >> 14 & 1 == 1 }

    private func isLater(_ offset: UInt64) -> Bool { mode.contains(.later) && offset & 1 == 0 }

    func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
        if isLater(offset) { return .later }
        read(offset, lengthBytes, into: buffer)
        return .done
    }

    func tryWrite(offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient) -> Inline {
        if isLater(offset) { return .later }
        write(offset, lengthBytes, from: buffer)
        return .done
    }

    func endTurn(client: any DeviceClient) -> TurnEnd {
        guard mode.contains(.journaled) else { return .acknowledged }
        turn += 1
        let told = Passed((client, turn))
        loop.post { told.value.0.journaled(turn: told.value.1, error: nil) }
        return .pending(turn: turn)
    }

    func submit(_ request: DeviceRequest) {
        let length = Int(request.lengthBytes)
        // The order in which effects are seen is that of the requests; only the answers are late.
        switch request.kind {
        case .read: read(request.offset, length, into: request.buffer!)
        case .write: write(request.offset, length, from: request.buffer!)
        case .trim, .writeZeroes: memory.zero(Int(request.offset), length)
        case .flush, .cache: break
        case .blockStatus:
            var at = request.offset
            while at < request.offset + request.lengthBytes {
                // Smaller runs than there are, and the last reaches beyond what was asked.
                let end = (at >> 13 + 1) << 13
                let isHole = Self.isHole(at: at)
                request.extents.append(Extent(lengthBytes: end - at, isHole: isHole, isZero: isHole))
                at = end
            }
        }
        let done = Passed(request)
        loop.post { done.value.client.completed(done.value) }
    }

    func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        if admission is Lapsed { return ready(AttachError(.refused, "lapsed")) }
        clients += 1
        ready(nil)
    }

    func leave(_ client: any DeviceClient, clean: Bool) { clients -= 1 }

    private func read(_ offset: UInt64, _ length: Int, into buffer: UnsafeMutableRawPointer) {
        buffer.copyMemory(from: memory.bytes + Int(offset), byteCount: length)
    }

    private func write(_ offset: UInt64, _ length: Int, from buffer: UnsafeRawPointer) {
        memory.write(Int(offset), buffer, length)
    }
}

/// The bytes of a disk, used again for the next input.
final class SessionMemory: @unchecked Sendable {  // targets run one at a time
    static let device = SessionMemory()
    static let model = SessionMemory()
    let bytes = UnsafeMutableRawPointer.allocate(byteCount: SessionDevice.size, alignment: 4096)
    private var isZero = false

    func reset() {
        if !isZero { memset(bytes, 0, SessionDevice.size) }
        isZero = true
    }
    func write(_ offset: Int, _ from: UnsafeRawPointer, _ count: Int) {
        isZero = false
        (bytes + offset).copyMemory(from: from, byteCount: count)
    }
    func zero(_ offset: Int, _ count: Int) { memset(bytes + offset, 0, count) }
}

final class Admitted: Sendable {}
final class Lapsed: Sendable {}

/// Passes a value of one loop to a closure that runs on the same loop.
private struct Passed<T>: @unchecked Sendable {
    let value: T
    init(_ value: T) { self.value = value }
}

/// `mem` (also the empty name), `ro`, and `lapsed`, which is described and then not had.
final class SessionExports: ExportProvider, @unchecked Sendable {  // used by one loop
    static let names = ["mem", "ro", "lapsed"]
    private let loop: Loop
    private(set) var devices: [SessionDevice] = []
    var mode = SessionMode() {
        didSet { devices = [] }
    }

    init(loop: Loop) { self.loop = loop }

    /// The export of a name, for the model too.
    static func find(_ name: String) -> String? {
        let wanted = name.isEmpty ? "mem" : name
        return names.first { $0 == wanted }
    }

    static func info(_ name: String) -> ExportInfo {
        ExportInfo(
            name: name, sizeBytes: UInt64(SessionDevice.size), isReadOnly: name == "ro",
            description: "the export \(name)")
    }

    func list() async throws(AttachError) -> [ExportInfo] { Self.names.map(Self.info) }

    func describe(_ exportName: String) async throws(AttachError) -> ExportInfo {
        guard let name = Self.find(exportName) else { throw AttachError(.unknown, "no such export") }
        return Self.info(name)
    }

    func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
        guard let name = Self.find(exportName) else { throw AttachError(.unknown, "no such export") }
        let device = SessionDevice(isReadOnly: name == "ro", mode: mode, loop: loop)
        devices.append(device)
        return AttachedDevice(device: device, loop: loop, admission: name == "lapsed" ? Lapsed() : Admitted())
    }
}
