// The journal while it is written: what the scratch disk lacks, what fails, and who waits.

import BlockCache
import Glibc
@testable import Margarine
import ObjectStore
@testable import Runtime
import Testing

@Suite struct JournalTests {
    @Test("row 9: no generation goes past a roll-back that is not in the journal")
    func commitsWaitForRollBacks() async throws {
        #expect(try await afterARollBackOnAFullScratch(nil) != .admittedOntoUndoneWrites)
        #expect(try await afterARollBackOnAFullScratch(.commitPassesRollBack) == .admittedOntoUndoneWrites)
    }

    private enum Outcome { case refused, foundWhatItWasTold, admittedOntoUndoneWrites }

    private func afterARollBackOnAFullScratch(_ fault: Fault?) async throws -> Outcome {
        let bed = try DiskBed(settings: { $0.fault = fault })
        try await bed.create { $0.resumeWindowMs = 0 }
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await bed.waitForGeneration(1)
        try await client.write(pattern(4096, 2), at: 0)
        bed.scratch.isFull = true
        await client.leave(clean: false)
        // Another disk needs room.
        let disk = client.device as! Disk
        await client.onLoop { disk.giveRoom() }
        await bed.environment.sleep(ns: 300_000_000)
        bed.kill()
        let left = bed.scratch.kill()
        left.isFull = false
        let next = try DiskBed(store: bed.store, scratch: left)
        await next.manager.recover()
        guard let again = try? await next.attach("d?session=one") else { return .refused }
        let found = try await again.read(4096, at: 0)
        return found == pattern(4096, 2) ? .foundWhatItWasTold : .admittedOntoUndoneWrites
    }

    @Test("row 10: what the scratch disk lacks is waited out, with one line when it begins and one when it ends")
    func lacksAreWaitedOut() async throws {
        for (call, errno) in [
            (MemoryScratch.Call.open, EMFILE), (.open, ENFILE), (.write, ENOSPC), (.write, EDQUOT), (.write, ENOMEM),
            (.write, EAGAIN), (.syncDirectory, EMFILE),
        ] {
            let lines = LogLines()
            let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, lines: lines)
            try await bed.create()
            let client = try await bed.attach("d?session=one")
            for _ in 0..<4 { bed.scratch.failNext(call, errno: errno, path: "journal/") }
            try await client.write(pattern(4096, 1), at: 0)
            try await client.flush()
            #expect(try await client.read(4096, at: 0) == pattern(4096, 1))
            let told = lines.all.filter { $0.contains("scratch disk") }
            #expect(told.count == 2, "\(call) \(errno): \(lines.all)")
            #expect(told.first?.contains("writers wait") == true)
            #expect(told.last?.contains("can be written again") == true)
            bed.kill()
            let next = try DiskBed(store: bed.store, scratch: bed.scratch.kill())
            await next.manager.recover()
            let again = try await next.attach("d?session=one")
            #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        }
    }

