// Disks sent and received: bytes against bytes, over random histories; and streams that are not what was sent.

@testable import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// Bytes of a stream, collected or given out in pieces of any length.
final class TestStream: Sendable {
    private let state: Mutex<(bytes: [UInt8], position: Int, g: SeededGenerator)>
    /// Called before each piece is given out.
    private let onRead: @Sendable () -> Void

    init(_ bytes: [UInt8] = [], seed: UInt64 = 1, onRead: @escaping @Sendable () -> Void = {}) {
        state = Mutex((bytes, 0, SeededGenerator(seed: seed)))
        self.onRead = onRead
    }

    var bytes: [UInt8] { state.withLock { $0.bytes } }

    func write(_ bytes: [UInt8]) { state.withLock { $0.bytes += bytes } }

    func read(_ most: Int) -> [UInt8] {
        onRead()
        return state.withLock { state in
            let left = state.bytes.count - state.position
            let count = min(left, state.g.next() & 1 == 0 ? most : Int.random(in: 1...most, using: &state.g))
            defer { state.position += count }
            return Array(state.bytes[state.position..<state.position + count])
        }
    }
}

/// A disk that is committed to by hand: its bytes, and generations made of bases and deltas like a server's.
struct StreamBed {
    let test: TestStore
    let catalog: Catalog
    let name: String
    /// Slices that are not all zeroes, by number.
    private(set) var slices: [UInt64: [UInt8]] = [:]
    private var g: SeededGenerator

    init(_ name: String, sizeBytes: UInt64, seed: UInt64, in test: TestStore) async throws {
        self.test = test
        self.name = name
        g = SeededGenerator(seed: seed)
        catalog = try await CatalogTests.open(test)
        var options = DiskOptions()
        options.historyDensity = DiskOptions.maxHistoryDensity
        _ = try await catalog.create(name, sizeBytes: sizeBytes, options: options)
    }

    var head: Head { get async throws { try await catalog.load(name).head } }

    /// The disk as it is.
    func image() async throws -> [UInt8] {
        var image = [UInt8](repeating: 0, count: Int(try await head.sizeBytes))
        for (slice, bytes) in slices {
            let at = Int(slice) * Geometry.sliceBytes
            CatalogImageTests.put(Array(bytes.prefix(max(0, image.count - at))), into: &image, at: at)
        }
        return image
    }

