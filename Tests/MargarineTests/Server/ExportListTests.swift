// LIST over a store that is slow: shared, kept, called off.

import BlockCache
import Logging
@testable import Margarine
import ObjectStore
import Runtime
import Synchronization
import Testing

@Suite struct ExportListTests {
    /// A store of some disks whose reads take their time and are counted.
    private struct Bed {
        let bed: DiskBed
        init(disks: Int, delayMs: UInt64) async throws {
            bed = try DiskBed()
            for number in 0..<disks { try await bed.create("disk-\(number)") }
            bed.faults.inject(StoreFault(.delay(ns: delayMs * 1_000_000), verb: .get, keyContains: "head"))
        }
        var reads: Int { bed.faults.suffered }
    }

    @Test("row 30: concurrent askers share one listing with few reads at a time, and its answer is kept for a while")
    func oneListingServesAllWhoAsk() async throws {
        let bed = try await Bed(disks: 24, delayMs: 10)
        let manager = bed.bed.manager
        let before = bed.reads
        let counts = try await withThrowingTaskGroup(of: Int.self) { group in
            for _ in 0..<50 { group.addTask { try await manager.list().count } }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        #expect(counts == Array(repeating: 24, count: 50))
        #expect(bed.reads - before == 24)
        #expect(try await manager.list().count == 24)
        #expect(bed.reads - before == 24)
    }

    @Test("row 30: a listing reads few heads at a time")
    func aListingReadsFewHeadsAtATime() async throws {
        let bed = try await Bed(disks: 40, delayMs: 0)
        bed.bed.faults.clearFaults()
        let gate = StoreGate()
        bed.bed.faults.inject(StoreFault(.hold(gate), verb: .get, keyContains: "head"))
        let asker = Task { try await bed.bed.manager.list().count }
        await gate.waitUntilArrived()
        await bed.bed.environment.sleep(ns: 200_000_000)
        #expect(gate.arrived <= 8)
        gate.open()
        #expect(try await asker.value == 40)
    }

    @Test("row 30: a listing is called off with the last one who waits for it, and not before")
    func aListingIsCalledOffWithItsLastAsker() async throws {
        let bed = try await Bed(disks: 64, delayMs: 20)
        let manager = bed.bed.manager
        let before = bed.reads
        let impatient = (0..<20).map { _ in Task { try await manager.list().count } }
        let patient = Task { try await manager.list().count }
        await bed.bed.environment.sleep(ns: 20_000_000)
        for task in impatient { task.cancel() }
        #expect(try await patient.value == 64)
        #expect(bed.reads - before == 64)
        // Now nobody stays.
        let other = try await Bed(disks: 64, delayMs: 20)
        let asker = Task { try await other.bed.manager.list() }
        await other.bed.environment.sleep(ns: 30_000_000)
        asker.cancel()
        await #expect(throws: AttachError.self) { try await asker.value }
        await other.bed.environment.sleep(ns: 500_000_000)
        #expect(other.reads < 40)
    }
}
