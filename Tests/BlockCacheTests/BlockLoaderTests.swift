import ObjectStore
import Runtime
import Testing

@testable import BlockCache

struct BlockLoaderTests {
    @Test func noEntryIsZeroes() async throws {
        let bed = await LoaderBed(frames: 1)
        #expect(isAllZero(try await bed.load(nil, 3)))
        #expect(isAllZero(bed.tryCopy(nil, 3)!))
        let ref = try await bed.storeBase([1: Sample.text.slice(seed: 1)], id: 1)
        #expect(isAllZero(bed.tryCopy(BlockEntry(base: ref, deltas: []), 3)!))
        #expect(bed.bucket.gets.isEmpty)
    }

    @Test func aSmallObjectIsOneFetch() async throws {
        let bed = await LoaderBed()
        let ref = try await bed.storeBase([1: Sample.text.slice(seed: 1), 9: Sample.sparse.slice(seed: 2)], id: 1)
        let entry = BlockEntry(base: ref, deltas: [])
        #expect(bed.tryCopy(entry, 9) == nil)
        try await bed.expect(entry, 9, Sample.sparse.slice(seed: 2))
        try await bed.expect(entry, 1, Sample.text.slice(seed: 1))
        #expect(bed.tryCopy(entry, 9) == Sample.sparse.slice(seed: 2))
        #expect(bed.bucket.gets == [.init(key: ref.id.blockKey, range: 0..<UInt64(ref.lengthBytes))])
    }

