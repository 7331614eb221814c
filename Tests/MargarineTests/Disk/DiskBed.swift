// A daemon's disks without sockets: the real engine on a real loop, over a store and a scratch disk in memory that can fail
// and lose power. A restart is a new bed on the same store and scratch.

import BlockCache
import Foundation
import Logging
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// A small generator, so that a run is a function of its seed.
struct SeededRandom: RandomNumberGenerator {
    var state: UInt64
    init(_ seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state &* 0x2545_f491_4f6c_dd1d
    }
}

/// The engine over given seams; of a store with several locations (`over`), or of one in memory.
final class DiskBed: Sendable {
    let store: MemoryBucket
    let faults: FaultyBucket
    let scratch: MemoryScratch
    let environment: SystemEnvironment
    let loop: Loop
    let context: DiskContext
    let manager: DiskManager
    let files: BlockFiles
    /// One for each location; proven for a day.
    let leases: Leases
    private let alive: Set<String>

    /// - Parameter alive: servers that live, whatever others do.
    init(
        store: MemoryBucket = MemoryBucket(), scratch: MemoryScratch = MemoryScratch(), server: String = "a",
        rebooted: Bool = false, boot: String = "boot", takeover: Takeover = .dead, alive: Set<String> = [],
        settings change: (inout DiskSettings) -> Void = { _ in }, memoryBytes: Int = 16 << 20,
        dirtyBytes: Int = 4 << 20,
        journalBytes: UInt64 = 1 << 40, over several: Store? = nil, lines: LogLines? = nil
    ) throws {
        self.store = store
        self.scratch = scratch
        environment = SystemEnvironment(workers: 2)
        faults = FaultyBucket(store, environment: environment)
        loop = try Loop(name: "bed")
        files = BlockFiles(disk: scratch, budgetBytes: 1 << 30, environment: environment)
        let locations = several?.locations ?? Locations([faults])
        let spawning = loop
        let loader = BlockLoader(
            locations: locations.buckets, cache: SliceCache(budgetBytes: UInt64(memoryBytes)), files: files,
            environment: environment, spawn: { spawning.run(task: $0) })
        var settings = DiskSettings()
        settings.commitIntervalMs = 20
        change(&settings)
        var log = Logger(label: "bed") { _ in SwiftLogNoOpLogHandler() }
        log.logLevel = .critical
        if let lines {
            log = Logger(label: "bed") { _ in lines }
            log.logLevel = .notice
        }
        context = DiskContext(
            loop: loop, environment: environment, scratch: scratch, locations: locations, loader: loader,
            manifests: ManifestCache(locations), arena: FrameArena(budgetBytes: dirtyBytes),
            journals: JournalBudget(limitBytes: journalBytes), log: log, settings: settings)
        let numbers = locations.all.map(\.number)
        leases = Leases(numbers)
        for number in numbers { leases[number].prove(sentNs: environment.bootNs, deadAfterMs: 86_400_000) }
        self.alive = alive
        manager = DiskManager(
            contexts: [context],
            store: several ?? Store(id: ObjectID(high: 0, low: 1), locations: locations, environment: environment),
            server: ServerIdentity(
                id: server, host: "host-\(server)", bootID: rebooted ? environment.objectID().description : boot),
            takeover: takeover,
            log: log,
            owners: OwnerWatch(
                name: server, environment: environment, process: { _ in .outOfSight }, fault: settings.fault),
            leases: leases)
    }

    /// As a kill: nothing is finished. The loop stops where it is.
    func kill() { loop.stop() }

    func create(_ name: String = "d", size: UInt64 = 64 << 20, _ change: (inout DiskOptions) -> Void = { _ in })
        async throws
    {
        var options = DiskOptions()
        options.safePoints = .flush
        change(&options)
        let head = Head(
            diskID: environment.objectID(), name: name, sizeBytes: size, options: options,
            createdAtMs: environment.wallMs)
        _ = try await HeadStore(bucket: store, environment: environment).swap(head, expecting: nil)
    }

