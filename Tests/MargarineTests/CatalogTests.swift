// Disks made, changed and deleted on the store, beside each other and beside owners.

import BlockCache
import Glibc
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

struct CatalogTests {
    /// A catalog on a store in memory; `running` are the servers whose processes live.
    static func open(_ store: TestStore, _ bucket: (any Bucket)? = nil) async throws -> Catalog {
        Catalog(try await Store.open(bucket: bucket ?? store.faulty, environment: store.environment)) { _ in .outOfSight
        }
    }

    static func kind(_ body: () async throws -> Void) async -> CatalogError.Kind? {
        do { try await body() } catch { return (error as? CatalogError)?.kind }
        return nil
    }

    /// Gives a disk to a server that is (or is not) alive, as an attachment does.
    static func own(_ catalog: Catalog, _ name: String, server: String, alive: Bool, session: String? = nil)
        async throws -> (Head, ETag)
    {
        let found = try await catalog.load(name)
        var head = found.head
        head.epoch += 1
        head.owner = Head.Owner(server: server, host: "h", sinceMs: 1)
        head.session = session
        let (heads, environment) = (catalog.store.heads, catalog.store.environment)
        @Sendable func beat(at timeMs: Int64) async throws {
            var record = ServerRecord(
                id: server, host: "h", bootID: "b", pid: 1, pidNamespace: "n", startTicks: 1, addresses: ["a"],
                timeMs: timeMs, incarnation: "i")
            record.nonce = environment.objectID()
            try await heads.beat(record)
        }
        try await beat(at: alive ? environment.wallMs : environment.wallMs - 60_000)
        if alive {
            (environment as? SeededEnvironment)?.whileAsleep { try? await beat(at: environment.wallMs) }
        }
        guard case .won(let tag) = try await catalog.store.heads.swap(head, expecting: found.etag) else {
            throw CatalogError(.conflict, "not won")
        }
        return (head, tag)
    }

    @Test func aDiskFromItsMakingToItsEnd() async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        var options = DiskOptions()
        options.durability = .store
        let made = try await catalog.create("work", sizeBytes: 10 << 30, options: options)
        #expect(made.name == "work" && made.size == 10 << 30 && made.generation == 0 && made.epoch == 0)
        #expect(made.owner == nil && made.blocks == 0 && made.storedBytes == 0 && made.committedAt == nil)
        #expect(made.durability == .store && made.safePoints == .auto && made.resumeWindowMs == 60_000)
        #expect(made.createdAt == "2027-01-15T08:00:00Z")
        _ = try await catalog.create("also.here-2_x", sizeBytes: 512)
        #expect(try await catalog.list().disks.map(\.name) == ["also.here-2_x", "work"])
        #expect(try await catalog.show("work") == made)
        let again = await Self.kind { _ = try await catalog.create("work", sizeBytes: 512) }
        #expect(again == .exists)

        let changed = try await catalog.set("work", .init(safePoints: .flush, resumeWindowMs: 0))
        #expect(changed.safePoints == .flush && changed.durability == .store && changed.resumeWindowMs == 0)
        #expect(try await catalog.show("work") == changed)
        for ms in [-1, DiskOptions.maxResumeWindowMs + 1] {
            let refused = await Self.kind { _ = try await catalog.set("work", .init(resumeWindowMs: ms)) }
            #expect(refused == .invalid)
        }

