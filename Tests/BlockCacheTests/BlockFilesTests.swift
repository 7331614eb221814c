import Runtime
import Testing

@testable import BlockCache

struct BlockFilesTests {
    private func files(_ scratch: MemoryScratch, budget: UInt64 = 10_000) async -> BlockFiles {
        let files = BlockFiles(disk: scratch, budgetBytes: budget, environment: SystemEnvironment(workers: 1))
        await files.start()
        return files
    }
    private func object(_ n: UInt64, _ count: Int) -> [UInt8] { Sample.noise.bytes(count / 8 * 8, seed: n) }
    private func bytes(_ view: ByteView?) -> [UInt8]? { view.map { $0.withBytes { [UInt8]($0) } } }
    private func names(_ scratch: MemoryScratch) throws -> [String] { try scratch.list("blocks") }

    @Test func completeFilesSurviveARestartAndPartsDoNot() async throws {
        let scratch = MemoryScratch()
        let first = await files(scratch)
        await first.adopt(.sample(1), object(1, 800))
        await first.write(.sample(2), at: 100, ByteView(object(2, 400)), total: 800)
        #expect(bytes(await first.read(.sample(2), 104..<200)) == Array(object(2, 400)[4..<100]))
        #expect(await first.read(.sample(2), 96..<104) == nil)
        #expect(try names(scratch).count == 2)
        let second = await files(scratch)
        #expect(try names(scratch) == [ObjectID.sample(1).description])
        #expect(bytes(await second.read(.sample(1), 0..<800)) == object(1, 800))
        #expect(await second.read(.sample(2), 104..<200) == nil)
        #expect(second.snapshot.heldBytes == 800)
    }

    @Test("also: what has left a queue is forgotten, though it never comes to its turn") func queuesStaySmall() {
        var queue = Fifo()
        let stays = (0..<300).map { BlockFile(id: .sample(UInt64($0)), path: "") }
        for file in stays {
            file.isInOpenOrder = true
            queue.push(file) { $0.isInOpenOrder }
        }
        var most = 0
        for number in 1000..<21_000 {
            let file = BlockFile(id: .sample(UInt64(number)), path: "")
            file.isInOpenOrder = true
            queue.push(file) { $0.isInOpenOrder }
            file.isInOpenOrder = false
            most = max(most, queue.count)
        }
        #expect(most <= 700)
        // In their order, and nobody twice.
        for file in stays {
            let next = queue.pop { $0.isInOpenOrder }
            #expect(next === file)
        }
        let rest = queue.pop { $0.isInOpenOrder }
        #expect(rest == nil)
    }

    @Test func partsMakeAWhole() async throws {
        let scratch = MemoryScratch()
        let files = await files(scratch)
        let whole = object(3, 4000)
        for range in [1000..<2000, 0..<1000, 3000..<4000] {
            await files.write(.sample(3), at: UInt64(range.lowerBound), ByteView(Array(whole[range])), total: 4000)
        }
        #expect(scratch.contents("blocks/" + ObjectID.sample(3).description) == nil)
        await files.write(.sample(3), at: 2000, ByteView(Array(whole[2000..<3000])), total: 4000)
        #expect(scratch.contents("blocks/" + ObjectID.sample(3).description) == whole)
        #expect(try names(scratch).count == 1 && files.snapshot.heldBytes == 4000)
    }

    /// Against a model: never more than the budget, on disk what is counted, and what is read is what was written.
    @Test(arguments: [1, 2, 3] as [UInt64])
    func theBudgetHolds(seed: UInt64) async throws {
        let scratch = MemoryScratch()
        let files = await files(scratch)
        var random = Random(seed: seed)
        for step in 0..<600 {
            let n = UInt64.random(in: 0..<30, using: &random)
            let length = 400 + Int(n) * 80
            let whole = object(n, length)
            let low = Int.random(in: 0..<length, using: &random)
            let high = Int.random(in: low...length, using: &random)
            switch Int.random(in: 0..<5, using: &random) {
            case 0: await files.adopt(.sample(n), whole)
            case 1:
                await files.write(
                    .sample(n), at: UInt64(low), ByteView(Array(whole[low..<high])), total: UInt64(length))
            case 2 where step % 50 == 0: await files.trim(to: 2000)
            default:
                if let found = await files.read(.sample(n), UInt64(low)..<UInt64(high)) {
                    #expect(bytes(found) == Array(whole[low..<high]))
                }
            }
            #expect(files.snapshot.heldBytes <= 10_000)
            #expect(try names(scratch).count == Int(files.snapshot.files))
        }
        #expect(files.snapshot.evictions > 0 && files.snapshot.errors == 0)
    }

