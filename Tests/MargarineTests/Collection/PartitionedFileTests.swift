// What goes into a partitioned file comes out of its partition, once.

@testable import Margarine
import Runtime
import Testing

struct PartitionedFileTests {
    @Test(arguments: [1, 2, 3, 6], [1, 4, 8])
    func everyRecordComesBackFromItsPartition(_ width: Int, _ bits: Int) async throws {
        let scratch = MemoryScratch()
        // What a round before left.
        let left = try scratch.open("x/f", create: true)
        try await left.write([UInt8](repeating: 9, count: 100_000), at: 0)
        let file = PartitionedFile(scratch, path: "x/f", partitionBits: bits, width: width, salt: 7)
        var g = SeededGenerator(seed: UInt64(width * bits))
        var expected: [Int: [[UInt64]]] = [:]
        for number in 0..<20_000 {
            // Most of them in one partition, so that it has many chunks.
            let first = number % 3 == 0 ? g.next() : g.next() >> 8
            let record = [first] + (1..<width).map { _ in g.next() }
            file.add(record)
            expected[Int(first >> UInt64(64 - bits)), default: []].append(record)
            if number % 1000 == 0 { try await file.spill() }
        }
        #expect(file.count == 20_000)
        for partition in 0..<file.partitions {
            let words = try await file.words(of: partition)
            let records = stride(from: 0, to: words.count, by: width).map { Array(words[$0..<$0 + width]) }
            #expect(records == expected[partition] ?? [])
        }
        #expect((scratch.contents("x/f")?.count ?? 0) > 100_000 * width / 3)
        file.remove()
        #expect(scratch.contents("x/f") == nil)
    }

    @Test func aScratchDiskThatFailsIsToldAsSuch() async throws {
        let scratch = MemoryScratch()
        let file = PartitionedFile(scratch, path: "f", partitionBits: 1, width: 1, salt: 7)
        for number in 0..<UInt64(5000) { file.add([number]) }
        scratch.failNext(.write, errno: 28)
        await #expect(throws: CatalogError.self) { try await file.spill() }
    }

    /// Every bit of a chunk counts, those that say what it is too; and a chunk of an earlier file is none of this one.
    @Test func whatTheScratchDiskChangedIsAnError() async throws {
        let scratch = MemoryScratch()
        func file(_ salt: UInt64) async throws -> PartitionedFile {
            let file = PartitionedFile(scratch, path: "f", partitionBits: 1, width: 3, salt: salt)
            for number in 0..<UInt64(1000) { file.add([number << 63 | number, 2, 3]) }
            try await file.spill()
            return file
        }
        let good = try await file(1)
        for at in [0, 7, 8, 12, 15, 16, 2000, 4090, 4095, 4096, 5000] as [UInt64] {
            scratch.flipBit("f", at: at)
            await #expect(throws: CatalogError.self, "\(at)") {
                for partition in 0..<2 { _ = try await good.words(of: partition) }
            }
            scratch.flipBit("f", at: at)
        }
        #expect(try await good.words(of: 0).count == 1500)
        // The same bytes, as another file's, and at another place.
        let other = PartitionedFile(scratch, path: "f", partitionBits: 1, width: 3, salt: 2)
        await #expect(throws: CatalogError.self) {
            try await other.restore(.init(chunks: 5, count: 850))
        }
        let bytes = try #require(scratch.contents("f"))
        let moved = try scratch.open("f", create: false)
        try await moved.write(Array(bytes[4096..<8192]), at: 0)
        try await moved.write(Array(bytes[..<4096]), at: 4096)
        await #expect(throws: CatalogError.self) { _ = try await good.words(of: 0) }
    }

    @Test func whatWasSavedIsThereAgain() async throws {
        let scratch = MemoryScratch()
        func make() -> PartitionedFile {
            PartitionedFile(scratch, path: "f", partitionBits: 4, width: 3, salt: 9)
        }
        var g = SeededGenerator(seed: 3)
        var records: [[UInt64]] = []
        var file = make()
        for round in 0..<5 {
            for _ in 0..<[0, 1, 3000, 40, 5000][round] {
                records.append([g.next(), g.next(), g.next()])
                file.add(records.last!)
            }
            let saved = try await file.save()
            // What comes after is lost with the process.
            for number in 0..<UInt64(4000) { file.add([number << 50, 0, 0]) }
            if round != 3 { try await file.spill() }
            file = make()
            try await file.restore(saved)
            #expect(file.count == UInt64(records.count))
        }
        var found: [[UInt64]] = []
        for partition in 0..<file.partitions {
            let words = try await file.words(of: partition)
            found += stride(from: 0, to: words.count, by: 3).map { Array(words[$0..<$0 + 3]) }
        }
        #expect(found.map(\.description).sorted() == records.map(\.description).sorted())
        // Too few, too many, or gone.
        let saved = try await file.save()
        for wrong in [
            PartitionedFile.Saved(chunks: saved.chunks - 1, count: saved.count),
            .init(chunks: saved.chunks, count: saved.count + 1), .init(chunks: saved.chunks + 100, count: saved.count),
        ] {
            let again = make()
            await #expect(throws: CatalogError.self) { try await again.restore(wrong) }
        }
        try scratch.remove("f")
        await #expect(throws: CatalogError.self) { try await make().restore(saved) }
    }
}
