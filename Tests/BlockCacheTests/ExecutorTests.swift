import Glibc
import ObjectStore
import Runtime
import Testing

@testable import BlockCache

struct ExecutorTests {
    /// Everything in one thread: loads of many slices at once, with fetches in the background and scratch writes that
    /// complete later. What happens is a function of the seed, and it happens without any other thread.
    private func simulate(seed: UInt64) async throws -> (gets: [RecordingBucket.Get], steps: Int) {
        let executor = StepExecutor()
        let environment = StepEnvironment()
        let scratch = MemoryScratch { executor.post($0) }
        scratch.writesInline = false
        let bucket = RecordingBucket()
        let bed = await LoaderBed(bucket: bucket)
        let ref = try await bed.storeNoise(id: seed)
        let files = BlockFiles(disk: scratch, budgetBytes: 1 << 30, environment: environment)
        let loader = BlockLoader(
            locations: [bucket], cache: SliceCache(budgetBytes: UInt64(3 * Geometry.sliceBytes)), files: files,
            environment: environment, spawn: { work in _ = Task(executorPreference: executor) { await work() } })
        let right = Counter()
        var random = Random(seed: seed)
        for _ in 0..<40 {
            let slice = LoaderBed.noisySlices.randomElement(using: &random)!
            let expected = bed.noise(seed, slice)
            _ = Task(executorPreference: executor) {
                let pin = try await loader.load(BlockEntry(base: ref, deltas: []), SliceIndex(slice))
                let isSame = expected.withUnsafeBytes { memcmp($0.baseAddress!, pin.pointer, $0.count) == 0 }
                right.add(isSame ? 1 : 0)
            }
        }
        let steps = executor.run(&random)
        #expect(right.value == 40)
        #expect(scratch.contents("blocks/" + ref.id.description)?.count == Int(ref.lengthBytes))
        return (bucket.gets, steps)
    }

    @Test(arguments: [1, 2, 3] as [UInt64])
    func aSimulatedRunIsAFunctionOfItsSeed(seed: UInt64) async throws {
        let first = try await simulate(seed: seed)
        let second = try await simulate(seed: seed)
        #expect(first.gets == second.gets && first.steps == second.steps)
    }

    /// On two loops with a real directory: each load resumes on its own loop, and what is read is right.
    @Test func loadsResumeOnTheirLoops() async throws {
        var template = Array("/tmp/margarine-cache-XXXXXX".utf8CString)
        let folder = try #require(mkdtemp(&template).map { String(cString: $0) })
        defer {
            for name in (try? DirectoryScratch(path: folder).list("blocks")) ?? [] {
                unlink(folder + "/blocks/" + name)
            }
            rmdir(folder + "/blocks")
            rmdir(folder)
        }
        let loops = [try Loop(name: "one"), try Loop(name: "two")]
        for loop in loops { try loop.start() }
        let bed = await LoaderBed()
        var entries: [BlockEntry] = []
        for id in 0..<3 as Range<UInt64> {
            entries.append(BlockEntry(base: try await bed.storeNoise(id: id), deltas: []))
        }
        let environment = SystemEnvironment(workers: 2)
        let files = BlockFiles(disk: try DirectoryScratch(path: folder), budgetBytes: 8 << 20, environment: environment)
        await files.start()
        let cache = SliceCache(budgetBytes: UInt64(4 * Geometry.sliceBytes))
        let spawned = Counter()
        let loader = BlockLoader(
            locations: [bed.bucket], cache: cache, files: files, environment: environment,
            spawn: { work in
                spawned.add(1)
                loops[0].run {
                    await work()
                    spawned.add(-1)
                }
            })
        let fine = Counter()
        await withTaskGroup(of: Void.self) { group in
            for n in 0..<120 {
                let (loop, id, slice) = (loops[n % 2], n % 3, LoaderBed.noisySlices[n % 7])
                let (entry, expected) = (entries[id], bed.noise(UInt64(id), slice))
                group.addTask(executorPreference: loop) {
                    guard let pin = try? await loader.load(entry, SliceIndex(slice)) else { return }
                    let isSame = expected.withUnsafeBytes { memcmp($0.baseAddress!, pin.pointer, $0.count) == 0 }
                    if isSame, loop.isCurrent { fine.add(1) }
                }
            }
        }
        #expect(fine.value == 120)
        while spawned.value > 0 { try await Task.sleep(for: .milliseconds(1)) }
        #expect(files.snapshot.errors == 0 && files.snapshot.heldBytes <= 8 << 20)
        for loop in loops { loop.stop() }
    }
}
