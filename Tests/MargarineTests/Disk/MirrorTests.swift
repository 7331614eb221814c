// The mirrors of a btrfs super block belong to its safe point, in whatever order they come.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

@Suite struct MirrorTests {
    private static let mirror: UInt64 = 64 << 20
    private static let far: UInt64 = 256 << 30

    /// When the mirror is written.
    enum Order: String, CaseIterable {
        case before, after
        /// As `after`, on another connection, beside a write of the next transaction.
        case beside
    }

    /// - Parameter mirrorsWithinMs: so long that a busy machine makes no mirror late.
    private func bed(
        _ rule: SafePointRule, _ durability: Durability = .scratch, size: UInt64 = 128 << 20,
        mirrorsWithinMs: Int64 = 20_000
    ) async throws -> DiskBed {
        let bed = try DiskBed {
            $0.commitIntervalMs = 1
            $0.mirrorsWithinMs = mirrorsWithinMs
        }
        try await bed.create(size: size) {
            $0.safePoints = rule
            $0.durability = durability
            $0.historyDensity = DiskOptions.maxHistoryDensity
        }
        return bed
    }

    /// A full commit, as btrfs writes it.
    private func commit(_ generation: UInt64, _ order: Order, _ client: TestClient, _ other: TestClient) async throws {
        try await client.write(pattern(4096, generation), at: 4 << 20)
        try await client.flush()
        let mirror = superBlock(generation, at: Self.mirror)
        if order == .before { try await other.write(mirror, at: Self.mirror) }
        async let primary: Void = client.write(superBlock(generation), at: 65536, fua: true)
        if order != .before { try await Task.sleep(for: .milliseconds(5)) }
        if order == .beside {
            try await client.write(pattern(4096, generation + 1), at: 5 << 20)
        }
        if order != .before { try await other.write(mirror, at: Self.mirror) }
        try await primary
    }

    /// Generations of primary and mirror in a committed generation of the disk; nil: no super block there.
    private func generations(_ bed: DiskBed, _ number: UInt64) async throws -> (UInt64?, UInt64?) {
        let reader = try await bed.attach("d@\(number)")
        defer { Task { await reader.leave(clean: true) } }
        func generation(_ offset: UInt64) async throws -> UInt64? {
            try await reader.read(4096, at: offset).withUnsafeBytes { SuperBlock($0.baseAddress!, at: offset) }?
                .generation
        }
        return (try await generation(65536), try await generation(Self.mirror))
    }

    /// Generations of the disk whose mirror is not as its primary.
    private func stale(_ rule: SafePointRule, _ durability: Durability, _ order: Order) async throws -> [UInt64] {
        let bed = try await bed(rule, durability)
        let client = try await bed.attach()
        let other = try await bed.attach()
        for generation in 5..<9 as Range<UInt64> {
            try await commit(generation, order, client, other)
            await bed.environment.sleep(ns: 20_000_000)
        }
        await other.leave(clean: true)
        await client.leave(clean: true)
        await bed.manager.drain()
        let reader = try DiskBed(store: bed.store, server: "b")
        var stale: [UInt64] = []
        let last = try await bed.head().generation
        #expect(last >= 4)
        for number in 1...last {
            let (primary, mirror) = try await generations(reader, number)
            if primary != mirror { stale.append(number) }
        }
        return stale
    }

    @Test("row 15: no generation has a mirror older than its super block", arguments: Order.allCases)
    func mirrorsBelong(_ order: Order) async throws {
        for rule in [SafePointRule.auto, .btrfs] {
            for durability in [Durability.scratch, .store] {
                #expect(try await stale(rule, durability, order) == [], "\(rule) \(durability)")
            }
        }
    }

