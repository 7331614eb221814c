// Collection: what no generation names and what is older than the grace period is deleted. One round goes through the phases
// of `CollectionPhase`, one after the other; Docs/Operations.md says what it promises.
//
// Always holds:
// - what counts as old is fixed, for each location by its own clock, before anything is listed; listed before traced;
// - records of generations are removed in the first phase only, never while manifests are traced;
// - any error while a head, record, retirement, page or listing is read ends the round before it deletes an object;
// - objects are deleted only after a compare-and-swap has shown that this collector still has the role.

import BlockCache
import ObjectStore
package import Runtime

package struct CollectionOptions: Sendable {
    /// Looks, and writes nothing at all. Ages are taken by this machine's clock then.
    package var isDryRun = false
    /// Makes this the store's grace period, from now on. A dry run takes it for itself alone.
    package var graceMs: Int64?
    /// Objects deleted in a second; 0: as many as the store takes.
    package var deletesPerSecond = 0
    /// Deletes also copies that nothing names at their location, of what is named and there at another. Not safe while
    /// something is being copied to that location: what finds such a copy there may name it.
    package var dropsCopies = false
    /// Who collects, for others: the server's id (empty for a command) and the host's name.
    package var server = ""
    package var host = ""
    /// Where on the scratch disk.
    package var folder = "gc"
    /// What is said of objects is sorted into 2^this parts, of which one at a time is in memory.
    package var partitionBits = 10
    /// Requests under way at the same time.
    package var requests = 16
    /// A collector that has not been heard of for so long, by the store's clock, has ended without a word.
    package var deadAfterMs: Int64 = 60_000
    /// How often it is to be heard of.
    package var beatMs: Int64 = 10_000
    /// How often what was listed is kept, so that a round that is cut off while it lists goes on there: with the same
    /// scratch disk and folder.
    package var checkpointMs: Int64 = 300_000
    package init() {}
}

package struct Collector: Sendable {
    package let store: Store
    package let scratch: any ScratchDisk
    package let options: CollectionOptions
    /// A rule to break, for tests of the tests.
    package let fault: Fault?

    package init(
        store: Store, scratch: any ScratchDisk, options: CollectionOptions = CollectionOptions(), fault: Fault? = nil
    ) {
        self.store = store
        self.scratch = scratch
        self.options = options
        self.fault = fault
    }

    /// One round, or the rest of the one that was cut off. Ends early, with nothing lost, when its task is cancelled.
    ///
    /// - Throws: `.owned` when another collector is at work, `.conflict` when another one has taken over meanwhile; else what
    ///   could not be read or written. What was deleted by then was garbage, and the next round does the rest.
    package func run(
        progress: @escaping @Sendable (CollectionProgress) -> Void = { _ in }
    ) async throws(CatalogError) -> CollectionSummary {
        let role = options.isDryRun ? nil : try await CollectorRole.take(store, options)
        var graceMs = role?.graceMs ?? options.graceMs
        if graceMs == nil {
            graceMs = try await store.collection()?.effectiveGraceMs(nowMs: store.environment.wallMs)
        }
        let round = CollectionRound(
            self, role: role, graceMs: graceMs ?? CollectionState.defaultGraceMs, progress: progress)
        let failure: CatalogError
        do throws(CatalogError) {
            try await round.run()
            round.removeFiles(keepsCheckpoint: false)
            try await role?.release(round.summary)
            return round.summary
        } catch {
            failure = error
        }
        round.removeFiles(keepsCheckpoint: failure.kind != .file)
        // Another one need not wait until this one is taken for dead.
        try? await role?.release(nil)
        throw failure
    }
}

/// One round at work. Used by one task at a time.
final class CollectionRound: @unchecked Sendable {
    let store: Store
    let options: CollectionOptions
    let fault: Fault?
    let role: CollectorRole?
    let progress: @Sendable (CollectionProgress) -> Void
    var summary = CollectionSummary()
    /// What time it was when the round began, at each location.
    var startMs: [Int64] = []
    /// Of a dry run: records that would have been removed, as `NAME@GENERATION` of each location.
    var wouldRemove: [Set<String>] = []
    let graceMs: Int64

    // On scratch.
    let scratch: any ScratchDisk
    /// Of `candidates`.
    private(set) var salt: UInt64 = 0
    private(set) var candidates: [ObjectKind: PartitionedFile] = [:]
    /// There is one of this round.
    var hasCheckpoint = false
    /// When it was written, else when the round began.
    var savedNs: UInt64
    let named: [ObjectKind: PartitionedFile]
    let garbage: PartitionedFile
    let trace: PageTrace

