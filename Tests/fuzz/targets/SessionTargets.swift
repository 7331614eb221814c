// Sessions of NBD: what a client says goes through a socket into the server itself, and what comes back is held against a
// reading of the protocol document.

import CLinux
import Glibc
import Logging
@testable import Margarine
import NBDProtocol
@testable import Runtime

extension FuzzTarget {
    /// A `SessionMode`, and all that a client says from its flags on.
    static let handshake = FuzzTarget(name: "handshake", maxInputBytes: 1024, allocationBaseBytes: 4 << 20) { input in
        guard let first = input.first else { return }
        try SessionBed.shared.play(Array(input.dropFirst()), mode: SessionMode(rawValue: first))
    }

    /// A `SessionMode`, and requests; the handshake is made for them.
    static let requests = FuzzTarget(name: "requests", maxInputBytes: 1024, allocationBaseBytes: 8 << 20) { input in
        guard let first = input.first else { return }
        let mode = SessionMode(rawValue: first)
        let name = mode.contains(.readOnly) ? "ro" : "mem"
        var stream: [UInt8] = [0, 0, 0, 3]
        func option(_ code: UInt32, _ data: [UInt8]) {
            stream.appendWire(NBD.Magic.option)
            stream.appendWire(code)
            stream.appendWire(UInt32(data.count))
            stream += data
        }
        func string(_ text: String) -> [UInt8] {
            var bytes: [UInt8] = []
            bytes.appendWire(UInt32(text.utf8.count))
            return bytes + Array(text.utf8)
        }
        if mode.contains(.structured) {
            option(8, [])
            if mode.contains(.contexts) { option(10, string(name) + [0, 0, 0, 1] + string("base:allocation")) }
        }
        option(7, string(name) + [0, 0])
        try SessionBed.shared.play(stream + input.dropFirst(), mode: mode)
    }
}

/// One loop that turns when it is told to, with a server on it. Kept from input to input; what it keeps is checked.
private final class SessionBed: @unchecked Sendable {  // targets run one at a time
    static let shared = SessionBed()

    private let loop: Loop
    private let exports: SessionExports
    private let roomy: ServerContext
    private let tight: ServerContext
    private var output: [UInt8] = []
    private let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 4096)

    private init() {
        do { loop = try Loop(name: "sessions", ring: false) } catch { fatalError("no loop: \(error)") }
        exports = SessionExports(loop: loop)
        var log = Logger(label: "fuzz") { _ in SwiftLogNoOpLogHandler() }
        log.logLevel = .critical
        roomy = ServerContext(provider: exports, loop: loop, limits: ConnectionLimits(), log: log)
        var limits = ConnectionLimits()
        limits.optionBytes = SessionModel.tightOptionBytes
        limits.skippedOptionBytes = SessionModel.tightSkippedBytes
        limits.options = SessionModel.tightOptions
        limits.requestsPerConnection = 3
        limits.bytesPerConnection = 16 << 10
        limits.ownBytesPerConnection = 4 << 10
        limits.turnBytes = 4 << 10
        tight = ServerContext(provider: exports, loop: loop, limits: limits, log: log)
    }

    /// Plays a session and holds it against the model.
    func play(_ stream: [UInt8], mode: SessionMode) throws {
        var model = SessionModel(stream, mode: mode)
        model.read()
        let server = mode.contains(.tight) ? tight : roomy
        exports.mode = mode
        output = []
        mg_thread_set_loop(Unmanaged.passUnretained(loop).toOpaque())
        defer { mg_thread_set_loop(nil) }

        var ends: [Int32] = [-1, -1]
        let flags = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
        precondition(socketpair(AF_UNIX, flags, 0, &ends) == 0)
        let client = ends[1]
        defer { close(client) }
        server.welcome(FileDescriptor(owning: ends[0]))
        let step = mode.contains(.pieces) ? model.stream.count / 9 + 1 : max(1, model.stream.count)
        for start in stride(from: 0, to: model.stream.count, by: step) {
            send(model.stream[start..<min(start + step, model.stream.count)], to: client)
            if mode.contains(.pieces) { turn(2, reading: client) }
        }
        turn(8, reading: client)
        let isClosed = isAtEnd(client)
        shutdown(client, Int32(SHUT_WR))
        var turns = 0
        while server.connectionCount > 0, turns < 5000 {
            turn(1, reading: client)
            turns += 1
        }
        try require(server.connectionCount == 0, "a connection stays when its client has gone")
        try require(exports.devices.allSatisfy { $0.clients == 0 }, "a client was not taken leave of")
        var reader = SessionReader(output, model)
        try reader.check(isClosed: isClosed)
    }

    private func send(_ bytes: ArraySlice<UInt8>, to client: Int32) {
        var rest = bytes
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { Glibc.send(client, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            if count > 0 { rest = rest.dropFirst(count) } else if errno != EAGAIN { return }
            if !rest.isEmpty { turn(1, reading: client) }
        }
    }

    /// Turns the loop until nothing more came for `idle` turns.
    private func turn(_ idle: Int, reading client: Int32) {
        var quiet = 0
        while quiet < idle {
            loop.post {}  // so that the turn does not wait
            loop.turn()
            quiet += 1
            while case let count = recv(client, room.baseAddress, room.count, 0), count > 0 {
                output += room[..<count]
                quiet = 0
            }
        }
    }

    private func isAtEnd(_ client: Int32) -> Bool {
        let count = recv(client, room.baseAddress, room.count, Int32(MSG_PEEK))
        return count == 0 || (count < 0 && errno != EAGAIN)
    }
}