    @Test("row 15: a super block that comes as a commit is about to begin has its mirror in it")
    func commitAboutToBegin() async throws {
        let bed = try await bed(.auto)
        let client = try await bed.attach()
        try await client.write(pattern(4096, 5), at: 4 << 20)
        try await client.flush()
        try await bed.waitForGeneration(1)
        try await client.write(superBlock(5), at: 65536, fua: true)
        try await client.write(superBlock(5, at: Self.mirror), at: Self.mirror)
        try await bed.waitForGeneration(2)
        while await client.onLoop({ (client.device as! Disk).isCommitting }) {
            await bed.environment.sleep(ns: 1_000_000)
        }
        // What waits now would be committed only once the next super block is there.
        try await client.write(pattern(4096, 6), at: 4 << 20)
        try await client.flush()
        let primary = superBlock(6)
        await client.onLoop {
            let disk = client.device as! Disk
            #expect(disk.waiting != nil)
            disk.startCommit()
            client.device.beginTurn()
            let written = primary.withUnsafeBytes {
                client.device.tryWrite(offset: 65536, lengthBytes: 4096, from: $0.baseAddress!, client: client)
            }
            guard case .done = written else { return #expect(Bool(false), "not taken inline") }
            _ = client.device.endTurn(client: client)
            #expect(disk.awaitsMirrors)
        }
        await bed.environment.sleep(ns: 100_000_000)
        try await client.write(superBlock(6, at: Self.mirror), at: Self.mirror)
        await client.leave(clean: true)
        await bed.manager.drain()
        let reader = try DiskBed(store: bed.store, server: "b")
        let last = try await bed.head().generation
        for number in 1...last {
            let (primary, mirror) = try await generations(reader, number)
            #expect(primary == mirror, "generation \(number)")
        }
        #expect(try await generations(reader, last) == (6, 6))
    }

    @Test("row 15: nothing stays dirty after a mirror that comes late")
    func lateMirror() async throws {
        let bed = try await bed(.btrfs, mirrorsWithinMs: 20)
        let client = try await bed.attach()
        try await client.write(pattern(4096, 1), at: 4 << 20)
        try await client.flush()
        try await client.write(superBlock(5), at: 65536, fua: true)
        try await bed.waitForGeneration(1)
        try await client.write(superBlock(5, at: Self.mirror), at: Self.mirror)
        try await bed.waitForGeneration(2)
        #expect(await client.onLoop { (client.device as! Disk).dirtyBytes } == 0)
        #expect(try await generations(bed, 2) == (5, 5))
        // One of another generation, or after a flush, is data like any other.
        try await client.write(superBlock(6, at: Self.mirror), at: Self.mirror)
        await bed.environment.sleep(ns: 50_000_000)
        #expect(await client.onLoop { (client.device as! Disk).active.dataBytes } == 4096)
    }

    @Test("row 15: both mirrors of a large disk are awaited, and those of a small device are not")
    func whichMirrors() async throws {
        func pages(_ size: UInt64, _ device: UInt64) -> [UInt64] {
            superBlock(1, deviceBytes: device).withUnsafeBytes { SuperBlock($0.baseAddress!)! }.mirrorPages(
                sizeBytes: size)
        }
        #expect(pages(1 << 40, 1 << 40) == [Self.mirror / 4096, Self.far / 4096])
        #expect(pages(1 << 40, Self.far + 4096) == [Self.mirror / 4096])
        #expect(pages(Self.mirror + 4096, 1 << 40) == [])
        #expect(pages(Self.mirror + 4608, 1 << 40) == [Self.mirror / 4096])
        #expect(pages(1 << 40, 1 << 20) == [])
        let bed = try await bed(.btrfs, size: 1 << 40)
        let client = try await bed.attach()
        try await client.flush()
        try await client.write(superBlock(5), at: 65536, fua: true)
        try await client.write(superBlock(5, at: Self.far), at: Self.far)
        try await client.write(superBlock(5, at: Self.mirror), at: Self.mirror)
        try await bed.waitForGeneration(1)
        #expect(try await generations(bed, 1) == (5, 5))
        #expect(try await bed.kinds() == [.btrfsFull])
    }

    @Test("row 15: a restart finds the same safe point", arguments: Order.allCases)
    func replay(_ order: Order) async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create(size: 128 << 20) {
            $0.safePoints = .btrfs
            $0.resumeWindowMs = 0
        }
        let client = try await bed.attach("d?session=1")
        let other = try await bed.attach("d?session=1")
        bed.faults.inject(StoreFault(.fail(.unavailable), verb: .put, keyContains: "blocks"))
        try await commit(5, order, client, other)
        try await client.write(pattern(4096, 90), at: 6 << 20)
        bed.kill()
        let after = try DiskBed(store: bed.store, scratch: bed.scratch, rebooted: true)
        let next = try await after.attach("d?session=2")
        #expect(try await next.read(4096, at: 65536) == superBlock(5))
        #expect(try await next.read(4096, at: Self.mirror) == superBlock(5, at: Self.mirror))
        #expect(try await next.read(4096, at: 4 << 20) == pattern(4096, 5))
        #expect(try await next.read(4096, at: 6 << 20) == [UInt8](repeating: 0, count: 4096))
    }
}
