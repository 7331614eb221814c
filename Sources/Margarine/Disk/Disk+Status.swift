// What a disk says of itself to `margined status`.

internal import BlockCache
internal import ObjectStore
internal import Runtime

extension Disk {
    func status() -> DiskStatus {
        var status = DiskStatus(
            name: name, sizeBytes: sizeBytes, epoch: head.epoch, safePoints: statusRule,
            durability: head.options.durability.rawValue, committedGeneration: head.generation)
        status.committedAgeMs = head.committedAtMs.map { context.environment.wallMs - $0 }
        status.dirtyBytes = UInt64(dirtyBytes)
        status.safePointAgeMs = lastSafePointNs.map { Int64((nowNs - $0) / 1_000_000) }
        status.safePointCount = safePoints
        if committing != nil {
            status.committingGeneration = head.generation + 1
            status.committingForMs = commitStartedNs.map { Int64((nowNs - $0) / 1_000_000) }
        }
        status.journalBytes = journal.liveBytes
        status.journalLimitBytes = context.settings.journalLimitBytes
        status.waitingWriters = pendingRequests.values.count { $0.kind == .write || $0.kind == .writeZeroes }
        status.cacheHits = hits
        status.cacheMisses = misses
        status.storeErrors = storeErrors
        status.lastError = lastCommitError
        return status
    }

    /// `auto` is shown with what it means now.
    private var statusRule: String {
        head.options.safePoints == .auto
            ? "auto (\(superBlocks.isFollowed ? "btrfs" : "flush"))" : head.options.safePoints.rawValue
    }

    func sessionStatus() -> SessionStatus? {
        guard let session else { return nil }
        var status = SessionStatus(
            address: session.address, export: session.name.map { "\(name)?session=\($0)" } ?? name,
            session: session.name,
            connections: clients.count)
        status.ageMs = context.environment.wallMs - session.sinceMs
        if let dropped = session.droppedAtNs, clients.isEmpty {
            status.resumableForMs = max(0, head.options.resumeWindowMs - Int64((nowNs - dropped) / 1_000_000))
        }
        return status
    }
}
