// Whether other servers live, and what their records are made to say, in time that passes while somebody sleeps.

import BlockCache
import Logging
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct OwnerWatchTests {
    static let deadAfterMs: Int64 = 30_000

    static func record(
        _ id: String, _ environment: any Environment, timeMs: Int64? = nil, deadAfterMs: Int64 = deadAfterMs
    ) -> ServerRecord {
        ServerRecord(
            id: id, host: "h-\(id)", bootID: "b", pid: 1, pidNamespace: "n", startTicks: 1, addresses: [],
            timeMs: timeMs ?? environment.wallMs, freshForMs: deadAfterMs)
    }

    /// A server that renews its record of its own accord. `behindMs`: how far its wall clock is behind.
    final class Owner: Sendable {
        let lease = Lease(location: 0)
        let heartbeat: Heartbeat
        let heads: HeadStore
        init(_ id: String, _ test: TestStore, behindMs: Int64 = 0) {
            heads = HeadStore(bucket: test.faulty, environment: test.environment)
            let environment = test.environment
            heartbeat = Heartbeat(
                lease: lease, heads: heads, log: Logger(label: "t") { _ in SwiftLogNoOpLogHandler() },
                interval: { 5_000 },
                content: { OwnerWatchTests.record(id, environment, timeMs: environment.wallMs - behindMs) })
        }
        func stands() -> Bool { lease.stands(atNs: heads.environment.bootNs) }
    }

    static func watch(_ test: TestStore, fault: Fault? = nil, process: ProcessState = .outOfSight) -> OwnerWatch {
        OwnerWatch(name: "server b", environment: test.environment, process: { _ in process }, fault: fault)
    }

    @Test("row 12: an owner whose wall clock goes back is alive", arguments: [Int64(60_000), -3_600_000])
    func clockGoesBack(_ behindMs: Int64) async throws {
        let test = TestStore()
        let owner = Owner("a", test, behindMs: behindMs)
        try await owner.heartbeat.renew()
        let due = Mutex(test.environment.wallMs + 5_000)
        test.environment.whileAsleep {
            guard due.withLock({ $0 <= test.environment.wallMs }) else { return }
            due.withLock { $0 = test.environment.wallMs + 5_000 }
            try? await owner.heartbeat.renew()
        }
        let state = try await Self.watch(test).settle("a", owner.heads)
        guard case .alive = state else {
            Issue.record("a live owner counts as \(state)")
            return
        }
        #expect(owner.stands())
    }

    @Test("row 12: the switch puts the wall clock back in charge")
    func clockInCharge() async throws {
        let test = TestStore()
        let owner = Owner("a", test, behindMs: 60_000)
        try await owner.heartbeat.renew()
        let state = try await Self.watch(test, fault: .livenessByClock).settle("a", owner.heads)
        #expect({ if case .gone = state { true } else { false } }())
    }

    @Test("row 12: an owner that is dead is found out by any clock", arguments: [Int64(0), 60_000, -3_600_000])
    func theDeadAreFound(_ behindMs: Int64) async throws {
        let test = TestStore()
        let owner = Owner("a", test, behindMs: behindMs)
        try await owner.heartbeat.renew()
        let began = test.environment.wallMs
        let told = Mutex(0)
        let state = try await Self.watch(test).settle("a", owner.heads) { _, ofMs in
            #expect(ofMs == Self.deadAfterMs)
            told.withLock { $0 += 1 }
        }
        let tookMs = test.environment.wallMs - began
        #expect({ if case .gone = state { true } else { false } }())
        #expect(tookMs >= Self.deadAfterMs && tookMs < Self.deadAfterMs + 3_000 && told.withLock { $0 } > 10)
        #expect(!owner.stands(), "the lease is over before others may take over")
        #expect(try await owner.heads.server("a")?.fencedBy == "server b")
        // It comes back: everything is lost, and it begins anew.
        let lost = Mutex<String?>(nil)
        owner.lease.prove(sentNs: test.environment.bootNs, deadAfterMs: 1_000)
        let claim = try #require(
            owner.lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: test.environment.bootNs))
        claim.whenLost { reason, _ in lost.withLock { $0 = reason } }
        let before = try await owner.heads.server("a")?.incarnation
        try await owner.heartbeat.renew()
        #expect(lost.withLock { $0 }?.contains("server b saw no renewal") == true)
        #expect(!claim.stands(atNs: test.environment.bootNs) && owner.stands())
        let after = try #require(try await owner.heads.server("a"))
        #expect(after.fencedBy == nil && after.incarnation != before)
    }

    @Test func whatWasSeenIsRemembered() async throws {
        let test = TestStore()
        let owner = Owner("a", test)
        try await owner.heartbeat.renew()
        let watch = Self.watch(test)
        #expect(try await watch.look("a", owner.heads) == .unknown(unchangedMs: 0, ofMs: Self.deadAfterMs))
        test.environment.wallMs += 20_000
        #expect(try await watch.look("a", owner.heads) == .unknown(unchangedMs: 20_000, ofMs: Self.deadAfterMs))
        let began = test.environment.wallMs
        _ = try await watch.settle("a", owner.heads)
        #expect(test.environment.wallMs - began < 13_000)
        // Those who come together ask once.
        try await owner.heartbeat.renew()
        _ = try await watch.look("a", owner.heads)
        let gets = test.gets
        for _ in 0..<20 { _ = try await watch.look("a", owner.heads) }
        #expect(test.gets - gets <= 1)
    }

    @Test func onlyTheStoresOwnWordMeansThatItEnded() async throws {
        let test = TestStore()
        let heads = HeadStore(bucket: test.faulty, environment: test.environment)
        #expect(try await Self.watch(test).settle("a", heads) == .gone("it ended in order"))
        test.faulty.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "servers/"))
        await #expect(throws: CatalogError.self) { _ = try await Self.watch(test).settle("a", heads) }
        test.faulty.clearFaults()
        _ = try await test.memory.put("servers/a", Array("{\"margarine\":\"server\",\"format\":9,".utf8), if: .none)
        #expect({ if case .alive = $0 { true } else { false } }(try await Self.watch(test).settle("a", heads)))
    }

    @Test func aProcessThatIsKnownToBeGoneIsNotWaitedFor() async throws {
        let test = TestStore()
        let owner = Owner("a", test)
        try await owner.heartbeat.renew()
        let began = test.environment.wallMs
        let state = try await Self.watch(test, process: .gone).settle("a", owner.heads)
        #expect(state == .gone("its process has ended") && test.environment.wallMs == began)
        #expect(try await owner.heads.server("a")?.fencedBy != nil)
    }

    @Test func recordsOfEarlierVersionsAreJudgedByChangeToo() async throws {
        let test = TestStore()
        let heads = HeadStore(bucket: test.faulty, environment: test.environment)
        @Sendable func beat() async throws {
            let body =
                "\"addresses\":[],\"bootID\":\"\",\"freshForMs\":30000,\"host\":\"h\",\"id\":\"a\",\"pid\":1,\"pidNamespace\":\"\",\"reading\":[],\"startTicks\":1,\"timeMs\":\(test.environment.wallMs - 3_600_000)}"
            _ = try await test.memory.put(
                ServerRecord.key("a"), CatalogObjectTests.sealed(body, kind: "server", format: "2"), if: .none)
        }
        try await beat()
        let state = try await Self.watch(test).settle("a", heads)
        #expect(state == .gone("its record did not change for 30 s"))
        try await beat()
        let isAwake = Mutex(true)
        test.environment.whileAsleep { if isAwake.withLock({ $0 }) { try? await beat() } }
        #expect({ if case .alive = $0 { true } else { false } }(try await Self.watch(test).settle("a", heads)))
        isAwake.withLock { $0 = false }
        // Nothing is noted where nobody would read it.
        let bytes = test.memory.contents["servers/a"]
        try await Self.watch(test).note(TakenDisk(diskID: ObjectID(high: 1, low: 1), epoch: 5), from: "a", heads)
        #expect(test.memory.contents["servers/a"] == bytes)
    }

    @Test func aDiskThatIsTakenByForceIsLostWithTheNextRenewal() async throws {
        let test = TestStore()
        let owner = Owner("a", test)
        try await owner.heartbeat.renew()
        let now = test.environment.bootNs
        let lost = Mutex<[Int]>([])
        let claims = try (0..<3).map { number in
            let claim = try #require(
                owner.lease.claim(ObjectID(high: 0, low: UInt64(number)), epoch: 7, nowNs: now))
            claim.whenLost { _, _ in lost.withLock { $0.append(number) } }
            return claim
        }
        let watch = Self.watch(test)
        _ = try await watch.look("a", owner.heads)
        try await watch.note(TakenDisk(diskID: claims[0].diskID, epoch: 8), from: "a", owner.heads)
        // What it has under that epoch already, it has taken since.
        try await watch.note(TakenDisk(diskID: claims[1].diskID, epoch: 7), from: "a", owner.heads)
        // A note is no sign of life.
        test.environment.wallMs += 10_000
        #expect(try await watch.look("a", owner.heads) == .unknown(unchangedMs: 10_000, ofMs: Self.deadAfterMs))
        try await owner.heartbeat.renew()
        #expect(lost.withLock { $0 } == [0])
        #expect(claims.map { $0.stands(atNs: test.environment.bootNs) } == [false, true, true])
        #expect(try await owner.heads.server("a")?.taken == [])
        // More than a record can name: it loses everything.
        for number in 0...UInt64(ServerRecord.maxTaken) {
            try await watch.note(TakenDisk(diskID: ObjectID(high: 9, low: number), epoch: 1), from: "a", owner.heads)
        }
        #expect(test.memory.contents["servers/a"]!.count < 256 << 10)
        try await owner.heartbeat.renew()
        #expect(lost.withLock { $0.sorted() } == [0, 1, 2])
    }

    @Test func aProofIsAsOldAsItsRequest() async throws {
        let test = TestStore()
        let owner = Owner("a", test)
        test.faulty.inject(StoreFault(.delay(ns: 10_000_000_000), verb: .put, keyContains: "servers/", count: 1))
        let sent = test.environment.bootNs
        try await owner.heartbeat.renew()
        #expect(test.environment.bootNs >= sent + 10_000_000_000)
        let length = Lease.lengthNs(deadAfterMs: Self.deadAfterMs)
        #expect(owner.lease.stands(atNs: sent + length - 1) && !owner.lease.stands(atNs: sent + length))
        // Rates that differ by a tenth either way.
        #expect(Double(length) * 1.1 / 0.9 < Double(Self.deadAfterMs) * 1e6)
    }

    @Test func unclearAnswersAreReadBack() async throws {
        let test = TestStore()
        let owner = Owner("a", test)
        try await owner.heartbeat.renew()
        for action in [StoreFault.Action.failAfterEffect(.unclear), .fail(.unclear)] {
            test.faulty.inject(StoreFault(action, verb: .put, keyContains: "servers/", count: 1))
            test.environment.wallMs += 20_000
            try await owner.heartbeat.renew()
            #expect(owner.lease.stands(atNs: test.environment.bootNs + 22_000_000_000))
        }
        // Not to be read back: no proof, and the next one finds its way.
        test.faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "servers/", count: 1))
        test.faulty.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "servers/", count: 1))
        test.environment.wallMs += 20_000
        await #expect(throws: CatalogError.self) { try await owner.heartbeat.renew() }
        #expect(owner.stands() && !owner.lease.stands(atNs: test.environment.bootNs + 3_000_000_000))
        let claim = try #require(
            owner.lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: test.environment.bootNs))
        try await owner.heartbeat.renew()
        #expect(claim.stands(atNs: test.environment.bootNs + 22_000_000_000))
    }

    @Test func twoProcessesWithOneIDFindOut() async throws {
        let test = TestStore()
        let first = Owner("a", test)
        try await first.heartbeat.renew()
        let claim = try #require(first.lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: test.environment.bootNs))
        let second = Owner("a", test)
        try await second.heartbeat.renew()
        #expect(second.stands())
        try await first.heartbeat.renew()
        #expect(claim.lostReason?.contains("another process") == true)
        // And one whose record was removed by hand.
        let other = try #require(first.lease.claim(ObjectID(high: 1, low: 1), epoch: 2, nowNs: test.environment.bootNs))
        try await first.heads.forget(server: "a")
        try await first.heartbeat.renew()
        #expect(other.lostReason?.contains("was removed") == true)
    }

    @Test func nothingIsClaimedWithoutAProof() {
        let lease = Lease(location: 0)
        #expect(lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: 1) == nil)
        lease.prove(sentNs: 100, deadAfterMs: 4)
        #expect(lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: 3_000_099) != nil)
        #expect(lease.claim(ObjectID(high: 1, low: 1), epoch: 1, nowNs: 3_000_100) == nil)
        lease.prove(sentNs: .max - 5, deadAfterMs: 86_400_000)
        #expect(lease.stands(atNs: .max - 1))
    }

    @Test("a renewal that is under way when the server ends in order is no error")
    func aCleanEndIsQuiet() async throws {
        let test = TestStore()
        for outcome in ["removed", "refused"] {
            let lines = LogLines()
            let heads = HeadStore(bucket: test.faulty, environment: test.environment)
            let heartbeat = Heartbeat(
                lease: Lease(location: 0), heads: heads, log: Logger(label: "t") { _ in lines }, interval: { 5_000 },
                content: { [environment = test.environment] in Self.record("a", environment) })
            try await heartbeat.renew()
            let gate = StoreGate()
            test.faulty.inject(StoreFault(.hold(gate), verb: .put, keyContains: "servers/", count: 1))
            let running = Task { await heartbeat.run { false } }
            await gate.waitUntilArrived()
            heartbeat.end()
            if outcome == "removed" {
                try await heads.forget(server: "a")
            } else {
                test.faulty.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "servers/", count: 9))
                _ = try await test.memory.put("servers/a", [1], if: .none)
            }
            gate.open()
            await running.value
            #expect(lines.all.isEmpty, "\(lines.all)")
            test.faulty.clearFaults()
            _ = try? await heads.forget(server: "a")
        }
    }
}
