// A slice that the store lost or damaged costs what is in it, and nothing else: the disk can be attached under every rule.

@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct UnreadableSliceTests {
    enum Harm: CaseIterable { case missing, damaged, outage }

    /// A disk with data in its first block and in its second, committed one after the other.
    private func disk(_ rule: SafePointRule) async throws -> (bed: DiskBed, first: [String]) {
        let bed = try DiskBed()
        try await bed.create { $0.safePoints = rule }
        let client = try await bed.attach()
        try await client.write(pattern(1 << 20, 1), at: 0)
        await client.leave(clean: true)
        try await bed.waitForGeneration(1)
        let first = try await bed.store.list(prefix: "blocks/", after: nil, folders: false, limit: 1000).items.map(
            \.key)
        let again = try await bed.attach()
        try await again.write(pattern(1 << 20, 2), at: 20 << 20)
        await again.leave(clean: true)
        try await bed.waitForGeneration(2)
        await bed.manager.drain()
        return (bed, first)
    }

    @Test(
        "row 21: a disk whose slice at 64 KiB can't be read is attached",
        arguments: SafePointRule.allCases, Harm.allCases)
    func attached(_ rule: SafePointRule, _ harm: Harm) async throws {
        let (before, first) = try await disk(rule)
        try #require(!first.isEmpty)
        let bed = try DiskBed(store: before.store) { if harm == .outage { $0.requestTimeoutMs = 3_000 } }
        for key in first {
            switch harm {
            case .missing: try await before.store.delete([key])
            case .damaged:
                let bytes = try await before.store.get(key, range: nil).bytes
                _ = try await before.store.put(key, bytes.map { $0 ^ 1 }, if: .none)
            case .outage: bed.faults.inject(StoreFault(.fail(.unavailable), verb: .get, keyContains: key))
            }
        }
        let client = try await bed.attach()
        #expect(await client.run(.read, offset: 65536, length: 4096).error == .io)
        #expect(try await client.read(1 << 20, at: 20 << 20) == pattern(1 << 20, 2))
        // It can be written. (Once that is committed, the slice's other pages are wanted with it.)
        try await client.write(pattern(4096, 3), at: 65536)
        #expect(try await client.read(4096, at: 65536) == pattern(4096, 3))
        try await client.flush()
    }
}