        try await catalog.delete("work")
        #expect(try await catalog.list().disks.map(\.name) == ["also.here-2_x"])
        for body in [
            { _ = try await catalog.show("work") }, { try await catalog.delete("work") },
            { _ = try await catalog.set("work", .init(durability: .memory)) },
            { _ = try await catalog.release("none") },
        ] as [() async throws -> Void] {
            #expect(await Self.kind(body) == .notFound)
        }
        let second = try await catalog.create("work", sizeBytes: 1 << 20)
        #expect(second.id != made.id && second.epoch > made.epoch && second.durability == .scratch)
    }

    @Test func namesAndSizesAtTheirLimits() async throws {
        let catalog = try await Self.open(TestStore())
        let long = String(repeating: "a", count: 128)
        for name in [long, "0", "A._-"] { _ = try await catalog.create(name, sizeBytes: 512) }
        for name in ["", long + "a", ".a", "-a", "_a", "a/b", "a b", "a@1", "ä", "a\n", "a?session=b", "..", "a\0"] {
            #expect(await Self.kind { _ = try await catalog.create(name, sizeBytes: 512) } == .invalid, "'\(name)'")
            #expect(await Self.kind { _ = try await catalog.show(name) } == .invalid)
        }
        for size in [0, 1, 511, 513, DiskSize.maxBytes + 512, 1 << 63, ManifestShape.maxSizeBytes, .max] as [UInt64] {
            #expect(await Self.kind { _ = try await catalog.create("s", sizeBytes: size) } == .invalid, "\(size)")
        }
        #expect(try await catalog.create("s", sizeBytes: DiskSize.maxBytes).size == UInt64(Int64.max) - (16 << 20) + 1)
    }

    @Test func ofManyMakersOneWins() async throws {
        let test = TestStore()
        let catalogs = [try await Self.open(test), try await Self.open(test)]
        for round in 0..<20 {
            if round > 0 { try await catalogs[0].delete("disk") }
            let outcomes = await withTaskGroup(of: CatalogError.Kind?.self) { group in
                for i in 0..<8 {
                    group.addTask {
                        await Self.kind { _ = try await catalogs[i % 2].create("disk", sizeBytes: UInt64(i + 1) * 512) }
                    }
                }
                return await group.reduce(into: []) { $0.append($1) }
            }
            #expect(outcomes.filter { $0 == nil }.count == 1)
            #expect(outcomes.allSatisfy { $0 == nil || $0 == .exists })
        }
        // A tombstone and a disk each time, and no swap was lost: epochs count them.
        #expect(try await catalogs[0].show("disk").epoch == 38)
    }

    @Test func changesOfManyAreAllKept() async throws {
        let test = TestStore()
        let a = try await Self.open(test)
        let b = try await Self.open(test)
        _ = try await a.create("disk", sizeBytes: 512)
        for _ in 0..<20 {
            _ = try await a.set("disk", .init(safePoints: .auto, durability: .memory, resumeWindowMs: 0))
            async let one = a.set("disk", .init(safePoints: .flush))
            async let two = b.set("disk", .init(durability: .store))
            async let three = b.set("disk", .init(resumeWindowMs: 7))
            _ = try await (one, two, three)
            let info = try await a.show("disk")
            #expect(info.safePoints == .flush && info.durability == .store && info.resumeWindowMs == 7)
        }
    }

    @Test(arguments: [true, false])
    func unclearAnswersAreSettled(tookEffect: Bool) async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        test.faulty.inject(
            StoreFault(
                tookEffect ? .failAfterEffect(.unclear) : .fail(.unclear), verb: .put, keyContains: "head", count: 3))
        let made = try await catalog.create("disk", sizeBytes: 512)
        #expect(made.epoch == 0)
        _ = try await catalog.set("disk", .init(durability: .store))
        _ = try await catalog.set("disk", .init(resumeWindowMs: 1))
        #expect(test.faulty.suffered == 3)
        let info = try await catalog.show("disk")
        #expect(info.durability == .store && info.resumeWindowMs == 1)
        // Reading back does not work either: said so, and nothing is taken for done.
        test.faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "head", count: 1))
        let gate = StoreFault(.fail(.unavailable), verb: .get, keyContains: "head", count: 1)
        test.faulty.inject(StoreFault(.delay(ns: 0), verb: .get, keyContains: "head", count: 1))
        test.faulty.inject(gate)
        #expect(await Self.kind { _ = try await catalog.set("disk", .init(resumeWindowMs: 2)) } == .store(.unclear))
    }

    @Test func aLivingOwnerKeepsItsDisk() async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        let (head, etag) = try await Self.own(catalog, "disk", server: "s1", alive: true, session: "vm7")
        #expect(await Self.kind { try await catalog.delete("disk") } == .owned)
        #expect(await Self.kind { _ = try await catalog.release("disk") } == .owned)
        let shown = try await catalog.show("disk")
        #expect(shown.owner?.server == "s1" && shown.owner?.alive == true && shown.session == "vm7")
        // What does not hurt it is allowed, and leaves it its epoch.
        let set = try await catalog.set("disk", .init(safePoints: .btrfs))
        #expect(set.epoch == head.epoch && set.owner?.server == "s1")

        let taken = try await catalog.release("disk", force: true)
        #expect(taken.owner == nil && taken.epoch == head.epoch + 1 && taken.session == nil)
        #expect(try await catalog.load("disk").head.lostSessions == ["vm7"])
        // The old owner finds out at its next swap.
        let update = try await catalog.store.heads.update(head, etag) { $0.session = nil }
        guard case .lost(let found?) = update else {
            Issue.record("\(update)")
            return
        }
        #expect(found.epoch == head.epoch + 1)
        // Nor does it go on when the same server has attached anew, at the same time by its clock.
        var again = found
        again.epoch += 1
        again.owner = head.owner
        guard case .won = try await catalog.store.heads.swap(again, expecting: try await catalog.load("disk").etag),
            case .lost = try await catalog.store.heads.update(head, etag, change: { _ in })
        else {
            Issue.record("an attachment of before went on")
            return
        }
        #expect(try await catalog.release("disk", force: true).epoch == head.epoch + 3)
        // Nothing to take: nothing is changed.
        let released = try await catalog.show("disk")
        #expect(try await catalog.release("disk") == released)
    }

    @Test func aDeadOwnerIsNoObstacle() async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        for name in ["a", "b"] {
            _ = try await catalog.create(name, sizeBytes: 1 << 30)
            _ = try await Self.own(catalog, name, server: "s1", alive: false)
        }
        #expect(try await catalog.show("a").owner?.alive == false)
        try await catalog.delete("a")
        #expect(try await catalog.release("b").owner == nil)
        // And one that lives is obeyed by force only.
        _ = try await catalog.create("a", sizeBytes: 512)
        let (head, etag) = try await Self.own(catalog, "a", server: "s2", alive: true)
        try await catalog.delete("a", force: true)
        guard case .lost = try await catalog.store.heads.update(head, etag, change: { _ in }) else {
            Issue.record("the owner of a deleted disk went on")
            return
        }
        // Nor does it own the next disk of that name.
        _ = try await catalog.create("a", sizeBytes: 512)
        guard case .lost = try await catalog.store.heads.update(head, etag, change: { _ in }) else {
            Issue.record("the owner of a deleted disk owns its successor")
            return
        }
    }

    @Test func whatARecordLooksLikeToPeople() async throws {
        let record = ServerRecord(
            id: "s", host: "h", bootID: "b", pid: 1, pidNamespace: "n", startTicks: 1, addresses: [], timeMs: 1_000_000)
        for (now, process, alive) in [
            (1_000_000, .outOfSight, true), (1_029_999, .running, true), (1_030_000, .running, false),
            (900_000, .outOfSight, true),
            (1_000_000, .gone, false),
        ] as [(Int64, ProcessState, Bool)] {
            #expect(record.looksAlive(nowMs: now, process: { _ in process }) == alive)
        }
        let test = TestStore()
        let store = try await Store.open(bucket: test.faulty, environment: test.environment)
        try await store.heads.beat(record)
        #expect(try await store.heads.server("s") == record)
        #expect(try await store.heads.server("t") == nil)
        await store.forget(server: "s")
        #expect(try await store.heads.server("s") == nil)
    }

    @Test func processesOfThisMachine() throws {
        let mine = LocalProcess.record(id: "me", addresses: ["tcp://a"], environment: SeededEnvironment())
        #expect(
            !mine.bootID.isEmpty && !mine.pidNamespace.isEmpty && mine.pid > 0 && mine.startTicks > 0
                && !mine.host.isEmpty)
        #expect(LocalProcess.state(mine) == .running)
        for (change, state) in [
            ({ $0.startTicks += 1 }, .gone), ({ $0.bootID = "x" }, .outOfSight), ({ $0.bootID = "" }, .outOfSight),
            ({ $0.pidNamespace = "pid:[1]" }, .outOfSight), ({ $0.pid = 0 }, .outOfSight),
            // Beyond the largest pid that Linux gives.
            ({ $0.pid = 4_194_305 }, .gone),
        ] as [((inout ServerRecord) -> Void, ProcessState)] {
            var other = mine
            change(&other)
            #expect(LocalProcess.state(other) == state)
        }
    }

    @Test func aProcessThatEndsIsGone() throws {
        var pid: pid_t = 0
        let words: [UnsafeMutablePointer<CChar>?] = [strdup("sleep"), strdup("60"), nil]
        defer { words.forEach { free($0) } }
        #expect(posix_spawn(&pid, "/bin/sleep", nil, nil, words, nil) == 0)
        var record = LocalProcess.record(id: "s", addresses: [], environment: SeededEnvironment())
        record.pid = pid
        record.startTicks = try #require(LocalProcess.startTicks(of: pid))
        #expect(LocalProcess.state(record) == .running)
        kill(pid, SIGKILL)
        // A zombie first, then nothing.
        while LocalProcess.startTicks(of: pid) != 0 { usleep(1000) }
        #expect(LocalProcess.state(record) == .gone)
        waitpid(pid, nil, 0)
        #expect(LocalProcess.state(record) == .gone)
    }

    @Test func aListingLooksAtEachServerOnce() async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        for i in 0..<30 {
            _ = try await catalog.create("d\(i)", sizeBytes: 512)
            _ = try await Self.own(catalog, "d\(i)", server: "s\(i % 2)", alive: i % 2 == 0)
        }
        try await catalog.delete("d1")
        let gets = test.gets
        let disks = try await catalog.list().disks
        #expect(test.gets - gets == 32)
        #expect(disks.count == 29)
        #expect(disks.allSatisfy { $0.owner?.alive == ($0.owner?.server == "s0") })
        // A heartbeat that cannot be read, of a later version perhaps, is no sign of death.
        _ = try await test.memory.put("servers/s1", Array("{\"margarine\":\"server\",\"format\":2,".utf8), if: .none)
        #expect(try await catalog.show("d3").owner?.alive == true)
        #expect(await Self.kind { try await catalog.delete("d3") } == .owned)
    }

    @Test func generationsAreKeptAndNumberedOn() async throws {
        let test = TestStore()
        var g = SeededGenerator(seed: 4)
        let catalog = try await Self.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        var (head, etag) = try await Self.own(catalog, "disk", server: "s1", alive: true)
        var entries: [BlockEntry] = []
        var manifest = head.manifest(cache: test.cache())
        for n in 1...5 as ClosedRange<UInt64> {
            entries.append(.random(using: &g))
            var edit = ManifestEdit(manifest)
            edit.set(BlockIndex(3), entries.last!)
            manifest = try await test.write(edit)
            let record = GenerationRecord(
                diskID: head.diskID, generation: n, epoch: head.epoch, kind: .flush, committedAtMs: Int64(n),
                journalSequence: 10 * n,
                newBytes: manifest.bytesWritten, manifest: manifest)
            if n == 3 { _ = try await catalog.set("disk", .init(durability: .store)) }
            guard
                case .done(let new, let tag) = try await catalog.store.heads.update(
                    head, etag, change: { $0.advance(to: record) })
            else {
                Issue.record("generation \(n) lost")
                return
            }
            (head, etag) = (new, tag)
            #expect(head.journalSequence == 10 * n && head.committedAtMs == Int64(n))
        }
        // What another changed meanwhile is there.
        #expect(head.options.durability == .store)
        #expect(try await catalog.show("disk").generation == 5)
        let records = try await catalog.generations("disk")
        #expect(records.map(\.generation) == [1, 2, 3, 4, 5])
        for n in 1...5 as ClosedRange<UInt64> {
            let record = try await catalog.store.heads.record(head, generation: n)
            #expect(record == records[Int(n) - 1])
            #expect(try await Manifest.open(record, cache: test.cache()).find(BlockIndex(3)) == entries[Int(n) - 1])
        }
        for n in [0, 6, .max] as [UInt64] {
            #expect(await Self.kind { _ = try await catalog.store.heads.record(head, generation: n) } == .notFound)
        }
        // The next disk of this name does not have them, and counts on.
        try await catalog.delete("disk", force: true)
        let next = try await catalog.create("disk", sizeBytes: 512)
        #expect(next.generation == 5 && next.blocks == 0 && next.committedAt == nil)
        #expect(try await catalog.generations("disk").isEmpty)
        let nextHead = try await catalog.load("disk").head
        #expect(await Self.kind { _ = try await catalog.store.heads.record(nextHead, generation: 4) } == .notFound)
    }

    /// A disk that grew has the manifest of its generation until the next commit, which gives it the missing levels.
    @Test func aDiskGrowsOverALevelAndIsWrittenThere() async throws {
        let test = TestStore()
        var g = SeededGenerator(seed: 8)
        let catalog = try await Self.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        var (head, etag) = try await Self.own(catalog, "disk", server: "s1", alive: true)
        let (low, high) = (BlockEntry.random(using: &g), BlockEntry.random(using: &g))
        for (n, block, entry, size) in [(1, 3, low, 1 << 30), (2, 1 << 30, high, 1 << 60)]
            as [(UInt64, UInt64, BlockEntry, UInt64)]
        {
            _ = try await catalog.resize("disk", to: size)
            guard
                case .done(let grown, let tag) = try await catalog.store.heads.update(
                    head, etag, change: { $0.session = "x\(n)" })
            else {
                Issue.record("lost")
                return
            }
            #expect(grown.sizeBytes == size)
            let manifest = grown.manifest(cache: test.cache())
            #expect(manifest.sizeBytes == size && manifest.blockCount == size >> 24)
            if n == 2 {
                #expect(manifest.depth == 1)
                #expect(try await manifest.find(BlockIndex(3)) == low)
                #expect(manifest.entry(BlockIndex(1 << 30)) == .entry(nil))
                #expect(try await manifest.nextUsed(from: BlockIndex(4)) == nil)
            }
            var edit = ManifestEdit(manifest)
            edit.set(BlockIndex(block), entry)
            let written = try await test.write(edit)
            #expect(written.depth == (n == 1 ? 1 : 4))
            let record = GenerationRecord(
                diskID: grown.diskID, generation: n, epoch: grown.epoch, kind: .flush, committedAtMs: 1,
                journalSequence: 0, newBytes: 0,
                manifest: written)
            guard
                case .done(let new, let newTag) = try await catalog.store.heads.update(
                    grown, tag, change: { $0.advance(to: record) })
            else {
                Issue.record("lost")
                return
            }
            (head, etag) = (new, newTag)
        }
        let manifest = try await catalog.load("disk").head.manifest(cache: test.cache())
        #expect(try await manifest.find(BlockIndex(3)) == low)
        #expect(try await manifest.find(BlockIndex(1 << 30)) == high)
        #expect(manifest.usedBlocks == 2)
    }

    @Test func aCommitWhoseAnswerWasLostForGoodIsFoundOut() async throws {
        let test = TestStore()
        let catalog = try await Self.open(test)
        _ = try await catalog.create("disk", sizeBytes: 1 << 30)
        let (head, etag) = try await Self.own(catalog, "disk", server: "s1", alive: true)
        func record(_ journal: UInt64) -> GenerationRecord {
            GenerationRecord(
                diskID: head.diskID, generation: 1, epoch: head.epoch, kind: .clean, committedAtMs: 1,
                journalSequence: journal, newBytes: 0,
                manifest: head.manifest(cache: test.cache()))
        }
        // Took effect, and neither the answer nor reading back came through.
        test.faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, keyContains: "head", count: 1))
        test.faulty.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: "head", count: 1))
        let kind = await Self.kind {
            _ = try await catalog.store.heads.update(head, etag) { $0.advance(to: record(5)) }
        }
        #expect(kind == .store(.unclear))
        guard
            case .stale(let found, _) = try await catalog.store.heads.update(
                head, etag, change: { $0.advance(to: record(9)) })
        else {
            Issue.record("a second commit of the same number was taken")
            return
        }
        #expect(found.journalSequence == 5)
    }

    @Test("row 25: a session stays lost, however many are lost after it")
    func lostSessionsAreRememberedForEver() async throws {
        let heads = HeadStore(bucket: MemoryBucket(), environment: SystemEnvironment(workers: 1))
        var head = Head(
            diskID: ObjectID(high: 1, low: 1), name: "d", sizeBytes: 512, options: DiskOptions(), createdAtMs: 0)
        for i in 0..<100 { head.lose(session: "s\(i)") }
        _ = try await heads.swap(head, expecting: nil)
        let stored = try #require(try await heads.load("d")).head
        #expect(
            stored.lostSessions.count == 64 && stored.lostSessions.last == "s99" && stored.lostSessions.first == "s36")
        for i in 0..<100 {
            let isForgotten = try await heads.isForgotten("s\(i)", of: stored)
            #expect(isForgotten != stored.lostSessions.contains("s\(i)"), "s\(i)")
        }
        #expect(try await !heads.isForgotten("new", of: stored))
        // A later disk of that name has nothing to do with them, and the deletion of the first takes nothing of its own.
        var later = Head(
            diskID: ObjectID(high: 1, low: 2), name: "d", sizeBytes: 512, options: DiskOptions(), createdAtMs: 0)
        for i in 0..<70 { later.lose(session: "t\(i)") }
        try await heads.remember(later.surplusSessions, of: later)
        later.forgetSurplus()
        #expect(try await !heads.isForgotten("s1", of: later))
        try await heads.forgetLostSessions(of: "d", head.diskID)
        #expect(try await heads.isForgotten("t1", of: later))
        #expect(try await !heads.isForgotten("s1", of: stored))
    }
}