    init(
        _ collector: Collector, role: CollectorRole?, graceMs: Int64,
        progress: @escaping @Sendable (CollectionProgress) -> Void
    ) {
        store = collector.store
        options = collector.options
        fault = collector.fault
        self.role = role
        self.progress = progress
        self.graceMs = graceMs
        let (scratch, folder, bits) = (collector.scratch, collector.options.folder, collector.options.partitionBits)
        self.scratch = scratch
        savedNs = store.environment.nowNs
        let salt = store.environment.randomBits()
        func file(_ name: String, width: Int, bits: Int) -> PartitionedFile {
            PartitionedFile(scratch, path: "\(folder)/\(name)", partitionBits: bits, width: width, salt: salt)
        }
        named = [.block: file("blocks.named", width: 3, bits: bits), .page: file("pages.named", width: 3, bits: bits)]
        garbage = file("garbage", width: 3, bits: 1)
        trace = PageTrace(
            scratch, folder: folder, partitionBits: bits, locations: collector.store.locations,
            requests: collector.options.requests, salt: salt)
        makeCandidates(salt: salt)
    }

    /// Begins the lists of what was found anew.
    func makeCandidates(salt: UInt64) {
        self.salt = salt
        for kind in ObjectKind.allCases {
            candidates[kind] = PartitionedFile(
                scratch, path: "\(options.folder)/\(kind.rawValue)s.found", partitionBits: options.partitionBits,
                width: 3, salt: salt)
        }
    }

    /// - Parameter keepsCheckpoint: what the next round can go on with is left.
    func removeFiles(keepsCheckpoint: Bool) {
        for file in named.values { file.remove() }
        garbage.remove()
        trace.remove()
        if hasCheckpoint, keepsCheckpoint { return }
        for file in candidates.values { file.remove() }
    }

    func run() async throws(CatalogError) {
        let environment = store.environment
        let began = environment.nowNs
        try await readClocks()
        summary.isDryRun = options.isDryRun
        summary.startedAtMs = startMs[0]
        summary.graceMs = graceMs
        summary.locations = store.locations.buckets.count
        try await time(.history) { () async throws(CatalogError) in try await thinHistory() }
        if fault == .collectionScansFirst {
            try await time(.tracing) { () async throws(CatalogError) in try await traceManifests() }
            try await readClocks()
            try await time(.listing) { () async throws(CatalogError) in try await listObjects() }
        } else {
            try await time(.listing) { () async throws(CatalogError) in try await listObjects() }
            try await time(.tracing) { () async throws(CatalogError) in try await traceManifests() }
        }
        try await time(.comparing) { () async throws(CatalogError) in try await compare() }
        if !options.isDryRun {
            try await discardCheckpoint()
            try await time(.deleting) { () async throws(CatalogError) in try await deleteGarbage() }
        }
        summary.durationMs = Int64((environment.nowNs - began) / 1_000_000)
    }

    private func time(_ phase: CollectionPhase, _ body: () async throws(CatalogError) -> Void)
        async throws(CatalogError)
    {
        let began = store.environment.nowNs
        try await report(phase, 0, 0, isSure: true)
        try await body()
        summary.phaseMs[phase.rawValue] = Int64((store.environment.nowNs - began) / 1_000_000)
    }

    /// Tells how far it has come: at once to whoever watches, now and then to the store.
    ///
    /// - Parameter isSure: to the store now: it returns only if this collector has the role.
    func report(_ phase: CollectionPhase, _ done: UInt64, _ total: UInt64, isSure: Bool = false)
        async throws(CatalogError)
    {
        if Task.isCancelled { throw CatalogError(.conflict, "the collection was stopped") }
        progress(CollectionProgress(phase: phase, done: done, total: total))
        try await role?.beat(phase, done: done, total: total, isSure: isSure)
    }

    /// Finds out that every location of the store can be reached, and what time it is there: a location out of reach may
    /// name what the others have, so then nothing is deleted.
    private func readClocks() async throws(CatalogError) {
        try await store.requireAll()
        startMs = []
        for bucket in store.locations.buckets {
            if options.isDryRun {
                _ = try await CatalogError.wrap { () async throws(StoreError) in
                    try await bucket.list(prefix: "disks/", after: nil, folders: true, limit: 1)
                }
                startMs.append(store.environment.wallMs)
            } else {
                startMs.append(try await StoreClock.read(bucket, store.environment.objectID()))
            }
        }
    }

    /// Objects stored before this time of the location are old.
    func cutOffMs(_ location: Int) -> Int64 {
        startMs[location] - (fault == .collectionIgnoresGrace ? 0 : graceMs)
    }
}

/// What there can be a thousand million of.
enum ObjectKind: String, Sendable, CaseIterable {
    case block
    case page

    var folder: String { self == .block ? "blocks/" : "manifests/" }
    func key(_ id: ObjectID) -> String { self == .block ? id.blockKey : id.manifestKey }
}
