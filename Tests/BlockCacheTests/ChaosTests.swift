import Glibc
import ObjectStore
import Runtime
import Testing

@testable import BlockCache

/// Everything at once, in one thread, from a seed: loads of all versions of some blocks, cancelled or not, while the store
/// fails and sends damaged bytes, the scratch disk fails and rots, and both caches are emptied.
///
/// A load gives the right bytes or an error, and when the faults end, everything reads again and nothing is left behind:
/// no pin, no fetch in the table, no file that is not counted.
struct ChaosTests {
    @Test(arguments: Array(1...24) as [UInt64])
    func rightBytesOrAnError(seed: UInt64) async throws {
        var random = Random(seed: seed)
        let executor = StepExecutor()
        let environment = StepEnvironment(tickNs: 100_000_000)
        let scratch = MemoryScratch { executor.post($0) }
        let bed = await LoaderBed()
        var versions: [ComposeTests.Version] = []
        for block in 0..<2 as Range<UInt64> {
            versions += try await ComposeTests.history(bed, seed: seed * 10 + block, slices: 4)
        }
        let faulty = FaultyBucket(bed.bucket, environment: environment)
        let files = BlockFiles(
            disk: scratch, budgetBytes: seed % 3 == 0 ? 2 << 20 : 64 << 20, environment: environment, reserveBytes: 0)
        let cache = SliceCache(budgetBytes: UInt64([1, 5, 40][Int(seed % 3)] * Geometry.sliceBytes))
        let loader = BlockLoader(
            locations: [faulty], cache: cache, files: files, environment: environment,
            spawn: { work in _ = Task(executorPreference: executor) { await work() } })
        let (right, wrong, failed) = (Counter(), Counter(), Counter())
        func start(_ version: ComposeTests.Version, _ slice: Int) -> Task<Void, Never> {
            let expected = version.slices[slice] ?? Sample.zeroes.slice(seed: 0)
            return Task(executorPreference: executor) {
                do throws(StoreError) {
                    let pin = try await loader.load(version.entry, SliceIndex(slice))
                    let isSame = expected.withUnsafeBytes { memcmp($0.baseAddress!, pin.pointer, $0.count) == 0 }
                    (isSame ? right : wrong).add(1)
                } catch { failed.add(1) }
            }
        }
        for _ in 0..<150 {
            scratch.writesInline = Bool.random(using: &random)
            switch Int.random(in: 0..<16, using: &random) {
            case 0: faulty.inject(StoreFault(.corrupt, verb: .get, count: Int.random(in: 1...3, using: &random)))
            case 1: faulty.inject(StoreFault(.truncate, verb: .get, count: 1))
            case 2: faulty.inject(StoreFault(.fail(.unavailable), verb: .get, count: 1))
            case 3:
                let calls: [MemoryScratch.Call] = [.open, .write, .read, .rename, .remove]
                scratch.failNext(
                    calls.randomElement(using: &random)!, errno: Bool.random(using: &random) ? EIO : ENOSPC)
            case 4:
                if let name = try? scratch.list("blocks").randomElement(using: &random),
                    let size = scratch.contents("blocks/" + name)?.count, size > 0
                {
                    scratch.flipBit("blocks/" + name, at: UInt64.random(in: 0..<UInt64(size), using: &random))
                }
            case 5: cache.trim(to: 0)
            case 6: _ = Task(executorPreference: executor) { await files.trim(to: 0) }
            default:
                let task = start(versions.randomElement(using: &random)!, Int.random(in: 0..<5, using: &random))
                if Int.random(in: 0..<8, using: &random) == 0 { executor.post { task.cancel() } }
            }
            _ = executor.run(&random, limit: Int.random(in: 0..<60, using: &random))
        }
        _ = executor.run(&random)
        #expect(wrong.value == 0 && right.value > 20)
        // Faults that nobody met yet.
        faulty.clearFaults()
        let (rightBefore, failedBefore) = (right.value, failed.value)
        for version in versions { for slice in 0..<5 { _ = start(version, slice) } }
        _ = executor.run(&random)
        #expect(right.value == rightBefore + versions.count * 5, "\(failed.value - failedBefore) failed")
        #expect(wrong.value == 0)
        #expect(loader.reader.isIdle)
        #expect(files.snapshot.heldBytes <= files.snapshot.budgetBytes)
        cache.trim(to: 0)
        #expect(cache.snapshot.heldBytes == 0 && cache.snapshot.overflowBytes == 0)
    }
}
