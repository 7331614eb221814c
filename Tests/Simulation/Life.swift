// The life of disks besides their clients': forks, pins, roll-backs, changed densities, deletions, and the collectors that
// remove what all of that leaves behind. What they do is held against `Named` and against what generations showed.

import BlockCache
import ObjectStore
import Runtime

@testable import Margarine

final class Life: @unchecked Sendable {  // as its world
    private unowned let run: Run
    private let world: World
    private let fault: Fault?
    private var collectors: [SimCollector?] = [nil, nil]
    /// What those before them left on scratch.
    private var scratch: [MemoryScratch?] = [nil, nil]
    private var isCalm = false
    private var isHostile = false
    /// One collector's rounds take longer than the grace period, mostly.
    private let slowPageNs: UInt64
    private var forks: [String] = []
    /// Forks that are to have a client, and what begins it.
    private var wanted: [String: () -> Void] = [:]
    private var forkCount = 0
    private var isLocalizing = false
    private var copied: UInt64 = 0
    private var completed = 0
    private var deleted: UInt64 = 0
    private let graceMs: Int64 = 120_000
    /// How long clients take, about.
    static let durationNs: UInt64 = 900_000_000_000

    /// The rules that only such a world can see broken.
    static let faults: [Fault] = [
        .collectionSkipsTombstone, .collectionIgnoresGrace, .collectionScansFirst, .collectionSkipsLocation,
    ]

    init(_ run: Run, fault: Fault?) {
        self.run = run
        world = run.world
        self.fault = fault
        let isSlow = run.world.chance.one(in: 4) || fault == .collectionScansFirst
        slowPageNs = isSlow ? run.world.chance.ns(2_000_000_000...6_000_000_000) : 0
        var state = CollectionState()
        state.setGrace(graceMs, nowMs: 0, isUnused: true)
        let bytes = state.encoded()
        let memory = run.store.memories[0]
        run.store.net.run { _ = try? await memory.put(CollectionState.key, bytes, if: .absent) }
        // As `location add` leaves them: a collector makes sure that it knows them all.
        let memories = run.store.memories
        let all = memories.indices.map { LocationRegistry.Entry(number: UInt8($0), name: "\($0)") }
        for (number, memory) in memories.enumerated() where memories.count > 1 {
            let registry = LocationRegistry(storeID: ObjectID(high: 0, low: 1), number: UInt8(number), all: all)
            let bytes = ControlObject.seal(registry, kind: LocationRegistry.kind, format: LocationRegistry.format)
            run.store.net.run { _ = try? await memory.put(LocationRegistry.key, bytes, if: .absent) }
        }
    }

    func begin(isHostile: Bool) {
        self.isHostile = isHostile
        for number in 0...1 { start(number) }
        world.after(1_000_000_000) { [self] in next() }
    }

    // MARK: Collectors

    private func start(_ number: Int) {
        guard collectors[number] == nil else { return }
        var shape = SimCollector.Shape()
        if isCalm { shape.pauseNs = 5_000_000_000 }
        shape.fault = fault
        if slowPageNs > 0 {
            // Longer than it takes between two beats, mostly.
            shape.deadAfterMs = 60_000
            if number == 0, !isCalm { shape.slowPageNs = slowPageNs }
        }
        shape.checkpointMs = [0, 1_000, 300_000].randomElement(using: &world.chance)!
        collectors[number] = SimCollector(
            world, run.store, id: "gc\(number).\(completed)", scratch: scratch[number], shape: shape)
        scratch[number] = nil
    }

    private func stop(_ number: Int) {
        guard let collector = collectors[number] else { return }
        let left = collector.kill(losesPower: world.chance.one(in: 3))
        scratch[number] = world.chance.one(in: 4) ? nil : left
        if scratch[number]?.contents("gc/round") != nil { run.count("listing that a killed collector has kept") }
        completed += collector.completed
        deleted += collector.deleted
        collectors[number] = nil
    }

