// Forks across locations, and bringing their data near.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct LocalizeTests {
    private static let size: UInt64 = 48 << 20

    /// A disk "base" at eu with bases, deltas, zeroes, and several generations; and its content.
    private func makeBase(_ bed: LocationBed, _ store: Store) async throws -> [UInt8] {
        var content = [UInt8](repeating: 0, count: Int(Self.size))
        let disk = try DiskBed(over: store)
        _ = try await bed.catalog(store).create("base", sizeBytes: Self.size, options: flushed())
        let client = try await disk.attach("base")
        func write(_ bytes: [UInt8], _ at: Int) async throws {
            try await client.write(bytes, at: UInt64(at))
            content.replaceSubrange(at..<at + bytes.count, with: bytes)
        }
        for round in 0..<4 {
            let seed = UInt64(round * 100)
            if round == 0 {
                for piece in 1..<7 { try await write(pattern(1 << 20, UInt64(piece)), piece << 20) }
            }
            try await write(pattern(8192, seed + 1), 4096 * (round + 1))
            try await write(pattern(300_000, seed + 2), (17 << 20) + round * 4096)
            try await write(pattern(4096, seed + 3), (40 << 20) + round * 1 << 19)
            if round == 2 {
                try await client.zero(2 << 20..<3 << 20)
                content.replaceSubrange(2 << 20..<3 << 20, with: repeatElement(0, count: 1 << 20))
            }
            try await client.flush()
            try await disk.waitFor(UInt64(round + 1), "base", store)
        }
        await client.leave(clean: true)
        await disk.manager.drain()
        return content
    }

    private func flushed() -> DiskOptions {
        var options = DiskOptions()
        options.safePoints = .flush
        return options
    }

    /// All locations that the disk's current generation names, of blocks and of pages.
    private func named(_ name: String, _ store: Store) async throws -> Set<UInt8> {
        let head = try #require(try await store.find(name)).head
        let cache = ManifestCache(store.locations)
        let manifest = head.manifest(cache: cache)
        var named: Set<UInt8> = []
        var block = BlockIndex(0)
        while let next = try await manifest.nextUsed(from: block) {
            let entry = try #require(try await manifest.find(next))
            if let base = entry.base { named.insert(base.location) }
            named.formUnion(entry.deltas.map(\.location))
            block = BlockIndex(next.value + 1)
        }
        var level = manifest.depth - 1
        var refs = manifest.root.map { [($0, UInt64(0))] } ?? []
        while !refs.isEmpty {
            named.formUnion(refs.map(\.0.location))
            if level == 0 { break }
            var below: [(PageRef, UInt64)] = []
            for (ref, index) in refs {
                let page = try await cache.page(ref, level: level, index: index)
                for (slot, child) in zip(page.slots.slots, page.children) {
                    below.append((child, index << ManifestShape.slotBits | UInt64(slot)))
                }
            }
            refs = below
            level -= 1
        }
        return named
    }

    private func content(_ disk: DiskBed, _ export: String) async throws -> [UInt8] {
        let client = try await disk.attach(export)
        var bytes: [UInt8] = []
        for at in stride(from: UInt64(0), to: Self.size, by: 1 << 20) {
            bytes += try await client.read(1 << 20, at: at)
        }
        await client.leave(clean: true)
        return bytes
    }

    @Test func aForkInAnotherRegionReadsFarWritesNearAndLivesOnAlone() async throws {
        let bed = LocationBed(environment: SystemEnvironment(workers: 2))
        let eu = try await bed.make()
        var expected = try await makeBase(bed, eu)
        let us = try await bed.open(["eu", "us"], near: "us")
        let catalog = bed.catalog(us)
        let before = bed.memory["us"]!.contents.keys.filter { $0.hasPrefix("blocks/") || $0.hasPrefix("manifests/") }
        let fork = try await catalog.fork("base", as: "fork")
        #expect(fork.location == "us")
        #expect(before.isEmpty)
        #expect(try await named("fork", us) == [0])
        // Far reads, near writes.
        do {
            let disk = try DiskBed(over: us)
            #expect(try await content(disk, "fork") == expected)
            let client = try await disk.attach("fork")
            try await client.write(pattern(8192, 99), at: 20 << 20)
            expected.replaceSubrange(20 << 20..<(20 << 20) + 8192, with: pattern(8192, 99))
            try await client.flush()
            try await disk.waitFor(2, "fork", us)
            await client.leave(clean: true)
            await disk.manager.drain()
        }
        #expect(try await named("fork", us) == [0, 1])
        #expect(bed.memory["us"]!.contents.keys.filter { $0.hasPrefix("blocks/") }.count == 1)

        let euBlocks = bed.memory["eu"]!.contents.filter { $0.key.hasPrefix("blocks/") }
        let summary = try await catalog.localize("fork")
        #expect(summary.copiedObjects > 3)
        #expect(summary.generations == 1)
        #expect(try await named("fork", us) == [1])
        #expect(try await catalog.generations("fork").last?.kind == .localized)
        // Names and bytes as they were.
        for (key, bytes) in bed.memory["us"]!.contents where euBlocks[key] != nil { #expect(euBlocks[key] == bytes) }
        // Again: nothing to do.
        let again = try await catalog.localize("fork")
        #expect(again.copiedObjects == 0 && again.generations == 0 && again.generation == summary.generation)

        bed.lose("eu")
        let alone = try await bed.open(["eu", "us"], near: "us")
        let disk = try DiskBed(settings: { $0.requestTimeoutMs = 1000 }, over: alone)
        #expect(try await content(disk, "fork") == expected)
        let client = try await disk.attach("fork")
        try await client.write(pattern(4096, 5), at: 0)
        try await client.flush()
        try await disk.waitFor(summary.generation + 1, "fork", alone)
        await client.leave(clean: true)
        // What is not localized: an error that says which location it would have to come from. Its blocks were copied, and
        // are read from there; its pages were not.
        let old = await failure {
            _ = try await bed.catalog(alone).export("fork", generation: 1, to: try ImageOutput(path: "/dev/null"))
        }
        #expect(old?.description.contains("location 'eu'") == true, "\(old as Any)")
        let reader = try await disk.attach("fork@1")
        let read = await reader.run(.read, offset: 0, length: 4096)
        #expect(read.error == .io)
        await disk.manager.drain()
    }

    @Test func oldGenerationsAreReadFromTheCopiesWhereThereAreAny() async throws {
        let bed = LocationBed(environment: SystemEnvironment(workers: 2))
        let expected = try await makeBase(bed, try await bed.make())
        let us = try await bed.open(["eu", "us"], near: "us")
        _ = try await bed.catalog(us).fork("base", as: "fork")
        let disk = try DiskBed(over: us)
        let client = try await disk.attach("fork@1")
        // Its pages are in memory from here on.
        #expect(try await client.read(4096, at: 0) == Array(expected[0..<4096]))
        _ = try await bed.catalog(us).localize("fork")
        bed.lose("eu")
        #expect(try await client.read(1 << 20, at: 17 << 20) == Array(expected[17 << 20..<18 << 20]))
        await client.leave(clean: true)
    }

    @Test func aDiskIsLocalizedInStepsThatStay() async throws {
        let bed = LocationBed()
        let eu = try await bed.make()
        // Blocks under five leaves, far apart.
        let catalog = bed.catalog(eu)
        _ = try await catalog.create("d", sizeBytes: 1 << 45)
        let found = try #require(try await eu.find("d"))
        var edit = ManifestEdit(found.head.manifest(cache: ManifestCache(eu.locations)))
        var g = SeededGenerator(seed: 1)
        let noise = CatalogImageTests.noise(Geometry.blockBytes, &g)
        for number: UInt64 in [0, 1, 600, 5000, 5001, 70_000, 2_000_000] {
            let id = bed.environment.objectID()
            let packed = try #require(noise.withUnsafeBytes { encodeBase($0, id: id, location: 0) })
            _ = try await eu.locations.nearBucket.put(id.blockKey, packed.object, if: .none)
            edit.set(BlockIndex(number), BlockEntry(base: packed.ref, deltas: []))
        }
        let manifest = try await edit.write(to: eu.locations.nearBucket, location: 0, environment: bed.environment)
        var head = found.head
        head.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: 1, epoch: 0, kind: .imported, committedAtMs: 1, journalSequence: 0,
                newBytes: 0, manifest: manifest))
        guard case .won = try await found.heads.swap(head, expecting: found.etag) else {
            _ = Issue.record("lost")
            return
        }

        var bounds = LocalizeBounds()
        bounds.leaves = 2
        // Ended after two steps, by a store that is away.
        bed.faulty["us"]!.inject(StoreFault(.delay(ns: 1), verb: .put, count: 6))
        bed.faulty["us"]!.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "blocks/"))
        let failed = await failure { _ = try await catalog.localize("d", to: 1, bounds: bounds) }
        #expect(failed?.description.contains("location 'us'") == true, "\(failed as Any)")
        bed.findAgain("us")
        let between = try #require(try await eu.find("d")).head
        #expect(between.generation == 2)
        #expect(try await named("d", eu) == [0, 1])
        bounds.bytes = 1
        bounds.batch = 1
        let summary = try await catalog.localize("d", to: 1, bounds: bounds)
        #expect(summary.copiedObjects + summary.presentObjects == 4)
        #expect(summary.generations == 4)
        #expect(try await named("d", eu) == [1])
        // Back again: everything is there.
        let back = try await catalog.localize("d", to: 0)
        #expect(back.copiedObjects == 0 && back.presentObjects == 7)
        #expect(try await named("d", eu) == [0])
        // The same bytes, throughout.
        let changed = catalog.diff(
            from: try await catalog.view("d", generation: 1),
            to: try await catalog.view("d", generation: back.generation))
        #expect(try await changed.next() == nil)
    }

    @Test func aDamagedObjectIsNotCopied() async throws {
        let bed = LocationBed(environment: SystemEnvironment(workers: 2))
        let eu = try await bed.make()
        _ = try await makeBase(bed, eu)
        for (key, bytes) in bed.memory["eu"]!.contents where key.hasPrefix("blocks/") {
            var bytes = bytes
            bytes[bytes.count - 1] ^= 1
            _ = try await bed.memory["eu"]!.put(key, bytes, if: .none)
        }
        let error = await failure { _ = try await bed.catalog(eu).localize("base", to: 1) }
        #expect(error?.kind == .corrupt, "\(error as Any)")
        #expect(bed.memory["us"]!.contents.keys.filter { $0.hasPrefix("blocks/") }.isEmpty)
        #expect(try await named("base", eu) == [0])
    }

    @Test func aDiskInUseIsLocalizedUnderItsWriter() async throws {
        let bed = LocationBed(environment: SystemEnvironment(workers: 2))
        let base = try await makeBase(bed, try await bed.make())
        let us = try await bed.open(["eu", "us"], near: "us")
        let catalog = bed.catalog(us)
        _ = try await catalog.fork("base", as: "fork")
        let disk = try DiskBed(over: us)
        let client = try await disk.attach("fork")
        let epoch = try #require(try await us.find("fork")).head.epoch
        let looking = Task {
            while !Task.isCancelled {
                await disk.manager.checkOwnership()
                await disk.environment.sleep(ns: 7_000_000)
            }
        }
        let writing = Task { () -> [UInt8] in
            var content = base
            for i in 0..<200 {
                let at = (i * 7919) % (Int(Self.size) / 4096 - 2) * 4096
                let bytes = pattern(4096 * (1 + i % 2), UInt64(i + 1000))
                try await client.write(bytes, at: UInt64(at))
                content.replaceSubrange(at..<at + bytes.count, with: bytes)
                if i % 3 == 0 { try await client.flush() }
                await disk.environment.sleep(ns: 2_000_000)
            }
            try await client.flush()
            return content
        }
        var generations: UInt64 = 0
        for _ in 0..<5 {
            generations += try await catalog.localize("fork").generations
            await disk.environment.sleep(ns: 50_000_000)
        }
        // The first did it all: its server has gone on from there, and writes near.
        #expect(generations == 1)
        let expected = try await writing.value
        looking.cancel()
        await looking.value
        let head = try #require(try await us.find("fork")).head
        #expect(head.epoch == epoch)
        #expect(head.owner?.server == "a")
        await client.leave(clean: true)
        await disk.manager.drain()
        #expect(try await named("fork", us) == [1])
        bed.lose("eu")
        let alone = try await bed.open(["eu", "us"], near: "us")
        #expect(try await content(try DiskBed(over: alone), "fork") == expected)
    }

    @Test func copiesOfWhatIsInUseAreNoGarbage() async throws {
        let bed = LocationBed(environment: SystemEnvironment(workers: 2))
        let eu = try await bed.make()
        _ = try await makeBase(bed, eu)
        _ = try await bed.catalog(eu).localize("base", to: 1)
        func blocks(_ name: String) -> Set<String> {
            Set(bed.memory[name]!.contents.keys.filter { $0.hasPrefix("blocks/") })
        }
        let (there, here) = (blocks("eu"), blocks("us"))
        var options = CollectionOptions()
        options.graceMs = 1
        for _ in 0..<4 {
            _ = try await Collector(store: eu, scratch: MemoryScratch(), options: options).run()
            await bed.environment.sleep(ns: 5_000_000)
        }
        #expect(blocks("us") == here)
        #expect(here.isSubset(of: blocks("eu")))
        #expect(blocks("eu").isSubset(of: there))
    }
}

extension DiskBed {
    /// Waits until the disk, wherever it is, has committed at least generation `generation`.
    fileprivate func waitFor(_ generation: UInt64, _ name: String, _ store: Store) async throws {
        for _ in 0..<1000 {
            if try await store.find(name)?.head.generation ?? 0 >= generation { return }
            await environment.sleep(ns: 10_000_000)
        }
        Issue.record("generation \(generation) of \(name) was not committed in 10 s")
    }
}
