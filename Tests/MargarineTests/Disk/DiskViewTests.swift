// One view: block status, commits and prefetches against a store that holds calls; and what is held in memory for clients.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

private let slice = UInt64(Geometry.sliceBytes)
private let block = UInt64(Geometry.blockBytes)

extension TestClient {
    fileprivate var disk: Disk { device as! Disk }

    /// Begins requests without waiting for them; gives the errors as they come.
    fileprivate func begin(
        _ kind: DeviceRequest.Kind, _ count: Int, from offset: UInt64, step: UInt64, length: UInt64,
        bytes: [UInt8] = []
    ) -> [Task<DeviceError?, Never>] {
        (0..<count).map { i in
            Task {
                if kind == .write {
                    return await self.run(.write, offset: offset + UInt64(i) * step, bytes: bytes).error
                }
                return await self.run(kind, offset: offset + UInt64(i) * step, length: Int(length)).error
            }
        }
    }

    fileprivate func look<T: Sendable>(_ body: @escaping @Sendable (Disk) -> T) async -> T {
        await onLoop { [self] in body(disk) }
    }

    /// Looks again and again until it is so.
    fileprivate func wait(_ bed: DiskBed, _ body: @escaping @Sendable (Disk) -> Bool) async -> Bool {
        for _ in 0..<1_000 {
            if await look(body) { return true }
            await bed.environment.sleep(ns: 5_000_000)
        }
        return false
    }
}

@Suite struct DiskViewTests {
    /// Writes block 1 and flushes; asks for its status while the manifest page is away; the commit ends before it comes.
    private func statusOverACommit(_ fault: Fault?) async throws -> [Extent] {
        let bed = try DiskBed(settings: { $0.fault = fault })
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await bed.waitForGeneration(1)

        let swap = StoreGate()
        bed.faults.inject(StoreFault(.hold(swap), verb: .put, keyContains: "head"))
        try await client.write(pattern(64 << 10, 2), at: block)
        try await client.flush()
        await swap.waitUntilArrived()
        let page = StoreGate()
        await client.onLoop { bed.context.manifests.evict(to: 0) }
        bed.faults.inject(StoreFault(.hold(page), verb: .get, keyContains: "manifests/"))
        let asked = Task { await client.run(.blockStatus, offset: block, length: 64 << 10) }
        await page.waitUntilArrived()
        bed.faults.clearFaults()
        swap.open()
        try await bed.waitForGeneration(2)
        #expect(await client.wait(bed) { $0.committing == nil })
        page.open()
        let answer = await asked.value
        #expect(answer.error == nil)
        return answer.extents
    }

    @Test("row 1: block status is of one instant, though a commit ends while a manifest page is fetched")
    func blockStatusIsOfOneInstant() async throws {
        #expect(try await statusOverACommit(nil).allSatisfy { !$0.isHole && !$0.isZero })
    }

    @Test("row 1: the test above sees block status that looks twice")
    func blockStatusThatLooksTwiceIsSeen() async throws {
        #expect(try await statusOverACommit(.statusReadsTwice).contains { $0.isHole })
    }

