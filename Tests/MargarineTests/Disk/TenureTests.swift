// Who may use a disk, over every state and every event; and the windows that the states close, on the engine.

import Foundation
@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct TenureTests {
    // MARK: The table

    @Test func everyStateTakesWhatCanHappenInIt() {
        for state in Tenure.allCases {
            for event in TenureEvent.allCases {
                guard let step = Tenure.transition(state, event) else { continue }
                let cell = "\(event) while \(state)"
                // Who asks is answered, and nobody else.
                let asks = event == .asked || event == .otherAsked
                #expect((step.answer != nil) == (asks || event == .granted), "\(cell)")
                #expect(!step.answer.isSome(.askStore) || [.admitting, .challenged].contains(step.next), "\(cell)")
                #expect(!step.answer.isSome(.wait) || state.isUndecided, "\(cell)")
                #expect(!step.answer.isSome(.admit) || step.next.isServing, "\(cell)")
                // The end is the end.
                if state == .lost || state == .released {
                    #expect(step.next == state && step.effects.isEmpty, "\(cell)")
                }
                if step.next == .lost || step.next == .released, step.next != state {
                    #expect(step.effects == [.leave], "\(cell)")
                }
                // Undecided is nobody but who was told so.
                if step.next.isUndecided, !state.isUndecided {
                    #expect(step.answer == .askStore || step.effects == [.release], "\(cell)")
                }
                // Whoever becomes idle is given back in the end.
                if step.next == .idle, state != .idle { #expect(step.effects.last == .rest, "\(cell)") }
            }
        }
    }

    @Test("row 2: no disk is given back while somebody is being admitted, and nobody is admitted meanwhile")
    func givingBackAndAdmittingExcludeEachOther() {
        for state in Tenure.allCases {
            let release = Tenure.transition(state, .restEnded)
            #expect((release?.effects ?? []).contains(.release) == (state == .idle))
        }
        for event in [TenureEvent.asked, .otherAsked, .granted] {
            #expect(Tenure.transition(.releasing, event)?.answer.isSome(.admit) != true)
        }
    }

    @Test("row 26: what an admission changes, it changes when it is granted")
    func aDeniedAdmissionChangesNothing() {
        #expect(Tenure.transition(.idle, .asked)?.effects == [])
        #expect(Tenure.transition(.away, .otherAsked)?.effects == [])
        #expect(Tenure.transition(.challenged, .denied) == TenureStep(.away))
        #expect(Tenure.transition(.challenged, .windowEnded) == TenureStep(.overdue))
        #expect(Tenure.transition(.overdue, .denied) == TenureStep(.idle, nil, [.rollBack, .rest]))
    }

    /// From the beginning, over what can happen: every state is reached, and each but the ends can be left.
    @Test func everyStateIsReachedAndLeft() {
        var reached: Set<Tenure> = [.idle, .away]
        var rest: [Tenure] = [.idle, .away]
        while let state = rest.popLast() {
            for event in TenureEvent.allCases {
                guard let next = Tenure.transition(state, event)?.next, reached.insert(next).inserted else { continue }
                rest.append(next)
            }
        }
        #expect(reached == Set(Tenure.allCases))
    }

    /// The picture in the documentation is made from the table: `MARGARINE_WRITE_DOCS=1 swift test --filter TenureTests`.
    @Test func thePictureIsThatOfTheTable() throws {
        let path = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "../../../Docs/Tenure.md")
        let page = try String(contentsOf: path, encoding: .utf8)
        let begin = "<!-- made from Tenure.transition -->\n"
        let end = "<!-- end -->\n"
        let from = try #require(page.range(of: begin)).upperBound
        let to = try #require(page.range(of: end)).lowerBound
        let drawn = Self.picture() + "\n" + Self.table()
        if ProcessInfo.processInfo.environment["MARGARINE_WRITE_DOCS"] != nil {
            try page.replacingCharacters(in: from..<to, with: drawn).write(to: path, atomically: true, encoding: .utf8)
            return
        }
        #expect(String(page[from..<to]) == drawn, "Docs/Tenure.md is not as the table")
    }

    /// Arrows between different states, one for each pair.
    private static func picture() -> String {
        var text = "```mermaid\nstateDiagram-v2\n    [*] --> idle\n    [*] --> away\n"
        for state in Tenure.allCases {
            for next in Tenure.allCases where next != state {
                let events = TenureEvent.allCases.filter { Tenure.transition(state, $0)?.next == next }
                if events.isEmpty { continue }
                text += "    \(state) --> \(next): \(events.map(\.rawValue).joined(separator: ", "))\n"
            }
        }
        return text + "    released --> [*]\n    lost --> [*]\n```\n"
    }

    private static func table() -> String {
        var text = "| while | event | becomes | answer | then |\n| --- | --- | --- | --- | --- |\n"
        for state in Tenure.allCases {
            for event in TenureEvent.allCases {
                guard let step = Tenure.transition(state, event) else { continue }
                let then = step.effects.map(\.rawValue).joined(separator: ", ")
                text += "| \(state) | \(event) | \(step.next) | \(step.answer?.rawValue ?? "") | \(then) |\n"
            }
        }
        return text
    }

    // MARK: On the engine

    /// Attaches while an idle disk's time is over, with a store that is slow to answer. Whether what was acknowledged then is
    /// still there.
    private func attachBeforeRelease(_ fault: Fault?) async throws -> Bool {
        let bed = try DiskBed(settings: {
            $0.releaseAfterMs = 100
            $0.fault = fault
        })
        try await bed.create()
        let first = try await bed.attach()
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: true)
        try await bed.waitForGeneration(1)
        bed.faults.inject(StoreFault(.delay(ns: 300_000_000), verb: .get, keyContains: "head"))
        do {
            let second = try await bed.attach()
            await bed.environment.sleep(ns: 200_000_000)
            try await second.write(pattern(4096, 2), at: 0)
            try await second.flush()
            await second.leave(clean: true)
        } catch { return false }
        await bed.manager.drain()
        let other = try DiskBed(store: bed.store, server: "b")
        return try await other.attach().read(4096, at: 0) == pattern(4096, 2)
    }

    @Test("row 2: a client that attaches just before the release of an idle disk keeps what it writes")
    func anAdmissionHoldsUpTheRelease() async throws {
        #expect(try await attachBeforeRelease(nil))
        #expect(try await !attachBeforeRelease(.releaseIgnoresAdmission))
    }

    /// A session is away, its window ends with nothing undone, somebody else writes and leaves. Whether it may go on, at this
    /// server and after a restart or on another one.
    private func comesBackAfterAnother(_ fault: Fault?, _ other: String, restarted: Bool) async throws -> Bool {
        var bed = try DiskBed(settings: { $0.fault = fault })
        try await bed.create { $0.resumeWindowMs = 50 }
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        try await first.flush()
        await first.leave(clean: false)
        await bed.environment.sleep(ns: 150_000_000)
        let second = try await bed.attach(other, host: "elsewhere")
        try await second.write(pattern(4096, 2), at: 0)
        await second.leave(clean: true)
        try await bed.waitForGeneration(2)
        if restarted {
            await bed.manager.drain()
            bed = try DiskBed(store: bed.store, scratch: bed.scratch, settings: { $0.fault = fault })
        }
        do { _ = try await bed.attach("d?session=one") } catch { return false }
        return true
    }

    @Test("row 4: whoever is served in between ends the claim of a session that was away", arguments: [false, true])
    func aSessionDoesNotGoOnAfterSomebodyElse(restarted: Bool) async throws {
        for other in ["d", "d?session=two"] {
            #expect(try await !comesBackAfterAnother(nil, other, restarted: restarted), "\(other)")
        }
        #expect(try await comesBackAfterAnother(.replacedSessionResumes, "d", restarted: restarted))
    }

    @Test("row 4: a session that nobody followed goes on, also after the disk was given back")
    func aClaimOutlivesTheWindow() async throws {
        let bed = try DiskBed(settings: { $0.releaseAfterMs = 50 })
        try await bed.create { $0.resumeWindowMs = 50 }
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        try await first.flush()
        await first.leave(clean: false)
        for _ in 0..<200 where try await bed.head().owner != nil { await bed.environment.sleep(ns: 20_000_000) }
        #expect(try await bed.head().owner == nil)
        let elsewhere = try DiskBed(store: bed.store, server: "b")
        let again = try await elsewhere.attach("d?session=one")
        #expect(try await again.read(4096, at: 0) == pattern(4096, 1))
        // And not once somebody else was there.
        await again.leave(clean: false)
        await elsewhere.environment.sleep(ns: 200_000_000)
        let other = try await elsewhere.attach("d?session=two")
        await other.leave(clean: true)
        await #expect(throws: AttachError.self) { try await elsewhere.attach("d?session=one") }
    }

    /// Another client tries to attach while the first one is away and the store refuses. Whether the first one may go on.
    private func failedAttach(_ fault: Fault?) async throws -> Bool {
        let bed = try DiskBed(settings: { $0.fault = fault })
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        await first.leave(clean: false)
        bed.faults.inject(StoreFault(.fail(.unavailable), keyContains: "head"))
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=two") }
        await #expect(throws: AttachError.self) { try await bed.attach("d", host: "x") }
        bed.faults.clearFaults()
        do {
            let again = try await bed.attach("d?session=one")
            return try await again.read(4096, at: 0) == pattern(4096, 1)
        } catch { return false }
    }

    @Test("row 26: a failed attach changes nothing")
    func aFailedAttachLeavesTheSessionThatIsAway() async throws {
        #expect(try await failedAttach(nil))
        #expect(try await !failedAttach(.failedAttachReplaces))
    }

    @Test("row 27: who can be refused here is refused without the store, and many who ask cost one look")
    func refusalsAskNobody() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let first = try await bed.attach("d?session=one")
        try await first.write(pattern(4096, 1), at: 0)
        bed.faults.inject(StoreFault(.fail(.unavailable)))
        await withTaskGroup(of: Void.self) { group in
            for i in 0..<200 {
                group.addTask {
                    await #expect(throws: AttachError.self) {
                        try await bed.attach(i % 2 == 0 ? "d" : "d?session=s\(i)", host: "h\(i)")
                    }
                }
            }
        }
        #expect(bed.faults.suffered == 0)
        bed.faults.clearFaults()
        try await first.flush()
    }

    @Test("row 25: a name falls out of no list, whoever attaches and resets in between")
    func manyLostSessionsKeepTheFirstOneOut() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.resumeWindowMs = 0 }
        let victim = try await bed.attach("d?session=victim")
        try await victim.write(pattern(4096, 1), at: 0)
        await victim.leave(clean: false)
        for i in 0..<70 {
            let client = try await bed.attach("d?session=s\(i)")
            await client.leave(clean: false)
        }
        let last = try await bed.attach("d?session=last")
        await last.leave(clean: true)
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=victim") }
        await #expect(throws: AttachError.self) { try await bed.attach("d?session=s0") }
        await bed.manager.drain()
        let other = try DiskBed(store: bed.store, server: "b")
        await #expect(throws: AttachError.self) { try await other.attach("d?session=victim") }
        _ = try await other.attach("d?session=fresh")
    }

    /// Readers come as the last one leaves, again and again. How often one was served that the server's record did not name.
    private func unnamedReaders(_ fault: Fault?) async throws -> Int {
        let bed = try DiskBed(settings: { $0.fault = fault })
        try await bed.create()
        let writer = try await bed.attach()
        try await writer.write(pattern(4096, 1), at: 0)
        await writer.leave(clean: true)
        try await bed.waitForGeneration(1)
        var unnamed = 0
        for _ in 0..<300 {
            let last = try await bed.attach("d@1")
            async let leaving: Void = last.leave(clean: true)
            let next = try await bed.attach("d@1")
            await leaving
            if bed.manager.reading != ["d@1"] { unnamed += 1 }
            await next.leave(clean: true)
            #expect(fault != nil || bed.manager.reading.isEmpty)
        }
        return unnamed
    }

    @Test("row 28: a reader that comes as the last one leaves is named all the time")
    func aReaderIsNamedAsLongAsItIsServed() async throws {
        #expect(try await unnamedReaders(nil) == 0)
        #expect(try await unnamedReaders(.snapshotGoneWhileAdmitting) > 0)
    }

    @Test("a reader's ticket that has lapsed is not joined")
    func aLapsedTicketIsRefused() async throws {
        let bed = try DiskBed()
        try await bed.create()
        let writer = try await bed.attach()
        try await writer.write(pattern(4096, 1), at: 0)
        await writer.leave(clean: true)
        try await bed.waitForGeneration(1)
        let attached = try await bed.manager.attach("d@1", client: ClientIdentity(address: "h:1", host: "h"))
        let once = TestClient(attached)
        try await once.join()
        let twice = TestClient(attached)
        await #expect(throws: AttachError.self) { try await twice.join() }
    }
}

extension Optional where Wrapped: Equatable {
    fileprivate func isSome(_ value: Wrapped) -> Bool { self == .some(value) }
}
