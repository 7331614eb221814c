// What a disk answers, and acknowledges, when the last proof of its ownership is old.

import BlockCache
import Glibc
import Logging
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct LeaseDiskTests {
    /// The lease of a bed ends now.
    private func lapse(_ bed: DiskBed) { bed.leases[0].prove(sentNs: 0, deadAfterMs: 0) }
    private func prove(_ bed: DiskBed) {
        bed.leases[0].prove(sentNs: bed.environment.bootNs, deadAfterMs: 86_400_000)
    }

    /// A call that may wait.
    private final class Call<T: Sendable>: Sendable {
        private let result = Mutex<Result<T, any Error>?>(nil)
        private let task: Mutex<Task<Void, Never>?>
        init(_ body: @escaping @Sendable () async throws -> T) {
            task = Mutex(nil)
            task.withLock {
                $0 = Task {
                    let ended: Result<T, any Error>
                    do { ended = .success(try await body()) } catch { ended = .failure(error) }
                    result.withLock { $0 = ended }
                }
            }
        }
        var isOver: Bool { result.withLock { $0 != nil } }
        func get() async throws -> T {
            await task.withLock { $0 }!.value
            return try result.withLock { $0 }!.get()
        }
        func error() async -> DeviceError? {
            do { _ = try await get() } catch { return (error as? TestFailure)?.error }
            return nil
        }
    }

    private func pause(_ bed: DiskBed, _ ms: UInt64 = 100) async { await bed.environment.sleep(ns: ms * 1_000_000) }

    @Test("row 13: what came after the lease is over waits for a proof, and goes on with it")
    func waitsForAProof() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(8192, 1), at: 4096)
        try await client.flush()
        lapse(bed)
        let read = Call { try await client.read(8192, at: 4096) }
        let write = Call { try await client.write(pattern(4096, 2), at: 1 << 20) }
        let flush = Call { try await client.flush() }
        let trim = Call { try await client.zero(65536..<131072, trim: true) }
        let status = Call { await client.run(.blockStatus, length: 1 << 20).error }
        await pause(bed)
        #expect(
            !read.isOver && !write.isOver && !flush.isOver && !trim.isOver && !status.isOver,
            "something was answered without a proof")
        prove(bed)
        #expect(try await read.get() == pattern(8192, 1))
        try await write.get()
        try await flush.get()
        try await trim.get()
        #expect(try await status.get() == nil)
        #expect(try await client.read(4096, at: 1 << 20) == pattern(4096, 2))
        bed.kill()
    }

    /// A server whose lease is over while another one takes its disk by force and writes.
    private func robbed(_ fault: Fault?) async throws -> (stale: Bool, acknowledged: Bool, error: DeviceError?) {
        let store = MemoryBucket()
        let a = try DiskBed(store: store, server: "a", settings: { $0.fault = fault })
        try await a.create()
        let heads = HeadStore(bucket: store, environment: a.environment)
        let heartbeat = Heartbeat(
            lease: a.leases[0], heads: heads, log: a.context.log, interval: { 5_000 },
            content: { [environment = a.environment] in OwnerWatchTests.record("a", environment) })
        try await heartbeat.renew()
        let client = try await a.attach()
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        try await a.waitForGeneration(1)
        // As after SIGSTOP: nothing was renewed for long. b takes over, and a goes on.
        let watch = OwnerWatch(name: "b", environment: a.environment, process: { _ in .gone })
        _ = try await watch.settle("a", heads)
        lapse(a)
        let b = try DiskBed(store: store, server: "b")
        let other = try await b.attach("d", host: "other")
        try await other.write(pattern(4096, 7), at: 0)
        try await other.flush()
        let read = Call { try await client.read(4096, at: 0) }
        let flush = Call {
            try await client.write(pattern(4096, 9), at: 8192)
            try await client.flush()
        }
        // Without the rule they are answered, however busy the machine is; with it, not in any time.
        for _ in 0..<100 where fault != nil && !(read.isOver && flush.isOver) { await pause(a) }
        await pause(a)
        let (stale, acknowledged) = (read.isOver, flush.isOver)
        try await heartbeat.renew()
        let error = await read.error()
        _ = await flush.error()
        #expect(client.disconnected != nil)
        #expect(try await other.read(4096, at: 0) == pattern(4096, 7))
        a.kill()
        b.kill()
        return (stale, acknowledged, error)
    }

    @Test("row 13: a server that was stopped and taken over answers nothing when it goes on")
    func stoppedAndGoneOn() async throws {
        let seen = try await robbed(nil)
        #expect(!seen.stale && !seen.acknowledged && seen.error == .shutdown)
    }

    @Test("row 13: the switch brings stale reads and acknowledged flushes back")
    func leaseNotAsked() async throws {
        let seen = try await robbed(.leaseNotAsked)
        #expect(seen.stale && seen.acknowledged)
    }

    @Test("row 13: a journaled turn and a synced flush are not acknowledged after the lease is over")
    func heldAcknowledgements() async throws {
        let scratch = MemoryScratch()
        let bed = try DiskBed(scratch: scratch)
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        scratch.writesInline = false
        scratch.holdsCompletions = true
        let write = Call { try await client.write(pattern(4096, 2), at: 4096) }
        // A flush that came before the write would have nothing to wait for.
        for _ in 0..<10_000 where scratch.heldCompletions == 0 { await pause(bed, 1) }
        let flush = Call { try await client.flush() }
        await pause(bed)
        lapse(bed)
        scratch.holdsCompletions = false
        scratch.releaseCompletions()
        await pause(bed)
        scratch.holdsCompletions = false
        scratch.releaseCompletions()
        await pause(bed)
        #expect(!write.isOver && !flush.isOver)
        prove(bed)
        try await write.get()
        try await flush.get()
        bed.kill()
    }

    @Test("row 13: a turn that the scratch disk kept past the end of the lease is not acknowledged")
    func heldTurn() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        let write = Call { try await client.write(pattern(4096, 2), at: 4096, beforeEnd: { lapse(bed) }) }
        await pause(bed)
        #expect(!write.isOver)
        prove(bed)
        try await write.get()
        #expect(try await client.read(4096, at: 4096) == pattern(4096, 2))
        bed.kill()
    }

    @Test("row 13: reads fail after read-timeout, writes wait on, and who has gone is done with")
    func howLongTheyWait() async throws {
        let bed = try DiskBed { $0.requestTimeoutMs = 600 }
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        lapse(bed)
        let read = Call { try await client.read(4096, at: 0) }
        let write = Call { try await client.write(pattern(4096, 2), at: 4096) }
        #expect(await read.error() == .io)
        await pause(bed)
        #expect(!write.isOver)
        await client.leave(clean: false)
        #expect(await write.error() == .shutdown)
        bed.kill()
    }

    /// How often the heartbeat is renewed while the head of a disk hangs: five times at least, or in half a second.
    private func renewals(_ fault: Fault?) async throws -> Int {
        let bed = try DiskBed { $0.fault = fault }
        try await bed.create("slow")
        // Its way is its own.
        let heads = HeadStore(bucket: bed.store, environment: bed.environment)
        let count = Mutex(0)
        let heartbeat = Heartbeat(
            lease: bed.leases[0], heads: heads, log: bed.context.log, interval: { 10 },
            content: { [environment = bed.environment] in
                count.withLock { $0 += 1 }
                return OwnerWatchTests.record("a", environment)
            })
        _ = try await bed.attach("slow")
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.hold(gate), keyContains: "disks/slow/head"))
        // As the daemon composes it.
        let look: @Sendable () async -> Void = { [manager = bed.manager] in await manager.checkOwnership(at: 0) }
        let isOver = Mutex(false)
        let beating = Task {
            await heartbeat.run(before: fault == .heartbeatWaits ? look : nil) { isOver.withLock { $0 } }
        }
        let looking = Task { await look() }
        await gate.waitUntilArrived()
        let before = count.withLock { $0 }
        func renewed() -> Int { count.withLock { $0 } - before }
        let patience = fault == nil ? 3000 : 50
        for _ in 0..<patience where renewed() < 5 { await pause(bed, 10) }
        let seen = renewed()
        isOver.withLock { $0 = true }
        gate.open()
        await beating.value
        await looking.value
        bed.kill()
        return seen
    }

    @Test("row 6: the heartbeat does not wait for the head of a disk that hangs")
    func heartbeatWaitsForNothing() async throws { #expect(try await renewals(nil) >= 5) }

    @Test("row 6: the switch makes it wait")
    func heartbeatWaits() async throws { #expect(try await renewals(.heartbeatWaits) == 0) }

    /// Nobody else could have had it: the head named this server, which lived.
    @Test("a disk that its server lost, and nobody took, is taken up again without anybody's asking")
    func whatNobodyTookIsTakenUp() async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create { $0.resumeWindowMs = 3_600_000 }
        let client = try await bed.attach("d?session=s")
        try await client.write(pattern(4096, 1), at: 0)
        for failure in ["fence", "journal"] {
            let lost = try #require(await bed.manager.present("d")).1
            if failure == "fence" {
                bed.leases[0].fence("b found it dead", isStillOurs: true)
                await pause(bed, 50)
                prove(bed)
            } else {
                bed.scratch.failNext(.write, errno: 5, path: "journal/")
                let writer = try await bed.attach("d?session=s")
                try? await writer.write(pattern(4096, 2), at: 4096)
                // It is told of the failure first.
                for _ in 0..<100 where writer.disconnected == nil { await pause(bed, 50) }
                #expect(writer.disconnected?.contains("journal can't be written") == true)
            }
            var again: Disk?
            for _ in 0..<100 where again == nil || again === lost {
                await pause(bed, 50)
                again = await bed.manager.present("d")?.1
            }
            #expect(again != nil && again !== lost, "\(failure)")
        }
        let back = try await bed.attach("d?session=s")
        #expect(try await back.read(4096, at: 0) == pattern(4096, 1))
        await back.leave(clean: true)
        await bed.manager.drain()
        #expect(try await bed.head().owner == nil)
    }

    /// An orderly end would have let another server have the disk at once, without the wait for a dead one.
    @Test("a disk whose journal waits to be taken up is this server's also at its end")
    func aWaitingJournalIsOwned() async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create { $0.resumeWindowMs = 3_600_000 }
        let client = try await bed.attach("d?session=s")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        bed.scratch.failNext(.write, errno: 5, path: "journal/")
        try? await client.write(pattern(4096, 2), at: 4096)
        await pause(bed, 50)
        #expect(!bed.manager.hasDisks)
        await bed.manager.drain()
        #expect(bed.manager.ownsDisks)
        let other = try DiskBed(store: bed.store, server: "b")
        #expect(!other.manager.ownsDisks)
    }

    /// Tells on which thread it ends.
    private final class LastWord: Sendable {
        private let tell: @Sendable () -> Void
        init(_ tell: @escaping @Sendable () -> Void) { self.tell = tell }
        deinit { tell() }
    }

    /// A lost disk with something dirty, of which nobody knows but who gets it.
    private func lostDisk(_ bed: DiskBed) async throws -> Disk {
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        bed.leases[0].fence("b found it dead", isStillOurs: false)
        for _ in 0..<100 where bed.manager.hasDisks { await pause(bed, 10) }
        return try #require(client.device as? Disk)
    }

    /// Its frames are those of the loop's other disks.
    @Test("what a disk holds of its loop's memory goes on the loop, however long another thread takes to let go of it")
    func partsGoOnTheirLoop() async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create()
        let ends = Mutex<[Bool]>([])
        let isSlow = Mutex(false)
        var disk: Disk? = try await lostDisk(bed)
        let loop = bed.loop
        // The disk lets go of its claim before it lets go of these.
        let slow = Mutex<LastWord?>(
            LastWord {
                if loop.isCurrent { return }
                isSlow.withLock { $0 = true }
                usleep(300_000)
            })
        slow.withLock { word in
            disk!.claim.whenLost { [word] _, _ in _ = word }
            word = nil
        }
        let pages = Mutex<LastWord?>(LastWord { ends.withLock { $0.append(loop.isCurrent) } })
        pages.withLock { word in
            disk!.pages.giveRoom = { [word] in _ = word }
            word = nil
        }
        await pause(bed)
        disk = nil
        for _ in 0..<100 where ends.withLock({ $0.isEmpty }) { await pause(bed, 20) }
        #expect(isSlow.withLock { $0 }, "the disk ended on its loop")
        #expect(ends.withLock { $0 } == [true])
        bed.kill()
    }

    @Test func aFencedServerLosesItsDisksAndTakesThemUpAgain() async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create { $0.resumeWindowMs = 3_600_000 }
        let client = try await bed.attach("d?session=s")
        try await client.write(pattern(4096, 1), at: 0)
        try await client.flush()
        // An append is under way when it is lost.
        bed.scratch.writesInline = false
        bed.scratch.holdsCompletions = true
        let write = Call { try await client.write(pattern(4096, 2), at: 4096) }
        await pause(bed, 50)
        bed.leases[0].fence("b found it dead", isStillOurs: true)
        await pause(bed, 50)
        #expect(!write.isOver && client.disconnected == "b found it dead")
        prove(bed)
        let again = Call { try await bed.attach("d?session=s") }
        await pause(bed)
        #expect(!again.isOver, "its journal is taken up while the last append is under way")
        bed.scratch.holdsCompletions = false
        bed.scratch.releaseCompletions()
        bed.scratch.writesInline = true
        let back = try await again.get()
        #expect(try await back.read(4096, at: 0) == pattern(4096, 1))
        try await back.write(pattern(4096, 3), at: 8192)
        try await back.flush()
        bed.kill()
    }

    @Test func aDiskThatWasTakenWhileItWasAttachedIsNotServed() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let head = try await bed.head()
        let gate = StoreGate()
        bed.faults.inject(StoreFault(.holdAfterEffect(gate), verb: .put, keyContains: "disks/d/head", count: 1))
        let attached = Call { try await bed.attach() }
        await gate.waitUntilArrived()
        bed.leases[0].giveAway([TakenDisk(diskID: head.diskID, epoch: 2)])
        gate.open()
        await #expect(throws: AttachError.self) { _ = try await attached.get() }
        // Its head still says that it is this server's: it takes it up again.
        let client = try await bed.attach()
        #expect(try await client.read(4096, at: 0) == [UInt8](repeating: 0, count: 4096))
        #expect(try await bed.head().epoch == 2)
        bed.kill()
    }
}
