// How far a round has listed, kept on scratch with what it found, so that a round that is cut off goes on there. What comes
// behind listing is done anew.
//
// Always holds: a checkpoint is used by the very next round of the store, and was discarded before anything was deleted. So
// what it says of an object's age is still true, and manifests are traced after all that it lists was listed.

import BlockCache
import Runtime

/// A place in the listing of all locations: what comes before it is listed.
struct ListingPlace: Codable {
    var location = 0
    /// Of `ObjectKind.allCases`.
    var kind = 0
    /// The last key that was listed of that kind there.
    var after: String?
}

struct CollectionCheckpoint: Codable {
    var storeID: String
    var locations: Int
    var graceMs: Int64
    var partitionBits: Int
    /// `CollectionState.rounds` of the round that wrote it.
    var round: UInt64
    /// Of the files.
    var salt: UInt64
    var next: ListingPlace
    var found: [String: PartitionedFile.Saved]
    /// What was counted.
    var blocks: CollectionSummary.Objects
    var pages: CollectionSummary.Objects

    private static let kind = "collection-checkpoint"
    private static let format = 1

    private static func path(_ folder: String) -> String { "\(folder)/round" }

    /// The checkpoint in a folder; nil: there is none that can be read.
    static func load(_ scratch: any ScratchDisk, _ folder: String) async -> CollectionCheckpoint? {
        do {
            let file = try scratch.open(path(folder), create: false)
            guard file.sizeBytes <= UInt64(ControlObject.maxBytes) else { return nil }
            let bytes = try await file.read(count: Int(file.sizeBytes), at: 0)
            return try ControlObject.open(Self.self, bytes, kind: kind, format: format, what: path(folder))
        } catch {
            return nil
        }
    }

    /// Durable when it returns.
    func write(_ scratch: any ScratchDisk, _ folder: String) async throws(CatalogError) {
        let bytes = ControlObject.seal(self, kind: Self.kind, format: Self.format)
        let path = Self.path(folder)
        do throws(ScratchError) {
            try scratch.remove(path + ".new")
            let file = try scratch.open(path + ".new", create: true)
            try await file.write(bytes, at: 0)
            try await file.sync()
            try scratch.rename(path + ".new", to: path)
            try await scratch.syncDirectory(folder)
        } catch { throw CatalogError(.file, error.description) }
    }

    /// Gone for good when it returns.
    static func discard(_ scratch: any ScratchDisk, _ folder: String) async throws(CatalogError) {
        do throws(ScratchError) {
            try scratch.remove(path(folder))
            try await scratch.syncDirectory(folder)
        } catch { throw CatalogError(.file, error.description) }
    }
}

extension CollectionRound {
    private func isOfNow(_ checkpoint: CollectionCheckpoint) -> Bool {
        guard let role else { return false }
        return checkpoint.storeID == store.id.description && checkpoint.locations == store.locations.buckets.count
            && checkpoint.graceMs == graceMs && checkpoint.partitionBits == options.partitionBits
            && checkpoint.round + 1 == role.round
    }

    /// Where listing begins: where the last round was cut off, if that was the store's last.
    func resume() async throws(CatalogError) -> ListingPlace {
        guard role != nil, let checkpoint = await CollectionCheckpoint.load(scratch, options.folder) else {
            return ListingPlace()
        }
        // From here on it belongs to nobody's round, until this one has taken it over.
        try await CollectionCheckpoint.discard(scratch, options.folder)
        guard isOfNow(checkpoint) else { return ListingPlace() }
        makeCandidates(salt: checkpoint.salt)
        do throws(CatalogError) {
            for kind in ObjectKind.allCases {
                guard let saved = checkpoint.found[kind.rawValue] else { throw CatalogError(.file, "not complete") }
                try await candidates[kind]!.restore(saved)
            }
        } catch {
            for file in candidates.values { file.remove() }
            return ListingPlace()
        }
        summary.blocks = checkpoint.blocks
        summary.pages = checkpoint.pages
        try await save(checkpoint.next)
        return checkpoint.next
    }

    /// Keeps how far listing has come, if it is time, or about to end.
    func saveIfDue(_ next: ListingPlace) async throws(CatalogError) {
        let nowNs = store.environment.nowNs
        guard role != nil, Task.isCancelled || nowNs - savedNs >= UInt64(options.checkpointMs) * 1_000_000 else {
            return
        }
        try await save(next)
    }

    private func save(_ next: ListingPlace) async throws(CatalogError) {
        guard let role else { return }
        var found: [String: PartitionedFile.Saved] = [:]
        for kind in ObjectKind.allCases { found[kind.rawValue] = try await candidates[kind]!.save() }
        let checkpoint = CollectionCheckpoint(
            storeID: store.id.description, locations: store.locations.buckets.count, graceMs: graceMs,
            partitionBits: options.partitionBits, round: role.round, salt: salt, next: next, found: found,
            blocks: summary.blocks, pages: summary.pages)
        try await checkpoint.write(scratch, options.folder)
        hasCheckpoint = true
        savedNs = store.environment.nowNs
    }

    /// Before anything is deleted.
    func discardCheckpoint() async throws(CatalogError) {
        if !hasCheckpoint { return }
        try await CollectionCheckpoint.discard(scratch, options.folder)
        hasCheckpoint = false
    }
}
