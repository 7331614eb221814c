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
        let file = PartitionedFile(scratch, path: "x/f", partitionBits: bits, width: width)
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
        let file = PartitionedFile(scratch, path: "f", partitionBits: 1, width: 1)
        for number in 0..<UInt64(5000) { file.add([number]) }
        scratch.failNext(.write, errno: 28)
        await #expect(throws: CatalogError.self) { try await file.spill() }
    }
}
