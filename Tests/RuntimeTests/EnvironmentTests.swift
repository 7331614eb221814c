// The clock, sleeping, randomness, workers and signals of a real daemon.

import Glibc
import Testing

@testable import Runtime

@Suite struct EnvironmentTests {
    private let environment = SystemEnvironment(workers: 3)

    @Test func clocksAgreeWithTheSystem() {
        let before = monotonicNs()
        let now = environment.nowNs
        #expect(before <= now && now <= monotonicNs())
        #expect(abs(environment.wallMs - Int64(time(nil)) * 1_000) < 5_000)
    }

    @Test func randomBitsDoNotRepeat() async {
        let words = Shared<[UInt64]>([])
        await withTaskGroup(of: Void.self) { group in
            for _ in 0..<4 {
                group.addTask { [environment] in
                    let mine = (0..<1_000).map { _ in environment.randomBits() }
                    words.update { $0 += mine }
                }
            }
        }
        #expect(Set(words.value).count == 4_000)
        // Each bit is set about half of the time: 2,000 of 4,000, more than 6 standard deviations (32) off is a fault.
        for bit in 0..<64 {
            let count = words.value.count { $0 >> UInt64(bit) & 1 == 1 }
            #expect(abs(count - 2_000) < 200)
        }
    }

    @Test(arguments: [true, false]) func sleepLastsAndEndsWithItsTask(_ onLoop: Bool) async throws {
        try await withLoop { loop in
            let environment = environment
            let work: @Sendable (UInt64) -> Task<UInt64, Never> = { ns in
                let body: @Sendable () async -> UInt64 = {
                    let started = monotonicNs()
                    await environment.sleep(ns: ns)
                    return monotonicNs() - started
                }
                return onLoop ? Task(executorPreference: loop) { await body() } : Task { await body() }
            }
            #expect(await work(20_000_000).value >= 20_000_000)
            let long = work(60_000_000_000)
            usleep(20_000)
            long.cancel()
            #expect(await long.value < 10_000_000_000)
            let cancelledBefore = work(60_000_000_000)
            cancelledBefore.cancel()
            #expect(await cancelledBefore.value < 10_000_000_000)
        }
    }

    @Test func cancellingRacesWithWaking() async throws {
        try await withLoop { loop in
            let environment = environment
            for round in 0..<300 {
                let task = Task(executorPreference: loop) { await environment.sleep(ns: UInt64(round % 10) * 20_000) }
                usleep(UInt32(round % 7) * 20)
                task.cancel()
                await task.value
            }
        }
    }

    @Test func workersAreBoundedAndRunSideBySide() async {
        let running = Shared((now: 0, most: 0))
        await withTaskGroup(of: Int.self) { group in
            for index in 0..<24 {
                group.addTask { [environment] in
                    await environment.offload {
                        running.update {
                            $0.now += 1
                            $0.most = max($0.most, $0.now)
                        }
                        // Nobody ends before three have run at once.
                        for _ in 0..<5_000 where running.value.most < 3 { usleep(1_000) }
                        usleep(1_000)
                        running.update { $0.now -= 1 }
                        return index
                    }
                }
            }
            var seen: Set<Int> = []
            for await index in group { seen.insert(index) }
            #expect(seen == Set(0..<24))
        }
        #expect(running.value.most == 3)
    }

    @Test func aStoppedPoolHasDoneItsWork() {
        let pool = WorkerPool(name: "test", threads: 2)
        let done = Shared(0)
        for _ in 0..<3_000 { pool.run { done.update { $0 += 1 } } }
        pool.stop()
        #expect(done.value == 3_000)
    }

    @Test func signalsReachTheLoopInsteadOfEndingTheProcess() async throws {
        try await withLoop { loop in
            let seen = Shared<[Int32]>([])
            let watcher = await loop.call {
                // To this thread only, so that the rest of the test process keeps its ways.
                SignalWatcher.block([SIGUSR1, SIGUSR2])
                return try! SignalWatcher([SIGUSR1, SIGUSR2], on: loop) { signal in seen.update { $0.append(signal) } }
            }
            await loop.call {
                pthread_kill(pthread_self(), SIGUSR2)
                pthread_kill(pthread_self(), SIGUSR1)
            }
            for _ in 0..<1_000 where seen.value.count < 2 { usleep(1_000) }
            #expect(Set(seen.value) == [SIGUSR1, SIGUSR2])
            await loop.call {
                watcher.stop()
                watcher.stop()
            }
        }
    }
}