    /// Writes pages, or zeroes, here and there, and makes that a generation.
    mutating func commit(writes: Int) async throws {
        let found = try await catalog.load(name)
        var head = found.head
        let cache = ManifestCache(catalog.store.locations)
        let manifest = head.manifest(cache: cache)
        // A file system writes whole pages.
        let pages = head.sizeBytes / UInt64(Geometry.pageBytes)
        var touched: [UInt64: PageMask] = [:]
        for _ in 0..<writes {
            let first = g.next() % pages
            let count = min([1, 3, 130, 4096].randomElement(using: &g)!, pages - first)
            let isZeroes = g.next() % 3 == 0
            let noise = (0..<512).map { _ in g.next() }
            for page in first..<first + count {
                let slice = page / UInt64(Geometry.pagesPerSlice)
                let index = Int(page % UInt64(Geometry.pagesPerSlice))
                touched[slice, default: .none].insert(index)
                var bytes = slices[slice] ?? [UInt8](repeating: 0, count: Geometry.sliceBytes)
                let written =
                    isZeroes ? [UInt8](repeating: 0, count: 4096) : noise.withUnsafeBytes { Array($0) }
                CatalogImageTests.put(written, into: &bytes, at: index * Geometry.pageBytes)
                slices[slice] = bytes.allSatisfy { $0 == 0 } ? nil : bytes
            }
        }
        var edit = ManifestEdit(manifest)
        for block in Set(touched.keys.map { $0 / 32 }).sorted() {
            edit.set(
                BlockIndex(block), try await store(block, over: try await manifest.find(BlockIndex(block)), touched))
        }
        let new = try await edit.write(
            to: test.faulty, location: 0, environment: test.environment)
        try await found.heads.archive(head)
        head.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .flush,
                committedAtMs: test.environment.wallMs, journalSequence: head.journalSequence + 1, newBytes: 1,
                manifest: new))
        guard case .won = try await found.heads.swap(head, expecting: found.etag) else {
            throw CatalogError(.conflict, "not won")
        }
    }

    /// The stored form of a block: over what was there, or anew.
    private mutating func store(
        _ block: UInt64, over old: BlockEntry?, _ touched: [UInt64: PageMask]
    ) async throws -> BlockEntry? {
        let id = test.environment.objectID()
        let zeroes = [UInt8](repeating: 0, count: Geometry.sliceBytes)
        if var entry = old, entry.deltas.count < BlockEntry.maxDeltas, g.next() % 4 != 0 {
            var delta = DeltaEncoder(id: id, location: 0)
            delta.begin(BlockIndex(block))
            for slice in block * 32..<(block + 1) * 32 {
                guard let mask = touched[slice] else { continue }
                (slices[slice] ?? zeroes).withUnsafeBytes {
                    delta.add(
                        SliceIndex(Int(slice % 32)), data: mask, zeroes: .none, pages: $0.baseAddress, layout: .inPlace)
                }
            }
            let (object, refs) = delta.finish()
            _ = try await test.faulty.put(id.blockKey, object, if: .none)
            entry.deltas.append(refs[0].ref)
            return entry
        }
        var base = BaseEncoder(id: id, location: 0)
        for index in 0..<32 {
            (slices[block * 32 + UInt64(index)] ?? zeroes).withUnsafeBytes {
                base.add(from: $0.baseAddress!, at: SliceIndex(index))
            }
        }
        if base.isZero { return nil }
        let (object, ref) = base.finish()
        _ = try await test.faulty.put(id.blockKey, object, if: .none)
        return BlockEntry(base: ref, deltas: [])
    }

    /// Changes the size.
    mutating func resize(to sizeBytes: UInt64) async throws {
        _ = try await catalog.resize(name, to: sizeBytes, shrink: true)
        for slice in slices.keys.sorted() {
            let start = slice * UInt64(Geometry.sliceBytes)
            if start >= sizeBytes {
                slices[slice] = nil
            } else if start + UInt64(Geometry.sliceBytes) > sizeBytes {
                let kept = Int(sizeBytes - start)
                let bytes = slices[slice]!.prefix(kept) + [UInt8](repeating: 0, count: Geometry.sliceBytes - kept)
                slices[slice] = bytes.allSatisfy { $0 == 0 } ? nil : Array(bytes)
            }
        }
    }

    func send(_ generation: UInt64? = nil, from: UInt64? = nil) async throws -> [UInt8] {
        let stream = TestStream()
        try await catalog.send(name, generation: generation, from: from, to: { stream.write($0) })
        return stream.bytes
    }
}

struct StreamTests {
    static func receive(_ catalog: Catalog, _ name: String, _ bytes: [UInt8], seed: UInt64 = 1) async throws -> DiskInfo
    {
        let stream = TestStream(bytes, seed: seed)
        return try await catalog.receive(name, from: { stream.read($0) })
    }

    static func kind(_ catalog: Catalog, _ name: String, _ bytes: [UInt8]) async -> CatalogError.Kind? {
        await CatalogTests.kind { _ = try await receive(catalog, name, bytes) }
    }

