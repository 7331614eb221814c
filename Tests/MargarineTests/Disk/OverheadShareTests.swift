// What several disks of a loop hold beside their frames: no disk keeps the others from what is left.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct OverheadShareTests {
    @Test(
        "row 7: disks whose commits fail hold up none of the others on their loop with what their layers take",
        arguments: [1, 3])
    func theDeadDoNotHoldUpTheLiving(_ dead: Int) async throws {
        let bed = try DiskBed(memoryBytes: 16 << 20, dirtyBytes: 8 << 20)
        let size: UInt64 = 1 << 40
        for number in 0..<dead {
            let name = "dead\(number)"
            try await bed.create(name, size: size)
            bed.faults.inject(StoreFault(.delay(ns: 1), verb: .put, keyContains: "disks/\(name)/head", count: 1))
            bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "disks/\(name)/head"))
        }
        try await bed.create("live", size: size)
        // A page in each slice: most overhead for least data.
        @Sendable func write(_ client: TestClient, _ number: Int) async throws {
            try await client.write(pattern(4096, UInt64(number)), at: UInt64(number) << 19)
        }
        let written = (0..<dead).map { _ in Tally() }
        for number in 0..<dead {
            let client = try await bed.attach("dead\(number)")
            let tally = written[number]
            Task {
                for page in 0..<1_000_000 {
                    try await write(client, page)
                    tally.add()
                }
            }
        }
        // They write until they can't.
        var before: [Int] = []
        for _ in 0..<120 {
            before = written.map(\.value)
            await bed.environment.sleep(ns: 500_000_000)
            if before == written.map(\.value), before.allSatisfy({ $0 > 100 }) { break }
        }
        #expect(before.allSatisfy { $0 > 100 && $0 < 999_999 })
        let client = try await bed.attach("live")
        let done = Tally()
        let pages = 4_000
        Task {
            for page in 0..<pages {
                try await write(client, page)
                done.add()
            }
        }
        for _ in 0..<3_000 where done.value < pages { await bed.environment.sleep(ns: 10_000_000) }
        #expect(done.value == pages)
        #expect(bed.context.arena.heldBytes <= 9 << 20)
        bed.kill()
    }
}
