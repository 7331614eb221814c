// A store of one or several locations in memory, whose clock the test sets, with disks whose generations are made without a
// server; and what they name, found by a walk that shares nothing with the collector's.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// Time passes while somebody sleeps, and when the test says so.
final class BedEnvironment: Environment {
    private let state = Mutex((SeededGenerator(seed: 1), Int64(1_800_000_000_000)))
    init(seed: UInt64 = 1) { state.withLock { $0.0 = SeededGenerator(seed: seed) } }
    var wallMs: Int64 { state.withLock { $0.1 } }
    var nowNs: UInt64 { UInt64(wallMs) * 1_000_000 }
    func pass(ms: Int64) { state.withLock { $0.1 += ms } }
    func randomBits() -> UInt64 { state.withLock { $0.0.next() } }
    func sleep(ns: UInt64) async {
        pass(ms: Int64(ns / 1_000_000))
        await Task.yield()
    }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}

final class CollectionBed: Sendable {
    let environment: BedEnvironment
    let memories: [MemoryBucket]
    let faults: [FaultyBucket]
    let store: Store
    let scratch = MemoryScratch()

    static let hour: Int64 = 3_600_000
    static let grace = CollectionState.defaultGraceMs

    init(locations: Int = 1, seed: UInt64 = 1) {
        let environment = BedEnvironment(seed: seed)
        self.environment = environment
        memories = (0..<locations).map { number in
            MemoryBucket(name: "memory\(number)", wallMs: { environment.wallMs })
        }
        faults = memories.map { FaultyBucket($0, environment: environment) }
        store = Store(
            id: ObjectID(high: 1, low: 1), locations: Locations(faults), environment: environment)
    }

    /// Tells a bucket which location it is, as `location add` does.
    private func register(_ number: Int) async throws {
        let all = memories.indices.map { LocationRegistry.Entry(number: UInt8($0), name: "\($0)") }
        let registry = LocationRegistry(storeID: store.id, number: UInt8(number), all: all)
        let bytes = ControlObject.seal(registry, kind: LocationRegistry.kind, format: LocationRegistry.format)
        _ = try await memories[number].put(LocationRegistry.key, bytes, if: .none)
    }

    var memory: MemoryBucket { memories[0] }
    func heads(_ location: Int = 0) -> HeadStore { HeadStore(bucket: faults[location], environment: environment) }
    func keys(_ prefix: String, at location: Int = 0) -> Set<String> {
        Set(memories[location].contents.keys.filter { $0.hasPrefix(prefix) })
    }
    /// Blocks and pages.
    func objects(at location: Int = 0) -> Set<String> {
        keys("blocks/", at: location).union(keys("manifests/", at: location))
    }

    func options(_ change: (inout CollectionOptions) -> Void = { _ in }) -> CollectionOptions {
        var options = CollectionOptions()
        options.host = "bed"
        // Small, so that everything is partitioned.
        options.partitionBits = 2
        change(&options)
        return options
    }

    @discardableResult
    func collect(_ fault: Fault? = nil, _ change: (inout CollectionOptions) -> Void = { _ in })
        async throws -> CollectionSummary
    {
        if memories.count > 1 { for number in memories.indices { try await register(number) } }
        return try await Collector(store: store, scratch: scratch, options: options(change), fault: fault).run()
    }

    // MARK: Disks

    @discardableResult
    func create(_ name: String, at location: Int = 0, blocks: UInt64 = 4096, density: Int = 2) async throws -> Head {
        let old = try await heads(location).load(name)
        var head = Head(
            diskID: environment.objectID(), name: name, sizeBytes: blocks << 24, options: DiskOptions(),
            createdAtMs: environment.wallMs)
        head.options.historyDensity = density
        if let old {
            head.generation = old.head.generation
            head.epoch = old.head.epoch + 1
        }
        head.pin(head.generation + 1)
        guard case .won = try await heads(location).swap(head, expecting: old?.etag) else { fatalError("not won") }
        return head
    }

    /// Changes a head whatever it says.
    func change(_ name: String, at location: Int = 0, _ body: (inout Head) -> Void) async throws {
        let (head, etag) = try #require(try await heads(location).load(name))
        var next = head
        body(&next)
        guard case .won = try await heads(location).swap(next, expecting: etag) else { fatalError("not won") }
    }

