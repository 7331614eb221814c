// The scratch disk in memory: like a real one while it has power, and never more than the worst legal one after.

import Glibc
import Runtime
import Testing

/// Random numbers that a seed decides (SplitMix64).
struct Seeded: RandomNumberGenerator {
    var state: UInt64
    init(_ seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}

@Suite struct MemoryScratchTests {
    /// Random calls on both kinds of disk give the same answers.
    @Test func answersLikeADirectory() async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        try await withFolder { folder in
            try await withLoop { loop in
                try await loop.task {
                    let real = try DirectoryScratch(path: folder)
                    let model = MemoryScratch()
                    var random = Seeded(seed)
                    for step in 0..<400 {
                        let name = "d/\(Int.random(in: 0..<4, using: &random))"
                        let other = "d/\(Int.random(in: 0..<4, using: &random))"
                        let offset = UInt64.random(in: 0..<3_000, using: &random)
                        let bytes = [UInt8](
                            repeating: UInt8(step & 255), count: Int.random(in: 0..<2_000, using: &random))
                        let count = Int.random(in: 0..<2_000, using: &random)
                        let kind = Int.random(in: 0..<10, using: &random)
                        func run(_ disk: any ScratchDisk) async throws -> String {
                            do {
                                switch kind {
                                case 0...3:
                                    let file = try disk.open(name, create: true)
                                    try await file.write(bytes, at: offset)
                                    return "\(file.sizeBytes)"
                                case 4, 5:
                                    return "\(try await disk.open(name, create: false).read(count: count, at: offset))"
                                case 6:
                                    let file = try disk.open(name, create: false)
                                    try file.truncate(to: offset)
                                    try await file.sync()
                                    return "\(file.sizeBytes)"
                                case 7:
                                    try disk.remove(name)
                                    return "removed"
                                case 8:
                                    if name != other { try disk.rename(name, to: other) }
                                    return "renamed"
                                default: return "\(try disk.list("d"))"
                                }
                            } catch { return "errno \(error.errno)" }
                        }
                        let (a, b) = (try await run(real), try await run(model))
                        #expect(a == b, "seed \(seed), step \(step), kind \(kind)")
                    }
                }
            }
        }
    }

