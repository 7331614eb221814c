// The loop: messages, timers, tasks, turns, descriptors.

import Glibc
import Testing

@testable import Runtime

@Suite struct LoopTests {
    @Test func currentIsTheLoopOnItsThreadOnly() async throws {
        try await withLoop { loop in
            #expect(Loop.current == nil)
            #expect(!loop.isCurrent)
            #expect(await loop.call { Loop.current === loop && loop.isCurrent })
        }
    }

    @Test func messagesOfEachThreadRunInOrder() async throws {
        try await withLoop { loop in
            let seen = Shared<[[Int]]>([[], [], [], []])
            await withTaskGroup(of: Void.self) { group in
                for thread in 0..<4 {
                    group.addTask {
                        for number in 0..<5_000 { loop.post { seen.update { $0[thread].append(number) } } }
                    }
                }
            }
            _ = await loop.call {}
            for thread in 0..<4 { #expect(seen.value[thread] == Array(0..<5_000)) }
        }
    }

    @Test func messagesPostedBeforeStopStillRun() throws {
        let loop = try Loop(name: "test")
        try loop.start()
        let count = Shared(0)
        for _ in 0..<1_000 { loop.post { count.update { $0 += 1 } } }
        loop.post { loop.post { count.update { $0 += 1 } } }
        loop.stop()
        #expect(count.value == 1_001)
    }

    @Test func aTimerThatRepeatsItselfStarvesNobody() async throws {
        try await withLoop { loop in
            let isOver = Shared(false)
            @Sendable func again() {
                if !isOver.value { loop.after(ns: 0) { again() } }
            }
            loop.post { again() }
            _ = await loop.call {}
            isOver.update { $0 = true }
        }
    }

    @Test func stopWaitsForDiskRequestsUnderWay() async throws {
        for ring in [true, false] {
            try await withFolder { folder in
                let loop = try Loop(name: "test", ring: ring)
                try loop.start()
                let file = try DirectoryScratch(path: folder).open("f", create: true)
                try await file.write([UInt8](repeating: 7, count: 600 * 512), at: 0)
                nonisolated(unsafe) let memory = UnsafeMutableRawBufferPointer.allocate(
                    byteCount: 600 * 512, alignment: 8)
                defer { memory.deallocate() }
                let done = Shared(0)
                await loop.call {
                    for index in 0..<600 {
                        let part = UnsafeMutableRawBufferPointer(rebasing: memory[index * 512..<(index + 1) * 512])
                        file.read(into: part, at: UInt64(index * 512)) { error in
                            if error == nil { done.update { $0 += 1 } }
                        }
                    }
                    loop.stop()  // nothing is submitted before the end of this turn
                }
                for _ in 0..<2_000 where done.value < 600 { usleep(1_000) }
                #expect(done.value == 600)
                #expect(memory.allSatisfy { $0 == 7 })
            }
        }
    }

    @Test func aLoopMayStopItself() async throws {
        let loop = try Loop(name: "test")
        try loop.start()
        #expect(
            await loop.call {
                loop.stop()
                return true
            })
    }