    /// A base object with one slice in use. It is real: `check` can read it.
    func block(at location: Int = 0) async throws -> BaseRef {
        let id = environment.objectID()
        var encoder = BaseEncoder(id: id, location: UInt8(location))
        let slice = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 64)
        defer { slice.deallocate() }
        slice.initializeMemory(
            as: UInt8.self, repeating: UInt8(truncatingIfNeeded: id.low | 1), count: Geometry.sliceBytes)
        encoder.add(from: slice, at: SliceIndex(Int(id.high % 32)))
        let (object, ref) = encoder.finish()
        _ = try await faults[location].put(id.blockKey, object, if: .none)
        return ref
    }

    /// The next generation of a disk, with new objects for `blocks`. As a server does it.
    @discardableResult
    func commit(_ name: String, at location: Int = 0, _ blocks: [UInt64]) async throws -> GenerationRecord {
        let (head, etag) = try #require(try await heads(location).load(name))
        let cache = ManifestCache(store.locations)
        var edit = ManifestEdit(head.manifest(cache: cache))
        for block in blocks {
            edit.set(BlockIndex(block), BlockEntry(base: try await self.block(at: location), deltas: []))
        }
        let manifest = try await edit.write(
            to: faults[location], location: UInt8(location), environment: environment)
        try await heads(location).archive(head)
        var next = head
        let record = GenerationRecord(
            diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .flush,
            committedAtMs: environment.wallMs, journalSequence: 0, newBytes: 0, manifest: manifest)
        next.advance(to: record)
        guard case .won = try await heads(location).swap(next, expecting: etag) else { fatalError("not won") }
        return record
    }

    func delete(_ name: String, at location: Int = 0) async throws {
        try await heads(location).archive(try #require(try await heads(location).load(name)).head)
        try await change(name, at: location) { $0.bury() }
    }

    /// Objects that nobody will ever name: of a commit that was given up.
    @discardableResult
    func litter(_ count: Int, at location: Int = 0) async throws -> Set<String> {
        var keys: Set<String> = []
        for number in 0..<count {
            let id = environment.objectID()
            let key = number % 3 == 2 ? id.manifestKey : id.blockKey
            _ = try await faults[location].put(key, Array("litter \(number)".utf8), if: .none)
            keys.insert(key)
        }
        return keys
    }

    func generations(_ name: String, at location: Int = 0) -> [UInt64] {
        keys(GenerationRecord.folder(disk: name), at: location).compactMap { UInt64($0.suffix(20)) }.sorted()
    }

    // MARK: What must be there

    /// Keys of all objects, by location, that heads and records name: read from the buckets' bytes, a generation after the
    /// other, through `Manifest`.
    func named() async throws -> [Set<String>] {
        var keys: [Set<String>] = Array(repeating: [], count: memories.count)
        for memory in memories {
            for (key, bytes) in memory.contents where key.hasPrefix("disks/") {
                let parts = key.split(separator: "/")
                var record: GenerationRecord?
                if parts.last == "head" {
                    record = try Head.decode(bytes, name: String(parts[1])).record
                } else if parts[2] == "generations" {
                    record = try GenerationRecord.decode(bytes, key: key)
                }
                if let record { try await walk(record, &keys) }
            }
        }
        return keys
    }

    private func walk(_ record: GenerationRecord, _ keys: inout [Set<String>]) async throws {
        let cache = ManifestCache(Locations(memories))
        let manifest = Manifest.open(record, cache: cache)
        guard let root = manifest.root else { return }
        var refs = [(root, record.depth - 1, UInt64(0))]
        while let (ref, level, index) = refs.popLast() {
            keys[Int(ref.location)].insert(ref.id.manifestKey)
            let page = try await cache.page(ref, level: level, index: index)
            for slot in 0..<512 {
                if level > 0, let child = page.child(slot) {
                    refs.append((child, level - 1, index * 512 + UInt64(slot)))
                }
                if level == 0, let entry = page.entry(slot) {
                    if let base = entry.base { keys[Int(base.location)].insert(base.id.blockKey) }
                    for delta in entry.deltas { keys[Int(delta.location)].insert(delta.id.blockKey) }
                }
            }
        }
    }

    /// Nothing that is named is gone.
    func expectNothingLost(_ comment: Comment? = nil) async throws {
        for (location, keys) in try await named().enumerated() {
            let lost = keys.subtracting(memories[location].contents.keys)
            #expect(lost.isEmpty, comment)
        }
    }

    /// What is there is what is named, and nothing else.
    func expectExactlyNamed(_ comment: Comment? = nil) async throws {
        for (location, keys) in try await named().enumerated() {
            #expect(objects(at: location) == keys, comment)
        }
    }
}