    func head(_ name: String = "d") async throws -> Head {
        try #require(try await HeadStore(bucket: store, environment: environment).load(name)).head
    }

    func attach(_ export: String = "d", host: String = "h") async throws -> TestClient {
        // Of a later version: nobody takes it for dead.
        for id in alive {
            _ = try await store.put(
                ServerRecord.key(id), Array("{\"margarine\":\"server\",\"format\":99,".utf8), if: .none)
        }
        let attached = try await manager.attach(export, client: ClientIdentity(address: "\(host):1", host: host))
        let client = TestClient(attached)
        try await client.join()
        return client
    }

    /// Waits until the disk has committed at least generation `generation`.
    func waitForGeneration(_ generation: UInt64, _ name: String = "d") async throws {
        for _ in 0..<500 * patience {
            if try await head(name).generation >= generation { return }
            await environment.sleep(ns: 10_000_000)
        }
        Issue.record("generation \(generation) of \(name) was not committed in \(5 * patience) s")
    }
}

/// What a bed's engine logs, for tests of that.
struct LogLines: LogHandler {
    private final class Kept: Sendable {
        let lines = Mutex<[(text: String, metadata: Logger.Metadata)]>([])
    }
    private let kept = Kept()
    var all: [String] { kept.lines.withLock { $0.map(\.text) } }
    /// What the lines say under `key`, those that have it.
    func values(of key: String) -> [String] { kept.lines.withLock { $0.compactMap { $0.metadata[key]?.description } } }
    var logLevel = Logger.Level.notice
    var metadata: Logger.Metadata = [:]
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }
    func log(event: LogEvent) { kept.lines.withLock { $0.append(("\(event.message)", event.metadata ?? [:])) } }
}

/// How many times longer to wait than usual: what a sanitizer makes slow is not broken.
private let patience = Int(ProcessInfo.processInfo.environment["MARGARINE_PATIENCE"] ?? "") ?? 1

/// A connection without a socket.
final class TestClient: DeviceClient, @unchecked Sendable {  // touched on its device's loop only
    let attached: AttachedDevice
    private var waiting: [ObjectIdentifier: CheckedContinuation<DeviceError?, Never>] = [:]
    private var turns: [(turn: UInt64, continuation: CheckedContinuation<DeviceError?, Never>)] = []
    private let ended = Mutex<String?>(nil)
    var disconnected: String? { ended.withLock { $0 } }
    var absorbs = true

    init(_ attached: AttachedDevice) { self.attached = attached }
    var device: any BlockDevice { attached.device }

    func onLoop<T: Sendable>(_ body: @escaping @Sendable () async -> T) async -> T {
        await Task(executorPreference: attached.loop) { await body() }.value
    }

    func join() async throws {
        let error: AttachError? = await onLoop { [self] in
            await withCheckedContinuation { c in
                device.join(self, admission: attached.admission) { c.resume(returning: $0) }
            }
        }
        if let error { throw error }
    }

    func leave(clean: Bool) async { await onLoop { [self] in device.leave(self, clean: clean) } }

    func completed(_ request: DeviceRequest) {
        waiting.removeValue(forKey: ObjectIdentifier(request))?.resume(returning: request.error)
    }
    func journaled(turn: UInt64, error: DeviceError?) {
        let ready = turns.filter { $0.turn <= turn }
        turns.removeAll { $0.turn <= turn }
        for one in ready { one.continuation.resume(returning: error) }
    }
    func disconnect(reason: String) { ended.withLock { $0 = reason } }
    func absorb(isFirst: Bool) -> Bool { absorbs }
    /// What the connection would have moved; grows where a test says so.
    let moved = Mutex<UInt64>(0)
    var movedBytes: UInt64 { moved.withLock { $0 } }

