// Attaches that come to nothing, and what is left of them.

import BlockCache
import Logging
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct AdmissionTests {
    @Test("row 25: of lost sessions a running disk holds as many as its head")
    func lostSessionsAreNotKeptInMemory() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.resumeWindowMs = 0 }
        for i in 0..<70 {
            let client = try await bed.attach("d?session=s\(i)")
            await client.leave(clean: false)
        }
        _ = try await bed.attach("d?session=last")
        let (context, disk) = try #require(await bed.manager.present("d"))
        #expect(await context.run { disk.head.lostSessions.count } <= Head.maxLostSessions)
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=s0") }
        bed.kill()
    }

    @Test("row 26: whoever goes away while he is being admitted replaces nobody")
    func aClientThatHasGoneReplacesNobody() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: false)
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head", count: 1))
        let second = Task { try await bed.attach("d?session=two") }
        await gate.waitUntilArrived()
        second.cancel()
        gate.open()
        await #expect(throws: AttachError.self) { try await second.value }
        let again = try await bed.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        bed.kill()
    }

    @Test(
        "row 26: whoever goes away while the store takes his admission replaces nobody",
        arguments: ["d", "d?session=two"])
    func aClientThatHasGoneIsTakenBack(_ other: String) async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: false)
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .put, keyContains: "head", count: 1))
        let second = Task { try await bed.attach(other) }
        await gate.waitUntilArrived()
        second.cancel()
        gate.open()
        await #expect(throws: AttachError.self) { try await second.value }
        let again = try await bed.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        let head = try await bed.head()
        #expect(head.session == "one" && head.lostSessions.isEmpty)
        bed.kill()
    }

    @Test("row 26: a session that came back in time keeps what it was told while another one is being admitted")
    func whoCameBackInTimeLosesNothing() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.resumeWindowMs = 300 }
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: false)
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head", count: 1))
        let second = Task { try await bed.attach("d?session=two") }
        await gate.waitUntilArrived()
        second.cancel()
        let back = Task { try await bed.attach("d?session=one") }
        await bed.environment.sleep(ns: 1_000_000_000)
        gate.open()
        await #expect(throws: AttachError.self) { try await second.value }
        let again = try await back.value
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        // Who waits no more holds nothing up.
        await again.leave(clean: false)
        bed.faults.inject(StoreFault(.hold(StoreGate()), verb: .get, keyContains: "head", count: 1))
        let third = Task { try await bed.attach("d?session=three") }
        let fourth = Task { try await bed.attach("d?session=one") }
        await bed.environment.sleep(ns: 100_000_000)
        fourth.cancel()
        _ = try? await fourth.value
        let (_, disk) = try #require(await bed.manager.present("d"))
        #expect(disk.returning == 0)
        third.cancel()
        bed.kill()
    }

    @Test("row 26: an admission stored without an answer leaves the session that is away, also after a restart")
    func anUnclearAdmissionChangesNothing() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: false)
        bed.faults.inject(StoreFault(.delay(ns: 1), verb: .get, keyContains: "head", count: 1))
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "head"))
        bed.faults.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "head", count: 1))
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=two") }
        #expect(try await bed.head().session == "two")
        bed.faults.clearFaults()
        _ = try await bed.attach("d?session=one")
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch)
        let again = try await next.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        next.kill()
    }

    @Test("row 26: an attach that fails because scratch is full can be tried again under its name")
    func aFullScratchCostsNoName() async throws {
        let bed = try DiskBed()
        try await bed.create()
        bed.scratch.fail(.open, errno: 28)
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=one") }
        bed.scratch.fail(.open, errno: nil)
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.kill()
    }

    /// Found by the simulator: the disk stayed with a server that lived and did not serve it.
    @Test("a journal that could not be taken up at the start is taken up later, without anybody's asking")
    func journalsAreTakenUpLater() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        bed.kill()
        let next = try DiskBed(store: bed.store, scratch: bed.scratch)
        next.scratch.fail(.open, errno: 28)
        await next.manager.recover()
        next.scratch.fail(.open, errno: nil)
        try await next.waitForGeneration(1)
        next.kill()
    }

    @Test("nothing is taken once the server ends")
    func aServerThatEndsTakesNoDisk() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head", count: 1))
        let late = Task { try await bed.attach() }
        await gate.waitUntilArrived()
        await bed.manager.drain()
        gate.open()
        await #expect(throws: AttachError.self) { try await late.value }
        #expect(try await bed.head().owner == nil)
    }

    @Test("an admission that waits while the server gives the disk back ends without a mistake")
    func aDiskIsGivenBackUnderAnAdmission() async throws {
        let lines = LogLines()
        let bed = try DiskBed(lines: lines)
        try await bed.create()
        let first = try await bed.attach()
        await first.leave(clean: true)
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head", count: 1))
        let late = Task { try await bed.attach() }
        await gate.waitUntilArrived()
        async let drained: Void = bed.manager.drain()
        // However slow the machine is: the disk drains while the admission waits.
        for _ in 0..<6_000 {
            if await first.onLoop({ (first.device as! Disk).tenure }) == .draining { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        await bed.environment.sleep(ns: 100_000_000)
        gate.open()
        await drained
        await #expect(throws: AttachError.self) { try await late.value }
        #expect(!lines.all.contains { $0.contains("can't happen") }, "\(lines.all)")
        #expect(try await bed.head().owner == nil)
    }

    @Test("row 13: a lease is as short as the last record that may be stored says")
    func aShorterLeaseCountsFromItsRequest() async throws {
        let test = TestStore()
        let deadAfterMs = Mutex<Int64>(60_000)
        let lease = Lease(location: 0)
        let heads = HeadStore(bucket: test.faulty, environment: test.environment)
        let heartbeat = Heartbeat(
            lease: lease, heads: heads, log: Logger(label: "t") { _ in SwiftLogNoOpLogHandler() }, interval: { 5_000 },
            content: { [environment = test.environment] in
                OwnerWatchTests.record("a", environment, deadAfterMs: deadAfterMs.withLock { $0 })
            })
        try await heartbeat.renew()
        deadAfterMs.withLock { $0 = 4_000 }
        // Stored, and never answered.
        test.faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "servers/", count: 1))
        test.faulty.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "servers/", count: 1))
        let sent = test.environment.bootNs
        await #expect(throws: CatalogError.self) { try await heartbeat.renew() }
        #expect(lease.stands(atNs: sent + 2_900_000_000) && !lease.stands(atNs: sent + 3_000_000_000))
    }

    /// What an opening leaves whose head was stored, and no answer came.
    private func openUnclearly(_ bed: DiskBed, _ export: String) async {
        bed.faults.inject(StoreFault(.delay(ns: 1), verb: .get, keyContains: "head", count: 1))
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "head"))
        bed.faults.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "head", count: 1))
        await #expect(throws: AttachError.self) { try await bed.attach(export) }
        bed.faults.clearFaults()
    }

    @Test("row 26: an opening stored without an answer does not cost the client its name")
    func anUnclearOpeningCostsNoName() async throws {
        let bed = try DiskBed()
        try await bed.create()
        await openUnclearly(bed, "d?session=one")
        #expect(try await bed.head().owner?.server == "a")
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        bed.kill()
    }

    @Test("row 26: an opening stored without an answer leaves the session that may go on")
    func anUnclearOpeningLeavesTheClaim() async throws {
        let bed = try DiskBed(settings: { $0.releaseAfterMs = 1 })
        try await bed.create { $0.resumeWindowMs = 0 }
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        try await first.flush()
        await first.leave(clean: false)
        for _ in 0..<500 {
            if try await bed.head().owner == nil { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        #expect(try await bed.head().session == "one")
        await openUnclearly(bed, "d?session=two")
        let again = try await bed.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        bed.kill()
    }

    @Test("a disk that was opened unclearly goes back to the store, though nobody asks for it again")
    func anUnclearOpeningIsUndone() async throws {
        let bed = try DiskBed()
        try await bed.create()
        await openUnclearly(bed, "d?session=one")
        for _ in 0..<1_000 {
            if try await bed.head().owner == nil { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        #expect(try await bed.head().owner == nil)
        #expect(try await bed.head().session == nil)
        let other = try DiskBed(store: bed.store, server: "b")
        _ = try await other.attach("d?session=one")
        other.kill()
        bed.kill()
    }

    /// Nothing of an unnamed client had to be said, so the head that gives the disk back was good still, and another server
    /// had the disk beside this one.
    @Test("row 2: what gives a disk back, and reaches the store late, is void once a client is served")
    func aLateReleaseIsVoid() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach()
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: true)
        try await bed.waitForGeneration(1)
        let disk = try #require(await bed.manager.present("d")).1
        for _ in 0..<500 {
            if await bed.context.run({ disk.isClean && !disk.isHeadStale }) { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        let sent = try #require(try await heads.load("d"))
        // It is on its way when its sender gives up, and the first look at what became of it fails too.
        bed.faults.inject(StoreFault(.fail(.unclear), verb: .put, keyContains: "disks/d/head", count: 1))
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "disks/d/head", count: 1))
        await bed.context.run { _ = disk.happen(.restEnded) }
        for _ in 0..<500 {
            if await bed.context.run({ disk.tenure == .idle }) { break }
            await bed.environment.sleep(ns: 10_000_000)
        }
        #expect(bed.faults.suffered == 2)
        let second = try await bed.attach()
        var late = sent.head
        late.owner = nil
        if case .won = try await heads.swap(late, expecting: sent.etag) {
            Issue.record("the disk was given back while a client was served")
        }
        try await second.write(pattern(4096, 2), at: 0)
        try await second.flush()
        let other = try DiskBed(store: bed.store, server: "b", alive: ["a"])
        await #expect(throws: AttachError.self) { try await other.attach() }
        other.kill()
        bed.kill()
    }

    @Test("a drain gives a disk back whose client was admitted and has not joined", arguments: ["d", "d?session=one"])
    func aDrainEndsAnAdmission(_ export: String) async throws {
        let bed = try DiskBed()
        try await bed.create()
        let attached = try await bed.manager.attach(export, client: ClientIdentity(address: "h:1", host: "h"))
        await bed.manager.drain()
        let head = try await bed.head()
        #expect(head.owner == nil && head.lostSessions.isEmpty)
        await #expect(throws: AttachError.self) { try await TestClient(attached).join() }
        let next = try DiskBed(store: bed.store, server: "b")
        _ = try await next.attach(export)
        next.kill()
    }

    @Test("a drain keeps what a client may resume that has not joined again yet")
    func aDrainKeepsWhatMayBeResumed() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach("d?session=one")
        try await client.write(pattern(4096, 1), at: 0)
        await client.leave(clean: false)
        let again = try await bed.manager.attach("d?session=one", client: ClientIdentity(address: "h:2", host: "h"))
        await bed.manager.drain()
        #expect(try await bed.head().owner?.server == "a")
        withExtendedLifetime(again) {}
        let next = try DiskBed(store: bed.store, scratch: bed.scratch)
        await next.manager.recover()
        #expect(try await next.attach("d?session=one").read(4096, at: 0) == pattern(4096, 1))
        next.kill()
    }

    /// Whether clients that wait for the disk and go away are done with at once, before what they wait for.
    private func areForgotten(_ bed: DiskBed) async -> Bool {
        let ended = Tally()
        let count = 50
        let clients = (0..<count).map { number in
            Task {
                _ = try? await bed.attach("d?session=w\(number)", host: "w\(number)")
                ended.add()
            }
        }
        await bed.environment.sleep(ns: 200_000_000)
        let early = ended.value
        #expect(early == 0)
        for client in clients { client.cancel() }
        for _ in 0..<200 where ended.value < count { await bed.environment.sleep(ns: 10_000_000) }
        return ended.value == count
    }

    @Test("row 29: clients that go away while another's admission is undecided do not wait for it")
    func whoGoesAwayDoesNotWaitForAnOutcome() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        await first.leave(clean: false)
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head", count: 1))
        let second = Task { try await bed.attach("d?session=two") }
        await gate.waitUntilArrived()
        #expect(await areForgotten(bed))
        gate.open()
        _ = try await second.value
        bed.kill()
    }

    @Test("row 29: clients that go away while a disk is opened do not wait for it")
    func whoGoesAwayDoesNotWaitForAnOpening() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), verb: .put, keyContains: "head", count: 1))
        let first = Task { try await bed.attach("d?session=one") }
        await gate.waitUntilArrived()
        #expect(await areForgotten(bed))
        gate.open()
        _ = try await first.value
        bed.kill()
    }

    @Test("row 29: clients that go away while a roll-back is not in the journal do not wait for it")
    func whoGoesAwayDoesNotWaitForTheJournal() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.resumeWindowMs = 0 }
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        bed.scratch.isFull = true
        await first.leave(clean: false)
        #expect(await areForgotten(bed))
        bed.scratch.isFull = false
        _ = try await bed.attach("d?session=two")
        bed.kill()
    }

    @Test("row 29: clients that go away while a lost disk leaves do not wait for it")
    func whoGoesAwayDoesNotWaitForALostDisk() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        bed.scratch.writesInline = false
        bed.scratch.holdsCompletions = true
        let write = Task { try await first.write(pattern(4096, 1), at: 0) }
        while bed.scratch.heldCompletions == 0 { await bed.environment.sleep(ns: 1_000_000) }
        let disk = first.device as! Disk
        await first.onLoop { disk.lose("a test") }
        #expect(await areForgotten(bed))
        bed.scratch.holdsCompletions = false
        bed.scratch.releaseCompletions()
        write.cancel()
        _ = try await bed.attach("d?session=one")
        bed.kill()
    }

    @Test("a server that is to be robbed hears of it only when nothing else can keep the disk from the robber")
    func aFailedRobberyIsNotTold() async throws {
        let bed = try DiskBed()
        try await bed.create()
        _ = try await bed.attach()
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        var record = OwnerWatchTests.record("a", bed.environment)
        record.incarnation = "1"
        _ = try await heads.swap(record, expecting: nil)
        let other = try DiskBed(store: bed.store, server: "b", takeover: .force)
        // A journal of an earlier time can't be set aside.
        other.scratch.fail(.remove, errno: 5)
        await #expect(throws: AttachError.self) { try await other.attach() }
        #expect(try await heads.server("a")?.taken.isEmpty == true)
        other.scratch.fail(.remove, errno: nil)
        _ = try await other.attach()
        #expect(try await heads.server("a")?.taken.count == 1)
        bed.kill()
        other.kill()
    }
}
