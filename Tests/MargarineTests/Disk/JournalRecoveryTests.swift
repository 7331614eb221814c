// What recovery makes of a journal: after a kill, after losses of power, and of one that was damaged.

import BlockCache
import Foundation
@testable import Margarine
import ObjectStore
@testable import Runtime
import Testing

@Suite struct JournalRecoveryTests {
    // MARK: The table

    @Test("row 8, 11: the recovery table says damage only of what must be there, and then always")
    func everyRowOfTheTable() {
        for found in SegmentFound.allCases {
            for trust in JournalTrust.allCases {
                let isUsable = [.joins, .begins].contains(found)
                // A header that is wrong, or records that are missing before it: lost with the power, or else damaged.
                let isMissing = [.gap, .damaged].contains(found)
                let right: SegmentVerdict = isUsable ? .read : isMissing && trust == .kept ? .damage : .drop
                #expect(JournalVerdict.segment(found, trust) == right, "\(found), \(trust)")
            }
        }
        for found in RecordFound.allCases {
            for behind in RecordBehind.allCases {
                for trust in JournalTrust.allCases {
                    let right: RecordVerdict
                    if found == .due {
                        right = .take
                    } else if found == .end {
                        right = .leave
                    } else if trust == .lost || behind == .joined {
                        right = .cut
                    } else {
                        // Only the last batch can be cut short by a kill.
                        right = found == .partial && behind == .nothing ? .cut : .damage
                    }
                    #expect(JournalVerdict.record(found, behind, trust) == right, "\(found), \(behind), \(trust)")
                }
            }
        }
        #expect(JournalVerdict.isDamaged(synced: 5, read: 4))
        #expect(!JournalVerdict.isDamaged(synced: 5, read: 5))
    }

    // MARK: Boot ids