    private func trouble() {
        guard isHostile, let number = [0, 1].randomElement(using: &world.chance), let collector = collectors[number]
        else { return }
        // One that is slow is left to come to its end, mostly.
        if slowPageNs > 0, number == 0, !world.chance.one(in: 8) { return }
        switch world.chance.below(5) {
        case 4:
            run.count("bit rot in a collector's files")
            collector.rot()
        case 0:
            run.count("kill of a collector")
            stop(number)
            world.after(world.chance.ns(1_000_000_000...60_000_000_000)) { [self] in start(number) }
        case 1:
            run.count("a collector's bad way to the store")
            collector.buckets.randomElement(using: &world.chance)!.faults = run.randomFaults()
        case 2:
            run.count("outage of the store for a collector")
            let bucket = collector.buckets.randomElement(using: &world.chance)!
            bucket.faults.isDown = true
            world.after(world.chance.ns(100_000_000...40_000_000_000)) { bucket.faults.isDown = false }
        default:
            run.count("jump of a collector's clock")
            collector.environment.wallOffsetMs += Int64(world.chance.below(7_200_000)) - 3_600_000
        }
    }

    // MARK: What owners do

    private func next() {
        guard !isCalm, world.violation == nil else { return }
        if world.chance.one(in: 3) { trouble() }
        run.store.net.run { [self] in
            do throws(CatalogError) {
                try await act()
            } catch {
                world.note("refused: \(error)")
            }
            world.after(world.chance.ns(100_000_000...12_000_000_000)) { [self] in next() }
        }
    }

    private func act() async throws(CatalogError) {
        let catalog = run.catalog()
        let client = run.clients.randomElement(using: &world.chance)!
        let any = (run.clients.map(\.disk) + forks).randomElement(using: &world.chance)!
        switch world.chance.below(16) {
        case 0..<4: try await fork(any, client, catalog)
        case 4: localize(any, catalog)
        case 5, 6:
            let number = try await generation(any, catalog)
            if run.heads[any]?.pinned.contains(number) == true {
                _ = try await catalog.unpin(any, generation: number)
            } else {
                _ = try await catalog.pin(any, generation: number)
                // Nothing may take it now.
                if run.heads[any]?.pinned.contains(number) == true {
                    _ = try await run.catalog().store.find(any)?.heads.record(run.heads[any]!, generation: number)
                }
            }
        case 7:
            _ = try await catalog.set(any, .init(historyDensity: world.chance.below(4)))
        case 8, 9:
            guard let name = forks.randomElement(using: &world.chance) else { return }
            forks.removeAll { $0 == name }
            run.count("deletion of a fork")
            try await catalog.delete(name, force: true)
        case 10:
            guard let name = forks.randomElement(using: &world.chance) else { return }
            _ = try await catalog.rollBack(name, to: try await generation(name, catalog), force: true)
        case 11, 12: try await read(any, catalog)
        case 13, 14: try await transfer(any, catalog)
        default: try await catalog.commitNow(client.disk, timeoutMs: 10_000)
        }
    }

    private func generation(_ name: String, _ catalog: Catalog) async throws(CatalogError) -> UInt64 {
        guard let one = try await catalog.generations(name).randomElement(using: &world.chance) else {
            throw CatalogError(.notFound, "no generation yet")
        }
        return one.generation
    }

    /// Has somebody read a generation for a while.
    private func read(_ name: String, _ catalog: Catalog) async throws(CatalogError) {
        let number = try await generation(name, catalog)
        guard let found = try await catalog.store.find(name) else { return }
        let record = try await found.heads.record(found.head, generation: number)
        guard let root = record.root, let seen = run.contents[root.id],
            let server = run.anyServer(using: &world.chance)
        else { return }
        run.count("reader of a generation")
        let reader = SimReader(world, server, record, seen: seen)
        let named = run.named
        let duration = world.chance.ns(1_000_000_000...UInt64(graceMs) * 3_000_000)
        run.store.net.run { [self] in await reader.run(name, named, for: duration) { isCalm } }
    }

    /// A name for another disk that nobody writes; a name is used again, sooner or later.
    private func freeName() -> String? {
        let name = "f\(world.chance.below(12))"
        if forks.count > 5 || forks.contains(name) || run.clients.contains(where: { $0.disk == name }) { return nil }
        return name
    }

    /// Sends a generation, whole or over an earlier one, and receives it as a disk of its own.
    private func transfer(_ source: String, _ catalog: Catalog) async throws(CatalogError) {
        guard let name = freeName() else { return }
        let number = try await generation(source, catalog)
        var base: UInt64?
        let isOver = world.chance.one(in: 2)
        if isOver { base = try await generation(source, catalog) }
        forks.append(name)
        if let base { _ = try await catalog.fork(source, generation: base, as: name) }
        let stream = StreamBytes()
        try await catalog.send(
            source, generation: number, from: base, to: { (piece) throws(CatalogError) in stream.add(piece) })
        run.count(isOver ? "stream over a generation" : "stream")
        _ = try await catalog.receive(name, from: { (most) throws(CatalogError) in stream.take(most) })
    }

