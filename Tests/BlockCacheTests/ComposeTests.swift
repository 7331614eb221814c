import ObjectStore
import Testing

@testable import BlockCache

/// Blocks with a history: what each entry of it means is kept beside it as plain bytes.
struct ComposeTests {
    /// A block's entry and what it should read as; slices not named are zeroes.
    struct Version {
        var entry: BlockEntry
        var slices: [Int: [UInt8]]
    }

    /// A random base (or none), then random commits over it; all versions, oldest first.
    static func history(_ bed: LoaderBed, seed: UInt64, slices count: Int = 32) async throws -> [Version] {
        var random = Random(seed: seed)
        var slices: [Int: [UInt8]] = [:]
        var entry = BlockEntry(base: nil, deltas: [])
        if seed % 4 != 0 {
            // Every second base is large, so that it comes in parts.
            for slice in 0..<count where Int.random(in: 0..<3, using: &random) == 0 || count < 32 {
                slices[slice] = (seed % 2 == 0 ? Sample.sparse : .noise).slice(seed: random.next())
            }
            slices[2] = Sample.text.slice(seed: seed)
            entry.base = try await bed.storeBase(slices, id: seed * 1000)
        }
        var versions = [Version(entry: entry, slices: slices)]
        for commit in 1...UInt64(BlockEntry.maxDeltas) {
            var encoder = DeltaEncoder(id: .sample(seed * 1000 + commit), location: 0)
            // Somebody else's segments before and behind.
            encoder.begin(BlockIndex(1))
            encoder.add(SliceIndex(0), data: .none, zeroes: .all, pages: nil)
            encoder.begin(BlockIndex(2))
            for slice in 0..<6 where Int.random(in: 0..<2, using: &random) == 0 || slice == 2 {
                let old = slices[slice] ?? Sample.zeroes.slice(seed: 0)
                if Int.random(in: 0..<6, using: &random) == 0 {
                    encoder.add(SliceIndex(slice), data: .none, zeroes: .all, pages: nil)
                    slices[slice] = nil
                } else {
                    let change = randomChange(of: old, &random)
                    change.packed.withUnsafeBytes {
                        encoder.add(SliceIndex(slice), data: change.data, zeroes: change.zeroes, pages: $0.baseAddress)
                    }
                    slices[slice] = change.after
                }
            }
            encoder.begin(BlockIndex(3))
            encoder.add(SliceIndex(31), data: .none, zeroes: .all, pages: nil)
            let (object, refs) = encoder.finish()
            _ = try await bed.bucket.put(ObjectID.sample(seed * 1000 + commit).blockKey, object, if: .absent)
            entry.deltas.append(refs[1].ref)
            versions.append(Version(entry: entry, slices: slices))
        }
        return versions
    }

    static func expect(_ bed: LoaderBed, _ version: Version, _ slice: Int) async throws {
        try await bed.expect(version.entry, slice, version.slices[slice] ?? Sample.zeroes.slice(seed: 0))
    }

    @Test(arguments: [1, 2, 3, 4, 5] as [UInt64])
    func everyVersionReadsAsItWasWritten(seed: UInt64) async throws {
        let bed = await LoaderBed(frames: 40)
        let versions = try await Self.history(bed, seed: seed)
        // Newest to oldest with memory cold, then in any order, over whatever is in memory and on scratch.
        for version in versions.reversed() {
            for slice in 0..<8 { try await Self.expect(bed, version, slice) }
        }
        var random = Random(seed: seed)
        for _ in 0..<100 {
            try await Self.expect(bed, versions.randomElement(using: &random)!, Int.random(in: 0..<32, using: &random))
            if Int.random(in: 0..<10, using: &random) == 0 { bed.cache.trim(to: 0) }
        }
        await bed.spawner.idle()
        let next = await bed.restarted(frames: 2, scratchBytes: 1 << 20)
        for version in versions { for slice in 0..<7 { try await Self.expect(next, version, slice) } }
        await next.spawner.idle()
        #expect(next.files.snapshot.heldBytes <= 1 << 20)
    }

    @Test func whatLiesBelowIsTakenFromMemory() async throws {
        let bed = await LoaderBed()
        let base = try await bed.storeNoise(id: 1)
        var entry = BlockEntry(base: base, deltas: [])
        _ = try await bed.load(entry, 5)
        await bed.spawner.idle()
        bed.bucket.forget()
        await bed.files.trim(to: 0)
        for commit in 2...4 as ClosedRange<UInt64> {
            var encoder = DeltaEncoder(id: .sample(commit), location: 0)
            encoder.begin(BlockIndex(0))
            encoder.add(SliceIndex(5), data: .none, zeroes: PageMask(pages: Int(commit)..<Int(commit) + 1), pages: nil)
            let (object, refs) = encoder.finish()
            _ = try await bed.bucket.put(ObjectID.sample(commit).blockKey, object, if: .absent)
            entry.deltas.append(refs[0].ref)
            var expected = bed.noise(1, 5)
            for page in 2...Int(commit) {
                expected.replaceSubrange(page * 4096..<(page + 1) * 4096, with: repeatElement(0, count: 4096))
            }
            try await bed.expect(entry, 5, expected)
            #expect(bed.bucket.gets.count == Int(commit) - 1, "one fetch for each commit, none of the base")
        }
    }

    @Test func aZeroedSliceNeedsNothing() async throws {
        let bed = await LoaderBed(frames: 1)
        var encoder = DeltaEncoder(id: .sample(2), location: 0)
        encoder.begin(BlockIndex(0))
        encoder.add(SliceIndex(5), data: .none, zeroes: .all, pages: nil)
        let entry = BlockEntry(base: try await bed.storeNoise(id: 1), deltas: [encoder.finish().refs[0].ref])
        #expect(isAllZero(bed.tryCopy(entry, 5)!))
        #expect(entry.nonzeroSlices == LoaderBed.noisySlices.reduce(0) { $0 | 1 << UInt32($1) } & ~(1 << 5))
        #expect(bed.bucket.gets.isEmpty)
    }

    /// A segment of more than 1 MiB comes in parts too, each byte once.
    @Test func aLargeSegmentIsFetchedBySlice() async throws {
        let bed = await LoaderBed(frames: 4)
        var encoder = DeltaEncoder(id: .sample(9), location: 0)
        encoder.begin(BlockIndex(0))
        for slice in 0..<4 {
            Sample.noise.slice(seed: UInt64(slice)).withUnsafeBytes {
                encoder.add(SliceIndex(slice), data: .all, zeroes: .none, pages: $0.baseAddress)
            }
        }
        let (object, refs) = encoder.finish()
        _ = try await bed.bucket.put(ObjectID.sample(9).blockKey, object, if: .absent)
        let entry = BlockEntry(base: nil, deltas: [refs[0].ref])
        let gate = StoreGate()
        bed.bucket.hold(at: gate) { $0.range.count > Geometry.sliceBytes }
        try await bed.expect(entry, 3, Sample.noise.slice(seed: 3))
        gate.open()
        for slice in 0..<4 { try await bed.expect(entry, slice, Sample.noise.slice(seed: UInt64(slice))) }
        await bed.spawner.idle()
        #expect(bed.bucket.gets.reduce(0) { $0 + $1.range.count } == Int(refs[0].ref.lengthBytes))
    }
}