    @Test(
        "row 3: one disk that can't be taken up after a reboot does not make later crashes losses of power for others")
    func theBootIsNotedPerDisk() async throws {
        let first = try DiskBed(boot: "one")
        for name in ["a", "b"] { try await first.create(name) }
        for name in ["a", "b"] {
            let client = try await first.attach("\(name)?session=old")
            try await client.write(pattern(4096, 1), at: 0)
        }
        first.kill()
        let second = try DiskBed(store: first.store, scratch: first.scratch, boot: "two")
        second.faults.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "disks/b/"))
        await second.manager.recover()
        let client = try await second.attach("a?session=new")
        try await client.write(pattern(4096, 2), at: 8192)
        second.kill()
        let third = try DiskBed(store: first.store, scratch: first.scratch, boot: "two")
        await third.manager.recover()
        let again = try await third.attach("a?session=new")
        #expect(try await again.read(4096, at: 8192) == pattern(4096, 2))
        // Of the other one the loss of power is not forgotten.
        await #expect(throws: AttachError.self) { try await third.attach("b?session=old") }
    }

    @Test("row 3: an attach whose boot can't be noted fails and says so, and the next one is as if it had not been")
    func theBootMustBeNoted() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let folder = DiskOpener.journalFolder("d", try await bed.head().diskID)
        bed.scratch.failNext(.write, errno: 5, path: JournalMark.path(folder))
        do {
            _ = try await bed.attach("d?session=one")
            Issue.record("attached without a mark")
        } catch let error as AttachError {
            #expect(error.kind == .unavailable)
            #expect("\(error)".contains("can't be made ready"))
        }
        _ = try await bed.attach("d?session=two")
    }

    @Test("row 3: the boot is noted only once the journal says that the disk went back")
    func theBootIsNotedAfterTheRollBack() async throws {
        let first = try DiskBed(boot: "one")
        try await first.create()
        let client = try await first.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await first.waitForGeneration(1)
        try await client.write(pattern(4096, 2), at: 0)
        first.kill()
        let scratch = first.scratch.kill()
        scratch.isFull = true
        let second = try DiskBed(
            store: first.store, scratch: scratch, boot: "two", settings: { $0.requestTimeoutMs = 200 })
        await #expect(throws: AttachError.self) { _ = try await second.attach("d?session=two") }
        second.kill()
        let left = scratch.kill()
        let third = try DiskBed(store: first.store, scratch: left, boot: "two")
        await third.manager.recover()
        // What power may have torn is no session's.
        for name in ["two", "three"] {
            guard let again = try? await third.attach("d?session=\(name)") else { continue }
            #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
            await again.leave(clean: true)
        }
    }

    @Test("a disk that was attached and never written is taken up after a loss of power")
    func anEmptyJournalIsTakenUp() async throws {
        let bed = try DiskBed(boot: "one")
        try await bed.create()
        _ = try await bed.attach("d?session=one")
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch.powerCutLosingAll(), boot: "two")
        await next.manager.recover()
        // Nobody else can have it as long as its server lives: it serves the disk, or gives it back.
        #expect(await next.manager.present("d") != nil)
        await next.manager.drain()
        #expect(try await next.head().owner == nil)
        let folder = DiskOpener.journalFolder("d", try await next.head().diskID)
        #expect(try next.scratch.list(folder).isEmpty)
    }

    @Test("a disk is not attached that the scratch disk can't note")
    func theOwnerMustBeNoted() async throws {
        for call in [MemoryScratch.Call.open, .syncDirectory] {
            let bed = try DiskBed()
            try await bed.create()
            bed.scratch.failNext(call, errno: 5)
            await #expect(throws: AttachError.self) { try await bed.attach("d?session=one") }
            #expect(try await bed.head().owner == nil)
            _ = try await bed.attach("d?session=one")
        }
    }

    @Test("row 3: marks of earlier versions are read with the boot id that was noted for all disks")
    func marksOfEarlierVersions() async throws {
        let disk = ObjectID(high: 1, low: 2)
        let scratch = MemoryScratch()
        func past(_ folder: String = "journal/d") async throws -> JournalPast {
            try await JournalPast.find(in: folder, of: disk, bootID: "now", scratch)
        }
        #expect(try await !past().survives)
        _ = try scratch.open("journal/d/attached", create: true)
        #expect(try await !past().survives)
        try await scratch.open("boot-id", create: true).write(Array("now\n".utf8), at: 0)
        #expect(try await past().survives)
        #expect(try await past().trust == .lost)
        // A disk that this version attached is not judged by what an earlier one noted.
        _ = try scratch.open("journal/d/owned", create: true)
        #expect(try await !past().survives)
        try scratch.remove("journal/d/owned")
        // A folder with nothing in it has lost its mark.
        #expect(try await !past("journal/e").survives)
        try scratch.open("boot-id", create: true).truncate(to: 0)
        try await scratch.open("boot-id", create: true).write(Array("before\n".utf8), at: 0)
        #expect(try await !past().survives)
    }

    @Test func everyDamagedMarkIsRefused() {
        let disk = ObjectID(high: 3, low: 4)
        let mark = JournalMark(count: 7, epoch: 2, boot: 99, synced: 12, hasSyncFailed: true)
        var bytes = [UInt8](repeating: 0, count: JournalMark.slotBytes)
        bytes.withUnsafeMutableBytes { mark.put($0.baseAddress!, of: disk) }
        #expect(bytes.withUnsafeBytes { JournalMark.slot($0.baseAddress!, of: disk) } == mark)
        for at in bytes.indices {
            bytes[at] ^= 4
            #expect(bytes.withUnsafeBytes { JournalMark.slot($0.baseAddress!, of: disk) } == nil, "byte \(at)")
            bytes[at] ^= 4
        }
    }

    // MARK: Two losses of power

    /// What page 25 holds after two losses of power in a row: the first tore one of several segments, and after the second
    /// what had not been made durable of the removals is undone. It was committed with 2; 1 was cut off.
    private func pageAfterTwoLosses(_ fault: Fault?) async throws -> [UInt8] {
        let bed = try DiskBed(
            boot: "one",
            settings: {
                $0.commitIntervalMs = 600_000
                $0.journalSegmentBytes = 32 << 10
            })
        try await bed.create { $0.durability = .memory }
        let first = try await bed.attach("d?session=one")
        for page in 0..<40 {
            try await first.write(pattern(4096, 1), at: UInt64(page) * 4096)
            if page % 10 == 9 { try await first.flush() }
        }
        bed.kill()
        // By chance the kernel had written all of it but a part of the second segment.
        let folder = DiskOpener.journalFolder("d", try await bed.head().diskID)
        let numbers = try JournalReplay.segmentNumbers(in: folder, scratch: bed.scratch)
        #expect(numbers.count > 4)
        for number in numbers {
            try await bed.scratch.open(Journal.path(folder, number), create: false).sync()
        }
        try await bed.scratch.syncDirectory(folder)
        bed.scratch.flipBit(Journal.path(folder, 2), at: 15_000)

        let second = try DiskBed(
            store: bed.store, scratch: bed.scratch.powerCutLosingAll(), boot: "two", settings: { $0.fault = fault })
        await second.manager.recover()
        let client = try await second.attach("d?session=two")
        for page in 15..<27 { try await client.write(pattern(4096, 2), at: UInt64(page) * 4096) }
        try await client.flush()
        let disk = client.device as! Disk
        for _ in 0..<500 {
            if await client.onLoop({ disk.waiting == nil && disk.committing == nil && disk.active.isEmpty }) { break }
            await second.environment.sleep(ns: 10_000_000)
        }
        second.kill()

        let third = try DiskBed(
            store: bed.store, scratch: second.scratch.powerCutLosingAll(), boot: "three",
            settings: { $0.fault = fault })
        await third.manager.recover()
        return try await third.attach("d?session=three").read(4096, at: 25 * 4096)
    }

    @Test("row 8: pages that a recovery cut off never come back, also after a second loss of power")
    func deadPagesStayDead() async throws {
        #expect(try await pageAfterTwoLosses(nil) == pattern(4096, 2))
        #expect(try await pageAfterTwoLosses(.replayIgnoresTimeline) == pattern(4096, 1))
    }

    @Test("row 8: of segments that contradict each other the newest and those it goes on from are the journal")
    func timelines() {
        func header(_ number: UInt64, _ first: UInt64, epoch: UInt64 = 1, id: UInt64, follows: UInt64?)
            -> JournalFormat.SegmentHeader
        {
            JournalFormat.SegmentHeader(epoch: epoch, number: number, firstSequence: first, id: id, follows: follows)
        }
        let branch = [
            header(1, 1, id: 11, follows: 0), header(2, 10, id: 12, follows: 11), header(3, 20, id: 13, follows: 12),
            header(4, 15, epoch: 2, id: 14, follows: 12),
        ]
        func members(_ headers: [JournalFormat.SegmentHeader], base: UInt64 = 0) -> [UInt64] {
            let timeline = JournalTimeline(headers: headers, base: base)
            return headers.map(\.number).filter { timeline.contains($0) }
        }
        #expect(members(branch) == [1, 2, 4])
        #expect(members(branch, base: 30) == [1, 2, 4])
        #expect(members(Array(branch[..<3])) == [1, 2, 3])
        // The newest can't be reached: what is there without it.
        #expect(members([branch[0], branch[2]]) == [1])
        // Nothing before it is needed.
        #expect(members([branch[0], branch[2]], base: 19) == [3])
        // An id that a later attachment follows can't be of a later one still.
        #expect(members([header(1, 1, epoch: 3, id: 1, follows: 0), header(2, 9, epoch: 2, id: 2, follows: 1)]) == [1])
    }

    // MARK: Damage

    /// A journal of some records, flushed or not, as it is after a kill.
    private func killed(flushed: Bool, pages: Int = 3) async throws -> (bed: DiskBed, folder: String, path: String) {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        for page in 0..<pages { try await client.write(pattern(4096, UInt64(page)), at: UInt64(page) * 4096) }
        if flushed { try await client.flush() }
        bed.kill()
        let folder = DiskOpener.journalFolder("d", try await bed.head().diskID)
        return (bed, folder, Journal.path(folder, 1))
    }

    @Test("row 11: a flipped bit in a synced record is damage", arguments: ["one", "two"])
    func aFlippedBit(boot: String) async throws {
        let (bed, _, path) = try await killed(flushed: true, pages: 64)
        let size = UInt64(try #require(bed.scratch.contents(path)?.count))
        // In the last page, behind which no record says what was synced.
        bed.scratch.flipBit(path, at: size - 64 - 2000)
        let next = try DiskBed(
            store: bed.store, scratch: bed.scratch.kill(), boot: boot == "one" ? "boot" : "another")
        await next.manager.recover()
        do {
            _ = try await next.attach("d?session=one")
            Issue.record("attached")
        } catch let error as AttachError { #expect("\(error)".contains("can't be taken up")) }
        #expect(next.scratch.contents(path)?.count == Int(size), "a damaged journal was changed")
    }

    @Test("row 11: without a reboot any flipped bit is damage, synced or not")
    func anyFlippedBit() async throws {
        let (bed, folder, path) = try await killed(flushed: false)
        let id = try await bed.head().diskID
        let size = try #require(bed.scratch.contents(path)?.count)
        func replay() async throws -> UInt64 {
            let pages = DirtyPages(arena: FrameArena(budgetBytes: 1 << 20))
            return try await JournalReplay.run(
                folder: folder, diskID: id, base: 0, past: JournalPast(trust: .kept, survives: true), pages: pages,
                scratch: bed.scratch
            ).lastSequence
        }
        #expect(try await replay() == 3)
        var places = Array(stride(from: 0, to: size, by: 97))
        for record in 0..<3 { places += (0..<72).map { 96 + record * (64 + 4 + 4096) + $0 } }
        for place in places {
            bed.scratch.flipBit(path, at: UInt64(place), bit: place % 8)
            await #expect(throws: JournalDamage.self, "byte \(place)") { _ = try await replay() }
            bed.scratch.flipBit(path, at: UInt64(place), bit: place % 8)
        }
    }

    @Test("row 11: what a kill cut off within the last batch is no damage, and is not taken")
    func aTornLastBatch() async throws {
        let (bed, folder, path) = try await killed(flushed: false)
        let id = try await bed.head().diskID
        let whole = try #require(bed.scratch.contents(path))
        for length in stride(from: 0, through: whole.count, by: 61) {
            let scratch = MemoryScratch()
            try await scratch.open(path, create: true).write(Array(whole[..<length]), at: 0)
            let pages = DirtyPages(arena: FrameArena(budgetBytes: 1 << 20))
            let found = try await JournalReplay.run(
                folder: folder, diskID: id, base: 0, past: JournalPast(trust: .kept, survives: true), pages: pages,
                scratch: scratch)
            #expect(found.lastSequence == UInt64(max(0, length - 96) / (64 + 4 + 4096)))
            // But not where more had been synced.
            await #expect(throws: JournalDamage.self) {
                let past = JournalPast(trust: .kept, survives: true, synced: found.lastSequence + 1)
                _ = try await JournalReplay.run(
                    folder: folder, diskID: id, base: 0, past: past, pages: pages, scratch: scratch)
            }
        }
    }

    @Test("row 11: a segment whose first batch a kill cut off hides nothing that is written later")
    func aSegmentWithoutRecords() async throws {
        func settings(_ settings: inout DiskSettings) {
            settings.commitIntervalMs = 600_000
            settings.journalSegmentBytes = 8 << 10
        }
        let bed = try DiskBed(settings: settings)
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        for page in 0..<3 { try await client.write(pattern(4096, UInt64(page)), at: UInt64(page) * 4096) }
        bed.kill()
        let folder = DiskOpener.journalFolder("d", try await bed.head().diskID)
        var scratch = bed.scratch.kill()
        try scratch.open(Journal.path(folder, 2), create: false).truncate(to: 1000)
        for seed in 7..<10 {
            let next = try DiskBed(store: bed.store, scratch: scratch, settings: settings)
            await next.manager.recover()
            let again = try await next.attach("d?session=one")
            #expect(try await again.read(4096, at: 4096) == pattern(4096, 1))
            if seed > 7 { #expect(try await again.read(4096, at: 8192) == pattern(4096, UInt64(seed - 1))) }
            try await again.write(pattern(4096, UInt64(seed)), at: 8192)
            next.kill()
            scratch = next.scratch.kill()
        }
    }

    @Test(
        "row 11: what any record that is cut off says of syncs counts, in the same segment or in a later one",
        arguments: [1, 2])
    func claimsOfDeadRecords(segments: Int) async throws {
        let bed = try DiskBed(
            settings: {
                $0.commitIntervalMs = 600_000
                if segments == 2 { $0.journalSegmentBytes = 12 << 10 }
            })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        for page in 0..<4 { try await client.write(pattern(4096, UInt64(page)), at: UInt64(page) * 4096) }
        try await client.flush()
        try await client.write(pattern(4096, 5), at: 5 * 4096)
        bed.kill()
        let id = try await bed.head().diskID
        let folder = DiskOpener.journalFolder("d", id)
        #expect(try JournalReplay.segmentNumbers(in: folder, scratch: bed.scratch).count == segments)
        bed.scratch.flipBit(Journal.path(folder, 1), at: 6000)
        await #expect(throws: JournalDamage.self) {
            _ = try await JournalReplay.run(
                folder: folder, diskID: id, base: 0, past: JournalPast(trust: .lost, survives: false),
                pages: DirtyPages(arena: FrameArena(budgetBytes: 1 << 20)), scratch: bed.scratch)
        }
    }

    @Test("A start that is refused a disk leaves the mark of its journal alone")
    func refusalsKeepTheMark() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.kill()
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        func resize(_ bytes: UInt64) async throws {
            let found = try #require(try await heads.load("d"))
            var head = found.head
            head.sizeBytes = bytes
            _ = try await heads.swap(head, expecting: found.etag)
        }
        try await resize(1 << 63)
        let second = try DiskBed(store: bed.store, scratch: bed.scratch.kill())
        await second.manager.recover()
        second.kill()
        try await resize(64 << 20)
        let third = try DiskBed(store: bed.store, scratch: second.scratch.kill())
        await third.manager.recover()
        let again = try await third.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("A head that was read before this server had the disk does not set its journal aside")
    func anOldHead() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.holdAfterEffect(gate), verb: .get, keyContains: "disks/d/head", count: 1))
        let slow = Task { try await bed.attach("d?session=slow") }
        await gate.waitUntilArrived()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        let disk = client.device as! Disk
        await client.onLoop { disk.lose("a test") }
        while await bed.manager.present("d") != nil { await bed.environment.sleep(ns: 1_000_000) }
        gate.open()
        #expect(try await slow.value.read(4096, at: 0) == pattern(4096, 1))
    }

    @Test("A server id that can't be read is no reason to become another server")
    func serverIDs() throws {
        let environment = SystemEnvironment(workers: 1)
        let directory = FileManager.default.temporaryDirectory.path + "/ids-\(environment.randomBits())"
        try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(atPath: directory) }
        let first = try ServerFiles.identity(in: directory, environment: environment)
        #expect(try ServerFiles.identity(in: directory, environment: environment).id == first.id)
        try Data().write(to: URL(fileURLWithPath: directory + "/server-id"))
        #expect(throws: DaemonError.self) { try ServerFiles.identity(in: directory, environment: environment) }
    }

    @Test("row 11: a torn last batch is cut off for good before anything is written behind it")
    func aTornBatchIsCut() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.scratch.failNext(.write, errno: 5, path: "journal/")
        try? await client.write(pattern(4096, 2), at: 0)
        bed.kill()
        let path = Journal.path(DiskOpener.journalFolder("d", try await bed.head().diskID), 1)
        // The header of the segment and one record of a page.
        let wholeBytes: Int = 96 + 64 + 4 + 4096
        let tornBytes = try #require(bed.scratch.contents(path)?.count)
        #expect(tornBytes > wholeBytes)
        var scratch = bed.scratch.kill()
        for seed in 3..<6 {
            let next = try DiskBed(store: bed.store, scratch: scratch, settings: { $0.commitIntervalMs = 600_000 })
            await next.manager.recover()
            let again = try await next.attach("d?session=one")
            let leftBytes = next.scratch.contents(path)?.count
            #expect(leftBytes == wholeBytes)
            #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
            try await again.write(pattern(4096, UInt64(seed)), at: 4096)
            next.kill()
            scratch = next.scratch.kill()
        }
    }
}