    @Test func timersRunInOrderOfDeadlineThenOfMaking() async throws {
        try await withLoop { loop in
            let order = Shared<[Int]>([])
            let started = monotonicNs()
            await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                loop.post {
                    for (name, ms) in [(3, 30), (1, 10), (2, 20), (0, 0)] as [(Int, UInt64)] {
                        loop.after(ns: ms * 1_000_000) { order.update { $0.append(name) } }
                    }
                    let cancelled = loop.after(ns: 5_000_000) { order.update { $0.append(-1) } }
                    loop.after(ns: 1_000_000) { cancelled.cancel() }
                    loop.after(ns: 40_000_000) { continuation.resume() }
                }
            }
            #expect(order.value == [0, 1, 2, 3])
            #expect(monotonicNs() - started >= 40_000_000)
        }
    }

    /// Thousands of random insertions, cancellations and advances of the clock, against a sorted list.
    @Test func theTimerHeapAgreesWithASortedList() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = Seeded(seed)
        let loop = try Loop(name: "test")
        var heap = TimerHeap()
        var model: [(deadline: UInt64, name: Int, timer: LoopTimer)] = []
        let ran = Shared<[Int]>([])
        var expected: [Int] = []
        var now: UInt64 = 0
        for name in 0..<5_000 {
            switch Int.random(in: 0..<6, using: &random) {
            case 0...2:
                let deadline = now + UInt64.random(in: 0..<50, using: &random)  // many of them equal
                let timer = LoopTimer(loop: loop, deadlineNs: deadline) { ran.update { $0.append(name) } }
                heap.insert(timer)
                model.append((deadline, name, timer))
            case 3:
                guard let index = model.indices.randomElement(using: &random) else { continue }
                heap.remove(model[index].timer)
                heap.remove(model[index].timer)
                model.remove(at: index)
            default:
                now += UInt64.random(in: 0..<10, using: &random)
                while let work = heap.takeDue(now: now) { work() }
                expected += model.filter { $0.deadline <= now }.sorted {
                    ($0.deadline, $0.name) < ($1.deadline, $1.name)
                }.map(\.name)
                model.removeAll { $0.deadline <= now }
            }
            #expect(heap.nextDeadlineNs == model.map(\.deadline).min(), "seed \(seed)")
        }
        #expect(ran.value == expected, "seed \(seed)")
        #expect(expected.count > 1_000)
    }

    @Test func tasksRunAndResumeOnTheLoop() async throws {
        try await withLoop { loop in
            let places = try await loop.task {
                var places = [loop.isCurrent]
                await Task.yield()
                places.append(loop.isCurrent)
                await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                    Task.detached { continuation.resume() }
                }
                places.append(loop.isCurrent)
                let environment = SystemEnvironment(workers: 2)
                let elsewhere = await environment.offload { !loop.isCurrent }
                places.append(elsewhere && loop.isCurrent)
                await environment.sleep(ns: 1_000)
                places.append(loop.isCurrent)
                async let child = loop.isCurrent
                places.append(await child)
                return places
            }
            #expect(places == [true, true, true, true, true, true])
        }
    }

    @Test func endOfTurnWorkRunsOnceAfterTheMessagesOfItsTurn() async throws {
        try await withLoop { loop in
            let order = Shared<[String]>([])
            await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                loop.post {
                    loop.atEndOfTurn {
                        order.update { $0.append("end") }
                        loop.atEndOfTurn {
                            order.update { $0.append("next end") }
                            continuation.resume()
                        }
                    }
                    order.update { $0.append("message") }
                    loop.post { order.update { $0.append("next turn") } }
                }
            }
            #expect(order.value == ["message", "end", "next turn", "next end"])
        }
    }

    /// A message that posts itself for ever must not keep descriptors and timers from being served.
    @Test func aMessageThatRepeatsItselfStarvesNobody() async throws {
        try await withLoop { loop in
            let isOver = Shared(false)
            @Sendable func again() {
                if !isOver.value { loop.post { again() } }
            }
            loop.post { again() }
            await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                loop.post { loop.after(ns: 1_000_000) { continuation.resume() } }
            }
            isOver.update { $0 = true }
        }
    }

    @Test func anIdleLoopUsesNoCPU() async throws {
        try await withLoop { loop in
            let read: @Sendable () -> Int = {
                var usage = rusage()
                getrusage(__rusage_who_t(1), &usage)  // RUSAGE_THREAD
                return usage.ru_utime.tv_usec + usage.ru_stime.tv_usec + usage.ru_nvcsw * 1_000_000
            }
            _ = await loop.call(read)
            let before = await loop.call(read)
            usleep(200_000)
            let after = await loop.call(read)
            // One switch for being woken by the second call, and less than a millisecond of work.
            #expect(after - before < 2_000_000 + 1_000)
        }
    }

    // MARK: Descriptors

    private final class Recorder: EventHandler, @unchecked Sendable {  // owned by the loop
        var events: [Events] = []
        var onReady: (Events) -> Void = { _ in }
        func ready(_ events: Events) {
            self.events.append(events)
            onReady(events)
        }
    }

    @Test func aPipeIsToldReadableThenHungUp() async throws {
        try await withLoop { loop in
            var ends: [Int32] = [0, 0]
            #expect(pipe(&ends) == 0)
            let (input, output) = (FileDescriptor(owning: ends[0]), FileDescriptor(owning: ends[1]))
            let recorder = Recorder()
            let seen = await withCheckedContinuation { (continuation: CheckedContinuation<[Events], Never>) in
                loop.post {
                    recorder.onReady = { events in
                        if events.contains(.readable) {
                            var byte: UInt8 = 0
                            _ = read(input.raw, &byte, 1)
                            output.close()
                        } else {
                            loop.unwatch(input.raw)
                            continuation.resume(returning: recorder.events)
                        }
                    }
                    try! loop.watch(input.raw, .readable, recorder)
                    _ = write(output.raw, "x", 1)
                }
            }
            #expect(seen == [.readable, .hangup])
        }
    }

    /// Both descriptors are ready in one turn; the first handler ends the second watch and reuses its number.
    @Test func anEventOfAnEndedWatchDoesNotReachTheNextOneOfThatNumber() async throws {
        try await withLoop { loop in
            let stale = await loop.call { () -> Recorder in
                let first = Recorder()
                let second = Recorder()
                let replacement = Recorder()
                var ends = [[Int32]](repeating: [0, 0], count: 3)
                for index in 0..<3 { _ = pipe(&ends[index]) }
                let pipes = ends
                let swap = { (own: Int32, other: Int32) in
                    { (_: Events) in
                        loop.unwatch(own)
                        loop.unwatch(other)
                        _ = dup2(pipes[2][0], other)  // the empty pipe under the other's number
                        try! loop.watch(other, .readable, replacement)
                    }
                }
                first.onReady = swap(pipes[0][0], pipes[1][0])
                second.onReady = swap(pipes[1][0], pipes[0][0])
                try! loop.watch(pipes[0][0], .readable, first)
                try! loop.watch(pipes[1][0], .readable, second)
                _ = write(pipes[0][1], "x", 1)
                _ = write(pipes[1][1], "x", 1)
                return replacement
            }
            try await loop.task { await SystemEnvironment(workers: 1).sleep(ns: 20_000_000) }
            #expect(await loop.call { stale.events.isEmpty })
        }
    }
}
