// Forks and read-only disks as clients see them, and commits that somebody waits for.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct ForkDiskTests {
    private func catalog(_ bed: DiskBed) async throws -> Catalog {
        Catalog(try await Store.open(bucket: bed.store, environment: bed.environment)) { _ in .outOfSight }
    }

    /// Its server lives.
    private func beat(_ bed: DiskBed, _ catalog: Catalog) async throws {
        try await catalog.store.heads.beat(
            ServerRecord(
                id: "a", host: "h", bootID: "b", pid: 1, pidNamespace: "n", startTicks: 1, addresses: [],
                timeMs: bed.environment.wallMs, freshForMs: 86_400_000))
    }

    @Test func nowMeansWhatIsSafeNow() async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create()
        let catalog = try await catalog(bed)
        try await beat(bed, catalog)
        let client = try await bed.attach()
        let safe = pattern(100_000, 1)
        try await client.write(safe, at: 8192)
        try await client.flush()
        try await client.write(pattern(4096, 2), at: 8192)
        #expect(try await catalog.fork("d", as: "before").generation == 0)
        let looking = Task {
            for _ in 0..<100 {
                await bed.manager.checkOwnership()
                await bed.environment.sleep(ns: 20_000_000)
            }
        }
        try await catalog.commitNow("d")
        #expect(try await bed.head().commitWanted == nil)
        #expect(try await catalog.fork("d", as: "after").origin == "d@1")
        // Once more, with nothing to commit; and with the disk given back.
        try await catalog.commitNow("d")
        #expect(try await bed.head().generation == 1)
        looking.cancel()
        _ = await looking.value
        let fork = try await bed.attach("after")
        #expect(try await fork.read(100_000, at: 8192) == safe)
        await client.leave(clean: true)
        await bed.manager.drain()
        try await catalog.commitNow("d")
        #expect(try await bed.head().owner == nil)
    }

    @Test func nobodyCommitsForADeadServer() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let catalog = try await catalog(bed)
        _ = try await bed.attach()
        #expect(await CatalogTests.kind { try await catalog.commitNow("d") } == .owned)
        try await beat(bed, catalog)
        // Alive, and it does not look.
        #expect(await CatalogTests.kind { try await catalog.commitNow("d", timeoutMs: 100) } == .conflict)
    }

    @Test func aForkAndItsSourceDoNotSeeEachOther() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let catalog = try await catalog(bed)
        let source = try await bed.attach()
        let shared = pattern(1 << 20, 1)
        try await source.write(shared, at: 0)
        try await source.flush()
        try await bed.waitForGeneration(1)
        _ = try await catalog.fork("d", as: "f")
        let fork = try await bed.attach("f")
        try await fork.write(pattern(8192, 2), at: 4096)
        try await source.write(pattern(8192, 3), at: 16384)
        try await fork.flush()
        try await source.flush()
        var forked = shared
        forked.replaceSubrange(4096..<12288, with: pattern(8192, 2))
        var sourced = shared
        sourced.replaceSubrange(16384..<24576, with: pattern(8192, 3))
        #expect(try await fork.read(1 << 20, at: 0) == forked)
        #expect(try await source.read(1 << 20, at: 0) == sourced)
        try await bed.waitForGeneration(2)
        try await bed.waitForGeneration(2, "f")
        let old = try await bed.attach("f@1")
        #expect(try await old.read(1 << 20, at: 0) == shared)
    }

    @Test func aThousandForksShareTheirSlices() async throws {
        let bed = try DiskBed(memoryBytes: 64 << 20)
        try await bed.create()
        let catalog = try await catalog(bed)
        let source = try await bed.attach()
        let bytes = pattern(2 << 20, 1)
        try await source.write(bytes, at: 0)
        await source.leave(clean: true)
        try await bed.waitForGeneration(1)
        var clients: [TestClient] = []
        for number in 0..<1000 {
            _ = try await catalog.fork("d", as: "f\(number)")
            let client = try await bed.attach("f\(number)")
            #expect(try await client.read(2 << 20, at: 0) == bytes)
            clients.append(client)
        }
        let cache = bed.context.loader.cache.snapshot
        #expect(cache.heldBytes <= 5 * UInt64(Geometry.sliceBytes))
        #expect(bed.context.loader.snapshot.loads <= 8)
        withExtendedLifetime(clients) {}
    }

    @Test func aReadOnlyDiskHasManyReadersAndNoOwner() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let catalog = try await catalog(bed)
        let source = try await bed.attach()
        let bytes = pattern(1 << 20, 1)
        try await source.write(bytes, at: 0)
        try await source.flush()
        try await bed.waitForGeneration(1)
        _ = try await catalog.fork("d", as: "ro", readOnly: true)
        _ = try await catalog.resize("d", to: 128 << 20)
        let other = try DiskBed(store: bed.store, server: "b")
        var readers: [TestClient] = []
        for (n, bed) in [bed, bed, other].enumerated() {
            #expect(try await bed.manager.describe("ro").isReadOnly)
            let reader = try await bed.attach(n == 1 ? "ro?session=x" : "ro", host: "h\(n)")
            #expect(reader.device.isReadOnly && reader.device.sizeBytes == 64 << 20)
            #expect(try await reader.read(1 << 20, at: 0) == bytes)
            #expect(await reader.run(.write, bytes: [1, 2, 3]).error == .notPermitted)
            readers.append(reader)
        }
        let head = try await bed.head("ro")
        #expect(head.owner == nil && head.epoch == 0)
        // One of a disk that was never written is all zeroes.
        try await bed.create("empty")
        _ = try await catalog.fork("empty", as: "none", readOnly: true)
        #expect(try await bed.attach("none").read(4096, at: 1 << 20) == [UInt8](repeating: 0, count: 4096))
    }

    @Test func generationsThatHaveLeftAreNotServed() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.historyDensity = 0 }
        let client = try await bed.attach()
        for n in 1...3 as ClosedRange<UInt64> {
            try await client.write(pattern(4096, n), at: 0)
            try await client.flush()
            try await bed.waitForGeneration(n)
        }
        await #expect(throws: AttachError.self) { try await bed.attach("d@2") }
        #expect(try await bed.attach("d@3").read(4096, at: 0) == pattern(4096, 3))
    }
}