    @Test func whatWasSyncedSurvivesEveryPowerCut() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("a/journal", create: true)
        let synced = [UInt8](repeating: 1, count: 5_000)
        try await file.write(synced, at: 0)
        try await file.sync()
        try await disk.syncDirectory("a")
        try await file.write([UInt8](repeating: 2, count: 5_000), at: 5_120)
        var random = Seeded(1)
        for _ in 0..<200 {
            let after = disk.powerCut(random: &random)
            #expect(try #require(after.contents("a/journal")).prefix(5_000) == synced[...])
        }
        #expect(disk.powerCutLosingAll().contents("a/journal") == synced)
    }

    /// Kept, dropped, torn and grown: each must occur, sectors are whole, and nothing else may be seen.
    @Test func unsyncedWritesAreKeptDroppedOrTornBySectors() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("f", create: true)
        try await disk.syncDirectory("")
        try await file.write([UInt8](repeating: 1, count: 2_048), at: 0)
        try await file.sync()
        try await file.write([UInt8](repeating: 2, count: 2_048), at: 256)
        try await file.write([UInt8](repeating: 3, count: 1_024), at: 2_560)
        var random = Seeded(2)
        var seen: Set<[UInt8]> = []
        var sizes: Set<Int> = []
        for _ in 0..<2_000 {
            let bytes = try #require(disk.powerCut(random: &random).contents("f"))
            sizes.insert(bytes.count)
            var kinds: [UInt8] = []
            for sector in 0..<7 {
                let part = Array(bytes.dropFirst(sector * 512).prefix(512))
                let (first, last) = sector == 0 ? (256, 256) : sector == 4 ? (256, 0) : (512, 0)
                // A sector holds its old bytes or its new ones, never a mixture, but for where a write begins or ends.
                if sector == 0 { #expect(part.prefix(first).allSatisfy { $0 == 1 }) }
                let body = sector == 0 ? Array(part.suffix(last)) : Array(part.prefix(first))
                #expect(Set(body).count <= 1)
                kinds.append(body.first ?? 99)
            }
            for (sector, kind) in kinds.enumerated() {
                let legal: Set<UInt8> = sector < 4 ? [1, 2] : sector == 4 ? [0, 2, 99] : [0, 3, 99]
                #expect(legal.contains(kind), "sector \(sector) has \(kind)")
            }
            seen.insert(kinds)
        }
        #expect(seen.contains([1, 1, 1, 1, 99, 99, 99]))  // all dropped
        #expect(seen.contains([2, 2, 2, 2, 2, 3, 3]))  // all kept
        #expect(seen.contains([1, 1, 1, 1, 0, 3, 3]))  // the later without the earlier
        #expect(seen.contains([1, 1, 1, 1, 0, 0, 0]))  // grown, without the data
        #expect(seen.contains { $0[0] != $0[1] })  // torn
        #expect(sizes.isSubset(of: [2_048, 2_304, 2_560 + 512, 2_560 + 1_024]))
    }

    /// Two records in one sector: the page cache can't write the second without the first.
    @Test func aKeptWriteKeepsEarlierOnesOfItsSector() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("f", create: true)
        try await disk.syncDirectory("")
        for record in 0..<5 {
            try await file.write([UInt8](repeating: UInt8(record + 1), count: 100), at: UInt64(record * 100))
        }
        var random = Seeded(3)
        var lengths: Set<Int> = []
        for _ in 0..<500 {
            let bytes = try #require(disk.powerCut(random: &random).contents("f"))
            let whole = (0..<5).prefix { bytes.count >= ($0 + 1) * 100 && bytes[$0 * 100] == UInt8($0 + 1) }.count
            #expect(bytes.dropFirst(whole * 100).allSatisfy { $0 == 0 })
            lengths.insert(whole)
        }
        #expect(lengths == [0, 1, 2, 3, 4, 5])
    }

    @Test func namesSurviveAsAPrefixOfTheirChanges() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("d/old", create: true)
        try await disk.syncDirectory("d")
        try await file.write([1], at: 0)
        try await file.sync()
        let new = try disk.open("d/new", create: true)
        try await new.write([2], at: 0)
        try await new.sync()
        try disk.rename("d/new", to: "d/old")
        _ = try disk.open("d/third", create: true)
        var random = Seeded(4)
        var seen: Set<String> = []
        for _ in 0..<200 {
            let after = disk.powerCut(random: &random)
            seen.insert("\(try after.list("d")) \(after.contents("d/old") ?? [])")
        }
        #expect(
            seen == [
                #"["old"] [1]"#, #"["new", "old"] [1]"#, #"["old"] [2]"#, #"["old", "third"] [2]"#,
            ])
        // A sync of another directory makes none of it durable; one of this directory, all.
        try await disk.syncDirectory("")
        #expect(try disk.powerCutLosingAll().list("d") == ["old"])
        try await disk.syncDirectory("d")
        #expect(try disk.powerCutLosingAll().list("d") == ["old", "third"])
    }

    @Test func aRenameIntoASyncedDirectoryTakesWhatItRestsOn() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("tmp/x", create: true)
        try await file.write([5], at: 0)
        try await file.sync()
        try disk.rename("tmp/x", to: "done/x")
        try await disk.syncDirectory("done")
        let after = disk.powerCutLosingAll()
        #expect(try after.list("tmp") == [])
        #expect(after.contents("done/x") == [5])
    }

    @Test func aPowerCutIsAFunctionOfItsSeed() async throws {
        func run(_ seed: UInt64) async throws -> [String: [UInt8]?] {
            let disk = MemoryScratch()
            var random = Seeded(seed)
            for name in ["a", "b", "c", "d"] {
                let file = try disk.open(name, create: true)
                try await file.write([UInt8](repeating: 1, count: 3_000), at: 0)
            }
            let after = disk.powerCut(random: &random)
            return Dictionary(uniqueKeysWithValues: ["a", "b", "c", "d"].map { ($0, after.contents($0)) })
        }
        #expect(try await run(7) == run(7))
        #expect(try await run(7) != run(8))
    }

    @Test func aPowerCutBeforeASyncIsDoneMayLoseItsData() async throws {
        let disk = MemoryScratch()
        let file = try disk.open("f", create: true)
        try await disk.syncDirectory("")
        try await file.write([UInt8](repeating: 1, count: 512), at: 0)
        disk.holdsCompletions = true
        let isDone = Shared(false)
        file.sync { _ in isDone.update { $0 = true } }
        // Not covered by that sync.
        disk.writesInline = true
        try await file.write([UInt8](repeating: 2, count: 512), at: 512)
        #expect(disk.heldCompletions == 1)
        #expect(disk.powerCutLosingAll().contents("f") == [])
        disk.holdsCompletions = false
        disk.releaseCompletions()
        while !isDone.value { await Task.yield() }
        #expect(disk.powerCutLosingAll().contents("f") == [UInt8](repeating: 1, count: 512))
    }

    @Test func faultsHitTheNextCallOfTheirKind() async throws {
        let disk = MemoryScratch(capacityBytes: 10_000)
        let file = try disk.open("f", create: true)
        try await disk.syncDirectory("")
        disk.failNext(.write, errno: EIO, path: "g")
        try await file.write([1, 2, 3, 4], at: 0)
        for isInline in [true, false] {
            disk.writesInline = isInline
            disk.failNext(.write, errno: EIO)
            let error = await #expect(throws: ScratchError.self) { try await file.write([5, 6, 7, 8], at: 4) }
            #expect(error?.errno == EIO)
            try await file.write([5, 6, 7, 8], at: 4)
        }
        disk.failNext(.read, errno: EIO)
        await #expect(throws: ScratchError.self) { try await file.read(count: 8, at: 0) }
        disk.flipBit("f", at: 2, bit: 3)
        #expect(try await file.read(count: 8, at: 0) == [1, 2, 3 ^ 8, 4, 5, 6, 7, 8])
        let full = await #expect(throws: ScratchError.self) {
            try await file.write([UInt8](repeating: 0, count: 9_993), at: 8)
        }
        #expect(full?.errno == ENOSPC)
        try await file.write([UInt8](repeating: 0, count: 9_992), at: 8)
        #expect(try disk.freeBytes() == 0)

        disk.failNext(.sync, errno: EIO)
        await #expect(throws: ScratchError.self) { try await file.sync() }
        await #expect(throws: ScratchError.self) { try await file.sync() }
        #expect(disk.powerCutLosingAll().contents("f") == [])
    }

    @Test func completionsRunOnTheCallingLoopOrWhereTheDiskWasTold() async throws {
        try await withLoop { loop in
            let onLoop = await withCheckedContinuation { (continuation: CheckedContinuation<Bool, Never>) in
                loop.post {
                    let file = try! MemoryScratch().open("f", create: true)
                    file.sync { _ in continuation.resume(returning: loop.isCurrent) }
                }
            }
            #expect(onLoop)
        }
        let queue = Shared<[@Sendable () -> Void]>([])
        let disk = MemoryScratch { work in queue.update { $0.append(work) } }
        let isDone = Shared(false)
        try disk.open("f", create: true).sync { _ in isDone.update { $0 = true } }
        #expect(!isDone.value)
        queue.value.forEach { $0() }
        #expect(isDone.value)
    }
}