    /// Has a disk brought to one of the locations, while whatever else happens goes on.
    private func localize(_ name: String, _ catalog: Catalog) {
        guard run.store.memories.count > 1, !isLocalizing else { return }
        isLocalizing = true
        let location = UInt8(world.chance.below(run.store.memories.count))
        var bounds = LocalizeBounds()
        bounds.leaves = 1 + world.chance.below(3)
        bounds.batch = 1 + world.chance.below(8)
        bounds.bytes = [1, 1 << 20, .max].randomElement(using: &world.chance)!
        bounds.parallel = 1 + world.chance.below(4)
        run.store.net.run { [self, bounds] in
            do throws(CatalogError) {
                let done = try await catalog.localize(name, to: location, bounds: bounds)
                if done.generations > 0 { run.count("localizing") }
                copied += done.copiedObjects
                world.note("\(name) is at \(location): \(done)")
            } catch {
                world.note("\(name) is not brought to \(location): \(error)")
            }
            isLocalizing = false
        }
    }

    private func fork(_ any: String, _ client: SimClient, _ catalog: Catalog) async throws(CatalogError) {
        guard let name = freeName() else { return }
        let source = world.chance.one(in: 3) ? any : client.disk
        var number: UInt64?
        if world.chance.one(in: 2) { number = try await generation(source, catalog) }
        let isClient =
            run.clients.count < 3 && source == client.disk && world.chance.one(in: 3)
            && run.heads[source]?.record != nil
        if isClient { wanted[name] = {} } else { forks.append(name) }
        run.count("fork")
        do throws(CatalogError) {
            _ = try await catalog.fork(
                source, generation: number, as: name, readOnly: !isClient && world.chance.one(in: 4),
                location: UInt8(world.chance.below(run.store.memories.count)))
            forkCount += 1
        } catch {
            wanted[name] = nil
            throw error
        }
        // One that had to be taken back has none.
        wanted.removeValue(forKey: name)?()
    }

    /// Whether the fork of this name that has just appeared is to have a client.
    func wantsClient(_ name: String) -> Bool { wanted[name] != nil }
    /// Begins it once the fork is made.
    func whenMade(_ name: String, _ begin: @escaping () -> Void) { wanted[name] = begin }

    /// Takes a client's disk back to an earlier generation.
    func goBack(_ client: SimClient) async {
        if isCalm { return }
        let catalog = run.catalog()
        do throws(CatalogError) {
            let number = try await generation(client.disk, catalog)
            run.count("roll-back of a disk")
            _ = try await catalog.rollBack(client.disk, to: number, force: world.chance.one(in: 2))
            world.note("\(client.disk) is taken back to \(number)")
        } catch {
            world.note("\(client.disk) can't be taken back: \(error.kind)")
        }
    }

    // MARK: The end

    func calmDown() {
        isCalm = true
        for collector in collectors { for bucket in collector?.buckets ?? [] { bucket.faults = StoreFaults() } }
        world.after(70_000_000_000) { [self] in
            for number in 0...1 { start(number) }
        }
    }

    /// Once nothing else happens any more, exactly the garbage goes, and everything else stays.
    func finish() {
        let deadline = world.nowNs + UInt64(graceMs) * 8_000_000
        while world.violation == nil, world.nowNs < deadline {
            if world.steps % 256 == 0, world.nowNs + UInt64(graceMs) * 4_000_000 > deadline, run.named.garbage.isEmpty {
                return
            }
            guard world.step() else { break }
        }
        if world.violation == nil, let left = run.named.garbage.first {
            world.violate("\(run.named.garbage.count) objects are garbage and were not collected, the first is \(left)")
        }
    }

    func add(to report: inout RunReport) {
        for number in 0...1 { stop(number) }
        report.collections = completed
        report.collected = deleted
        report.forks = forkCount
        report.copied = copied
    }
}

/// A stream on its way from one end to the other.
private final class StreamBytes: @unchecked Sendable {  // used by one task
    private var bytes: [UInt8] = []
    private var taken = 0
    func add(_ piece: [UInt8]) { bytes += piece }
    func take(_ most: Int) -> [UInt8] {
        let end = min(bytes.count, taken + most)
        defer { taken = end }
        return Array(bytes[taken..<end])
    }
}
