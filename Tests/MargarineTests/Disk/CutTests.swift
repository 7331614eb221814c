// Several disks as of one instant, while somebody writes to all of them in turn.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct CutTests {
    /// A server with two loops, and a disk on each.
    private struct Pair {
        let beds: [DiskBed]
        let manager: DiskManager
        let catalog: Catalog
        let clients: [TestClient]

        init(rule: SafePointRule) async throws {
            let first = try DiskBed { $0.commitIntervalMs = 3 }
            let second = try DiskBed(store: first.store, scratch: first.scratch) { $0.commitIntervalMs = 3 }
            beds = [first, second]
            let store = Store(
                id: ObjectID(high: 0, low: 1), locations: Locations([first.faults]), environment: first.environment)
            manager = DiskManager(
                contexts: [first.context, second.context], store: store,
                server: ServerIdentity(id: "a", host: "h", bootID: "boot"), takeover: .dead,
                log: first.context.log,
                owners: OwnerWatch(
                    name: "a", environment: first.environment, process: { _ in .outOfSight }, fault: nil),
                leases: first.leases)
            catalog = Catalog(store) { _ in .outOfSight }
            var clients: [TestClient] = []
            for name in ["a", "b"] {
                try await first.create(name) {
                    $0.safePoints = rule
                    $0.historyDensity = DiskOptions.maxHistoryDensity
                }
                let attached = try await manager.attach(name, client: ClientIdentity(address: "h:1", host: "h"))
                let client = TestClient(attached)
                try await client.join()
                clients.append(client)
            }
            self.clients = clients
        }

        /// The number that a generation of a disk shows.
        func number(_ name: String, _ generation: UInt64) async throws -> UInt64 {
            if generation == 0 { return 0 }
            let head = try await catalog.load(name).head
            let record = try await beds[0].record(head, generation)
            let bytes = try await GenerationReader(record, store: catalog.store).bytes(at: 8192, count: 8)
            return bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
    }

    /// Of how many pairs of generations the numbers are of different instants. The writer puts each number on a, and when that
    /// is acknowledged on b. `cut` may wait until some more were put.
    private func torn(
        _ pair: Pair, cuts: Int, _ cut: (_ more: () async -> Void) async throws -> [String: UInt64]
    ) async throws -> Int {
        let isOver = Atomic(false)
        let written = Tally()
        async let writing: Void = {
            while !isOver.load(ordering: .relaxed) {
                written.add()
                let number = UInt64(written.value)
                let page = withUnsafeBytes(of: number.littleEndian) { Array($0) } + [UInt8](repeating: 1, count: 4088)
                for client in pair.clients {
                    try await client.write(page, at: 8192)
                    if number % 7 == 0 { try await client.flush() }
                }
            }
        }()
        // However slow the machine is.
        func more() async {
            let before = written.value
            for _ in 0..<10_000 where written.value < before + 3 {
                await pair.beds[0].environment.sleep(ns: 1_000_000)
            }
        }
        var torn = 0
        for _ in 0..<cuts {
            await more()
            let generations = try await cut(more)
            let a = try await pair.number("a", generations["a"]!)
            let b = try await pair.number("b", generations["b"]!)
            if a != b, a != b + 1 { torn += 1 }
        }
        isOver.store(true, ordering: .relaxed)
        try await writing
        return torn
    }

    @Test("row 20: disks cut together are of one instant", arguments: [SafePointRule.auto, .btrfs])
    func together(_ rule: SafePointRule) async throws {
        let pair = try await Pair(rule: rule)
        #expect(try await torn(pair, cuts: 20) { _ in try await pair.manager.cut(["a", "b"]) } == 0)
        // One after the other they are not: the test sees what it is there to see.
        let apart = try await torn(pair, cuts: 10) { more in
            let a = try await pair.manager.cut(["a"])
            await more()
            return a.merging(try await pair.manager.cut(["b"])) { $1 }
        }
        #expect(apart > 0)
        // Nothing is held any more, and nothing was lost.
        for client in pair.clients {
            try await client.write(pattern(4096, 5), at: 0)
            #expect(try await client.read(4096, at: 0) == pattern(4096, 5))
        }
    }

    @Test("row 20: a set of forks is complete, or there is none")
    func sets() async throws {
        let pair = try await Pair(rule: .auto)
        for (client, seed) in zip(pair.clients, [1, 2] as [UInt64]) {
            try await client.write(pattern(4096, seed), at: 0)
        }
        let forks = try await pair.catalog.forkSet(["a", "b"], as: ["x", "y"]) { try await pair.manager.cut($0) }
        #expect(forks.map(\.name) == ["x", "y"])
        for (name, seed) in [("x", 1), ("y", 2)] as [(String, UInt64)] {
            let head = try await pair.catalog.load(name).head
            let reader = GenerationReader(try #require(head.record), store: pair.catalog.store)
            #expect(try await reader.bytes(at: 0, count: 4096) == pattern(4096, seed))
        }
        #expect(try await pair.catalog.generations("a").contains { $0.kind == .cut })
        // The second name is taken: the first fork does not stay.
        let kind = await CatalogTests.kind {
            _ = try await pair.catalog.forkSet(["a", "b"], as: ["z", "y"]) { try await pair.manager.cut($0) }
        }
        #expect(kind == .exists)
        #expect(await CatalogTests.kind { _ = try await pair.catalog.show("z") } == .notFound)
        // A server that can't be asked, or that has not all of them.
        _ = try await pair.catalog.create("c", sizeBytes: 1 << 20)
        for ask in [
            { _ in throw CutError(description: "no daemon") }, { _ in try await pair.manager.cut(["a", "c"]) },
        ] as [@Sendable ([String]) async throws -> [String: UInt64]] {
            let kind = await CatalogTests.kind {
                _ = try await pair.catalog.forkSet(["a", "b"], as: ["p", "q"], cut: ask)
            }
            #expect(kind == .owned)
        }
        // Nobody has them.
        for client in pair.clients { await client.leave(clean: true) }
        await pair.manager.drain()
        let idle = try await pair.catalog.forkSet(["a", "b", "c"], as: ["p", "q", "r"]) { _ in [:] }
        #expect(
            idle.map(\.origin) == [
                "a@\(try await pair.catalog.show("a").generation)", "b@\(try await pair.catalog.show("b").generation)",
                nil,
            ])
    }

    @Test("row 20: a disk of another server is refused")
    func differentServers() async throws {
        let pair = try await Pair(rule: .auto)
        let other = try DiskBed(store: pair.beds[0].store, server: "b")
        try await other.create("c")
        let client = try await other.attach("c")
        let kind = await CatalogTests.kind {
            _ = try await pair.catalog.forkSet(["a", "c"], as: ["x", "y"]) { try await pair.manager.cut($0) }
        }
        #expect(kind == .owned)
        await client.leave(clean: true)
    }

    @Test("row 20: a cut gets its turn on a slow store, where one commit follows the other")
    func aCutGetsItsTurn() async throws {
        let pair = try await Pair(rule: .auto)
        pair.beds[0].faults.inject(StoreFault(.delay(ns: 40_000_000), verb: .put))
        let isOver = Tally()
        let writing = pair.clients.map { client in
            Task {
                var number: UInt64 = 0
                while isOver.value == 0 {
                    number += 1
                    try await client.write(pattern(4096, number), at: 8192)
                    try await client.flush()
                    await pair.beds[0].environment.sleep(ns: 1_000_000)
                }
            }
        }
        for number in 1...3 as ClosedRange<UInt64> {
            // Commits follow each other on both.
            for name in ["a", "b"] { try await pair.beds[0].waitForGeneration(3 * number, name) }
            let generations = try await pair.manager.cut(["a", "b"])
            #expect(generations.count == 2)
        }
        isOver.add()
        for task in writing { try await task.value }
        // Commits go on afterwards.
        let before = try await pair.beds[0].head("a").generation
        try await pair.clients[0].write(pattern(4096, 9), at: 0)
        try await pair.clients[0].flush()
        try await pair.beds[0].waitForGeneration(before + 1, "a")
    }

    @Test("row 20: a cut that gets no turn says which disk is busy, and commits go on")
    func aCutGivesUp() async throws {
        let pair = try await Pair(rule: .auto)
        try await pair.clients[0].write(pattern(4096, 1), at: 0)
        pair.beds[0].faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "disks/a/"))
        try await pair.clients[0].flush()
        await pair.beds[0].environment.sleep(ns: 100_000_000)
        do {
            _ = try await pair.manager.cut(["a", "b"], withinNs: 2_000_000_000)
            Issue.record("cut")
        } catch {
            #expect("\(error)".contains("disk 'a'") && "\(error)".contains("commit"), "\(error)")
        }
        pair.beds[0].faults.clearFaults()
        try await pair.beds[0].waitForGeneration(1, "a")
        try await pair.clients[1].write(pattern(4096, 2), at: 0)
        try await pair.clients[1].flush()
        try await pair.beds[0].waitForGeneration(1, "b")
    }

    @Test("row 20: a hold ends by itself, and no cut follows it")
    func holdsEnd() async throws {
        let pair = try await Pair(rule: .auto)
        let client = pair.clients[0]
        try await client.write(pattern(4096, 1), at: 0)
        let hold = try #require(await client.onLoop { (client.device as! Disk).beginHold() })
        let begin = ContinuousClock.now
        try await client.write(pattern(4096, 2), at: 0)
        #expect(ContinuousClock.now - begin > .milliseconds(500))
        #expect(await client.onLoop { (client.device as! Disk).cut(under: hold) == nil })
        #expect(try await client.read(4096, at: 0) == pattern(4096, 2))
    }

    @Test("row 20: whose hold is over does not cut under another's, nor end it")
    func holdsAreOnesOwn() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 0)
        let (first, second) = await client.onLoop {
            let disk = client.device as! Disk
            let first = disk.beginHold()!
            disk.endHold(first)
            return (first, disk.beginHold()!)
        }
        await client.onLoop {
            let disk = client.device as! Disk
            #expect(disk.cut(under: first) == nil)
            disk.endHold(first)
            #expect(disk.hold === second)
            #expect(disk.cut(under: second) != nil)
            disk.endHold(second)
        }
        try await bed.waitForGeneration(1)
        await client.leave(clean: true)
    }

    @Test("row 20: a server that can't prove that a disk is its own does not cut it")
    func notProven() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let client = try await bed.attach()
        await client.onLoop {
            let disk = client.device as! Disk
            let hold = disk.beginHold()!
            disk.claim.end()
            #expect(disk.cut(under: hold) == nil)
            disk.endHold(hold)
            #expect(disk.beginHold() == nil)
        }
    }

    @Test("row 20: a disk without a generation is forked empty, whatever is committed meanwhile")
    func emptyMembers() async throws {
        let bed = try DiskBed()
        let store = Store(
            id: ObjectID(high: 0, low: 1), locations: Locations([bed.faults]), environment: bed.environment)
        let catalog = Catalog(store) { _ in .outOfSight }
        try await bed.create("a")
        let client = try await bed.attach("a")
        // Made anew: it counts on from what was deleted.
        try await bed.create("c")
        let before = try await bed.attach("c")
        try await before.write(pattern(4096, 1), at: 0)
        try await before.flush()
        try await bed.waitForGeneration(1, "c")
        await before.leave(clean: true)
        await before.onLoop { await (before.device as! Disk).drain() }
        try await catalog.delete("c")
        _ = try await catalog.create("c", sizeBytes: 1 << 20)
        let forks = try await catalog.forkSet(["a", "c"], as: ["x", "y"]) {
            let generations = try await bed.manager.cut($0)
            try await client.write(pattern(4096, 2), at: 0)
            try await client.flush()
            try await bed.waitForGeneration(1, "a")
            return generations
        }
        #expect(forks.map(\.origin) == [nil, nil])
        for name in ["x", "y"] { #expect(try await catalog.load(name).head.record == nil) }
        await client.leave(clean: true)
    }
}

extension DiskBed {
    func record(_ head: Head, _ generation: UInt64) async throws -> GenerationRecord {
        try await HeadStore(bucket: store, environment: environment).record(head, generation: generation)
    }
}
