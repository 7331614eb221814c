// What can be done to disks on the store itself: beside running daemons and without any. Every change is a
// compare-and-swap of the head, begun again when another writer was faster.
//
// Always holds: a change that takes the disk from an owner raises the epoch, so the owner's next swap fails and it
// stops; a change that does not (options, a larger size) leaves epoch, owner and generation alone, and the owner takes
// it over at its next swap (`Disk.swapHead`) or look at the head.

internal import ObjectStore
internal import Runtime

package struct Catalog: Sendable {
    package let store: Store
    let process: ProcessProbe
    let owners: OwnerWatch
    /// Told what a change waits for, in one line.
    package var waits: @Sendable (String) -> Void = { _ in }
    /// Swaps tried before a change is given up: each lost one means that another writer got on.
    static let maxAttempts = 16

    /// - Parameters:
    ///   - name: who this is, for the servers whose disks it takes.
    ///   - process: how to find out whether a server's process runs.
    package init(
        _ store: Store, name: String = "a command", process: @escaping ProcessProbe = LocalProcess.state
    ) {
        self.store = store
        self.process = process
        owners = OwnerWatch(
            name: name, environment: store.environment, process: process)
    }

    // MARK: Looking

    /// The disks of a store, as far as its locations answer.
    package struct Listed: Sendable {
        /// By name.
        package var disks: [DiskInfo] = []
        /// Of locations that could not be asked.
        package var failures: [CatalogError] = []
    }

    /// All disks of all locations.
    ///
    /// - Throws: the near location could not be asked.
    package func list() async throws(CatalogError) -> Listed {
        var listed = Listed(failures: store.locations.missing.map { store.unconfigured($0) })
        for location in store.locations.nearFirst {
            do throws(CatalogError) {
                listed.disks += try await list(at: location)
            } catch {
                if location.number == store.locations.near { throw error }
                listed.failures.append(error)
            }
        }
        listed.disks.sort { ($0.name, $0.location) < ($1.name, $1.location) }
        return listed
    }

    private func list(at location: Location) async throws(CatalogError) -> [DiskInfo] {
        let place = store.hastyHeads(at: location)
        let heads = try await inParallel(try await place.names(), limit: 16) {
            (name) async throws(CatalogError) -> Head? in
            try await place.load(name)?.head
        }.compactMap { $0 }.filter { !$0.deleted }
        // Each server is looked at once, however many disks it has.
        var owners: [String: Head.Owner] = [:]
        for head in heads { if let owner = head.owner { owners[owner.server] = owner } }
        let alive = try await inParallel(owners.values.sorted { $0.server < $1.server }, limit: 16) {
            (owner) async throws(CatalogError) -> String? in
            try await place.looksAlive(owner, process: process) ? owner.server : nil
        }
        return heads.map { head in
            DiskInfo(
                head, location: location.name, ownerAlive: head.owner.map { alive.contains($0.server) } ?? false)
        }
    }

    /// Names that have, or had, a disk at any location, ascending.
    ///
    /// - Throws: when not all locations answer.
    package func names() async throws(CatalogError) -> [String] {
        if let missing = store.locations.missing.first { throw store.unconfigured(missing) }
        var names: Set<String> = []
        for location in store.locations.all { names.formUnion(try await store.heads(at: location.number).names()) }
        return names.sorted()
    }

    /// One disk.
    package func show(_ name: String) async throws(CatalogError) -> DiskInfo {
        let found = try await load(name)
        return try await info(found.head, at: found.heads)
    }

    /// A head as people see it.
    ///
    /// - Parameter heads: where it is.
    func info(_ head: Head, at heads: HeadStore) async throws(CatalogError) -> DiskInfo {
        info(head, at: heads, ownerAlive: try await heads.looksAlive(head.owner, process: process))
    }

    func info(_ head: Head, at heads: HeadStore, ownerAlive: Bool) -> DiskInfo {
        DiskInfo(head, location: store.locations.name(heads.location), ownerAlive: ownerAlive)
    }

    /// The head of a disk that exists.
    package func load(_ name: String) async throws(CatalogError) -> Store.Found {
        guard let found = try await store.find(name), !found.head.deleted else { throw Self.notFound(name) }
        return found
    }

    static func notFound(_ name: String) -> CatalogError { CatalogError(.notFound, "there is no disk '\(name)'") }

    // MARK: Changing

    /// Makes a disk, all zeroes. Takes no space and no time, whatever its size.
    ///
    /// - Parameter location: where its head is to be; nil: near.
    package func create(
        _ name: String, sizeBytes: UInt64, options: DiskOptions = DiskOptions(), location: UInt8? = nil
    ) async throws(CatalogError) -> DiskInfo {
        try DiskSize.check(sizeBytes)
        try Self.check(options)
        for _ in 0..<Self.maxAttempts {
            let spot = try await store.spot(for: name, at: location ?? store.locations.near)
            let head = try newHead(name, over: spot.head, sizeBytes: sizeBytes, options: options)
            if case .won = try await spot.heads.swap(head, expecting: spot.etag) {
                return try await info(head, at: spot.heads)
            }
        }
        throw Self.conflict(name)
    }

    /// The head of a new disk on a free name; counts on from a tombstone there.
    func newHead(_ name: String, over old: Head?, sizeBytes: UInt64, options: DiskOptions) throws(CatalogError) -> Head
    {
        if let old, !old.deleted {
            throw CatalogError(.exists, "there is a disk '\(name)' already; delete it first, or take another name")
        }
        try DiskSize.check(sizeBytes)
        var head = Head(
            diskID: store.environment.objectID(), name: name, sizeBytes: sizeBytes, options: options,
            createdAtMs: store.environment.wallMs)
        if let old {
            head.generation = old.generation
            head.epoch = old.epoch + 1
        }
        head.pin(head.generation + 1)
        return head
    }

    /// What `set` can change; nil stays as it is.
    package struct OptionsChange: Sendable, Equatable {
        package var safePoints: SafePointRule?
        package var durability: Durability?
        package var resumeWindowMs: Int64?
        package var historyDensity: Int?
        package init(
            safePoints: SafePointRule? = nil, durability: Durability? = nil, resumeWindowMs: Int64? = nil,
            historyDensity: Int? = nil
        ) {
            self.safePoints = safePoints
            self.durability = durability
            self.resumeWindowMs = resumeWindowMs
            self.historyDensity = historyDensity
        }
    }

    /// Changes options. A server that has the disk takes them over with its next commit or attachment.
    package func set(_ name: String, _ change: OptionsChange) async throws(CatalogError) -> DiskInfo {
        try await self.change(name) { (head: inout Head, _) async throws(CatalogError) in
            if let rule = change.safePoints { head.options.safePoints = rule }
            if let durability = change.durability { head.options.durability = durability }
            if let ms = change.resumeWindowMs { head.options.resumeWindowMs = ms }
            if let density = change.historyDensity { head.options.historyDensity = density }
            try Self.check(head.options)
        }
    }

    /// Deletes a disk: its head becomes a tombstone and its name is free. What it stored stays until collection.
    ///
    /// - Parameter force: also when a live server has it; the server loses it.
    package func delete(_ name: String, force: Bool = false) async throws(CatalogError) {
        var buried: (heads: HeadStore, head: Head)?
        _ = try await change(name, force: force, "delete it") { (head: inout Head, heads) async throws(CatalogError) in
            // Whoever forks it right now finds the generation named until it is retired.
            try await heads.archive(head)
            head.bury()
            buried = (heads, head)
        }
        // Left behind, they would do no harm: they are of this disk alone.
        if let buried { try? await buried.heads.forgetLostSessions(of: name, buried.head.diskID) }
    }

    /// Takes a disk from its owner: what the owner did not commit is lost, and the session that was attached is told.
    ///
    /// - Parameter force: also when the owner is alive.
    package func release(_ name: String, force: Bool = false) async throws(CatalogError) -> DiskInfo {
        try await change(name, force: force, "take it") { (head: inout Head, _) async throws(CatalogError) in
            if head.owner != nil || head.session != nil { head.dispossess() }
        }
    }

    /// Loads, changes and swaps a head until it holds. A change that takes the disk from its owner waits until the owner is
    /// known to be dead, unless `force` is set.
    ///
    /// - Parameter todo: what `force` would do, for people.
    func change(
        _ name: String, force: Bool = false, _ todo: String = "change it",
        _ change: (inout Head, HeadStore) async throws(CatalogError) -> Void
    ) async throws(CatalogError) -> DiskInfo {
        for _ in 0..<Self.maxAttempts {
            let found = try await load(name)
            var head = found.head
            try await change(&head, found.heads)
            if head == found.head { return try await info(head, at: found.heads) }
            if head.epoch != found.head.epoch { try await clear(found, epoch: head.epoch, force: force, todo) }
            if case .won = try await found.heads.swap(head, expecting: found.etag) {
                return try await info(head, at: found.heads)
            }
        }
        throw Self.conflict(name)
    }

    /// Before the head of `found` is replaced by one that takes the disk from its owner: waits until the owner is known to be
    /// dead; with `force`, tells it instead.
    private func clear(_ found: Store.Found, epoch: UInt64, force: Bool, _ todo: String) async throws(CatalogError) {
        guard let owner = found.head.owner else { return }
        if force { return try await tell(found, epoch: epoch) }
        var isTold = false
        let state = try await owners.settle(owner.server, found.heads) { unchangedMs, ofMs in
            if isTold { return }
            isTold = true
            waits(
                "watching server \(owner.server) on \(owner.host), which has disk '\(found.head.name)': it counts as dead when it does not say that it lives for \((ofMs - unchangedMs + 999) / 1000) s; --force does not wait"
            )
        }
        if case .alive = state { throw Self.owned(found.head, todo) }
    }

    /// Before the head of `found` is replaced by one of a higher epoch, by force: its owner's record says so. The last step
    /// before the swap: the owner loses the disk by it, whether the swap is won or not.
    func tell(_ found: Store.Found, epoch: UInt64) async throws(CatalogError) {
        guard let owner = found.head.owner else { return }
        try await owners.note(TakenDisk(diskID: found.head.diskID, epoch: epoch), from: owner.server, found.heads)
    }

    static func check(_ options: DiskOptions) throws(CatalogError) {
        guard (0...DiskOptions.maxResumeWindowMs).contains(options.resumeWindowMs) else {
            throw CatalogError(
                .invalid, "a resume window is from 0 to \(DiskOptions.maxResumeWindowMs / 3_600_000) hours")
        }
        guard (0...DiskOptions.maxHistoryDensity).contains(options.historyDensity) else {
            throw CatalogError(.invalid, "the density of a history is from 0 to \(DiskOptions.maxHistoryDensity)")
        }
    }

    static func owned(_ head: Head, _ todo: String) -> CatalogError {
        let owner = head.owner.map { "server \($0.server) on \($0.host)" } ?? "a server"
        return CatalogError(
            .owned,
            "disk '\(head.name)' is served by \(owner), which is alive; stop it, or use --force to \(todo) all the same"
        )
    }

    static func conflict(_ name: String) -> CatalogError {
        CatalogError(
            .conflict, "disk '\(name)' was changed by others \(maxAttempts) times while this tried to; try again")
    }
}

extension DiskOptions {
    /// Seven days.
    package static let maxResumeWindowMs: Int64 = 7 * 24 * 3_600_000
}
