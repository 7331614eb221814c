// Checking a store: every head, record and manifest page is read, every object that is named must be there with its length,
// and, if asked for, every byte of it is read and held against its checksums. One thing that can't be read hides no other.
//
// Always holds: nothing is written without `repairs`, and with it only what was verified whole. Of what is found at a time when
// others write, a loss is told only when a second look finds it too.

import BlockCache
import ObjectStore
package import Runtime

package struct CheckOptions: Sendable {
    /// Only this disk. Orphans are not looked for then.
    package var disk: String?
    /// Reads the block objects themselves.
    package var readsData = false
    /// Puts valid copies in the place of what is missing or damaged.
    package var repairs = false
    /// Files on the scratch disk that the check keeps.
    package var folder = "check"
    package var partitionBits = 10
    package var requests = 16
    /// Block objects in memory at the same time, each up to 17 MiB.
    package var dataRequests = 4
    package init() {}
}

package struct Checker: Sendable {
    package let store: Store
    package let scratch: any ScratchDisk
    package let options: CheckOptions
    /// The scratch disk of a daemon, whose block files are copies.
    package let copies: (any ScratchDisk)?

    package init(
        store: Store, scratch: any ScratchDisk, options: CheckOptions = CheckOptions(),
        copies: (any ScratchDisk)? = nil
    ) {
        self.store = store
        self.scratch = scratch
        self.options = options
        self.copies = copies
    }

    /// - Throws: only what keeps it from working at all, such as the scratch disk; what is wrong with the store is in the
    ///   report.
    package func run(
        progress: @escaping @Sendable (CheckPhase, _ done: UInt64, _ total: UInt64) -> Void = { _, _, _ in }
    ) async throws(CatalogError) -> CheckReport {
        let run = CheckRun(self, progress)
        let failure: CatalogError
        do throws(CatalogError) {
            try await run.run()
            run.removeFiles()
            return run.report
        } catch { failure = error }
        run.removeFiles()
        throw failure
    }
}

/// One check at work. Used by one task at a time.
final class CheckRun: @unchecked Sendable {
    let store: Store
    let options: CheckOptions
    let repair: Repair
    let progress: @Sendable (CheckPhase, UInt64, UInt64) -> Void
    var report = CheckReport()
    /// What objects could not be had, by id: whose owners are to be found. The value is the problem's place in the report.
    var bad: [ObjectID: Int] = [:]
    /// Locations that could not be looked at whole.
    var blind: Set<Int> = []
    /// There are generations whose blocks are not all known.
    var isPartial = false
    /// There are generations that are not known at all.
    var hidesRoots = false

    let trace: PageTrace
    /// What is said of block objects.
    let parts: PartitionedFile
    let found: [ObjectKind: PartitionedFile]

    /// Problems whose owners are looked for.
    static let maxTraced = 1000

    init(_ checker: Checker, _ progress: @escaping @Sendable (CheckPhase, UInt64, UInt64) -> Void) {
        store = checker.store
        options = checker.options
        repair = Repair(store: checker.store, copies: checker.copies, isOn: checker.options.repairs)
        self.progress = progress
        let (scratch, folder, bits) = (checker.scratch, checker.options.folder, checker.options.partitionBits)
        let salt = store.environment.randomBits()
        func file(_ name: String, _ width: Int) -> PartitionedFile {
            PartitionedFile(scratch, path: "\(folder)/\(name)", partitionBits: bits, width: width, salt: salt)
        }
        trace = PageTrace(
            scratch, folder: folder, partitionBits: bits, locations: checker.store.locations,
            requests: checker.options.requests, salt: salt)
        parts = file("parts", NamedPart.width)
        found = [.block: file("blocks", 4), .page: file("pages", 4)]
    }

    func removeFiles() {
        trace.remove()
        parts.remove()
        for kind in ObjectKind.allCases { found[kind]!.remove() }
    }

    func run() async throws(CatalogError) {
        let began = store.environment.nowNs
        try await checkRoots()
        try await checkPages()
        try await listObjects()
        try await checkBlocks()
        if options.disk == nil { try await findOrphanedPages() }
        try await findOwners()
        report.problems.sort {
            ($0.isWrong ? 0 : 1, $0.location, $0.key, $0.text) < ($1.isWrong ? 0 : 1, $1.location, $1.key, $1.text)
        }
        report.durationMs = Int64((store.environment.nowNs - began) / 1_000_000)
    }

    func add(_ problem: CheckProblem, of id: ObjectID? = nil) {
        if let id, problem.isWrong, bad.count < Self.maxTraced, report.problems.count < CheckReport.maxListed {
            bad[id] = report.problems.count
        }
        report.add(problem)
    }

    /// A problem with a control object.
    func add(_ error: CatalogError, location: Int, key: String) {
        let kind: CheckProblem.Kind
        switch error.kind {
        case .notFound: kind = .missing
        case .store(.notFound): kind = .missing
        case .store: kind = .unreachable
        default: kind = .corrupt
        }
        // What it names is not known.
        isPartial = true
        hidesRoots = true
        add(CheckProblem(kind, location: location, key: key, error.description))
    }

    // MARK: Heads and records

    private func checkRoots() async throws(CatalogError) {
        var isThere = false
        for (location, heads) in store.headStores.enumerated() {
            let scan = RootScan(heads: heads, requests: options.requests)
            do throws(CatalogError) {
                if let name = options.disk {
                    isThere = try await checkDisks([name], scan, location) || isThere
                } else {
                    try await scan.heads.forEachName { (names) async throws(CatalogError) in
                        for start in stride(from: 0, to: names.count, by: 4 * options.requests) {
                            let some = Array(names[start..<min(start + 4 * options.requests, names.count)])
                            _ = try await checkDisks(some, scan, location)
                            progress(.manifests, report.disks, 0)
                        }
                    }
                }
            } catch {
                if error.kind == .file { throw error }
                blind.insert(location)
                add(error, location: location, key: "")
            }
        }
        if let name = options.disk, !isThere, report.counts.isEmpty { throw Catalog.notFound(name) }
    }

