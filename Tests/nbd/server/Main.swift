// nbdbench-server [--listen HOST:PORT]... [--unix PATH]... [--size BYTES] [--loops N] [--limit NAME=VALUE]... [--verbose]
//
// Prints `ready ADDRESS...` once it serves; SIGTERM drains and ends it, SIGUSR1 prints its sessions.

import Glibc
import Logging
import Margarine
import Runtime

@main
struct Main {
    /// Not async: only threads that are started after this one blocks the signals leave them to the watcher.
    static func main() {
        SignalWatcher.block([SIGTERM, SIGINT, SIGUSR1])
        Task.detached {
            do { try await run() } catch {
                print("nbdbench-server: \(error)")
                exit(1)
            }
        }
        while true { pause() }
    }

    private static func run() async throws {
        var endpoints: [Endpoint] = []
        var sizeBytes: UInt64 = 1 << 30
        var loopCount = 2
        var limits = ConnectionLimits()
        var level = Logger.Level.error
        var arguments = CommandLine.arguments.dropFirst()
        while let flag = arguments.popFirst() {
            switch flag {
            case "--listen", "--unix": endpoints.append(Endpoint(value(&arguments, flag)) ?? usage("bad address"))
            case "--size": sizeBytes = UInt64(value(&arguments, flag)) ?? usage("bad size")
            case "--loops": loopCount = Int(value(&arguments, flag)) ?? usage("bad number of loops")
            case "--limit": set(&limits, value(&arguments, flag))
            case "--verbose": level = .debug
            default: let _: Never = usage("unknown flag \(flag)")
            }
        }
        if endpoints.isEmpty { endpoints = [.tcp(host: "127.0.0.1", port: 0)] }

        let doors = try Loop(name: "doors")
        let loops = try (0..<loopCount).map { try Loop(name: "disks-\($0)") }
        for loop in [doors] + loops { try loop.start() }
        var log = Logger(label: "nbdbench-server") { StreamLogHandler.standardError(label: $0) }
        log.logLevel = level
        let exports = MemoryExports(sizeBytes: sizeBytes, loops: loops, environment: SystemEnvironment(workers: 1))
        let listener = Listener(provider: exports, loop: doors, limits: limits, log: log)

        let (signals, queue) = AsyncStream.makeStream(of: Int32.self)
        doors.post {
            do { _ = try SignalWatcher([SIGTERM, SIGINT, SIGUSR1], on: doors) { queue.yield($0) } } catch {
                fatalError("\(error)")
            }
        }
        var addresses: [String] = []
        for endpoint in endpoints { addresses += try await listener.listen(on: endpoint).map(\.description) }
        print("ready \(addresses.joined(separator: " "))")
        fflush(nil)
        for await signal in signals {
            if signal == SIGUSR1 {
                for session in await listener.sessions() { print(session) }
                print("connections \(listener.connectionCount) available \(listener.availableBytes)")
                fflush(nil)
                continue
            }
            exit(await listener.drain(timeoutMs: 5_000) ? 0 : 1)
        }
    }

    private static func value(_ arguments: inout ArraySlice<String>, _ flag: String) -> String {
        arguments.popFirst() ?? usage("\(flag) needs a value")
    }

    private static func set(_ limits: inout ConnectionLimits, _ text: String) {
        let parts = text.split(separator: "=")
        guard parts.count == 2, let number = Int(parts[1]) else { return usage("write --limit NAME=NUMBER") }
        switch parts[0] {
        case "connections": limits.connections = number
        case "handshakes": limits.handshakes = number
        case "handshakeTimeoutMs": limits.handshakeTimeoutMs = UInt64(number)
        case "requestsPerConnection": limits.requestsPerConnection = number
        case "bytesPerConnection": limits.bytesPerConnection = number
        case "ownBytesPerConnection": limits.ownBytesPerConnection = number
        case "budgetBytes": limits.budgetBytes = number
        case "turnBytes": limits.turnBytes = number
        case "stallSeconds": limits.stallSeconds = number
        case "mapsAtMostBytes": limits.mapsAtMostBytes = number
        default: let _: Never = usage("no limit \(parts[0])")
        }
    }

    /// Never returns; whatever type is wanted.
    private static func usage<T>(_ why: String) -> T {
        print("nbdbench-server: \(why)")
        exit(64)
    }
}
