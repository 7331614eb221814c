import Glibc
import ObjectStore
import Runtime
import Testing

@testable import BlockCache

/// Wrong bytes and failing disks: a read gives what was stored, or says what is wrong.
struct DamageTests {
    @Test(arguments: [0, 8, 40, 100, 816, 823, 824, 900_000])
    func damageOnScratchIsRepairedFromTheStore(place: UInt64) async throws {
        let first = await LoaderBed()
        let ref = try await first.storeNoise(id: 1)
        let entry = BlockEntry(base: ref, deltas: [])
        _ = try await first.load(entry, 0)
        await first.spawner.idle()
        let bed = await first.restarted()
        let path = "blocks/" + ref.id.description
        #expect(bed.scratch.contents(path)?.count == Int(ref.lengthBytes))
        bed.scratch.flipBit(path, at: place)
        bed.bucket.forget()
        try await bed.expect(entry, 0, bed.noise(1, 0))
        try await bed.expect(entry, 1, bed.noise(1, 1))
        #expect(bed.loader.snapshot.scratchCorruptions == 1 && bed.files.snapshot.corruptions == 1)
        #expect(bed.loader.snapshot.storeCorruptions == 0)
        // And the file is good again.
        await bed.spawner.idle()
        #expect(bed.scratch.contents(path) == bed.bucket.memory.contents[ref.id.blockKey])
        let last = await bed.restarted()
        bed.bucket.forget()
        for slice in 0..<3 { try await last.expect(entry, slice, bed.noise(1, slice)) }
        #expect(last.bucket.gets.isEmpty)
    }