    /// The journal's room is not taken, and what somebody else takes of the disk is given up.
    @Test func theReserveStaysFree() async throws {
        let scratch = MemoryScratch(capacityBytes: 400 << 20)
        let files = BlockFiles(
            disk: scratch, budgetBytes: 1 << 40, environment: SystemEnvironment(workers: 1), reserveBytes: 100 << 20)
        await files.start()
        let whole = object(1, 16 << 20)
        for n in 0..<40 as Range<UInt64> {
            await files.adopt(.sample(n), whole)
            #expect(try scratch.freeBytes() >= 100 << 20)
        }
        #expect(files.snapshot.heldBytes > 200 << 20 && files.snapshot.errors == 0)
        let journal = try scratch.open("journal", create: true)
        try await journal.write([UInt8](repeating: 1, count: 90 << 20), at: 0)
        for n in 40..<46 as Range<UInt64> { await files.adopt(.sample(n), whole) }
        #expect(try scratch.freeBytes() >= 100 << 20)
        #expect(files.snapshot.heldBytes > 150 << 20 && files.snapshot.errors == 0)
    }

    @Test func whatIsLargerThanTheBudgetIsNotKept() async throws {
        let scratch = MemoryScratch()
        let files = await files(scratch, budget: 1000)
        await files.adopt(.sample(1), object(1, 1000))
        await files.adopt(.sample(2), object(2, 1008))
        #expect(files.snapshot.bypasses == 1)
        #expect(await files.read(.sample(2), 0..<8) == nil)
        #expect(bytes(await files.read(.sample(1), 0..<1000)) == object(1, 1000))
    }

    @Test func filesInUseOutliveAScan() async throws {
        let files = await files(MemoryScratch(), budget: 100_000)
        for n in 0..<50 as Range<UInt64> { await files.adopt(.sample(n), object(n, 1000)) }
        // Used again a while after they came: they belong to the working set.
        for n in 0..<50 as Range<UInt64> { _ = await files.read(.sample(n), 0..<8) }
        for n in 100..<1000 as Range<UInt64> {
            await files.adopt(.sample(n), object(n, 1000))
            _ = await files.read(.sample(n), 0..<8)
        }
        var kept = 0
        for n in 0..<50 as Range<UInt64> where await files.read(.sample(n), 0..<8) != nil { kept += 1 }
        #expect(kept >= 48)
    }

    @Test func manyFilesAreReadThoughFewAreOpen() async throws {
        let files = await files(MemoryScratch(), budget: 1 << 20)
        for n in 0..<700 as Range<UInt64> { await files.adopt(.sample(n), object(n, 80)) }
        for n in 0..<700 as Range<UInt64> { #expect(bytes(await files.read(.sample(n), 0..<80)) == object(n, 80)) }
    }

    @Test func writesThatTheDiskTakesItsTimeForAreWaitedFor() async throws {
        let scratch = MemoryScratch()
        scratch.writesInline = false
        let files = await files(scratch, budget: 10 << 20)
        let whole = object(1, 3 << 20)
        await files.adopt(.sample(1), whole)
        #expect(bytes(await files.read(.sample(1), 5..<3_000_000)) == Array(whole[5..<3_000_000]))
    }

    @Test func aFileCutShortIsReplaced() async throws {
        let scratch = MemoryScratch()
        let whole = object(1, 2000)
        let first = await files(scratch)
        await first.adopt(.sample(1), Array(whole[0..<1200]))
        let second = await files(scratch)
        #expect(second.present(.sample(1)).ranges == [0..<1200])
        await second.adopt(.sample(1), whole)
        #expect(bytes(await second.read(.sample(1), 0..<2000)) == whole)
        #expect(try names(scratch) == [ObjectID.sample(1).description])
    }
}

struct ByteRangesTests {
    @Test func agreesWithASetOfPositions() {
        var random = Random(seed: 7)
        for _ in 0..<200 {
            var ranges = ByteRanges()
            var model = Set<UInt64>()
            for _ in 0..<12 {
                let low = UInt64.random(in: 0..<60, using: &random)
                let high = low + UInt64.random(in: 0..<12, using: &random)
                ranges.insert(low..<high)
                model.formUnion(low..<high)
            }
            #expect(ranges.count == UInt64(model.count))
            for position in 0..<75 as Range<UInt64> {
                #expect((ranges.range(at: position) != nil) == model.contains(position))
            }
            for (a, b) in zip(ranges.ranges, ranges.ranges.dropFirst()) { #expect(a.upperBound < b.lowerBound) }
        }
    }
}
