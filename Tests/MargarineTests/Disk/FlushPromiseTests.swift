// A flush keeps its promise whatever stands at 64 KiB: what it was answered for is there after a lost connection, after a
// loss of power, and with `store` after the loss of the machine.

@testable import Margarine
import Runtime
import Testing

@Suite struct FlushPromiseTests {
    private static let place: UInt64 = 4 << 20

    /// What writes to a disk that has, or looks as if it had, a btrfs super block.
    enum Writer: String, CaseIterable {
        /// An image is copied onto the disk, with a flush at the end.
        case image
        /// The disk was a btrfs; now something else writes beside its super block.
        case formerBtrfs
        /// btrfs was mounted in this very session, and left its super block to another user.
        case unmountedBtrfs
        /// A FUA write instead of a flush.
        case forcedUnitAccess
    }

    @discardableResult
    private func write(_ writer: Writer, _ bed: DiskBed) async throws -> TestClient {
        var client = try await bed.attach("d?session=1")
        try await client.write(superBlock(7), at: 65536)
        switch writer {
        case .image: break
        case .formerBtrfs:
            await client.leave(clean: true)
            client = try await bed.attach("d?session=2")
        case .unmountedBtrfs, .forcedUnitAccess:
            for generation in 8..<12 as Range<UInt64> {
                try await client.flush()
                try await client.write(superBlock(generation), at: 65536, fua: true)
            }
        }
        for i in 0..<64 as Range<UInt64> { try await client.write(pattern(4096, i), at: Self.place + i * 8192) }
        if writer == .forcedUnitAccess {
            try await client.write(pattern(4096, 63), at: Self.place + 63 * 8192, fua: true)
        } else {
            try await client.flush()
        }
        try await client.write(pattern(4096, 99), at: Self.place)
        return client
    }

    /// How many of the flushed pages are there.
    private func left(_ bed: DiskBed) async throws -> Int {
        let client = try await bed.attach("d?session=9")
        var count = 0
        for i in 1..<64 as Range<UInt64> {
            if try await client.read(4096, at: Self.place + i * 8192) == pattern(4096, i) { count += 1 }
        }
        return count
    }

    private func afterLostConnection(_ writer: Writer, _ fault: Fault?) async throws -> Int {
        let bed = try DiskBed { $0.fault = fault }
        try await bed.create {
            $0.safePoints = .auto
            $0.resumeWindowMs = 0
        }
        try await write(writer, bed).leave(clean: false)
        return try await left(bed)
    }

    @Test("row 24: flushed writes survive a lost connection", arguments: Writer.allCases)
    func lostConnection(_ writer: Writer) async throws {
        #expect(try await afterLostConnection(writer, nil) == 63)
    }

    @Test("row 24: the switch flushWithoutSafePoint loses them")
    func theSwitchIsSeen() async throws {
        for writer in Writer.allCases where writer != .formerBtrfs {
            #expect(try await afterLostConnection(writer, .flushWithoutSafePoint) == 0, "\(writer)")
        }
    }

    @Test("row 24: flushed writes survive a loss of power", arguments: Writer.allCases)
    func lossOfPower(_ writer: Writer) async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create { $0.safePoints = .auto }
        try await write(writer, bed)
        bed.kill()
        let after = try DiskBed(store: bed.store, scratch: bed.scratch.powerCutLosingAll(), rebooted: true)
        #expect(try await left(after) == 63)
    }

    @Test(
        "row 24: with store a flush is answered once everything before it is in the store", arguments: Writer.allCases)
    func lossOfTheMachine(_ writer: Writer) async throws {
        let bed = try DiskBed { $0.commitIntervalMs = 3_600_000 }
        try await bed.create {
            $0.safePoints = .auto
            $0.durability = .store
        }
        try await write(writer, bed)
        bed.kill()
        let after = try DiskBed(store: bed.store, server: "b")
        #expect(try await left(after) == 63)
    }

    @Test("row 24: where btrfs is followed, its super block takes the place of the flush before it")
    func superBlocksTakeTheFlushsPlace() async throws {
        let bed = try DiskBed {
            $0.commitIntervalMs = 1
            $0.superBlockWithinMs = 3_000
        }
        try await bed.create(size: 32 << 20) { $0.safePoints = .auto }
        let client = try await bed.attach()
        for generation in 1..<20 as Range<UInt64> {
            try await client.write(pattern(4096, generation), at: Self.place)
            try await client.flush()
            // Longer than a commit interval.
            await bed.environment.sleep(ns: 3_000_000)
            try await client.write(superBlock(generation), at: 65536, fua: true)
            // The first flush was one too, for nobody knew of btrfs then.
            try await bed.waitForGeneration(generation + 1)
        }
        let kinds = try await bed.kinds()
        #expect(kinds == [.flush] + Array(repeating: .btrfsFull, count: 19))
        // No super block follows any more: flushes become generations by themselves.
        let before = try await bed.head().generation
        try await client.write(pattern(4096, 77), at: Self.place)
        try await client.flush()
        try await bed.waitForGeneration(before + 1)
        #expect(try await bed.head().record?.kind == .flush)
    }

    @Test("row 24: a super block at the start of an image is no transaction")
    func imageIsNoTransaction() async throws {
        let bed = try DiskBed()
        try await bed.create { $0.safePoints = .auto }
        let client = try await bed.attach()
        try await client.write(superBlock(7), at: 65536)
        try await client.write(pattern(4096, 1), at: Self.place)
        try await client.flush()
        try await bed.waitForGeneration(1)
        #expect(try await bed.kinds() == [.flush])
    }

    @Test("row 24: under the rule btrfs only super blocks are safe points")
    func explicitRule() async throws {
        let bed = try DiskBed()
        try await bed.create {
            $0.safePoints = .btrfs
            $0.resumeWindowMs = 0
        }
        let client = try await bed.attach("d?session=1")
        try await client.write(pattern(4096, 1), at: Self.place)
        try await client.flush()
        try await client.write(superBlock(7), at: 65536, fua: true)
        try await client.write(pattern(4096, 2), at: Self.place)
        try await client.flush()
        await client.leave(clean: false)
        let next = try await bed.attach("d?session=2")
        #expect(try await next.read(4096, at: Self.place) == pattern(4096, 1))
    }
}

extension DiskBed {
    /// How each generation so far came to be, oldest first.
    func kinds(_ name: String = "d") async throws -> [GenerationKind] {
        let heads = HeadStore(bucket: store, environment: environment)
        let head = try await head(name)
        var kinds: [GenerationKind] = []
        for number in 1...max(1, head.generation) where number <= head.generation {
            kinds.append(try await heads.record(head, generation: number).kind)
        }
        return kinds
    }
}