    @Test(arguments: 1...6)
    func whatIsReceivedEqualsWhatWasSent(_ number: Int) async throws {
        let seed = UInt64(number)
        var g = SeededGenerator(seed: seed + 100)
        let sizes: [UInt64] = [2 << 24, (3 << 24) + 512 * 77, 40 << 20, (1 << 24) - 4096, 4 << 24]
        var bed = try await StreamBed(
            "source", sizeBytes: sizes.randomElement(using: &g)!, seed: seed, in: TestStore(seed: seed))
        let far = try await CatalogTests.open(TestStore(seed: seed + 1000))
        /// What is at both ends: a generation of the source, and the current one of the copy.
        var last: UInt64?
        for round in 0..<8 {
            for _ in 0..<Int.random(in: 0...3, using: &g) {
                if g.next() % 4 == 0 { try await bed.resize(to: sizes.randomElement(using: &g)!) }
                try await bed.commit(writes: Int.random(in: 1...4, using: &g))
            }
            if round == 0 { try await bed.commit(writes: 3) }
            let head = try await bed.head
            let image = try await bed.image()
            #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(bed.catalog, "source"), image))
            // A stream over nothing makes a disk of its own.
            if round % 4 == 1 {
                let whole = try await Self.receive(far, "whole\(round)", try await bed.send(), seed: g.next())
                #expect(
                    whole.generation == 1 && whole.pinned == [1] && whole.epoch == 0 && whole.size == head.sizeBytes)
                #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(far, "whole\(round)"), image))
            }
            let stream = try await bed.send(from: last)
            let before = last == nil ? 0 : try await far.show("copy").generation
            let info = try await Self.receive(far, "copy", stream, seed: g.next())
            #expect(info.generation == before + 1 && info.size == head.sizeBytes && info.owner == nil)
            #expect(info.origin == "source@\(head.generation)")
            let record = try #require(try await far.load("copy").head.record)
            #expect(record.kind == .received && record.origin?.diskID == head.diskID)
            #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(far, "copy"), image), "round \(round)")
            last = head.generation
        }
        // Every generation that was received is still there, bit for bit.
        for record in try await far.generations("copy") {
            let sent = record.origin!.generation
            let there = try await CatalogImageTests.bytes(far, "copy", record.generation)
            var here = try #require(try await CatalogImageTests.bytes(bed.catalog, "source", sent))
            // Sent at the size that the disk had then.
            here += [UInt8](repeating: 0, count: Int(record.sizeBytes) - here.count)
            #expect(CatalogImageTests.same(there, here), "generation \(record.generation)")
        }
    }

    @Test func onlyWhatChangedIsReadAndSent() async throws {
        var bed = try await StreamBed("disk", sizeBytes: 1 << 44, seed: 3, in: TestStore())
        for _ in 0..<30 { try await bed.commit(writes: 1) }
        let far = TestStore()
        let catalog = try await CatalogTests.open(far)
        let whole = try await bed.send()
        _ = try await Self.receive(catalog, "disk", whole)
        try await bed.commit(writes: 1)
        let (gets, puts) = (bed.test.gets, far.puts)
        let part = try await bed.send(from: 30)
        _ = try await Self.receive(catalog, "disk", part)
        #expect(part.count < whole.count / 4)
        // Here: the head, a record, pages on both ways, and the parts of at most two blocks.
        #expect(bed.test.gets - gets < 2 + 2 * 2 * 3 + 2 * 9)
        // There: at most two blocks, pages on the way, the record before, and the head.
        #expect(far.puts - puts <= 2 + 4 + 2)
    }

    @Test func aStreamGoesOverTheGenerationItWasMadeOverAndNoOther() async throws {
        let test = TestStore()
        var bed = try await StreamBed("source", sizeBytes: 2 << 24, seed: 5, in: test)
        let catalog = bed.catalog
        #expect(await CatalogTests.kind { _ = try await bed.send() } == .notFound)
        for _ in 0..<3 { try await bed.commit(writes: 2) }
        let whole = try await bed.send(1)
        let (oneTwo, twoThree) = (try await bed.send(2, from: 1), try await bed.send(3, from: 2))
        let backwards = try await bed.send(1, from: 3)
        #expect(await CatalogTests.kind { _ = try await bed.send(4) } == .notFound)
        #expect(await CatalogTests.kind { _ = try await bed.send(from: 9) } == .notFound)

        #expect(await Self.kind(catalog, "copy", oneTwo) == .notFound)
        _ = try await Self.receive(catalog, "copy", whole)
        #expect(await Self.kind(catalog, "copy", whole) == .exists)
        #expect(await Self.kind(catalog, "copy", twoThree) == .invalid)
        _ = try await Self.receive(catalog, "copy", oneTwo)
        #expect(await Self.kind(catalog, "copy", oneTwo) == .invalid)

        // A fork of it, and a roll-back of that fork, hold the same bytes.
        _ = try await catalog.fork("copy", as: "fork")
        _ = try await Self.receive(catalog, "fork", twoThree)
        _ = try await catalog.rollBack("fork", to: 1)
        #expect(try await catalog.show("fork").generation == 3)
        _ = try await Self.receive(catalog, "fork", twoThree)
        let three = try await CatalogImageTests.bytes(catalog, "source", 3)
        #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(catalog, "fork"), try #require(three)))
        // The very disk that was sent, back to where it was.
        _ = try await Self.receive(catalog, "source", backwards)
        let one = try #require(try await CatalogImageTests.bytes(catalog, "source", 1))
        #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(catalog, "source"), one))
        #expect(try await catalog.show("source").generation == 4)

        // One that was written since, that is owned, that nobody may write, or that was never written.
        let other = try await StreamBed("never", sizeBytes: 512, seed: 1, in: test)
        #expect(await Self.kind(other.catalog, "never", oneTwo) == .invalid)
        _ = try await catalog.fork("copy", as: "frozen", readOnly: true)
        #expect(await Self.kind(catalog, "frozen", twoThree) == .invalid)
        _ = try await CatalogTests.own(catalog, "copy", server: "s", alive: false)
        #expect(await Self.kind(catalog, "copy", twoThree) == .owned)
        _ = try await catalog.release("copy")
        _ = try await Self.receive(catalog, "copy", twoThree)
        #expect(CatalogImageTests.same(try await CatalogImageTests.bytes(catalog, "copy"), try #require(three)))
        // The name of a deleted disk is free, and its numbers go on.
        try await catalog.delete("copy")
        #expect(await Self.kind(catalog, "copy", twoThree) == .notFound)
        let again = try await Self.receive(catalog, "copy", whole)
        #expect(again.generation == 4 && again.pinned == [4])
        #expect(await Self.kind(catalog, "a/b", whole) == .invalid)
    }

    /// A stream of two blocks, short enough to try everything with.
    static func small() async throws -> (StreamBed, whole: [UInt8], part: [UInt8]) {
        let bed = try await StreamBed("d", sizeBytes: 2 << 24, seed: 8, in: TestStore())
        func commit(_ bytes: UInt8) async throws {
            let folder = TestFolder()
            folder.write(
                "in", size: 2 << 24, [(0, [bytes, 1, 2]), (700_000, [3]), (20 << 20, [bytes, bytes])])
            let name = "d\(bytes)"
            _ = try await bed.catalog.import(try ImageInput(path: folder.file("in")), as: name)
        }
        try await commit(7)
        try await commit(9)
        // Two generations of one disk.
        let found = try await bed.catalog.load("d")
        var head = found.head
        for (number, name) in [(UInt64(1), "d7"), (2, "d9")] {
            var record = try #require(try await bed.catalog.load(name).head.record)
            record.diskID = head.diskID
            record.generation = number
            record.epoch = head.epoch
            if number == 2 { try await found.heads.archive(head) }
            head.advance(to: record)
        }
        _ = try await found.heads.swap(head, expecting: found.etag)
        return (bed, try await bed.send(1), try await bed.send(2, from: 1))
    }

    @Test func everyDamagedByteAndEveryCutIsToldAndChangesNothing() async throws {
        let (_, whole, part) = try await Self.small()
        #expect(whole.count < 2000 && part.count < 2000)
        var g = SeededGenerator(seed: 1)
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        for (stream, name) in [(whole, "new"), (part, "old")] {
            if name == "old" { _ = try await Self.receive(catalog, name, whole) }
            let before = test.memory.contents.filter { $0.key.hasPrefix("disks/") }
            for at in stream.indices {
                var bad = stream
                bad[at] ^= 1 << UInt8(g.next() & 7)
                #expect(await Self.kind(catalog, name, bad) == .corrupt, "byte \(at) of \(name)")
                #expect(await Self.kind(catalog, name, Array(stream[..<at])) == .corrupt, "cut to \(at) of \(name)")
            }
            for tail in [[0], stream, Array(repeating: UInt8(255), count: 100)] as [[UInt8]] {
                #expect(await Self.kind(catalog, name, stream + tail) == .corrupt)
            }
            let after = test.memory.contents.filter { $0.key.hasPrefix("disks/") }
            #expect(after.keys.sorted() == before.keys.sorted())
            #expect(after == before)
            _ = try await Self.receive(catalog, name, stream)
        }
        for foreign in [[], Array("hello, world, this is no stream".utf8), [UInt8](repeating: 0, count: 1 << 20)] {
            #expect(await Self.kind(catalog, "x", foreign) == .corrupt)
        }
        var later = whole
        later[8] = 2
        await #expect { _ = try await Self.receive(catalog, "x", later) } throws: {
            "\($0)".contains("format version 2") && "\($0)".contains("use a later one")
        }
    }

    @Test func recordsThatCannotBeAreRefused() async throws {
        let catalog = try await CatalogTests.open(TestStore())
        let page = [UInt8](repeating: 5, count: Geometry.sliceBytes)
        let slice = page.withUnsafeBytes { encodeSlice($0.baseAddress!) }
        let size: UInt64 = (3 << 24) - 512
        func stream(_ blocks: [StreamBlock], size: UInt64 = size) -> [[UInt8]] {
            var writer = StreamWriter()
            let origin = GenerationRecord.Origin(disk: "d", diskID: ObjectID(high: 1, low: 2), generation: 3)
            var pieces = [
                writer.begin(
                    StreamDescription(
                        generation: origin, from: nil, sizeBytes: size, kind: .flush, committedAtMs: 0))
            ]
            for block in blocks { pieces.append(writer.add(block).reduce([], +)) }
            return pieces + [writer.end()]
        }
        func block(
            _ index: UInt64, _ changed: UInt32 = 1, _ zeroed: UInt32 = 0, _ slices: [EncodedSlice]? = nil
        ) -> StreamBlock {
            StreamBlock(
                block: BlockIndex(index), changed: changed, zeroed: zeroed,
                slices: slices ?? Array(repeating: slice, count: (changed & ~zeroed).nonzeroBitCount))
        }
        let good = stream([block(0), block(1, 6, 2), block(2, 1 << 30)])
        #expect(await Self.kind(catalog, "good", good.reduce([], +)) == nil)
        let garbage = Array("no zstd frame".utf8)
        let sealed = garbage.withUnsafeBytes { bytes in checksum(bytes) }
        let broken = try #require(EncodedSlice(checking: .zstd, stored: garbage, checksum: sealed))
        for (what, blocks) in [
            ("descending", [block(1), block(0)]), ("twice", [block(1), block(1)]), ("beyond the disk", [block(3)]),
            ("far beyond", [block(.max)]), ("nothing changed", [block(0, 0)]), ("zeroes not changed", [block(0, 1, 2)]),
            ("more slices than said", [block(0, 1, 0, [slice, slice])]), ("fewer", [block(0, 3, 0, [slice])]),
            ("does not unpack", [block(0, 1, 0, [broken])]), ("behind the end", [block(2, 1 << 31)]),
        ] {
            #expect(await Self.kind(catalog, "x", stream(blocks).reduce([], +)) == .corrupt, "\(what)")
        }
        // Whole records, in another order, left out, or twice.
        for order in [[0, 2, 1, 3, 4], [0, 1, 3, 4], [0, 1, 1, 2, 3, 4], [0, 4], [1, 2, 3, 4], [0, 1, 2, 3]] {
            #expect(await Self.kind(catalog, "x", order.flatMap { good[$0] }) == .corrupt, "\(order)")
        }
        for size in [0, 100, .max] as [UInt64] {
            #expect(await Self.kind(catalog, "x", stream([], size: size).reduce([], +)) == .corrupt)
        }
        #expect(await CatalogTests.kind { _ = try await catalog.show("x") } == .notFound)
    }

    @Test func aReceiveThatTakesTooLongOrComesTooLateChangesNothing() async throws {
        let (_, whole, part) = try await Self.small()
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let environment = test.environment
        let slow = TestStream(whole, onRead: { environment.wallMs += 3 * 3_600_000 })
        #expect(await CatalogTests.kind { _ = try await catalog.receive("d", from: { slow.read($0) }) } == .tooSlow)
        #expect(await CatalogTests.kind { _ = try await catalog.show("d") } == .notFound)
        _ = try await Self.receive(catalog, "d", whole)
        // Another one had the disk before the stream was at its end.
        let gate = StoreGate()
        test.faulty.inject(StoreFault(.hold(gate), verb: .put, keyContains: "blocks/", count: 1))
        async let receiving = Self.kind(catalog, "d", part)
        await gate.waitUntilArrived()
        let (head, _) = try await CatalogTests.own(catalog, "d", server: "s", alive: true)
        gate.open()
        #expect(await receiving == .conflict)
        #expect(try await catalog.show("d").generation == 1)
        #expect(try await catalog.load("d").head.epoch == head.epoch)
    }

    @Test func aStoreThatFailsIsToldAtBothEnds() async throws {
        let (bed, whole, _) = try await Self.small()
        for (fault, kind) in [
            (StoreFault(.corrupt, verb: .get, keyContains: "blocks/"), .corrupt),
            (StoreFault(.fail(.notFound), verb: .get, keyContains: "manifests/"), .store(.notFound)),
        ] as [(StoreFault, CatalogError.Kind)] {
            bed.test.faulty.inject(fault)
            #expect(await CatalogTests.kind { _ = try await bed.send() } == kind)
            bed.test.faulty.clearFaults()
        }
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        for key in ["blocks/", "manifests/"] {
            test.faulty.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: key))
            #expect(await Self.kind(catalog, "d", whole) == .store(.unavailable))
            test.faulty.clearFaults()
        }
        #expect(await CatalogTests.kind { _ = try await catalog.show("d") } == .notFound)
        // An output that is full ends it, and an input that cannot be read.
        await #expect(throws: CatalogError.self) {
            try await bed.catalog.send(
                "d", to: { (_) throws(CatalogError) in throw CatalogError(.file, "full") })
        }
        await #expect(throws: CatalogError.self) {
            _ = try await catalog.receive(
                "d", from: { (_) throws(CatalogError) in throw CatalogError(.file, "gone") })
        }
    }
}
