// Images in and out, and disks made smaller: bytes against bytes.

import BlockCache
import Foundation
import Glibc
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

/// A folder that goes with the test.
final class TestFolder {
    let path: String
    init() {
        var name = Array("/tmp/margarine-test-XXXXXX".utf8CString)
        path = String(cString: mkdtemp(&name))
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
    func names() throws -> [String] { try DirectoryScratch(path: path).list("").filter { !$0.hasPrefix(".") } }
    func file(_ name: String) -> String { path + "/" + name }

    /// Writes runs of bytes at offsets into a file of `size` bytes, holes between them.
    func write(_ name: String, size: Int, _ runs: [(at: Int, bytes: [UInt8])]) {
        let fd = open(file(name), O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        defer { close(fd) }
        ftruncate(fd, off_t(size))
        for run in runs { #expect(pwrite(fd, run.bytes, run.bytes.count, off_t(run.at)) == run.bytes.count) }
    }

    func read(_ name: String) -> [UInt8]? {
        let fd = open(file(name), O_RDONLY)
        if fd < 0 { return nil }
        defer { close(fd) }
        let size = Int(lseek(fd, 0, SEEK_END))
        var bytes = [UInt8](repeating: 0, count: size)
        return pread(fd, &bytes, size, 0) == size ? bytes : nil
    }

    /// Bytes that the file takes on its file system.
    func allocatedBytes(_ name: String) -> Int {
        var status = stat()
        return stat(file(name), &status) == 0 ? Int(status.st_blocks) * 512 : -1
    }
}

struct CatalogImageTests {
    static func noise(_ count: Int, _ g: inout SeededGenerator) -> [UInt8] {
        // One seeded page, and its number in front of every copy: fast, also where nothing is optimised.
        let page = (0..<512).map { _ in g.next() }
        var bytes = [UInt8](repeating: 0, count: count)
        bytes.withUnsafeMutableBytes { out in
            for at in stride(from: 0, to: count, by: 4096) {
                memcpy(out.baseAddress! + at, page, min(4096, count - at))
                withUnsafeBytes(of: at) { _ = memcpy(out.baseAddress! + at, $0.baseAddress!, min(8, count - at)) }
            }
        }
        return bytes
    }

    static func put(_ bytes: [UInt8], into image: inout [UInt8], at: Int) {
        precondition(at + bytes.count <= image.count)
        image.withUnsafeMutableBytes { _ = memcpy($0.baseAddress! + at, bytes, bytes.count) }
    }

    /// Equal, told fast.
    static func same(_ a: [UInt8]?, _ b: [UInt8]) -> Bool {
        a.map { $0.count == b.count && memcmp($0, b, b.count) == 0 } ?? false
    }

    /// The whole disk (or generation) as bytes, through an export to a file.
    static func bytes(_ catalog: Catalog, _ name: String, _ generation: UInt64? = nil) async throws -> [UInt8]? {
        let folder = TestFolder()
        try await catalog.export(name, generation: generation, to: try ImageOutput(path: folder.file("out")))
        return folder.read("out")
    }

    @Test func anUnfinishedImageGoesAndAnothersFileStays() throws {
        let folder = TestFolder()
        var output: ImageOutput? = try ImageOutput(path: folder.file("out"))
        withExtendedLifetime(output) {}
        output = nil
        #expect(try folder.names().isEmpty)
        output = try ImageOutput(path: folder.file("out"))
        withExtendedLifetime(output) {}
        folder.write("another", size: 3, [(0, [1, 2, 3])])
        #expect(rename(folder.file("another"), folder.file("out")) == 0)
        output = nil
        #expect(folder.read("out") == [1, 2, 3])
    }

    @Test func anImageComesOutAsItWentIn() async throws {
        var g = SeededGenerator(seed: 1)
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let folder = TestFolder()
        let block = Geometry.blockBytes
        let size = 5 * block + 3 * 512
        // Across blocks, at the very start, in the last sector; block 3 is written, and zeroes; block 4 is a hole.
        let runs = [
            (0, Self.noise(100_000, &g)), (2 * block - 70_000, Self.noise(140_000, &g)),
            (3 * block, [UInt8](repeating: 0, count: 1 << 20)),
            (size - 512, Self.noise(512, &g)),
        ]
        folder.write("in", size: size, runs.map { (at: $0.0, bytes: $0.1) })
        let told = Mutex<[UInt64]>([])
        let info = try await catalog.import(try ImageInput(path: folder.file("in")), as: "disk") { done, total in
            #expect(done <= total && total == UInt64(size))
            told.withLock { $0.append(done) }
        }
        #expect(told.withLock { $0.last == UInt64(size) && $0 == $0.sorted() })
        #expect(info.size == UInt64(size) && info.generation == 1 && info.blocks == 4 && info.storedBytes < 1 << 20)
        #expect(test.memory.contents.keys.filter { $0.hasPrefix("blocks/") }.count == 4)

        try await catalog.export("disk", to: try ImageOutput(path: folder.file("out")))
        let wanted = try #require(folder.read("in"))
        #expect(Self.same(folder.read("out"), wanted))
        #expect(folder.allocatedBytes("out") <= 300_000)
        // Over a longer file that was there, which is not sparse.
        folder.write("old", size: size + 1_000_000, [(0, Self.noise(30_000_000, &g))])
        try await catalog.export("disk", generation: 1, to: try ImageOutput(path: folder.file("old")))
        #expect(Self.same(folder.read("old"), wanted))
        #expect(folder.allocatedBytes("old") <= 300_000)
        // Into a pipe, where nothing can be left out.
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        let reader = Task.detached { [end = ends[0]] in
            var all: [UInt8] = []
            var buffer = [UInt8](repeating: 0, count: 1 << 20)
            while case let count = Glibc.read(end, &buffer, buffer.count), count > 0 { all += buffer[..<count] }
            return all
        }
        var output: ImageOutput? = try ImageOutput(path: "/dev/fd/\(ends[1])")
        close(ends[1])
        try await catalog.export("disk", to: output!)
        output = nil
        let piped = await reader.value
        close(ends[0])
        #expect(Self.same(piped, wanted))
    }

    @Test func imagesOfAnyLength() async throws {
        var g = SeededGenerator(seed: 2)
        let catalog = try await CatalogTests.open(TestStore())
        let folder = TestFolder()
        for length in [1, 511, 512, 513, 4097, Geometry.blockBytes - 1, Geometry.blockBytes, Geometry.blockBytes + 1] {
            let bytes = Self.noise(length, &g)
            folder.write("in", size: length, [(0, bytes)])
            let name = "d\(length)"
            let info = try await catalog.import(try ImageInput(path: folder.file("in")), as: name)
            let padded = bytes + [UInt8](repeating: 0, count: (512 - length % 512) % 512)
            #expect(info.size == UInt64(padded.count))
            #expect(Self.same(try await Self.bytes(catalog, name), padded))
        }
        folder.write("empty", size: 0, [])
        #expect(
            await CatalogTests.kind {
                _ = try await catalog.import(try ImageInput(path: folder.file("empty")), as: "e")
            } == .invalid)
        folder.write("zero", size: 1 << 30, [])
        let zero = try await catalog.import(try ImageInput(path: folder.file("zero")), as: "z")
        #expect(zero.blocks == 0 && zero.generation == 1 && zero.size == 1 << 30)
        for path in [folder.file("missing"), folder.path, "/dev/null"] {
            #expect(throws: CatalogError.self) { try ImageInput(path: path) }
        }
    }

    @Test func anImportTakesOnlyADiskThatIsFree() async throws {
        var g = SeededGenerator(seed: 3)
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let folder = TestFolder()
        folder.write("in", size: 8192, [(0, Self.noise(8192, &g))])
        func image() throws -> ImageInput { try ImageInput(path: folder.file("in")) }
        var options = DiskOptions()
        options.durability = .store
        _ = try await catalog.create("large", sizeBytes: 1 << 30, options: options)
        let large = try await catalog.import(try image(), as: "large")
        #expect(large.size == 1 << 30 && large.durability == .store && large.generation == 1 && large.epoch == 1)
        #expect(await CatalogTests.kind { _ = try await catalog.import(try image(), as: "large") } == .exists)
        _ = try await catalog.create("small", sizeBytes: 4096)
        #expect(await CatalogTests.kind { _ = try await catalog.import(try image(), as: "small") } == .invalid)
        _ = try await catalog.create("owned", sizeBytes: 8192)
        _ = try await CatalogTests.own(catalog, "owned", server: "s", alive: false)
        #expect(await CatalogTests.kind { _ = try await catalog.import(try image(), as: "owned") } == .exists)
        #expect(await CatalogTests.kind { _ = try await catalog.import(try image(), as: "a/b") } == .invalid)

        // Taken while the image was on its way: nothing is changed.
        _ = try await catalog.create("race", sizeBytes: 8192)
        let gate = StoreGate()
        test.faulty.inject(StoreFault(.hold(gate), verb: .put, keyContains: "blocks/", count: 1))
        let opened = try image()
        async let importing = CatalogTests.kind { _ = try await catalog.import(opened, as: "race") }
        await gate.waitUntilArrived()
        let (head, _) = try await CatalogTests.own(catalog, "race", server: "s", alive: true)
        gate.open()
        #expect(await importing == .conflict)
        #expect(try await catalog.load("race").head.epoch == head.epoch)
        #expect(try await catalog.show("race").blocks == 0)
        // After a tombstone the numbers go on.
        try await catalog.delete("large")
        let second = try await catalog.import(try image(), as: "large")
        #expect(second.generation == 2 && second.epoch == 3 && second.size == 8192)
    }

    @Test func aDamagedBlockIsNeverExported() async throws {
        var g = SeededGenerator(seed: 4)
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let folder = TestFolder()
        let bytes = Self.noise(3_000_000, &g)
        folder.write("in", size: 3_000_064, [(0, bytes)])
        _ = try await catalog.import(try ImageInput(path: folder.file("in")), as: "disk")
        for (fault, kind) in [
            (StoreFault(.corrupt, verb: .get, keyContains: "blocks/"), .corrupt),
            (StoreFault(.truncate, verb: .get, keyContains: "blocks/"), .corrupt),
            (StoreFault(.fail(.notFound), verb: .get, keyContains: "blocks/"), .store(.notFound)),
            (StoreFault(.fail(.unavailable), verb: .get, keyContains: "manifests/"), .store(.unavailable)),
        ] as [(StoreFault, CatalogError.Kind)] {
            test.faulty.inject(fault)
            var output: ImageOutput? = try ImageOutput(path: folder.file("out"))
            #expect(await CatalogTests.kind { try await catalog.export("disk", to: output!) } == kind)
            output = nil
            #expect(try folder.names() == ["in"])
            test.faulty.clearFaults()
        }
        // Damage under way is tried again.
        test.faulty.inject(StoreFault(.corrupt, verb: .get, keyContains: "blocks/", count: 1))
        #expect(Self.same(try await Self.bytes(catalog, "disk"), bytes + [UInt8](repeating: 0, count: 320)))
        // And a file that was there is as it was, when the disk is not.
        folder.write("mine", size: 10, [(0, [1, 2, 3])])
        #expect(
            await CatalogTests.kind { try await catalog.export("none", to: try ImageOutput(path: folder.file("mine"))) }
                == .notFound)
        #expect(folder.read("mine") == [1, 2, 3, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Commits random deltas over and over, and compares every generation with a flat array.
    @Test(arguments: 1...3)
    func baseAndDeltasComeOutAsWritten(_ seed: Int) async throws {
        var g = SeededGenerator(seed: UInt64(seed))
        let test = TestStore(seed: UInt64(seed))
        let catalog = try await CatalogTests.open(test)
        let size = 2 * Geometry.blockBytes
        var model = [UInt8](repeating: 0, count: size)
        var options = DiskOptions()
        options.historyDensity = DiskOptions.maxHistoryDensity
        _ = try await catalog.create("disk", sizeBytes: UInt64(size), options: options)
        var (head, etag) = try await CatalogTests.own(catalog, "disk", server: "s", alive: true)
        var models: [[UInt8]] = []
        var manifest = head.manifest(cache: test.cache())
        for n in 1...9 as ClosedRange<UInt64> {
            var edit = ManifestEdit(manifest)
            let base = Bool.random(using: &g)
            let id = test.environment.objectID()
            var encoder = DeltaEncoder(id: id, location: 0)
            for block in 0..<2 where Bool.random(using: &g) {
                let start = block * Geometry.blockBytes
                if base {
                    Self.put(Self.noise(5000, &g), into: &model, at: start + Int(g.next() % 16_000_000))
                    let (object, ref) = model[start..<start + Geometry.blockBytes].withUnsafeBytes {
                        encodeBase($0, id: test.environment.objectID(), location: 0)!
                    }
                    _ = try await test.memory.put(ref.id.blockKey, object, if: .none)
                    edit.set(BlockIndex(UInt64(block)), BlockEntry(base: ref, deltas: []))
                    continue
                }
                encoder.begin(BlockIndex(UInt64(block)))
                for slice in 0..<Geometry.slicesPerBlock where slice == 0 || g.next() % 8 == 0 {
                    var data = PageMask(low: g.next() & g.next(), high: g.next() & g.next())
                    var zeroes = PageMask(low: g.next() & ~data.low, high: g.next() & ~data.high)
                    if g.next() % 4 == 0 { (data, zeroes) = (.none, .all) }
                    let frame = start + slice * Geometry.sliceBytes
                    for page in 0..<128 {
                        if data.contains(page) {
                            Self.put(Self.noise(4096, &g), into: &model, at: frame + page * 4096)
                        } else if zeroes.contains(page) {
                            Self.put([UInt8](repeating: 0, count: 4096), into: &model, at: frame + page * 4096)
                        }
                    }
                    model.withUnsafeBytes {
                        encoder.add(
                            SliceIndex(slice), data: data, zeroes: zeroes, pages: $0.baseAddress! + frame,
                            layout: .inPlace)
                    }
                }
            }
            if !encoder.isEmpty {
                let (object, refs) = encoder.finish()
                _ = try await test.memory.put(id.blockKey, object, if: .none)
                for (block, ref) in refs {
                    var entry = try await manifest.find(block) ?? BlockEntry(base: nil, deltas: [])
                    entry.deltas.append(ref)
                    if entry.deltas.count <= BlockEntry.maxDeltas { edit.set(block, entry) }
                }
            }
            manifest = try await test.write(edit)
            let record = GenerationRecord(
                diskID: head.diskID, generation: n, epoch: head.epoch, kind: .flush, committedAtMs: 1,
                journalSequence: 0, newBytes: 0,
                manifest: manifest)
            guard
                case .done(let new, let tag) = try await catalog.store.heads.update(
                    head, etag, change: { $0.advance(to: record) })
            else {
                Issue.record("lost")
                return
            }
            (head, etag) = (new, tag)
            models.append(model)
        }
        for n in [1, 4, 9] {
            #expect(
                Self.same(try await Self.bytes(catalog, "disk", UInt64(n)), models[n - 1]),
                "seed \(seed) generation \(n)")
        }
    }

    /// Docs/Format.md is enough to read a disk: a program written from it alone, in another language, gets the same bytes.
    @Test func whatIsStoredReadsByTheDocument() async throws {
        var g = SeededGenerator(seed: 12)
        let folder = TestFolder()
        let environment = SeededEnvironment(seed: 12)
        let storeFolder = folder.file("store")
        let store = try await Store.open(url: "file://" + storeFolder, environment: environment)
        let catalog = Catalog(store) { _ in .outOfSight }
        // A base for each block, with raw, packed and empty slices.
        let size = 2 * Geometry.blockBytes + 512
        var model = [UInt8](repeating: 0, count: size)
        for at in stride(from: 0, to: size - (1 << 20), by: 5 << 20) {
            Self.put(Self.noise(300_000, &g), into: &model, at: at)
            Self.put((0..<100_000).map { UInt8($0 / 1000) }, into: &model, at: at + 600_000)
        }
        Self.put((0..<Geometry.sliceBytes).map { _ in UInt8(truncatingIfNeeded: g.next()) }, into: &model, at: 3 << 20)
        Self.put([1, 2, 3], into: &model, at: size - 3)
        folder.write("in", size: size, [(0, model)])
        _ = try await catalog.import(try ImageInput(path: folder.file("in")), as: "disk")
        _ = try await catalog.resize("disk", to: 1 << 50)
        var models = [model]
        // Then deltas over them, two blocks in one object, and a block far off that has nothing below.
        var (head, etag) = try await CatalogTests.own(catalog, "disk", server: "s", alive: true)
        let manifest = head.manifest(cache: ManifestCache(store.locations))
        var encoder = DeltaEncoder(id: environment.objectID(), location: 0)
        var edit = ManifestEdit(manifest)
        for block in [0, 1] {
            encoder.begin(BlockIndex(UInt64(block)))
            for (slice, data, zeroes) in [
                (0, PageMask(pages: 3..<70), PageMask(pages: 0..<3)), (6, .none, .all), (9, .all, .none),
            ] as [(Int, PageMask, PageMask)] {
                let frame = block * Geometry.blockBytes + slice * Geometry.sliceBytes
                for page in 0..<128 where data.contains(page) {
                    Self.put(
                        Self.noise(4000, &g) + [UInt8](repeating: 7, count: 96), into: &model, at: frame + page * 4096)
                }
                for page in 0..<128 where zeroes.contains(page) {
                    Self.put([UInt8](repeating: 0, count: 4096), into: &model, at: frame + page * 4096)
                }
                model.withUnsafeBytes {
                    encoder.add(
                        SliceIndex(slice), data: data, zeroes: zeroes, pages: $0.baseAddress! + frame, layout: .inPlace)
                }
            }
        }
        encoder.begin(BlockIndex(1 << 25))
        encoder.add(SliceIndex(31), data: PageMask(pages: 127..<128), zeroes: .none, pages: Self.noise(4096, &g))
        let (object, refs) = encoder.finish()
        _ = try await store.bucket.put(encoder.id.blockKey, object, if: .absent)
        for (block, ref) in refs {
            var entry = try await manifest.find(block) ?? BlockEntry(base: nil, deltas: [])
            entry.deltas.append(ref)
            edit.set(block, entry)
        }
        let written = try await edit.write(to: store.bucket, location: 0, environment: environment)
        let record = GenerationRecord(
            diskID: head.diskID, generation: 2, epoch: head.epoch, kind: .flush, committedAtMs: 1, journalSequence: 9,
            newBytes: 1,
            manifest: written)
        guard
            case .done(let new, let tag) = try await store.heads.update(head, etag, change: { $0.advance(to: record) })
        else {
            Issue.record("lost")
            return
        }
        (head, etag) = (new, tag)
        // And a disk cut off where it can be compared.
        let forced = try await catalog.resize("disk", to: UInt64(size), shrink: true, force: true)
        #expect(forced.generation == 3)
        models.append(model)

        let script = #filePath.split(separator: "/").dropLast(2).joined(separator: "/")
        func read(_ name: String) throws -> [UInt8]? {
            let words: [UnsafeMutablePointer<CChar>?] =
                (["python3", "/\(script)/format/readstore.py", storeFolder, name, folder.file("out")] as [String]).map {
                    strdup($0)
                } + [nil]
            defer { words.forEach { free($0) } }
            var pid: pid_t = 0
            #expect(posix_spawnp(&pid, "python3", nil, nil, words, environ) == 0)
            var status: Int32 = -1
            waitpid(pid, &status, 0)
            #expect(status == 0)
            return folder.read("out")
        }
        #expect(Self.same(try read("disk"), models[1]))
        #expect(Self.same(try read("disk@1"), models[0]))
        #expect(Self.same(try read("disk@3"), models[1]))
        #expect(Self.same(try await Self.bytes(catalog, "disk"), models[1]))
        // Generation 2 has 1 PiB: what the document's reader says of it is in its sums.
        #expect(try await catalog.generations("disk").map(\.usedBlocks) == [3, 4, 3])
    }

    @Test(arguments: [
        512, 4096 + 512, 600 << 10, Geometry.blockBytes - 512, Geometry.blockBytes, Geometry.blockBytes + 512,
    ])
    func whatWasCutOffStaysAway(_ kept: Int) async throws {
        var g = SeededGenerator(seed: 6)
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let folder = TestFolder()
        let size = 2 * Geometry.blockBytes
        // Something on both sides of every end.
        var image = [UInt8](repeating: 0, count: size)
        for at in stride(from: 0, to: size - 4096, by: 300_000) { Self.put(Self.noise(4096, &g), into: &image, at: at) }
        for at in [0, 4096, (600 << 10) - 256, Geometry.blockBytes - 1024] {
            Self.put(Self.noise(2048, &g), into: &image, at: at)
        }
        folder.write("in", size: size, [(0, image)])
        _ = try await catalog.import(try ImageInput(path: folder.file("in")), as: "disk")

        #expect(await CatalogTests.kind { _ = try await catalog.resize("disk", to: UInt64(kept)) } == .invalid)
        let small = try await catalog.resize("disk", to: UInt64(kept), shrink: true)
        #expect(small.size == UInt64(kept) && small.generation == 2)
        #expect(Self.same(try await Self.bytes(catalog, "disk"), Array(image[..<kept])))
        let large = try await catalog.resize("disk", to: UInt64(size))
        #expect(large.size == UInt64(size) && large.generation == 2)
        #expect(
            Self.same(try await Self.bytes(catalog, "disk"), image[..<kept] + [UInt8](repeating: 0, count: size - kept))
        )
        // History is as it was.
        #expect(Self.same(try await Self.bytes(catalog, "disk", 1), image))
        #expect(Self.same(try await Self.bytes(catalog, "disk", 2), Array(image[..<kept])))
        #expect(try await catalog.generations("disk").map(\.kind) == [.imported, .resized])
    }