    /// One slice of a cold object of some MiB comes while everything else of it is held up.
    @Test func aSliceDoesNotWaitForItsBlock() async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        let gate = StoreGate()
        bed.bucket.hold(at: gate) { $0.range.count > Geometry.sliceBytes }
        try await bed.expect(entry, 17, bed.noise(1, 17))
        #expect(bed.bucket.gets.prefix(2).map(\.range.count) == [BaseHeader.lengthBytes, Geometry.sliceBytes])
        gate.open()
        await bed.spawner.idle()
    }

    @Test func theFirstSliceComesWithTheHeader() async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        try await bed.expect(entry, 0, bed.noise(1, 0))
        #expect(bed.bucket.gets.first?.range == 0..<UInt64(BaseHeader.lengthBytes + Geometry.sliceBytes))
        await bed.spawner.idle()
    }

    /// Whoever asks for what in whatever order: each byte of the object is fetched once, and then it is on scratch.
    @Test(arguments: [1, 2, 3] as [UInt64])
    func eachByteIsFetchedOnce(seed: UInt64) async throws {
        let bed = await LoaderBed(frames: 3)
        let ref = try await bed.storeNoise(id: seed)
        let entry = BlockEntry(base: ref, deltas: [])
        var random = Random(seed: seed)
        let slices = (0..<60).map { _ in LoaderBed.noisySlices.randomElement(using: &random)! }
        try await withThrowingTaskGroup(of: Void.self) { group in
            for slice in slices {
                group.addTask { try await bed.expect(entry, slice, bed.noise(seed, slice)) }
            }
            try await group.waitForAll()
        }
        await bed.spawner.idle()
        let ranges = bed.bucket.gets.map(\.range).sorted { $0.lowerBound < $1.lowerBound }
        #expect(ranges.first?.lowerBound == 0 && ranges.last?.upperBound == UInt64(ref.lengthBytes))
        for (a, b) in zip(ranges, ranges.dropFirst()) { #expect(a.upperBound == b.lowerBound) }
        #expect(bed.scratch.contents("blocks/" + ref.id.description) == bed.bucket.memory.contents[ref.id.blockKey])
        #expect(bed.loader.snapshot.fetchedBytes == UInt64(ref.lengthBytes))
        // And from then on the store is not asked.
        bed.bucket.forget()
        for slice in 0..<32 { try await bed.expect(entry, slice, bed.noise(seed, slice)) }
        #expect(bed.bucket.gets.isEmpty)
    }

    @Test func loadsOfOneSliceAreOne() async throws {
        let bed = await LoaderBed()
        let ref = try await bed.storeBase([4: Sample.text.slice(seed: 1)], id: 1)
        let gate = StoreGate()
        bed.bucket.hold(at: gate) { _ in true }
        try await withThrowingTaskGroup(of: Void.self) { group in
            for _ in 0..<20 {
                group.addTask {
                    try await bed.expect(BlockEntry(base: ref, deltas: []), 4, Sample.text.slice(seed: 1))
                }
            }
            while bed.loader.snapshot.joined < 19 { await Task.yield() }
            gate.open()
            try await group.waitForAll()
        }
        #expect(bed.bucket.gets.count == 1)
        #expect(bed.loader.snapshot.loads == 1)
    }

    /// The one that fetches is cancelled; the other one, who waits for it, is served all the same.
    @Test func aCancelledLoadDoesNotFailOthers() async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeBase([4: Sample.text.slice(seed: 1)], id: 1), deltas: [])
        let gate = StoreGate()
        bed.bucket.hold(at: gate) { _ in true }
        let first = Task { try await bed.load(entry, 4) }
        while gate.arrived < 1 { await Task.yield() }
        let second = Task { try await bed.load(entry, 4) }
        while bed.loader.snapshot.joined < 1 { await Task.yield() }
        first.cancel()
        await #expect(throws: StoreError.self) { try await first.value }
        gate.open()
        #expect(try await second.value == Sample.text.slice(seed: 1))
    }

    /// The same for two slices that come with one fetch.
    @Test func aCancelledFetchDoesNotFailOthers() async throws {
        let bed = await LoaderBed()
        let slices = [4: Sample.text.slice(seed: 1), 9: Sample.sparse.slice(seed: 2)]
        let entry = BlockEntry(base: try await bed.storeBase(slices, id: 1), deltas: [])
        let gate = StoreGate()
        bed.bucket.hold(at: gate) { _ in true }
        let first = Task { try await bed.load(entry, 4) }
        while gate.arrived < 1 { await Task.yield() }
        let second = Task { try await bed.load(entry, 9) }
        while bed.loader.snapshot.loads < 2 { await Task.yield() }
        // Time to get to the fetch; where it does not suffice, the test shows less.
        try await Task.sleep(for: .milliseconds(20))
        first.cancel()
        await #expect(throws: StoreError.self) { try await first.value }
        gate.open()
        #expect(try await second.value == Sample.sparse.slice(seed: 2))
    }

    @Test func aFailedLoadFailsAllWhoWaitAndIsTriedAnewByTheNext() async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeBase([4: Sample.text.slice(seed: 1)], id: 1), deltas: [])
        bed.faulty.inject(StoreFault(.fail(.unavailable), count: 1))
        let error = await #expect(throws: StoreError.self) { try await bed.load(entry, 4) }
        #expect(error?.kind == .unavailable)
        try await bed.expect(entry, 4, Sample.text.slice(seed: 1))
        #expect(bed.loader.snapshot.failures == 1)
    }

    @Test func oneFrameServesManyLoadsAtOnce() async throws {
        let bed = await LoaderBed(frames: 1)
        let ref = try await bed.storeNoise(id: 1)
        try await withThrowingTaskGroup(of: Void.self) { group in
            for n in 0..<200 {
                group.addTask { try await bed.expect(BlockEntry(base: ref, deltas: []), n % 32, bed.noise(1, n % 32)) }
            }
            try await group.waitForAll()
        }
        #expect(bed.cache.snapshot.overflowBytes == 0)
        await bed.spawner.idle()
    }

    @Test func prefetchedSlicesAreInMemory() async throws {
        let bed = await LoaderBed()
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [])
        try await bed.loader.prefetch(entry, [0, 2, 5, 17, 30].map { SliceIndex($0) })
        for slice in [0, 2, 5, 17, 30] { #expect(bed.tryCopy(entry, slice) == bed.noise(1, slice)) }
        #expect(bed.tryCopy(entry, 31) == nil)
        bed.faulty.inject(StoreFault(.fail(.unavailable)))
        await bed.spawner.idle()
        try await bed.loader.prefetch(nil, [SliceIndex(0)])
    }

    @Test func anAdoptedObjectIsNotFetched() async throws {
        let bed = await LoaderBed()
        let ref = try await bed.storeNoise(id: 1)
        await bed.loader.adopt(id: ref.id, bytes: bed.bucket.memory.contents[ref.id.blockKey]!)
        for slice in [31, 0, 5] {
            try await bed.expect(BlockEntry(base: ref, deltas: []), slice, bed.noise(1, slice))
        }
        #expect(bed.bucket.gets.isEmpty)
        // A delta object as well.
        var encoder = DeltaEncoder(id: .sample(2), location: 0)
        encoder.begin(BlockIndex(0))
        encoder.add(SliceIndex(5), data: .none, zeroes: PageMask(pages: 0..<1), pages: nil)
        let (object, refs) = encoder.finish()
        await bed.loader.adopt(id: .sample(2), bytes: object)
        let after = try await bed.load(BlockEntry(base: ref, deltas: [refs[0].ref]), 5)
        #expect(isAllZero(Array(after[0..<4096])) && after[4096...] == bed.noise(1, 5)[4096...])
        #expect(bed.bucket.gets.isEmpty)
    }
}

func isAllZero(_ bytes: [UInt8]) -> Bool { bytes.withUnsafeBytes { isZero($0) } }
