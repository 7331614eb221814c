import ObjectStore
import Synchronization
import Testing

@Suite struct RetryingBucketTests {
    let memory = MemoryBucket()
    let environment = SkippingEnvironment()
    let faulty: FaultyBucket
    let bucket: RetryingBucket

    init() {
        faulty = FaultyBucket(memory, environment: environment)
        bucket = RetryingBucket(faulty, environment: environment)
    }

    @Test func keepsTheContract() async throws { try await BucketContract(bucket).runAll() }

    @Test func readsListsDeletesAndPlainPutsAreRepeated() async throws {
        for kind in [StoreError.Kind.unavailable, .unclear] {
            for verb in [StoreFault.Verb.put, .get, .list, .delete] {
                faulty.inject(StoreFault(.fail(kind), verb: verb, count: 3))
            }
            _ = try await bucket.put("a", [1], if: .none)
            #expect(try await bucket.get("a", range: nil).bytes == [1])
            #expect(try await bucket.list(prefix: "", after: nil, folders: false, limit: 9).items.count == 1)
            try await bucket.delete(["a"])
        }
        #expect(faulty.suffered == 24)
    }

    @Test func plainAnswersAreNotRepeated() async throws {
        for kind in [StoreError.Kind.refused, .notFound, .conditionFailed] {
            faulty.inject(StoreFault(.fail(kind), count: 1))
            #expect(await ObjectStoreTests.kind { _ = try await bucket.get("a", range: nil) } == kind)
            faulty.clearFaults()
        }
        #expect(environment.pausesMs.isEmpty)
    }

    @Test func conditionalPutWhoseAnswerWasLostSucceeds() async throws {
        faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, count: 1))
        let first = try await bucket.put("head", [1, 1], if: .absent)
        #expect(try await memory.get("head", range: nil).etag == first)
        faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, count: 1))
        faulty.inject(StoreFault(.fail(.unavailable), verb: .get, count: 2))
        let second = try await bucket.put("head", [2, 2], if: .matches(first))
        #expect(try await memory.get("head", range: nil).etag == second)
        #expect(faulty.suffered == 4)
    }

    @Test func conditionalPutThatHadNoEffectIsSentAgain() async throws {
        let first = try await bucket.put("head", [1], if: .absent)
        faulty.inject(StoreFault(.fail(.unclear), verb: .put, count: 3))
        _ = try await bucket.put("head", [2], if: .matches(first))
        #expect(memory.contents == ["head": [2]])
    }

    @Test func conditionalPutIsLostWhenAnotherIsThere() async throws {
        let first = try await bucket.put("head", [1], if: .absent)
        faulty.inject(StoreFault(.fail(.unclear), verb: .put, count: 1))
        let gate = StoreGate()
        faulty.inject(StoreFault(.hold(gate), verb: .get, count: 1))
        async let lost = kind { _ = try await bucket.put("head", [2], if: .matches(first)) }
        await gate.waitUntilArrived()
        _ = try await memory.put("head", [3], if: .none)
        gate.open()
        #expect(await lost == .conditionFailed)
        #expect(memory.contents == ["head": [3]])
    }

    @Test func conditionalPutStaysUnclearWhenItCannotBeReadBack() async throws {
        faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put))
        faulty.inject(StoreFault(.fail(.unavailable), verb: .get))
        #expect(await kind { _ = try await bucket.put("head", [1], if: .absent) } == .unclear)
        #expect(memory.contents == ["head": [1]])
    }

    @Test func damagedReadsAreAskedForAgainAFewTimes() async throws {
        _ = try await bucket.put("a", [1], if: .none)
        faulty.inject(StoreFault(.fail(.corrupt), verb: .get, count: 3))
        #expect(try await bucket.get("a", range: nil).bytes == [1])
        faulty.inject(StoreFault(.fail(.corrupt), verb: .get))
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .corrupt)
        #expect(faulty.suffered == 7)
    }

    @Test func pausesGrowJitteredUntilTheDeadline() async throws {
        faulty.inject(StoreFault(.fail(.unavailable)))
        let text = await errorText { _ = try await bucket.get("a", range: nil) }
        #expect(text.contains("given up after"))
        let pauses = environment.pausesMs
        for (index, pause) in pauses.enumerated() {
            let longest = min(50 << UInt64(index), 5000)
            #expect(pause >= longest / 2 && pause <= longest, "pause \(index) is \(pause)")
        }
        #expect(pauses.reduce(0, +) <= 60_000 && pauses.reduce(0, +) >= 55_000)
        #expect(Set(pauses).count > pauses.count / 2)
    }

    @Test func aSpentBudgetSlowsAllCallsDown() async throws {
        var policy = RetryPolicy()
        policy.budget = 3
        let bucket = RetryingBucket(faulty, environment: environment, policy: policy)
        faulty.inject(StoreFault(.fail(.unavailable), count: 6))
        _ = await kind { _ = try await bucket.get("a", range: nil) }
        let pauses = environment.pausesMs
        #expect(
            pauses.count == 6 && pauses[..<3].allSatisfy { $0 <= 200 } && pauses[3...].allSatisfy { $0 >= 2500 },
            "\(pauses)")
    }
}