    @Test(arguments: [StoreFault.Action.corrupt, .truncate])
    func aFetchThatComesWrongIsTriedOnceMore(action: StoreFault.Action) async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeBase([7: Sample.sparse.slice(seed: 1)], id: 1), deltas: [])
        bed.faulty.inject(StoreFault(action, verb: .get, count: 1))
        try await bed.expect(entry, 7, Sample.sparse.slice(seed: 1))
        #expect(bed.loader.snapshot.storeCorruptions == 1)
        // What came wrong did not stay on scratch.
        await bed.spawner.idle()
        let next = await bed.restarted()
        try await next.expect(entry, 7, Sample.sparse.slice(seed: 1))
        #expect(next.loader.snapshot.scratchCorruptions == 0)
    }

    @Test(arguments: [0, 30, 816, 900], [false, true])
    func damageInTheStoreIsSaid(place: Int, isLarge: Bool) async throws {
        let bed = await LoaderBed()
        let ref =
            isLarge
            ? try await bed.storeNoise(id: 1) : try await bed.storeBase([0: Sample.sparse.slice(seed: 1)], id: 1)
        var object = bed.bucket.memory.contents[ref.id.blockKey]!
        object[place] ^= 4
        _ = try await bed.bucket.put(ref.id.blockKey, object, if: .none)
        let entry = BlockEntry(base: ref, deltas: [])
        let error = await #expect(throws: StoreError.self) { try await bed.load(entry, 0) }
        #expect(error?.kind == .corrupt)
        #expect(error?.description.contains(ref.id.description) == true)
        #expect(error?.description.contains("slice 0") == true)
        #expect(bed.loader.snapshot.storeCorruptions == 2)
        #expect(bed.tryCopy(entry, 0) == nil)
        let problems = await bed.loader.verify(entry)
        #expect(problems.map(\.kind) == [.corrupt] && problems[0].id == ref.id)
        #expect(problems[0].slice == (place == 900 ? SliceIndex(0) : nil))
        await bed.spawner.idle()
        // Mended, it reads at once.
        object[place] ^= 4
        _ = try await bed.bucket.put(ref.id.blockKey, object, if: .none)
        try await bed.expect(entry, 0, (isLarge ? bed.noise(1, 0) : Sample.sparse.slice(seed: 1)))
        #expect(await bed.loader.verify(entry).isEmpty)
        await bed.spawner.idle()
    }

    @Test func aLaterFormatIsRefused() async throws {
        let bed = await LoaderBed()
        let ref = try await bed.storeBase([0: Sample.sparse.slice(seed: 1)], id: 1)
        var object = bed.bucket.memory.contents[ref.id.blockKey]!
        object[8] = 2
        _ = try await bed.bucket.put(ref.id.blockKey, object, if: .none)
        let error = await #expect(throws: StoreError.self) { try await bed.load(BlockEntry(base: ref, deltas: []), 0) }
        #expect(error?.kind == .refused && error?.description.contains("version 2") == true)
    }

    @Test func aMissingObjectIsSaid() async throws {
        let bed = await LoaderBed()
        let ref = try await bed.storeBase([0: Sample.sparse.slice(seed: 1)], id: 1)
        try await bed.bucket.delete([ref.id.blockKey])
        let error = await #expect(throws: StoreError.self) { try await bed.load(BlockEntry(base: ref, deltas: []), 0) }
        #expect(error?.kind == .notFound && error?.description.contains(ref.id.description) == true)
        #expect(await bed.loader.verify(BlockEntry(base: ref, deltas: [])).map(\.kind) == [.missing])
    }

    @Test func aLocationThatIsNotConfiguredIsSaid() async throws {
        let bed = await LoaderBed()
        var ref = try await bed.storeBase([0: Sample.sparse.slice(seed: 1)], id: 1)
        ref.location = 3
        let error = await #expect(throws: StoreError.self) { try await bed.load(BlockEntry(base: ref, deltas: []), 0) }
        #expect(error?.kind == .refused && error?.description.contains("location 3") == true)
        #expect(await bed.loader.verify(BlockEntry(base: ref, deltas: [])).map(\.kind) == [.unreachable])
    }

    /// Whatever fails on scratch, once or for good, reads go on.
    @Test(arguments: [MemoryScratch.Call.open, .write, .read, .rename, .remove], [EIO, ENOSPC])
    func aFailingScratchDiskFailsNoRead(call: MemoryScratch.Call, errno: Int32) async throws {
        let bed = await LoaderBed(frames: 2, scratchBytes: 8 << 20)
        var entries: [BlockEntry] = []
        for id in 1...3 as ClosedRange<UInt64> {
            entries.append(BlockEntry(base: try await bed.storeNoise(id: id), deltas: []))
        }
        for round in 0..<12 {
            if round % 3 == 1 { bed.scratch.failNext(call, errno: errno) }
            let id = round % 3
            for slice in LoaderBed.noisySlices[(round / 3)...(round / 3 + 1)] {
                try await bed.expect(entries[id], slice, bed.noise(UInt64(id + 1), slice))
                await bed.spawner.idle()
            }
        }
        await bed.spawner.idle()
        #expect(bed.files.snapshot.errors > 0 && bed.files.snapshot.lastError != nil)
        #expect(bed.files.snapshot.heldBytes <= 8 << 20)
    }

    @Test func aScratchDiskWithoutRoomFailsNoRead() async throws {
        let bed = await LoaderBed(frames: 2, scratch: MemoryScratch(capacityBytes: 2 << 20))
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        for slice in 0..<32 { try await bed.expect(entry, slice, bed.noise(1, slice)) }
        await bed.spawner.idle()
        #expect(bed.files.snapshot.errors > 0 && bed.files.snapshot.bypasses > 0)
    }

    /// An object that can never fit is not fetched in the background again and again.
    @Test func anObjectTooLargeForScratchIsFetchedBySlice() async throws {
        let bed = await LoaderBed(frames: 2, scratchBytes: 3 << 20)
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        for slice in LoaderBed.noisySlices { try await bed.expect(entry, slice, bed.noise(1, slice)) }
        await bed.spawner.idle()
        #expect(bed.bucket.gets.count == LoaderBed.noisySlices.count && bed.loader.snapshot.backgroundBytes == 0)
    }

    @Test func withoutScratchTheStoreServesAll() async throws {
        let bed = await LoaderBed(frames: 2, scratchBytes: 0)
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        for slice in 0..<32 { try await bed.expect(entry, slice, bed.noise(1, slice)) }
        await bed.spawner.idle()
        #expect(bed.bucket.gets.count == LoaderBed.noisySlices.count && bed.loader.snapshot.backgroundBytes == 0)
    }

    /// Files whose names outlived their content in a power cut.
    @Test(arguments: [1, 2, 3, 4] as [UInt64])
    func aPowerCutLeavesNothingWrong(seed: UInt64) async throws {
        let bed = await LoaderBed()
        var entries: [BlockEntry] = []
        for id in 1...4 as ClosedRange<UInt64> {
            let entry = BlockEntry(base: try await bed.storeNoise(id: id), deltas: [])
            entries.append(entry)
            _ = try await bed.load(entry, 5)
        }
        await bed.spawner.idle()
        var random = Random(seed: seed)
        let after = bed.scratch.powerCut(random: &random)
        let next = await LoaderBed(bucket: bed.bucket, scratch: after)
        for (i, entry) in entries.enumerated() {
            for slice in 0..<32 { try await next.expect(entry, slice, bed.noise(UInt64(i + 1), slice)) }
        }
        await next.spawner.idle()
    }
}