    @Test("row 10: many disks that wait for the same thing make two lines, not two each")
    func oneLineForAll() async throws {
        let lines = LogLines()
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, lines: lines)
        var clients: [TestClient] = []
        for number in 0..<8 {
            try await bed.create("d\(number)")
            clients.append(try await bed.attach("d\(number)"))
        }
        bed.scratch.isFull = true
        try await withThrowingTaskGroup(of: Void.self) { group in
            for client in clients { group.addTask { try await client.write(pattern(4096, 1), at: 0) } }
            group.addTask {
                await bed.environment.sleep(ns: 500_000_000)
                bed.scratch.isFull = false
            }
            try await group.waitForAll()
        }
        // The last of them may have been waiting for its next try.
        #expect(lines.all.count == 2, "\(lines.all)")
    }

    @Test("row 10: a lack of descriptors at an attach is no damage, and nobody is told to give anything up")
    func anAttachWithoutDescriptors() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch.kill())
        for _ in 0..<2 {
            next.scratch.failNext(.open, errno: EMFILE, path: "journal/")
            do {
                _ = try await next.attach("d?session=one")
                Issue.record("attached")
            } catch let error as AttachError {
                #expect("\(error)".contains("Nothing is lost; attach again"))
                #expect(!"\(error)".contains("--force"))
            }
        }
        let again = try await next.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("row 10: a start that can't list the journals for a lack of descriptors takes them up later")
    func aStartWithoutDescriptors() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch.kill())
        next.scratch.failNext(.list, errno: EMFILE, path: "journal")
        await next.manager.recover()
        for _ in 0..<500 where !next.manager.hasDisks { await next.environment.sleep(ns: 10_000_000) }
        #expect(next.manager.hasDisks)
        let again = try await next.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("row 10: after a failed sync the disk is closed, and what the next one promises is on the disk")
    func aFailedSyncIsNotForgotten() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        // Nothing gets into the store: the journal alone has it.
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "blocks/"))
        bed.scratch.failNext(.sync, errno: ENOSPC, path: "journal/")
        await #expect(throws: TestFailure.self) { try await client.flush() }
        #expect(client.disconnected != nil)
        let again = try await bed.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        try await again.flush()
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch.powerCutLosingAll(), rebooted: true)
        await next.manager.recover()
        let last = try await next.attach("d?session=two")
        #expect(try await last.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("row 10: a sync that fails while a journal is taken up is not forgotten by the next attach")
    func aFailedSyncOfAnAttach() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.scratch.failNext(.write, errno: EIO, path: "journal/")
        try? await client.write(pattern(4096, 2), at: 0)
        bed.kill()
        let next = try DiskBed(
            store: bed.store, scratch: bed.scratch.kill(), settings: { $0.commitIntervalMs = 600_000 })
        next.scratch.failNext(.sync, errno: EIO, path: "journal/")
        let mark = JournalMark.path(DiskOpener.journalFolder("d", try await bed.head().diskID))
        next.scratch.failNext(.write, errno: EIO, path: mark)
        await #expect(throws: AttachError.self) { _ = try await next.attach("d?session=one") }
        let again = try await next.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        try await again.flush()
        next.kill()
        let last = try DiskBed(store: bed.store, scratch: next.scratch.powerCutLosingAll(), rebooted: true)
        await last.manager.recover()
        #expect(try await last.attach("d?session=two").read(4096, at: 0) == pattern(4096, 1))
    }

    @Test(
        "row 10: a failed sync is not forgotten where the mark can't be written at once",
        arguments: [MemoryScratch.Call.open, .write], [1, 3])
    func aFailedSyncThatIsMarkedLate(_ call: MemoryScratch.Call, _ times: Int) async throws {
        let lines = LogLines()
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, lines: lines)
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        let mark = JournalMark.path(DiskOpener.journalFolder("d", try await bed.head().diskID))
        // Nothing gets into the store: the journal alone has it.
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "blocks/"))
        bed.scratch.failNext(.sync, errno: EIO, path: "journal/")
        for _ in 0..<times { bed.scratch.failNext(call, errno: call == .open ? EMFILE : EIO, path: mark) }
        await #expect(throws: TestFailure.self) { try await client.flush() }
        #expect(client.disconnected != nil)
        let again = try await bed.attach("d?session=one")
        #expect(lines.all.filter { $0.contains("can't say that a sync") }.count == 1, "\(lines.all)")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        try await again.flush()
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch.powerCutLosingAll(), rebooted: true)
        await next.manager.recover()
        #expect(try await next.attach("d?session=two").read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("row 10: the next attach waits for a sync that is under way, and hears that it failed")
    func aFailedSyncOfALostDisk() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.scratch.failNext(.sync, errno: EIO, path: "journal/")
        bed.scratch.holdsCompletions = true
        // Nothing gets into the store: the journal alone has it.
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "blocks/"))
        let flush = Task { try await client.flush() }
        while bed.scratch.heldCompletions == 0 { await bed.environment.sleep(ns: 1_000_000) }
        bed.scratch.holdsCompletions = false
        let disk = client.device as! Disk
        await client.onLoop { disk.lose("a test") }
        let attach = Task { try await bed.attach("d?session=one") }
        await bed.environment.sleep(ns: 200_000_000)
        bed.scratch.releaseCompletions()
        await #expect(throws: TestFailure.self) { try await flush.value }
        let again = try await attach.value
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        try await again.flush()
        bed.kill()
        let last = try DiskBed(store: bed.store, scratch: bed.scratch.powerCutLosingAll(), rebooted: true)
        await last.manager.recover()
        #expect(try await last.attach("d?session=two").read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("row 9: a roll-back that lands alone, after a wait, is known to the head that goes past it")
    func aRollBackThatLandsAlone() async throws {
        let bed = try DiskBed(settings: { $0.journalSegmentBytes = 1 })
        try await bed.create { $0.resumeWindowMs = 0 }
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await bed.waitForGeneration(1)
        try await client.write(pattern(4096, 2), at: 0)
        bed.scratch.isFull = true
        await client.leave(clean: false)
        let disk = client.device as! Disk
        await client.onLoop { disk.giveRoom() }
        await bed.environment.sleep(ns: 60_000_000)
        // There is room for it, and no descriptor for the segment of the next record.
        bed.scratch.fail(.open, errno: EMFILE)
        bed.scratch.isFull = false
        try await bed.waitForGeneration(2)
        bed.kill()
        let left = bed.scratch.kill()
        let next = try DiskBed(store: bed.store, scratch: left)
        await next.manager.recover()
        await #expect(throws: AttachError.self) { _ = try await next.attach("d?session=one") }
    }

    @Test("row 35: thousands of writes that wait for room use no CPU, and all are done once there is some")
    func waitersAreWoken() async throws {
        let bed = try DiskBed(
            settings: {
                $0.commitIntervalMs = 600_000
                $0.journalLimitBytes = 64 << 20
            }, journalBytes: 4 << 20)
        for name in ["d", "e"] { try await bed.create(name) }
        let client = try await bed.attach("d")
        let other = try await bed.attach("e")
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put))
        // Both hold something, and no commit frees it.
        try await other.write(pattern(1 << 20, 7), at: 0)
        let waiting = 4096
        let writes = Task {
            await withTaskGroup(of: DeviceError?.self) { group in
                for number in 0..<waiting {
                    let at = UInt64(number % 4096) * 8192
                    group.addTask { await client.run(.write, offset: at, bytes: pattern(4096, at)).error }
                }
                return await group.reduce(into: [DeviceError]()) { if let error = $1 { $0.append(error) } }
            }
        }
        let disk = client.device as! Disk
        for _ in 0..<500 {
            if await client.onLoop({ disk.writesInLine }) > 3000 { break }
            await bed.environment.sleep(ns: 20_000_000)
        }
        #expect(await client.onLoop { disk.writesInLine } > 3000)
        @Sendable func loopCPU() -> UInt64 {
            var time = timespec()
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
            return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
        }
        await bed.environment.sleep(ns: 300_000_000)
        let before = await client.onLoop { loopCPU() }
        await bed.environment.sleep(ns: 2_000_000_000)
        let used = await client.onLoop { loopCPU() } - before
        #expect(used < 200_000_000, "\(used / 1_000_000) ms of CPU in 2 s")
        bed.faults.clearFaults()
        #expect(await writes.value == [])
        #expect(try await client.read(4096, at: 4095 * 8192) == pattern(4096, 4095 * 8192))
        #expect(try await other.read(1 << 20, at: 0) == pattern(1 << 20, 7))
    }

    @Test("row 35: writes of a connection that leaves do not go on waiting")
    func whoLeavesWaitsNoMore() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, journalBytes: 1 << 20)
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put))
        let results = await withTaskGroup(of: DeviceError?.self) { group in
            for number in 0..<512 {
                let at = UInt64(number) * 4096
                group.addTask { await client.run(.write, offset: at, bytes: pattern(4096, at)).error }
            }
            group.addTask {
                await bed.environment.sleep(ns: 300_000_000)
                await client.leave(clean: false)
                return nil
            }
            return await group.reduce(into: [DeviceError?]()) { $0.append($1) }
        }
        #expect(results.contains(.shutdown))
        let disk = client.device as! Disk
        for _ in 0..<500 {
            if await client.onLoop({ disk.writesInLine + disk.waitingWrites.running }) == 0 { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        #expect(await client.onLoop { disk.writesInLine + disk.waitingWrites.running } == 0)
    }

    @Test("row 35: whoever waits is woken when room comes, not by the look once a second")
    func roomIsTold() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 }, journalBytes: 4 << 20)
        try await bed.create()
        let client = try await bed.attach("d")
        let disk = client.device as! Disk
        var shortestNs = UInt64.max
        for round in UInt64(0)..<5 {
            // As if the journal of a disk on another loop held all there is.
            bed.context.journals.change(from: 0, to: 4 << 20)
            let write = Task { try await client.write(pattern(4096, round), at: round * 4096) }
            while await client.onLoop({ disk.roomLine.count }) == 0 { await bed.environment.sleep(ns: 1_000_000) }
            let began = bed.environment.nowNs
            bed.context.journals.change(from: 4 << 20, to: 0)
            try await write.value
            shortestNs = min(shortestNs, bed.environment.nowNs - began)
        }
        #expect(shortestNs < 400_000_000)
    }

    @Test("also: a journal stays until its write has landed: the kernel reads its memory")
    func aJournalOutlivesItsWrites() async throws {
        let bed = try DiskBed()
        bed.scratch.writesInline = false
        bed.scratch.holdsCompletions = true
        try bed.loop.start()
        let weakly = Weakly()
        await bed.context.run { [context = bed.context] in
            let pages = DirtyPages(arena: context.arena)
            let journal = Journal(
                folder: "journal/x", diskID: ObjectID(high: 1, low: 1), epoch: 1, lastSequence: 0, pages: pages,
                context: context)
            journal.mark(.safePoint, 1)
            _ = journal.append()
            weakly.journal = journal
        }
        #expect(bed.scratch.heldCompletions == 1)
        #expect(weakly.journal != nil)
        bed.scratch.holdsCompletions = false
        bed.scratch.releaseCompletions()
        for _ in 0..<100 where weakly.journal != nil { await bed.environment.sleep(ns: 10_000_000) }
        #expect(weakly.journal == nil)
    }

    private final class Weakly: @unchecked Sendable {  // touched by one task
        weak var journal: Journal?
    }
}

extension Disk {
    /// Writes that wait: for room, or for those before them that do.
    fileprivate var writesInLine: Int { roomLine.count + waitingWrites.waitingCount }
}