@Suite struct SwapTests {
    let memory = MemoryBucket()
    let faulty: FaultyBucket
    init() { faulty = FaultyBucket(memory, environment: SkippingEnvironment()) }

    @Test func wonAndLost() async throws {
        guard case .won(let tag) = try await memory.swap("head", [1], if: .absent) else { return #expect(Bool(false)) }
        guard case .won = try await memory.swap("head", [2], if: .matches(tag)) else { return #expect(Bool(false)) }
        guard case .lost(let current?) = try await memory.swap("head", [3], if: .matches(tag)) else {
            return #expect(Bool(false))
        }
        #expect(current.bytes == [2])
        guard case .lost(let other?) = try await memory.swap("head", [3], if: .absent) else {
            return #expect(Bool(false))
        }
        #expect(other.bytes == [2])
        guard case .lost(nil) = try await memory.swap("none", [3], if: .matches(tag)) else {
            return #expect(Bool(false))
        }
    }

    @Test func lostAnswersAreReadBack() async throws {
        faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, count: 1))
        guard case .won(let tag) = try await faulty.swap("head", [1], if: .absent) else { return #expect(Bool(false)) }
        faulty.inject(StoreFault(.failAfterEffect(.unclear), verb: .put, count: 1))
        guard case .won(let next) = try await faulty.swap("head", [2], if: .matches(tag)) else {
            return #expect(Bool(false))
        }
        #expect(try await memory.get("head", range: nil).etag == next)
    }

    @Test func answersThatHidNothingAreTriedAgain() async throws {
        faulty.inject(StoreFault(.fail(.unclear), verb: .put, count: 2))
        faulty.inject(StoreFault(.fail(.conditionFailed), verb: .put, count: 2))
        guard case .won = try await faulty.swap("head", [1], if: .absent) else { return #expect(Bool(false)) }
        #expect(faulty.suffered == 4)
    }

    @Test func unclearOnlyWhenItCannotBeReadBack() async throws {
        faulty.inject(StoreFault(.fail(.unclear), verb: .put, count: 1))
        faulty.inject(StoreFault(.fail(.unavailable), verb: .get, count: 1))
        #expect(await kind { _ = try await faulty.swap("head", [1], if: .absent) } == .unclear)
        faulty.inject(StoreFault(.fail(.unavailable), verb: .put, count: 1))
        #expect(await kind { _ = try await faulty.swap("head", [1], if: .absent) } == .unavailable)
        #expect(memory.contents.isEmpty)
    }
}

@Suite struct CountingBucketTests {
    @Test("row 5: a denial is told once with its cause, and its end once, for each kind of call") func troubles()
        async throws
    {
        let environment = SkippingEnvironment()
        let faulty = FaultyBucket(MemoryBucket(name: "m"), environment: environment)
        let told = Mutex<[StoreTrouble]>([])
        let counters = StoreCounters { trouble in told.withLock { $0.append(trouble) } }
        let bucket = CountingBucket(faulty, counters: counters, environment: environment)
        _ = try await bucket.put("a", [1], if: .none)
        faulty.inject(StoreFault(.fail(.denied), verb: .get))
        _ = await kind { _ = try await bucket.get("a", range: nil) }
        // At once: it lasts until somebody mends it.
        #expect(told.withLock { $0.count } == 1)
        await environment.sleep(ns: 50_000_000)
        for _ in 0..<999 {
            _ = await kind { _ = try await bucket.get("a", range: nil) }
            await environment.sleep(ns: 50_000_000)
            // Others go on as before.
            _ = try await bucket.put("a", [1], if: .none)
        }
        faulty.clearFaults()
        await environment.sleep(ns: 3_000_000_000)
        _ = try await bucket.get("a", range: nil)
        _ = try await bucket.get("a", range: nil)
        var all = told.withLock { $0 }
        #expect(all.count == 2 && all.allSatisfy { $0.verb == "get" && $0.bucket == "m" })
        #expect(all.first?.change == .denied && all.first?.description.contains("injected") == true)
        #expect(all.last?.change == .over(durationMs: 53_000, failures: 1000))

        // One that is out of reach is told once it lasts; plain answers are none of this.
        told.withLock { $0 = [] }
        _ = await kind { _ = try await bucket.get("b", range: nil) }
        faulty.inject(StoreFault(.fail(.unavailable), verb: .put, count: 1))
        _ = await kind { _ = try await bucket.put("a", [1], if: .none) }
        _ = try await bucket.put("a", [1], if: .none)
        #expect(told.withLock { $0.isEmpty })
        faulty.inject(StoreFault(.fail(.unavailable), verb: .put))
        for _ in 0..<200 {
            _ = await kind { _ = try await bucket.put("a", [1], if: .none) }
            await environment.sleep(ns: 100_000_000)
        }
        all = told.withLock { $0 }
        #expect(all.map(\.change) == [.unavailable])
    }

    @Test func countsCallsBytesAndErrors() async throws {
        let environment = SkippingEnvironment()
        let faulty = FaultyBucket(MemoryBucket(name: "m"), environment: environment)
        let bucket = CountingBucket(faulty, environment: environment)
        _ = try await bucket.put("a", [1, 2, 3], if: .none)
        _ = try await bucket.get("a", range: 0..<2)
        _ = await kind { _ = try await bucket.get("b", range: nil) }
        _ = await kind { _ = try await bucket.put("a", [1], if: .absent) }
        #expect(bucket.counters.snapshot.lastError == nil)
        faulty.inject(StoreFault(.fail(.unavailable), verb: .list, count: 1))
        _ = await kind { _ = try await bucket.list(prefix: "", after: nil, folders: false, limit: 1) }
        faulty.inject(StoreFault(.delay(ns: 5_000_000), verb: .delete, count: 1))
        try await bucket.delete(["a", "b"])
        let counts = bucket.counters.snapshot
        #expect(counts.put.started == 2 && counts.put.failed == 1 && counts.put.bytes == 3)
        #expect(counts.get.started == 2 && counts.get.failed == 1 && counts.get.bytes == 2 && counts.get.inFlight == 0)
        #expect(counts.errors.notFound == 1 && counts.errors.conditionFailed == 1 && counts.errors.unavailable == 1)
        #expect(counts.lastError?.contains("injected") == true && counts.lastErrorWallMs != nil)
        #expect(counts.delete.longestNs == 5_000_000)
    }

    @Test func keepsTheContract() async throws {
        try await BucketContract(CountingBucket(MemoryBucket(), environment: SkippingEnvironment())).runAll()
    }
}

@Suite struct FaultyBucketTests {
    @Test func damagesBytesAndHoldsCalls() async throws {
        let memory = MemoryBucket()
        let faulty = FaultyBucket(memory, environment: TestEnvironment(seed: 7))
        _ = try await faulty.put("a", [0, 0, 0, 0], if: .none)
        faulty.inject(StoreFault(.corrupt, verb: .get, count: 1))
        #expect(try await faulty.get("a", range: nil).bytes.map { $0.nonzeroBitCount }.reduce(0, +) == 1)
        faulty.inject(StoreFault(.truncate, verb: .get, count: 1))
        #expect(try await faulty.get("a", range: nil).bytes.count == 2)

        let before = StoreGate()
        let after = StoreGate()
        faulty.inject(StoreFault(.hold(before), verb: .put, keyContains: "held-b"))
        faulty.inject(StoreFault(.holdAfterEffect(after), verb: .put, keyContains: "held-a"))
        async let one = faulty.put("held-b", [1], if: .none)
        async let two = faulty.put("held-a", [1], if: .none)
        await before.waitUntilArrived()
        await after.waitUntilArrived()
        #expect(Set(memory.contents.keys) == ["a", "held-a"])
        before.open()
        after.open()
        _ = try await (one, two)
        #expect(Set(memory.contents.keys) == ["a", "held-a", "held-b"])
    }

    @Test func sameSeedSameFaults() async throws {
        func run() async -> [Bool] {
            let faulty = FaultyBucket(MemoryBucket(), environment: TestEnvironment(seed: 42))
            faulty.inject(StoreFault(.fail(.unavailable), probability: 0.5))
            var failed: [Bool] = []
            for _ in 0..<64 { failed.append(await kind { _ = try await faulty.put("a", [1], if: .none) } != nil) }
            return failed
        }
        let first = await run()
        #expect(await run() == first)
        #expect((16...48).contains(first.count { $0 }))
    }
}