    @Test("row 1: status is right page by page, whatever is committed, waiting or active")
    func statusIsAsTheModel() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 5 })
        let size = 3 * block + 12_288
        try await bed.create(size: size)
        let client = try await bed.attach()
        var random = SeededRandom(5)
        var isData = [Bool](repeating: false, count: Int(size / 4096))
        for round in 0..<300 {
            let first = Int.random(in: 0..<isData.count, using: &random)
            let count = min(Int.random(in: 1..<300, using: &random), isData.count - first)
            let range = UInt64(first * 4096)..<UInt64((first + count) * 4096)
            switch Int.random(in: 0..<4, using: &random) {
            case 0, 1:
                try await client.write(pattern(count * 4096, random.next()), at: range.lowerBound)
                for page in first..<first + count { isData[page] = true }
            default:
                try await client.zero(range, trim: Bool.random(using: &random))
                for page in first..<first + count { isData[page] = false }
            }
            if round % 7 == 0 { try await client.flush() }
            if round % 20 == 0 { await client.onLoop { bed.context.manifests.evict(to: 0) } }
            guard round % 10 == 9 else { continue }
            var at: UInt64 = 0
            while at < size {
                let length = min(size - at, UInt64.random(in: 1..<size, using: &random))
                let answer = await client.run(.blockStatus, offset: at, length: Int(length))
                #expect(answer.error == nil && !answer.extents.isEmpty)
                for extent in answer.extents {
                    #expect(extent.lengthBytes > 0)
                    // Stored slices count whole; a hole is never data.
                    if extent.isHole {
                        let pages = Int(at / 4096)..<Int((at + extent.lengthBytes + 4095) / 4096)
                        #expect(!isData[pages].contains(true), "round \(round): a hole at \(at) has data")
                    }
                    at += extent.lengthBytes
                }
                #expect(at <= size)
            }
        }
    }

    @Test("row 33: a question costs what it asks for, not what the layers hold")
    func statusCostsWhatItAsks() async throws {
        let pages = DirtyPages(arena: FrameArena(budgetBytes: 16 << 20))
        let layer = Layer(pages: pages)
        let manifest = Manifest.empty(sizeBytes: 1 << 50, cache: ManifestCache(Locations([MemoryBucket()])))
        var random = SeededRandom(4)
        for _ in 0..<50_000 {
            let page = UInt64.random(in: 0..<1 << 38, using: &random)
            let slot = pages.recover(at: JournalLocation(segment: 1, offset: 0), sum: 0)
            layer.put(slot, page: Int(page % 128), of: page / 128)
        }
        for _ in 0..<1_000 {
            let at = UInt64.random(in: 0..<1 << 50, using: &random)
            var work = 0
            guard
                case .extents(let extents) = BlockStatus.step(
                    at..<at + 1, onlyOne: true, manifest, [layer], work: &work)
            else {
                Issue.record("no answer")
                return
            }
            #expect(extents.count == 1 && extents[0].lengthBytes == 1)
            #expect(work > -8)
        }
        // And a long one ends when the turn's work is done.
        var work = 100
        guard case .extents(let extents) = BlockStatus.step(0..<1 << 50, onlyOne: false, manifest, [layer], work: &work)
        else {
            Issue.record("no answer")
            return
        }
        #expect(extents.count > 10 && extents.count < 200)
        #expect(extents.reduce(0) { $0 + $1.lengthBytes } < 1 << 50)
    }

    /// A layer with single pages in so many slices, far apart.
    private func scattered(_ count: Int, _ pages: DirtyPages) -> Layer {
        let layer = Layer(pages: pages)
        for slice in 0..<UInt64(count) {
            let slot = pages.recover(at: JournalLocation(segment: 1, offset: 0), sum: 0)
            layer.put(slot, page: Int(slice % 128), of: slice &* 0x9e37_79b9_7f4a_7c15 >> 34)
        }
        return layer
    }

    @Test("row 33: a question takes as long over many slices as over few")
    func statusTakesAsLongOverManySlices() {
        let pages = DirtyPages(arena: FrameArena(budgetBytes: 16 << 20))
        let manifest = Manifest.empty(sizeBytes: 1 << 50, cache: ManifestCache(Locations([MemoryBucket()])))
        func ask(_ layer: Layer) -> Duration {
            ContinuousClock().measure {
                for at in 0..<UInt64(50) {
                    var work = 0
                    let start = at << 40
                    _ = BlockStatus.step(start..<start + 1, onlyOne: true, manifest, [layer], work: &work)
                }
            }
        }
        let (few, many) = (scattered(500, pages), scattered(50_000, pages))
        // The best of some: what else the machine does is not theirs.
        let best = (0..<5).map { _ in (few: ask(few), many: ask(many)) }
        let (fewNs, manyNs) = (best.map(\.few).min()!, best.map(\.many).min()!)
        #expect(manyNs < fewNs * 15, "\(fewNs) over 500 slices, \(manyNs) over 50,000")
    }

    @Test("row 33: a turn answers so many status requests and no more")
    func aTurnOfStatusIsBounded() async throws {
        #expect(try await turnsForStatuses(nil) >= 10)
    }

    @Test("row 33: the test above sees turns without a bound")
    func turnsWithoutABoundAreSeen() async throws {
        #expect(try await turnsForStatuses(.memoryNotBounded) < 10)
    }

    private func turnsForStatuses(_ fault: Fault?) async throws -> Int {
        let bed = try DiskBed(
            settings: {
                $0.commitIntervalMs = 600_000; $0.fault = fault
            }, dirtyBytes: 16 << 20)
        try await bed.create(size: 4 << 30)
        let client = try await bed.attach()
        for at in stride(from: UInt64(0), to: 4 << 30, by: Int(slice)) {
            try await client.write(pattern(4096, at), at: at)
        }
        // Each goes through 8,192 slices with two runs in them.
        return await client.onLoop { [disk = client.disk, loop = bed.context.loop] in
            await withCheckedContinuation { done in
                let counter = TurnCounter(30, on: loop, done)
                for request in counter.requests {
                    request.kind = .blockStatus
                    request.lengthBytes = 4 << 30 - 4096
                    request.client = counter
                    disk.submit(request)
                }
                counter.count()
            }
        }
    }

    /// Counts the loop's turns until its requests are answered.
    private final class TurnCounter: DeviceClient, @unchecked Sendable {  // stays on its loop
        let requests: [DeviceRequest]
        private var left: Int
        private var turns = 0
        private let loop: Loop
        private let done: CheckedContinuation<Int, Never>
        var movedBytes: UInt64 { 0 }
        init(_ count: Int, on loop: Loop, _ done: CheckedContinuation<Int, Never>) {
            requests = (0..<count).map { _ in DeviceRequest() }
            left = count
            self.loop = loop
            self.done = done
        }
        func count() {
            turns += 1
            if left > 0 { loop.post { [self] in count() } } else { done.resume(returning: turns) }
        }
        func completed(_ request: DeviceRequest) { left -= 1 }
        func journaled(turn: UInt64, error: DeviceError?) {}
        func disconnect(reason: String) {}
        func absorb(isFirst: Bool) -> Bool { true }
    }

    @Test("row 7: scattered trims stay within the dirty memory, and commit when it is used up")
    func scatteredTrimsAreBounded() async throws {
        let largest = try await overheadOfScatteredTrims(nil)
        // An eighth of it, and what one more request adds.
        #expect(largest > 100 << 10 && largest < 160 << 10, "\(largest) bytes")
    }

    @Test("row 7: the test above sees trims that are not held against it")
    func trimsWithoutABoundAreSeen() async throws {
        #expect(try await overheadOfScatteredTrims(.memoryNotBounded) > 300 << 10)
    }

    private func overheadOfScatteredTrims(_ fault: Fault?) async throws -> Int {
        let bed = try DiskBed(
            settings: {
                $0.commitIntervalMs = 600_000; $0.fault = fault
            }, dirtyBytes: 1 << 20)
        try await bed.create(size: 1 << 40)
        let client = try await bed.attach()
        var random = SeededRandom(9)
        var largest = 0
        for _ in 0..<20_000 {
            let at = UInt64.random(in: 0..<1 << 28, using: &random) * 4096
            try await client.zero(at..<at + 4096, trim: true)
            largest = max(largest, await client.look { $0.context.arena.overheadBytes })
        }
        #expect(await client.look { $0.status().dirtyBytes } > 0)
        if fault == nil { #expect(try await bed.head().generation >= 1) }
        await client.leave(clean: true)
        #expect(await client.wait(bed) { $0.dirtyBytes == 0 && $0.context.arena.overheadBytes == 0 })
        return largest
    }

    @Test("row 7: frames and overhead together keep the budget")
    func framesMakeRoomForOverhead() {
        let arena = FrameArena(budgetBytes: 80 << 20)
        let pages = DirtyPages(arena: arena)
        let layer = Layer(pages: pages)
        var page: UInt64 = 0
        while arena.ensure(1), page < 30_000 {
            let slot = pages.make()
            pages.bytes(slot)!.storeBytes(of: page, as: UInt64.self)
            pages.journaled(slot)
            layer.put(slot, page: Int(page % 128), of: page / 128)
            page += 1
        }
        #expect(arena.heldBytes <= 80 << 20)
        for far in 0..<UInt64(600_000) where !arena.isCrowded(0) {
            let at = (1 << 30) + far * 1_000
            layer.zero(pages: at..<at + 1)
        }
        #expect(arena.overheadBytes > 10 << 20)
        #expect(arena.heldBytes <= 80 << 20, "\(arena.heldBytes)")
        layer.drop()
        arena.trim()
        #expect(arena.heldBytes == 0)
    }

    @Test("row 7: sub-page writes on a slow store hold a few pages each, a few at a time")
    func subPageWritesAreBounded() async throws {
        #expect(try await subPageWritesAtATime(nil) == RequestLine.writes)
    }

    @Test("row 7: the test above sees writes that do not stand in line")
    func writesWithoutABoundAreSeen() async throws {
        #expect(try await subPageWritesAtATime(.memoryNotBounded) == 1_000)
    }

    private func subPageWritesAtATime(_ fault: Fault?) async throws -> Int {
        let bed = try DiskBed(dirtyBytes: 16 << 20)
        try await bed.create(size: 1 << 30)
        var client = try await bed.attach()
        // Not in block 0: that one is fetched as a whole when the disk is looked at.
        for at in 0..<64 { try await client.write(pattern(Int(slice), UInt64(at)), at: block + UInt64(at) * slice) }
        try await client.flush()
        try await bed.waitForGeneration(1)
        await client.leave(clean: true)
        bed.kill()

        let next = try DiskBed(store: bed.store, settings: { $0.fault = fault }, dirtyBytes: 16 << 20)
        client = try await next.attach()
        let gate = StoreGate()
        next.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "blocks/"))
        let reader = client
        let writes = (0..<1_000).map { (i: Int) -> Task<DeviceError?, Never> in
            let border = block + UInt64(1 + i % 62) * slice
            let offset = border - 100 + UInt64(i / 62)
            return Task { await reader.run(.write, offset: offset, bytes: pattern(180, UInt64(i))).error }
        }
        #expect(await client.wait(next) { $0.waitingWrites.running + $0.waitingWrites.waitingCount == 1_000 })
        let running = await client.look { $0.waitingWrites.running }
        gate.open()
        for write in writes { #expect(await write.value == nil) }
        #expect(await client.look { $0.waitingWrites.running } == 0)
        // Around what was written, the pages are as they were.
        for at in UInt64(0)..<64 {
            let found = try await client.read(4096, at: block + at * slice + 8192)
            #expect(found == Array(pattern(Int(slice), at)[8192..<12_288]))
        }
        return running
    }

    @Test("row 29: what a client asked for ends with it, on a store that hangs")
    func allEndsWithItsClient() async throws {
        let held = try await heldOnAHangingStore(nil)
        #expect(held.prefetches == Prefetches.limit + Prefetches.maxWaiting)
        #expect(held.statuses == RequestLine.statuses && held.reads == RequestLine.reads)
        #expect(held.pendingAfter == 0 && held.prefetchesAfter <= Prefetches.limit)
    }

    @Test("row 29: the test above sees requests that nothing bounds")
    func requestsWithoutABoundAreSeen() async throws {
        let held = try await heldOnAHangingStore(.memoryNotBounded)
        #expect(held.prefetches == 3_000 && held.statuses == 1_000 && held.reads == 1_500)
        #expect(held.pendingAfter == 2_700 && held.prefetchesAfter == 3_000)
    }

    private struct Held {
        var prefetches = 0
        var statuses = 0
        var reads = 0
        var pendingAfter = 0
        var prefetchesAfter = 0
    }

    private func heldOnAHangingStore(_ fault: Fault?) async throws -> Held {
        let bed = try DiskBed()
        try await bed.create(size: 64 << 30)
        var client = try await bed.attach()
        for at in UInt64(0)..<64 { try await client.write(pattern(4096, at), at: at * block) }
        try await client.flush()
        try await bed.waitForGeneration(1)
        await client.leave(clean: true)
        bed.kill()

        let next = try DiskBed(store: bed.store, settings: { $0.fault = fault })
        client = try await next.attach()
        _ = try await client.read(4096, at: 0)
        let gate = StoreGate()
        next.faults.inject(StoreFault(.hold(gate), verb: .get))
        await client.onLoop { next.context.manifests.evict(to: 0) }
        var held = Held()
        let cached = client.begin(.cache, 3_000, from: 0, step: block / 2, length: 4096)
        for one in cached { #expect(await one.value == nil) }
        held.prefetches = await client.look { $0.prefetches.count }
        let statuses = client.begin(.blockStatus, 1_000, from: 0, step: 4096, length: 4096)
        let reads = client.begin(.read, 1_500, from: block, step: 4096, length: 512)
        let writes = client.begin(.write, 200, from: 1, step: block, length: 0, bytes: [1, 2, 3])
        #expect(await client.wait(next) { $0.pendingRequests.count == 2_700 })
        held.statuses = await client.look { $0.statuses.loadingCount }
        held.reads = await client.look { $0.coldReads.running }
        await client.leave(clean: false)
        if fault == nil { for one in statuses + reads + writes { #expect(await one.value == .shutdown) } }
        held.pendingAfter = await client.look { $0.pendingRequests.count }
        held.prefetchesAfter = await client.look { $0.prefetches.count }
        next.faults.clearFaults()
        gate.open()
        #expect(
            await client.wait(next) {
                $0.coldReads.running == 0 && $0.waitingWrites.running == 0 && $0.statuses.loadingCount == 0
                    && $0.prefetches.count == 0
            })
        for one in statuses + reads + writes { _ = await one.value }
        return held
    }
}
