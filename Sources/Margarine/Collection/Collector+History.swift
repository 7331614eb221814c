// The first phase: generations that history no longer keeps leave, in two steps. Records in a retirement that is older than
// the grace period are removed; what else is no longer kept is put into a new retirement.
//
// Always holds: a record is removed only if its head, read after its retirement had become old, does not keep it, and no live
// server reads it. Numbers that the head has not reached are somebody's new generations: they are left alone.

import BlockCache
import ObjectStore
import Runtime

extension CollectionRound {
    func thinHistory() async throws(CatalogError) {
        let reading = try await readHolds()
        var done: UInt64 = 0
        for (location, heads) in store.headStores.enumerated() {
            wouldRemove.append([])
            if skips(location) { continue }
            let thinning = HistoryThinning(
                scan: RootScan(heads: heads, requests: options.requests), cutOffMs: cutOffMs(location),
                reading: reading, isDryRun: options.isDryRun, fault: fault, environment: store.environment)
            try await thinning.scan.heads.forEachName { (names) async throws(CatalogError) in
                for start in stride(from: 0, to: names.count, by: 4 * options.requests) {
                    let part = Array(names[start..<min(start + 4 * options.requests, names.count)])
                    let thinned = try await inParallel(part, limit: options.requests) {
                        (name) async throws(CatalogError) -> HistoryThinning.Outcome in
                        try await thinning.thin(name)
                    }
                    for outcome in thinned {
                        if outcome.isDisk { summary.disks += 1 }
                        summary.generations.add(outcome.generations)
                        wouldRemove[location].formUnion(outcome.wouldRemove)
                    }
                    done += UInt64(part.count)
                    try await report(.history, done, 0)
                }
            }
        }
    }

    /// The fault of that name: the disks of the last location are not looked at.
    func skips(_ location: Int) -> Bool {
        fault == .collectionSkipsLocation && location > 0 && location == store.locations.buckets.count - 1
    }

    /// What servers say that they read. A heartbeat that can't be read may hold anything.
    private func readHolds() async throws(CatalogError) -> ReadingHolds {
        var holds = ReadingHolds()
        // A server beats at the locations that it knows.
        for (location, heads) in store.headStores.enumerated() {
            try await heads.bucket.forEachPage(prefix: "servers/") { (page) async throws(CatalogError) in
                for item in page.items where item.modifiedMs >= startMs[location] - graceMs {
                    do throws(CatalogError) {
                        let server = try await heads.server(String(item.key.dropFirst("servers/".utf8.count)))
                        holds.add(server?.reading ?? [])
                    } catch {
                        guard error.kind == .corrupt else { throw error }
                        holds.add([ServerRecord.readsEverything])
                    }
                }
            }
        }
        return holds
    }
}

/// Generations that live servers have attached read-only.
struct ReadingHolds: Sendable {
    private var names: Set<String> = []

    mutating func add(_ reading: [String]) { names.formUnion(reading) }

    func holds(_ disk: String, _ generation: UInt64) -> Bool {
        names.contains(ServerRecord.readsEverything) || names.contains("\(disk)@\(generation)")
    }
}

/// Thins the histories of the disks of one location.
struct HistoryThinning: Sendable {
    let scan: RootScan
    /// Retirements stored before this are old.
    let cutOffMs: Int64
    let reading: ReadingHolds
    let isDryRun: Bool
    let fault: Fault?
    let environment: any Environment

    struct Outcome: Sendable {
        /// No tombstone.
        var isDisk = false
        var generations = CollectionSummary.Generations()
        /// Of a dry run: records that would have been removed.
        var wouldRemove: [String] = []
    }

    func thin(_ name: String) async throws(CatalogError) -> Outcome {
        var outcome = Outcome()
        let heads = scan.heads
        let retirements = try await heads.retirements(name)
        // After the retirements: of what is in an old one nobody can have begun to make use since.
        guard let head = try await heads.load(name)?.head else {
            throw CatalogError(
                .corrupt,
                "\(heads.bucket.name): disk '\(name)' has objects and no head: nothing is deleted before it is restored"
            )
        }
        outcome.isDisk = !head.deleted
        let numbers = try await scan.heads.recordedGenerations(name)
        var gone: Set<UInt64> = []
        var waiting: Set<UInt64> = []
        for (key, retirement, modifiedMs) in retirements {
            guard modifiedMs < cutOffMs else {
                waiting.formUnion(retirement.generations)
                continue
            }
            var leaving: [UInt64] = []
            var isHeld = false
            for number in retirement.generations {
                if reading.holds(name, number) {
                    isHeld = true
                    waiting.insert(number)
                } else if try await !keeps(head, number) {
                    leaving.append(number)
                }
            }
            gone.formUnion(leaving)
            // The retirement goes once all that was in it has gone, by a request of its own: of one that is there no more the
            // generations would look as if they stayed.
            try await remove(leaving.map { GenerationRecord.key(disk: name, generation: $0) })
            if !isHeld { try await remove([key]) }
        }
        if isDryRun { outcome.wouldRemove = gone.map { "\(name)@\($0)" } }

        var retiring: [UInt64] = []
        // The current one has no record of its own yet, or has.
        if head.record != nil, !numbers.contains(head.generation) { outcome.generations.kept += 1 }
        for number in numbers {
            if gone.contains(number) {
                outcome.generations.removed += 1
                continue
            }
            if waiting.contains(number) {
                if reading.holds(name, number) {
                    outcome.generations.held += 1
                } else {
                    outcome.generations.waiting += 1
                }
                continue
            }
            var isKept = number > head.generation
            if !isKept { isKept = try await keeps(head, number) }
            if isKept { outcome.generations.kept += 1 } else { retiring.append(number) }
        }
        outcome.generations.retired = UInt64(retiring.count)
        try await retire(retiring, name)
        return outcome
    }

    /// Whether the head keeps this generation, and its record is of the head's disk.
    private func keeps(_ head: Head, _ number: UInt64) async throws(CatalogError) -> Bool {
        if !head.keeps(number) { return false }
        guard let record = try await scan.record(head.name, number) else { return false }
        return record.diskID == head.diskID
    }

    private func retire(_ numbers: [UInt64], _ name: String) async throws(CatalogError) {
        if numbers.isEmpty || isDryRun { return }
        if fault == .collectionSkipsTombstone {
            return try await remove(numbers.map { GenerationRecord.key(disk: name, generation: $0) })
        }
        for start in stride(from: 0, to: numbers.count, by: Retirement.maxGenerations) {
            let part = Array(numbers[start..<min(start + Retirement.maxGenerations, numbers.count)])
            let key = Retirement.key(disk: name, id: environment.objectID())
            try await CatalogError.wrap { () async throws(StoreError) in
                _ = try await scan.heads.bucket.put(key, Retirement(generations: part).encoded(), if: .none)
            }
        }
    }

    private func remove(_ keys: [String]) async throws(CatalogError) {
        if isDryRun { return }
        for start in stride(from: 0, to: keys.count, by: 1000) {
            let part = Array(keys[start..<min(start + 1000, keys.count)])
            try await CatalogError.wrap { () async throws(StoreError) in try await scan.heads.bucket.delete(part) }
        }
    }
}

extension CollectionSummary.Generations {
    mutating func add(_ other: Self) {
        kept += other.kept
        retired += other.retired
        waiting += other.waiting
        held += other.held
        removed += other.removed
    }
}