    @Test func sizesBesideAnOwner() async throws {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        let (head, etag) = try await CatalogTests.own(catalog, "disk", server: "s", alive: true, session: "vm")
        let grown = try await catalog.resize("disk", to: 1 << 44)
        #expect(grown.size == 1 << 44 && grown.epoch == head.epoch && grown.owner != nil)
        guard case .done(let merged, _) = try await catalog.store.heads.update(head, etag, change: { $0.session = nil })
        else {
            Issue.record("lost")
            return
        }
        #expect(merged.sizeBytes == 1 << 44 && merged.session == nil)
        #expect(await CatalogTests.kind { _ = try await catalog.resize("disk", to: 512, shrink: true) } == .owned)
        // One that died with the disk may come back with what it acknowledged.
        test.environment.wallMs += 60_000
        #expect(await CatalogTests.kind { _ = try await catalog.resize("disk", to: 512, shrink: true) } == .owned)
        let forced = try await catalog.resize("disk", to: 512, shrink: true, force: true)
        #expect(forced.size == 512 && forced.owner == nil && forced.epoch > head.epoch)
        #expect(try await catalog.resize("disk", to: 512) == forced)
        for size in [0, 100, 513, .max] as [UInt64] {
            #expect(await CatalogTests.kind { _ = try await catalog.resize("disk", to: size) } == .invalid)
        }
    }
}