    /// Whether there is one among them that is there.
    private func checkDisks(
        _ names: [String], _ scan: RootScan, _ location: Int
    ) async throws(CatalogError) -> Bool {
        var isThere = false
        for disk in try await scan.disks(names) {
            var head: Head?
            switch disk.head {
            case .success(nil):
                if disk.generations.isEmpty, options.disk != nil { continue }
                add(
                    CatalogError(.notFound, "disk '\(disk.name)' has objects and no head"), location: location,
                    key: Head.key(disk: disk.name))
            case .success(let stored): head = stored
            case .failure(let error): add(error, location: location, key: Head.key(disk: disk.name))
            }
            if let head {
                isThere = isThere || !head.deleted
                if !head.deleted { report.disks += 1 }
                if let record = head.record {
                    report.generations += 1
                    trace.add(record)
                }
                for number in head.pinned where number < head.generation && !disk.generations.contains(number) {
                    add(
                        CatalogError(
                            .notFound, "generation \(number) of disk '\(disk.name)' is pinned and has no record"),
                        location: location, key: GenerationRecord.key(disk: disk.name, generation: number))
                }
            }
            await checkRetirements(disk, location)
            for start in stride(from: 0, to: disk.generations.count, by: 1000) {
                let some = Array(disk.generations[start..<min(start + 1000, disk.generations.count)])
                try await checkRecords(some, of: disk, head, scan, location)
            }
        }
        return isThere
    }

    private func checkRecords(
        _ numbers: [UInt64], of disk: FoundDisk, _ head: Head?, _ scan: RootScan, _ location: Int
    ) async throws(CatalogError) {
        let records = await inParallel(numbers, limit: options.requests) {
            (number) async -> Result<GenerationRecord?, CatalogError> in
            do throws(CatalogError) {
                return .success(try await scan.record(disk.name, number))
            } catch { return .failure(error) }
        }
        for (number, record) in zip(numbers, records) {
            let key = GenerationRecord.key(disk: disk.name, generation: number)
            switch record {
            case .success(nil): break  // Removed since it was listed.
            case .success(let record?):
                if let current = head?.record, current.generation == number {
                    if record != current {
                        add(
                            CatalogError(.corrupt, "'\(key)' is not what the head says of this generation"),
                            location: location, key: key)
                    }
                    continue
                }
                report.generations += 1
                trace.add(record)
            case .failure(let error): add(error, location: location, key: key)
            }
        }
        try await trace.spill()
    }

    private func checkRetirements(_ disk: FoundDisk, _ location: Int) async {
        do throws(CatalogError) {
            _ = try await disk.heads.retirements(disk.name)
        } catch {
            add(error, location: location, key: Retirement.folder(disk: disk.name))
        }
    }

    // MARK: Pages

    private func checkPages() async throws(CatalogError) {
        let repair = repair
        try await trace.forEachBatch { (batch) async throws(CatalogError) in
            let pages = await inParallel(batch, limit: options.requests) { (place) async -> Repair.Outcome in
                await repair.page(place)
            }
            for (place, outcome) in zip(batch, pages) {
                report.pages += 1
                if let problem = outcome.problem { add(problem, of: place.ref.id) }
                guard let page = outcome.page else {
                    isPartial = true
                    continue
                }
                trace.descend(place, page)
                for (slot, entry) in zip(page.slots.slots, page.entries) {
                    let block = BlockIndex(place.index << ManifestShape.slotBits | UInt64(slot))
                    if let base = entry.base { parts.add(NamedPart.base(base).words) }
                    for delta in entry.deltas { parts.add(NamedPart.segment(delta, block).words) }
                }
            }
            try await trace.spill()
            try await parts.spill()
            progress(.manifests, report.pages, 0)
        }
    }
}

extension NamedPart {
    static let width = 6
    /// As words of a `PartitionedFile`.
    var words: [UInt64] {
        switch self {
        case .base(let ref):
            [ref.id.high, ref.id.low, UInt64(ref.location), UInt64(ref.lengthBytes), UInt64(ref.nonzeroSlices), 0]
        case .segment(let ref, let block):
            [
                ref.id.high, ref.id.low, 1 << 8 | UInt64(ref.location),
                UInt64(ref.offsetBytes) << 32 | UInt64(ref.lengthBytes),
                UInt64(ref.touchedSlices) << 32 | UInt64(ref.zeroedSlices), block.value,
            ]
        }
    }

    init(_ words: ContiguousArray<UInt64>.SubSequence) {
        let w = words.startIndex
        let id = ObjectID(high: words[w], low: words[w + 1])
        let location = UInt8(truncatingIfNeeded: words[w + 2])
        func high(_ word: UInt64) -> UInt32 { UInt32(word >> 32) }
        func low(_ word: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: word) }
        if words[w + 2] >> 8 == 0 {
            self = .base(
                BaseRef(id: id, location: location, lengthBytes: low(words[w + 3]), nonzeroSlices: low(words[w + 4])))
        } else {
            self = .segment(
                DeltaRef(
                    id: id, location: location, offsetBytes: high(words[w + 3]), lengthBytes: low(words[w + 3]),
                    touchedSlices: high(words[w + 4]), zeroedSlices: low(words[w + 4])), BlockIndex(words[w + 5]))
        }
    }
}
