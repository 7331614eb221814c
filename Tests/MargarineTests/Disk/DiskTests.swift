// The disk as a client sees it, against an array of bytes; with crashes, power cuts and failing stores in between.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct DiskTests {
    @Test("part 2: what belongs to a loop ends the process when it is called elsewhere", arguments: 0..<5)
    func entriesAreOfOneLoop(_ entry: Int) async throws {
        await #expect(processExitsWith: .failure) { [entry] in
            let bed = try DiskBed()
            try await bed.create()
            let client = try await bed.attach()
            let disk = client.device as! Disk
            switch entry {
            case 0: disk.beginTurn()
            case 1: disk.submit(DeviceRequest())
            case 2: disk.leave(client, clean: true)
            case 3: disk.happen(.cut)
            default: _ = disk.journal.append()
            }
        }
    }

    @Test func whatWasWrittenIsReadAtAnyOffsetAndLength() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        var model = [UInt8](repeating: 0, count: 4 << 20)
        var random = SeededRandom(7)
        for step in 0..<400 {
            let offset = Int.random(in: 0..<model.count - 1, using: &random)
            let count = min(Int.random(in: 1..<60_000, using: &random), model.count - offset)
            switch Int.random(in: 0..<10, using: &random) {
            case 0..<5:
                let bytes = pattern(count, UInt64(step))
                try await client.write(bytes, at: UInt64(offset))
                model.replaceSubrange(offset..<offset + count, with: bytes)
            case 5:
                try await client.zero(UInt64(offset)..<UInt64(offset + count))
                model.replaceSubrange(offset..<offset + count, with: repeatElement(0, count: count))
            case 6: try await client.flush()
            default:
                #expect(try await client.read(count, at: UInt64(offset)) == Array(model[offset..<offset + count]))
            }
        }
        #expect(try await client.read(model.count, at: 0) == model)
        await client.leave(clean: true)
        try await bed.waitForGeneration(1)
    }

    /// Somebody makes a generation of the same bytes, of copies at another location, while this server makes the next one.
    @Test(arguments: ["it archives", "it waits for its turn at the head"])
    func aCommitIsMadeAnewWhenTheDiskWasMoved(_ when: String) async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        func look() async { await client.onLoop { await (client.device as! Disk).checkOwnership() } }
        try await client.write(pattern(70_000, 1), at: 0)
        try await client.flush()
        try await bed.waitForGeneration(1)
        let gate = StoreGate()
        let first = GenerationRecord.key(disk: "d", generation: 1)
        let looking: Task<Void, Never>?
        if when == "it archives" {
            bed.faults.inject(StoreFault(.hold(gate), verb: .put, keyContains: first, count: 1))
            looking = nil
        } else {
            bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "d/head", count: 1))
            looking = Task { await look() }
            await gate.waitUntilArrived()
        }
        try await client.write(pattern(70_000, 2), at: 4096)
        try await client.flush()
        if when == "it archives" {
            await gate.waitUntilArrived()
        } else {
            while bed.store.contents[first] == nil { await bed.environment.sleep(ns: 1_000_000) }
            await bed.environment.sleep(ns: 50_000_000)
        }
        // As `disk localize` does it.
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        let (head, etag) = try #require(try await heads.load("d"))
        var moved = try #require(head.record)
        moved.origin = GenerationRecord.Origin(disk: "d", diskID: head.diskID, generation: 1)
        moved.generation = 2
        moved.kind = .localized
        var after = head
        after.advance(to: moved)
        try await heads.archive(head)
        guard case .won = try await heads.swap(after, expecting: etag) else { fatalError("not won") }
        if looking == nil { await look() }
        gate.open()
        await looking?.value

        try await bed.waitForGeneration(3)
        #expect(client.disconnected == nil)
        var bytes = pattern(70_000, 1) + [UInt8](repeating: 0, count: 4096)
        bytes.replaceSubrange(4096..<74_096, with: pattern(70_000, 2))
        #expect(try await client.read(bytes.count, at: 0) == bytes)
        await client.leave(clean: true)
        bed.kill()
        // Each generation is there, the moved one too, and the last one shows everything.
        let now = try await bed.head()
        let again = try DiskBed(store: bed.store)
        for number in 1...now.generation {
            let record = try await heads.record(now, generation: number)
            #expect((record.kind == .localized) == (number == 2))
        }
        let snapshot = try await again.attach("d@\(now.generation)")
        #expect(try await snapshot.read(bytes.count, at: 0) == bytes)
        again.kill()
    }

    @Test func aCommittedDiskIsTheSameWithAnEmptyScratch() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        var model = [UInt8](repeating: 0, count: 40 << 20)
        var random = SeededRandom(11)
        // Sparse pages, whole blocks, and rewrites over several generations: deltas, bases and folds.
        for round in 0..<12 {
            for _ in 0..<20 {
                let page = Int.random(in: 0..<model.count / 4096, using: &random)
                let bytes = pattern(4096, random.next())
                try await client.write(bytes, at: UInt64(page * 4096))
                model.replaceSubrange(page * 4096..<(page + 1) * 4096, with: bytes)
            }
            if round == 3 {
                let bytes = pattern(17 << 20, 99)
                for at in stride(from: 0, to: bytes.count, by: 1 << 20) {
                    try await client.write(Array(bytes[at..<at + (1 << 20)]), at: UInt64(at + 5000))
                }
                model.replaceSubrange(5000..<5000 + bytes.count, with: bytes)
            }
            if round == 6 {
                try await client.zero(10 << 20..<30 << 20, trim: true)
                model.replaceSubrange(10 << 20..<30 << 20, with: repeatElement(0, count: 20 << 20))
            }
            try await client.flush()
            try await bed.waitForGeneration(UInt64(round) + 1)
        }
        await client.leave(clean: true)
        try await bed.waitForGeneration(12)
        await bed.manager.drain()

        let next = try DiskBed(store: bed.store, server: "b")
        let again = try await next.attach()
        for at in stride(from: 0, to: model.count, by: 4 << 20) {
            #expect(try await again.read(4 << 20, at: UInt64(at)) == Array(model[at..<at + (4 << 20)]), "at \(at)")
        }
    }

    @Test(arguments: [Durability.memory, .scratch])
    func aKillLosesNoAcknowledgedWrite(_ durability: Durability) async throws {
        var bed = try DiskBed()
        try await bed.create { $0.durability = durability }
        var model = [UInt8](repeating: 0, count: 8 << 20)
        var random = SeededRandom(3)
        for round in 0..<25 {
            let client = try await bed.attach()
            #expect(try await client.read(model.count, at: 0) == model, "round \(round)")
            for _ in 0..<Int.random(in: 1..<40, using: &random) {
                let offset = Int.random(in: 0..<model.count - 20_000, using: &random)
                let bytes = pattern(Int.random(in: 1..<20_000, using: &random), random.next())
                try await client.write(bytes, at: UInt64(offset))
                model.replaceSubrange(offset..<offset + bytes.count, with: bytes)
                if Int.random(in: 0..<8, using: &random) == 0 { try await client.flush() }
            }
            bed.kill()
            bed = try DiskBed(store: bed.store, scratch: bed.scratch)
            await bed.manager.recover()
        }
    }

    @Test func withoutAResumeWindowAKillGoesBackToTheLastSafePoint() async throws {
        var bed = try DiskBed()
        try await bed.create { $0.resumeWindowMs = 0 }
        var model = [UInt8](repeating: 0, count: 2 << 20)
        var safe = model
        var random = SeededRandom(5)
        for round in 0..<25 {
            let client = try await bed.attach("d?session=s\(round)")
            #expect(try await client.read(model.count, at: 0) == safe, "round \(round)")
            model = safe
            for _ in 0..<20 {
                let offset = Int.random(in: 0..<model.count - 9000, using: &random)
                let bytes = pattern(Int.random(in: 1..<9000, using: &random), random.next())
                try await client.write(bytes, at: UInt64(offset))
                model.replaceSubrange(offset..<offset + bytes.count, with: bytes)
                if Int.random(in: 0..<6, using: &random) == 0 {
                    try await client.flush()
                    safe = model
                }
            }
            bed.kill()
            bed = try DiskBed(store: bed.store, scratch: bed.scratch)
            await bed.manager.recover()
        }
    }

    @Test func aPowerCutLosesNoFlushedWrite() async throws {
        var bed = try DiskBed()
        try await bed.create { $0.durability = .scratch }
        // For each page what a read may give: the flushed content, or anything written since.
        let pages = 512
        var allowed = [[UInt64]](repeating: [0], count: pages)
        var random = SeededRandom(13)
        var stamp: UInt64 = 1
        for round in 0..<50 {
            let client = try await bed.attach("d?session=r\(round)")
            for page in 0..<pages {
                let found = try await client.read(4096, at: UInt64(page * 4096))
                let value = found.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) }
                #expect(
                    allowed[page].contains(value), "round \(round) page \(page): \(value) is none of \(allowed[page])")
                let whole = value == 0 ? [UInt8](repeating: 0, count: 4096) : stamped(value)
                #expect(found == whole, "round \(round) page \(page) is torn")
                allowed[page] = [value]
            }
            for _ in 0..<Int.random(in: 1..<60, using: &random) {
                let page = Int.random(in: 0..<pages, using: &random)
                stamp += 1
                try await client.write(stamped(stamp), at: UInt64(page * 4096))
                allowed[page].append(stamp)
                if Int.random(in: 0..<12, using: &random) == 0 {
                    try await client.flush()
                    for i in allowed.indices { allowed[i] = [allowed[i].last!] }
                }
            }
            bed.kill()
            let survivor = bed.scratch.powerCut(random: &random)
            bed = try DiskBed(store: bed.store, scratch: survivor, rebooted: true)
            await bed.manager.recover()
        }
    }

    @Test func withStoreDurabilityFlushedWritesSurviveTheLossOfTheHost() async throws {
        var bed = try DiskBed(server: "s0")
        try await bed.create { $0.durability = .store }
        let pages = 256
        var allowed = [[UInt64]](repeating: [0], count: pages)
        var random = SeededRandom(17)
        var stamp: UInt64 = 1
        for round in 0..<50 {
            let client = try await bed.attach("d?session=r\(round)")
            for page in 0..<pages {
                let found = try await client.read(4096, at: UInt64(page * 4096))
                let value = found.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) }
                #expect(allowed[page].contains(value), "round \(round) page \(page)")
                allowed[page] = [value]
            }
            for _ in 0..<20 {
                let page = Int.random(in: 0..<pages, using: &random)
                stamp += 1
                try await client.write(stamped(stamp), at: UInt64(page * 4096), fua: stamp % 7 == 0)
                allowed[page].append(stamp)
                if stamp % 7 == 0 || Int.random(in: 0..<10, using: &random) == 0 {
                    try await client.flush()
                    for i in allowed.indices { allowed[i] = [allowed[i].last!] }
                }
            }
            bed.kill()
            bed = try DiskBed(store: bed.store, server: "s\(round + 1)")
        }
    }

    private func stamped(_ value: UInt64) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
            buffer.withMemoryRebound(to: UInt64.self) { words in
                for i in 0..<512 { words.initializeElement(at: i, to: value) }
            }
            count = 4096
        }
    }

    @Test func aTinyDirtyMemoryHoldsAndReadsBackFromTheJournal() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, dirtyBytes: 1 << 20)
        try await bed.create()
        let client = try await bed.attach()
        var model = [UInt8](repeating: 0, count: 8 << 20)
        var random = SeededRandom(23)
        for at in stride(from: 0, to: model.count, by: 64 << 10) {
            let bytes = pattern(64 << 10, random.next())
            try await client.write(bytes, at: UInt64(at))
            model.replaceSubrange(at..<at + bytes.count, with: bytes)
        }
        #expect(bed.context.arena.inUse <= bed.context.arena.capacity)
        for _ in 0..<50 {
            // Partial pages over pages that only the journal has.
            let at = Int.random(in: 0..<model.count - 5000, using: &random)
            let bytes = pattern(Int.random(in: 1..<5000, using: &random), random.next())
            try await client.write(bytes, at: UInt64(at))
            model.replaceSubrange(at..<at + bytes.count, with: bytes)
        }
        #expect(try await client.read(model.count, at: 0) == model)
    }

    @Test func aClientThatNeverFlushesIsNotStuckOnAFullJournal() async throws {
        let bed = try DiskBed(settings: {
            $0.journalLimitBytes = 8 << 20; $0.commitIntervalMs = 600_000
        })
        try await bed.create()
        let client = try await bed.attach()
        for round in 0..<10 {
            for at in stride(from: 0, to: 4 << 20, by: 256 << 10) {
                try await client.write(pattern(256 << 10, UInt64(at + round)), at: UInt64(at))
            }
        }
        #expect(try await client.read(256 << 10, at: 3 << 20) == pattern(256 << 10, UInt64(3 << 20) + 9))
        #expect(try await bed.head().generation >= 1)
    }

    @Test(.timeLimit(.minutes(1)), arguments: [SafePointRule.auto, .btrfs])
    func aLargeWriteIsNotStuckOnAJournalThatIsNotFillingYet(_ rule: SafePointRule) async throws {
        let bed = try DiskBed(
            settings: {
                $0.journalLimitBytes = 8 << 20; $0.commitIntervalMs = 600_000
            }, dirtyBytes: 16 << 20)
        try await bed.create { $0.safePoints = rule }
        let client = try await bed.attach()
        // Not half full, and yet without room for the next one.
        try await client.write(pattern(3900 << 10, 1), at: 0)
        try await client.write(pattern(4400 << 10, 2), at: 8 << 20)
        #expect(try await client.read(4400 << 10, at: 8 << 20) == pattern(4400 << 10, 2))
        #expect(try await bed.head().generation == 1)
    }

    @Test func allJournalsTogetherKeepTheirLimit() async throws {
        let limit: UInt64 = 16 << 20
        let bed = try DiskBed(
            settings: {
                $0.journalLimitBytes = 14 << 20; $0.commitIntervalMs = 600_000
            }, journalBytes: limit)
        var clients: [TestClient] = []
        for name in ["idle", "slow", "busy"] {
            try await bed.create(name)
            clients.append(try await bed.attach(name))
        }
        func fill(_ client: TestClient, _ bytes: Int, seed: UInt64) async throws {
            for at in stride(from: 0, to: bytes, by: 256 << 10) {
                try await client.write(pattern(256 << 10, seed + UInt64(at)), at: UInt64(at))
                #expect(bed.context.journals.usedBytes <= limit)
            }
        }
        // Under their own limits, never flushed, and then left alone: the larger one at least has to give.
        try await fill(clients[0], 6 << 20, seed: 1)
        try await fill(clients[1], 5 << 20, seed: 2)
        for round in 0..<4 { try await fill(clients[2], 8 << 20, seed: 3 + UInt64(round)) }
        try await bed.waitForGeneration(1, "idle")
        #expect(try await clients[0].read(256 << 10, at: 5 << 20) == pattern(256 << 10, 1 + 5 << 20))
        #expect(try await clients[2].read(256 << 10, at: 7 << 20) == pattern(256 << 10, 6 + 7 << 20))
    }

    /// Found by the simulator: such a disk stayed with a server that lived and did not know of it.
    @Test func aDiskWithAnEmptyJournalIsGivenBackAfterAKill() async throws {
        let first = try DiskBed()
        try await first.create()
        let client = try await first.attach()
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await first.waitForGeneration(1)
        await first.context.run { await first.environment.sleep(ns: 50_000_000) }
        first.kill()
        #expect(try await first.head().owner?.server == "a")
        let second = try DiskBed(store: first.store, scratch: first.scratch, settings: { $0.releaseAfterMs = 20 })
        await second.manager.recover()
        for _ in 0..<500 where try await second.head().owner != nil { await second.environment.sleep(ns: 10_000_000) }
        #expect(try await second.head().owner == nil)
        #expect(try second.scratch.list("journal").isEmpty)
    }

    @Test func aReadThatTheStoreDoesNotAnswerFailsInTime() async throws {
        let warm = try DiskBed()
        try await warm.create()
        let writer = try await warm.attach()
        try await writer.write(pattern(4096, 1), at: 20 << 20)
        await writer.leave(clean: true)
        try await warm.waitForGeneration(1)
        await warm.manager.drain()
        let bed = try DiskBed(store: warm.store, settings: { $0.requestTimeoutMs = 100 })
        let client = try await bed.attach()
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get))
        await #expect(throws: TestFailure.self) { try await client.read(4096, at: 20 << 20) }
        gate.open()
        bed.faults.clearFaults()
        #expect(try await client.read(4096, at: 20 << 20) == pattern(4096, 1))
    }

    @Test(
        "row 5: while the store denies, cold reads and sub-page writes wait",
        arguments: [StoreError.Kind.denied, .unavailable])
    func aStoreThatDeniesIsWaitedFor(_ kind: StoreError.Kind) async throws {
        let warm = try DiskBed()
        try await warm.create()
        let writer = try await warm.attach()
        try await writer.write(pattern(1 << 20, 1), at: 20 << 20)
        await writer.leave(clean: true)
        try await warm.waitForGeneration(1)
        await warm.manager.drain()
        let bed = try DiskBed(store: warm.store)
        let client = try await bed.attach()
        bed.faults.inject(StoreFault(.fail(kind)))
        let isAway = Mutex(true)
        async let read = client.read(4096, at: 20 << 20)
        async let written: Void = client.write([1, 2, 3], at: (20 << 20) + 600_001)
        let environment = bed.environment
        async let opened: Void = {
            await environment.sleep(ns: 400_000_000)
            isAway.withLock { $0 = false }
            bed.faults.clearFaults()
        }()
        #expect(try await read == pattern(1 << 20, 1)[..<4096].map { $0 })
        #expect(isAway.withLock { !$0 })
        try await written
        await opened
        var expected = Array(pattern(1 << 20, 1)[598_016..<602_112])
        expected.replaceSubrange(1985..<1988, with: [1, 2, 3])
        #expect(try await client.read(4096, at: (20 << 20) + 598_016) == expected)
    }

    @Test("row 5: a read that a store denies for too long fails in time") func aDenialThatLasts() async throws {
        let warm = try DiskBed()
        try await warm.create()
        let writer = try await warm.attach()
        try await writer.write(pattern(4096, 1), at: 20 << 20)
        await writer.leave(clean: true)
        try await warm.waitForGeneration(1)
        await warm.manager.drain()
        let bed = try DiskBed(store: warm.store, settings: { $0.requestTimeoutMs = 300 })
        let client = try await bed.attach()
        let reader = try await bed.attach("d@1", host: "r")
        bed.faults.inject(StoreFault(.fail(.denied), verb: .get))
        let began = bed.environment.nowNs
        await #expect(throws: TestFailure.self) { try await client.read(4096, at: 20 << 20) }
        await #expect(throws: TestFailure.self) { try await reader.read(4096, at: 20 << 20) }
        #expect(bed.environment.nowNs - began >= 600_000_000)
    }

    @Test(
        "row 5: what is missing, damaged or of another format is no outage", .timeLimit(.minutes(1)),
        arguments: [
            StoreError.Kind.notFound, .corrupt, .refused,
        ])
    func anAnswerIsNoOutage(_ kind: StoreError.Kind) async throws {
        let warm = try DiskBed()
        try await warm.create()
        let writer = try await warm.attach()
        try await writer.write(pattern(4096, 1), at: 20 << 20)
        await writer.leave(clean: true)
        try await warm.waitForGeneration(1)
        await warm.manager.drain()
        let bed = try DiskBed(store: warm.store)
        let client = try await bed.attach()
        bed.faults.inject(StoreFault(.fail(kind), verb: .get))
        let began = bed.environment.nowNs
        await #expect(throws: TestFailure.self) { try await client.read(4096, at: 20 << 20) }
        await #expect(throws: TestFailure.self) { try await client.write([1], at: 20 << 20) }
        #expect(bed.environment.nowNs - began < 20_000_000_000)
    }

    @Test("row 37: a disk whose loop gets no thread goes to one that runs, and without any its attach fails alone")
    func noThreadForALoop() async throws {
        let bed = try DiskBed()
        let names = ["a", "b", "c"]
        for name in names { try await bed.create(name) }
        func context(_ name: String) throws -> DiskContext {
            DiskContext(
                loop: try Loop(name: name), environment: bed.environment, scratch: bed.scratch,
                locations: bed.context.locations, loader: bed.context.loader, manifests: bed.context.manifests,
                arena: FrameArena(budgetBytes: 4 << 20), journals: JournalBudget(limitBytes: 1 << 30),
                log: bed.context.log, settings: bed.context.settings)
        }
        let manager = DiskManager(
            contexts: try (0..<3).map { try context("r37-disks-\($0)") },
            store: Store(
                id: bed.environment.objectID(), locations: bed.context.locations, environment: bed.environment),
            server: ServerIdentity(id: "a", host: "h", bootID: "b"), takeover: .dead, log: bed.context.log,
            owners: OwnerWatch(
                name: "a", environment: bed.environment, process: { _ in .outOfSight }, fault: nil),
            leases: bed.leases)
        let client = ClientIdentity(address: "h:1", host: "h")
        await Threads.refusing("r37-disks") {
            let error = await #expect(throws: AttachError.self) { try await manager.attach("a", client: client) }
            #expect(error?.kind == .unavailable && error?.description.contains("no thread") == true)
        }
        // The second loop gets its thread; then there are no more.
        let first = TestClient(try await manager.attach("a", client: client))
        try await first.join()
        try await Threads.refusing("r37-disks") {
            let second = TestClient(try await manager.attach("b", client: client))
            try await second.join()
            #expect(second.attached.loop === first.attached.loop)
            try await second.write(pattern(4096, 2), at: 0)
            #expect(try await second.read(4096, at: 0) == pattern(4096, 2))
        }
        let third = TestClient(try await manager.attach("c", client: client))
        #expect(third.attached.loop !== first.attached.loop)
        try await first.write(pattern(4096, 1), at: 0)
        #expect(try await first.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test func aTrimOfATebibyteIsInstantAndReadsAsZeroes() async throws {
        let bed = try DiskBed()
        try await bed.create(size: 2 << 40)
        let client = try await bed.attach()
        try await client.write(pattern(8192, 1), at: 1 << 40)
        try await client.flush()
        try await bed.waitForGeneration(1)
        // The best of some: what else the machine does is not the trim's.
        var bestNs = UInt64.max
        for _ in 0..<5 {
            let before = bed.environment.nowNs
            try await client.zero(0..<2 << 40, trim: true)
            bestNs = min(bestNs, bed.environment.nowNs - before)
        }
        #expect(bestNs < 1_000_000_000)
        #expect(try await client.read(8192, at: 1 << 40) == [UInt8](repeating: 0, count: 8192))
        let extents = await client.run(.blockStatus, offset: 0, length: 1 << 30).extents
        #expect(extents == [Extent(lengthBytes: 1 << 30, isHole: true, isZero: true)])
        try await client.flush()
        try await bed.waitForGeneration(2)
        #expect(try await bed.head().usedBlocks == 0)
    }
}