    /// Runs one request to its end.
    func run(
        _ kind: DeviceRequest.Kind, offset: UInt64 = 0, bytes: [UInt8]? = nil, length: Int = 0, fua: Bool = false
    ) async -> (error: DeviceError?, bytes: [UInt8], extents: [Extent]) {
        await onLoop { [self] in
            device.beginTurn()
            let request = DeviceRequest()
            let count = bytes?.count ?? length
            let buffer = UnsafeMutableRawPointer.allocate(byteCount: max(count, 1), alignment: 16)
            defer { buffer.deallocate() }
            if let bytes { buffer.copyMemory(from: bytes, byteCount: count) }
            request.kind = kind
            request.offset = offset
            request.lengthBytes = UInt64(count)
            request.buffer = kind == .read || kind == .write ? buffer : nil
            request.fua = fua
            request.client = self
            let error = await withCheckedContinuation { c in
                waiting[ObjectIdentifier(request)] = c
                device.submit(request)
            }
            let result = kind == .read ? [UInt8](UnsafeRawBufferPointer(start: buffer, count: count)) : []
            return (error, result, request.extents)
        }
    }

    /// Writes as a connection does: inline if possible, with the turn's end, else as a request. `beforeEnd` comes to pass
    /// before the turn ends.
    func write(
        _ bytes: [UInt8], at offset: UInt64, fua: Bool = false, beforeEnd: @escaping @Sendable () -> Void = {}
    ) async throws {
        let result: DeviceError?
        if fua {
            result = await run(.write, offset: offset, bytes: bytes, fua: true).error
        } else {
            let inline: (done: Bool, error: DeviceError?) = await onLoop { [self] in
                device.beginTurn()
                switch bytes.withUnsafeBytes({
                    device.tryWrite(offset: offset, lengthBytes: bytes.count, from: $0.baseAddress!, client: self)
                }) {
                case .later: return (false, nil)
                case .failed(let error): return (true, error)
                case .done:
                    beforeEnd()
                    switch device.endTurn(client: self) {
                    case .acknowledged: return (true, nil)
                    case .failed(let error): return (true, error)
                    case .pending(let turn):
                        return (true, await withCheckedContinuation { turns.append((turn, $0)) })
                    }
                }
            }
            result = inline.done ? inline.error : await run(.write, offset: offset, bytes: bytes).error
        }
        if let result { throw TestFailure(what: "write", error: result) }
    }

    func read(_ count: Int, at offset: UInt64) async throws -> [UInt8] {
        let result = await run(.read, offset: offset, length: count)
        if let error = result.error { throw TestFailure(what: "read", error: error) }
        return result.bytes
    }

    func flush() async throws {
        if let error = await run(.flush).error { throw TestFailure(what: "flush", error: error) }
    }

    func zero(_ range: Range<UInt64>, trim: Bool = false) async throws {
        let kind: DeviceRequest.Kind = trim ? .trim : .writeZeroes
        let error = await onLoop { [self] () -> DeviceError? in
            device.beginTurn()
            let request = DeviceRequest()
            request.kind = kind
            request.offset = range.lowerBound
            request.lengthBytes = range.upperBound - range.lowerBound
            request.client = self
            return await withCheckedContinuation { c in
                waiting[ObjectIdentifier(request)] = c
                device.submit(request)
            }
        }
        if let error { throw TestFailure(what: "\(kind)", error: error) }
    }
}

/// Counts what tasks have done.
final class Tally: Sendable {
    private let count = Atomic(0)
    var value: Int { count.load(ordering: .relaxed) }
    func add() { count.add(1, ordering: .relaxed) }
}

struct TestFailure: Error {
    var what: String
    var error: DeviceError
}

/// `count` bytes that differ from those of other seeds, and from themselves every 512 bytes.
func pattern(_ count: Int, _ seed: UInt64) -> [UInt8] {
    var bytes = [UInt8](repeating: UInt8(truncatingIfNeeded: seed | 1), count: count)
    for at in stride(from: 0, to: count - 8, by: 512) {
        withUnsafeBytes(of: seed &+ UInt64(at)) { for i in 0..<8 { bytes[at + i] = $0[i] } }
    }
    return bytes
}
