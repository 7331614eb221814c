// Each kind of damage is found, named with its disk and generations, and hides no other; repair puts back what is valid and
// nothing else.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct CheckerTests {
    static func check(
        _ bed: CollectionBed, data: Bool = true, copies: MemoryScratch? = nil,
        _ change: (inout CheckOptions) -> Void = { _ in }
    ) async throws -> CheckReport {
        var options = CheckOptions()
        options.partitionBits = 2
        options.readsData = data
        change(&options)
        return try await Checker(store: bed.store, scratch: bed.scratch, options: options, copies: copies).run()
    }

    /// Two disks with a few generations, and a delta object over a base.
    static func bed(locations: Int = 1) async throws -> CollectionBed {
        let bed = CollectionBed(locations: locations)
        for name in ["a", "b"] {
            try await bed.create(name)
            for round in 0..<3 { try await bed.commit(name, [UInt64(round), 700, 1500]) }
        }
        try await addDelta(bed, "a", blocks: [1, 700])
        return bed
    }

    /// A generation whose blocks share a delta object over what was there.
    static func addDelta(_ bed: CollectionBed, _ name: String, blocks: [UInt64]) async throws {
        let (head, etag) = try #require(try await bed.heads().load(name))
        let manifest = head.manifest(cache: ManifestCache(bed.store.locations))
        var encoder = DeltaEncoder(id: bed.environment.objectID(), location: 0)
        let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 16)
        defer { page.deallocate() }
        for block in blocks {
            page.initializeMemory(as: UInt64.self, repeating: 0x77 &+ block, count: 512)
            encoder.begin(BlockIndex(block))
            var mask = PageMask.none
            mask.insert(5)
            encoder.add(encodePatch(SliceIndex(3), data: mask, zeroes: .none, pages: page, layout: .packed))
        }
        let id = encoder.id
        let (object, refs) = encoder.finish()
        _ = try await bed.memory.put(id.blockKey, object, if: .none)
        var edit = ManifestEdit(manifest)
        for (block, ref) in refs {
            var entry = try #require(try await manifest.find(block))
            entry.deltas.append(ref)
            edit.set(block, entry)
        }
        let new = try await edit.write(to: bed.memory, location: 0, environment: bed.environment)
        try await bed.heads().archive(head)
        var next = head
        next.advance(
            to: GenerationRecord(
                diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .flush,
                committedAtMs: 1, journalSequence: 0, newBytes: 0, manifest: new))
        guard case .won = try await bed.heads().swap(next, expecting: etag) else { fatalError("not won") }
    }

    static func flip(_ bed: CollectionBed, _ key: String, at place: Int? = nil) async throws {
        var bytes = try #require(bed.memory.contents[key])
        bytes[place ?? bytes.count - 3] ^= 4
        _ = try await bed.memory.put(key, bytes, if: .none)
    }

    /// The base object of a block of a disk's current generation.
    static func blockKey(_ bed: CollectionBed, _ disk: String, _ block: UInt64) async throws -> String {
        let head = try #require(try await bed.heads().load(disk)).head
        let entry = try await head.manifest(cache: ManifestCache(bed.store.locations)).find(BlockIndex(block))
        return try #require(entry?.base).id.blockKey
    }

    static func deltaKey(_ bed: CollectionBed) -> String {
        bed.memory.contents.first { $0.value.starts(with: Array("MGDELT".utf8)) }!.key
    }

    @Test func nothingIsWrongWithAGoodStore() async throws {
        let bed = try await Self.bed(locations: 2)
        let before = bed.memories.map { $0.contents }
        for data in [false, true] {
            let report = try await Self.check(bed, data: data)
            #expect(report.problems.isEmpty && report.wrong == 0 && report.counts.isEmpty)
            #expect(report.disks == 2 && report.generations == 7)
            #expect(report.blocks == UInt64(bed.keys("blocks/").count))
            #expect(report.pages == UInt64(bed.keys("manifests/").count))
            let stored = bed.keys("blocks/").reduce(0) { $0 + UInt64(bed.memory.contents[$1]!.count) }
            #expect(report.readBytes == (data ? stored : 0))
        }
        #expect(bed.memories.map { $0.contents } == before)
        #expect(try bed.scratch.list("check").isEmpty)
        let one = try await Self.check(bed) { $0.disk = "b" }
        #expect(one.disks == 1 && one.generations == 3 && one.problems.isEmpty)
        await #expect(throws: CatalogError.self) { try await Self.check(bed) { $0.disk = "c" } }
    }

    /// The six of the issue, and more, all at once: none hides another.
    @Test func eachDamageIsFoundAndNamed() async throws {
        let bed = try await Self.bed()
        var expected: [String: CheckProblem.Kind] = [:]
        func key(_ disk: String, _ block: UInt64, _ kind: CheckProblem.Kind) async throws -> String {
            let key = try await Self.blockKey(bed, disk, block)
            expected[key] = kind
            return key
        }
        try await Self.flip(bed, try await key("a", 0, .corrupt))
        try await Self.flip(bed, try await key("b", 0, .corrupt), at: 20)
        try await bed.memory.delete([try await key("a", 2, .missing)])
        let truncated = try await key("b", 1, .truncated)
        _ = try await bed.memory.put(truncated, Array(bed.memory.contents[truncated]!.dropLast(5)), if: .none)
        let swapped = try await key("b", 700, .swapped)
        let other = try await Self.blockKey(bed, "b", 1500)
        _ = try await bed.memory.put(swapped, bed.memory.contents[other]!, if: .none)
        let delta = Self.deltaKey(bed)
        expected[delta] = .corrupt
        try await Self.flip(bed, delta)
        // A manifest page of an old generation: the leaf of its first blocks.
        let old = try #require(try await RootScan(heads: bed.heads(), requests: 1).record("a", 1))
        let root = try await ManifestCache(bed.store.locations).page(try #require(old.root), level: 1, index: 0)
        let page = try #require(root.child(0)).id.manifestKey
        expected[page] = .corrupt
        try await Self.flip(bed, page)
        // A head that points nowhere.
        try await bed.create("c")
        let record = try await bed.commit("c", [3])
        let nowhere = try #require(record.root).id.manifestKey
        expected[nowhere] = .missing
        try await bed.memory.delete([nowhere])
        let record2 = GenerationRecord.key(disk: "b", generation: 2)
        expected[record2] = .corrupt
        try await Self.flip(bed, record2)
        try await bed.create("d")
        expected["disks/d/head"] = .corrupt
        try await Self.flip(bed, "disks/d/head")
        _ = try await bed.memory.put("disks/a/retired/x", Array("{}".utf8), if: .none)
        expected["disks/a/retired/"] = .corrupt
        let before = bed.memory.contents

        let report = try await Self.check(bed)
        for problem in report.problems {
            #expect(expected[problem.key] == problem.kind, "\(problem)")
            #expect(problem.isWrong && problem.location == 0)
        }
        #expect(Set(report.problems.map(\.key)) == Set(expected.keys))
        #expect(report.wrong == UInt64(expected.count))
        #expect(bed.memory.contents == before)
        func owners(_ key: String) -> [String] { report.problems.first { $0.key == key }!.generations }
        #expect(owners(try await Self.blockKey(bed, "a", 0)) == ["a@2", "a@3", "a@4 (head)"])
        #expect(owners(try await Self.blockKey(bed, "a", 2)) == ["a@3", "a@4 (head)"])
        #expect(owners(delta) == ["a@4 (head)"])
        #expect(owners(page) == ["a@1"])
        #expect(owners(swapped) == ["b@3 (head)"])
        #expect(owners(nowhere) == ["c@1 (head)"])
        #expect(report.problems.first { $0.key == nowhere }!.text.contains("the head of disk 'c' points nowhere"))

        // Of one disk only what is its own.
        let one = try await Self.check(bed) { $0.disk = "c" }
        #expect(one.problems.map(\.key) == [nowhere])
        // Without reading them, the missing and those of another length are found.
        let quick = try await Self.check(bed, data: false)
        let lengths = bed.memory.contents[swapped]!.count != before[other]!.count
        #expect(quick.counts["truncated"] == 1 && quick.counts["missing"] == 2 && !lengths)
        #expect(quick.counts["swapped"] == nil)
    }

    @Test func orphansAreListedAndNotWrong() async throws {
        let bed = try await Self.bed()
        let old = try await bed.litter(6)
        bed.environment.pass(ms: CollectionBed.grace + 1)
        try await bed.litter(3)
        var report = try await Self.check(bed)
        #expect(Set(report.problems.map(\.key)) == old && report.wrong == 0)
        #expect(report.counts == ["orphaned": 6] && report.orphanedBytes == 48)
        #expect(try await Self.check(bed) { $0.disk = "a" }.problems.isEmpty)
        // While a page can't be read, what it names would look like orphans.
        let head = try #require(try await bed.heads().load("b")).head
        try await Self.flip(bed, try #require(head.record?.root).id.manifestKey)
        report = try await Self.check(bed)
        #expect(report.counts == ["corrupt": 1])
    }

    @Test func aLocationOutOfReachHidesNothingOfTheOthers() async throws {
        let bed = try await Self.bed(locations: 2)
        try await bed.create("far", at: 1)
        try await bed.commit("far", at: 1, [1])
        try await bed.memory.delete([try await Self.blockKey(bed, "a", 0)])
        bed.faults[1].inject(StoreFault(.fail(.unavailable)))
        let report = try await Self.check(bed)
        #expect(report.counts == ["unreachable": 1, "missing": 1])
        #expect(report.problems.first { $0.kind == .missing }!.generations.contains("a@4 (head)"))
    }

    @Test func repairTakesValidCopiesOnly() async throws {
        let bed = try await Self.bed(locations: 2)
        let good = bed.memory.contents
        let far = bed.memories[1]
        let copies = MemoryScratch()
        func keep(_ key: String, _ bytes: [UInt8]) async throws {
            let file = try copies.open(key, create: true)
            try await file.write(bytes, at: 0)
        }
        // Three with a copy, the last two of them behind a bad one; two with a bad copy only; one with none.
        let keys = try await [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)].map { $0 }
            .asyncMap { try await Self.blockKey(bed, $0.0, UInt64($0.1)) }
        var bad = try #require(good[keys[3]])
        bad[bad.count - 1] ^= 1
        _ = try await far.put(keys[0], good[keys[0]]!, if: .none)
        _ = try await far.put(keys[1], Array(good[keys[1]]!.dropLast()), if: .none)
        try await keep(keys[1], good[keys[1]]!)
        try await keep(keys[2], good[keys[2]]!)
        _ = try await far.put(keys[3], bad, if: .none)
        try await keep(keys[4], good[keys[0]]!)
        let head = try #require(try await bed.heads().load("b")).head
        let page = try #require(head.record?.root).id.manifestKey
        _ = try await far.put(page, good[page]!, if: .none)
        try await bed.memory.delete([keys[0], keys[2], keys[4]])
        for key in [keys[1], keys[3], keys[5], page] { try await Self.flip(bed, key) }
        let damaged = bed.memory.contents

        var report = try await Self.check(bed, copies: copies)
        #expect(bed.memory.contents == damaged, "without --repair nothing is written")
        // What lies below the page can't be seen.
        #expect(report.problems.contains { $0.key == page } && report.repaired == 0)

        report = try await Self.check(bed, copies: copies) { $0.repairs = true }
        #expect(report.repaired == 4 && report.wrong == 3)
        #expect(Set(report.problems.filter(\.isRepaired).map(\.key)) == [keys[0], keys[1], keys[2], page])
        var expected = good
        for key in [keys[3], keys[4], keys[5]] { expected[key] = damaged[key] }
        #expect(bed.memory.contents == expected)
        report = try await Self.check(bed)
        #expect(report.repaired == 0 && report.wrong == 3)
        #expect(Set(report.problems.map(\.key)) == [keys[3], keys[4], keys[5]])
    }
}

extension Array {
    fileprivate func asyncMap<T>(_ body: (Element) async throws -> T) async throws -> [T] {
        var all: [T] = []
        for element in self { all.append(try await body(element)) }
        return all
    }
}
