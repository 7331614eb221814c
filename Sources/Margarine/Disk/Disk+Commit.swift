// Committing: when, in which order, and what happens when the store fails. How blocks become objects is in
// CommitWriter.swift.
//
// Always holds: the order objects, manifest pages, record of the generation before, head; the journal is released only
// after the head names a generation that contains it; one commit at a time; a failed one leaves garbage and nothing else.

internal import BlockCache
internal import Logging
internal import ObjectStore
internal import Runtime

extension Disk {
    /// A safe point waits: sees that it is being committed before it is older than the interval.
    func scheduleCommit() {
        guard !isCommitting, lost == nil, let waiting else { return }
        let age = nowNs - min(waiting.frozenAtNs, nowNs)
        let interval = UInt64(context.settings.commitIntervalMs) * 1_000_000
        if isDue(waiting) { return startCommit() }
        // Each of these waits ends in another look.
        if commitTimer != nil || superBlockTimer != nil || awaitsMirrors || cutComesFirst { return }
        commitTimer = context.after(ns: interval - min(age, interval)) { [weak self] in
            self?.commitTimer = nil
            self?.scheduleCommit()
        }
    }

    private func isDue(_ layer: Layer) -> Bool {
        if awaitsMirrors { return false }
        let interval = UInt64(context.settings.commitIntervalMs) * 1_000_000
        return tenure == .draining || session == nil || !commitWaiters.isEmpty || head.commitWanted != nil
            || layer.dataBytes >= context.settings.commitBytes
            || journal.liveBytes > context.settings.journalLimitBytes / 2 || context.journals.isFilling
            || (superBlockTimer == nil && nowNs >= layer.frozenAtNs + interval)
    }

    /// Commits what waits, now.
    func startCommit() {
        commitTimer?.cancel()
        commitTimer = nil
        if awaitsMirrors { return heldCommit.isWanted = true }
        if cutComesFirst { return isCommitPutOff = true }
        guard !isCommitting, lost == nil, waiting != nil || committing != nil || isHeadStale else { return }
        isCommitting = true
        context.spawn { [self] in await commitAll() }
    }

    private func commitAll() async {
        var backoffMs: UInt64 = 200
        var hasFailed = false
        while lost == nil {
            if committing == nil {
                // A super block came since the commit was asked for.
                if awaitsMirrors {
                    heldCommit.isWanted = true
                    break
                }
                if cutComesFirst {
                    isCommitPutOff = true
                    break
                }
                view.beginCommit()
            } else if hasFailed, committing!.kind != .cut, !awaitsMirrors {
                // A newer safe point supersedes what the last try tried.
                view.widenCommit()
            }
            do {
                if let layer = committing {
                    commitStartedNs = nowNs
                    try await commit(layer)
                } else if isHeadStale {
                    try await swapHead(.note)
                }
                backoffMs = 200
                hasFailed = false
                lastCommitError = nil
            } catch let conflict as CatalogError where conflict.kind == .conflict {
                // There is another generation of the same bytes: on that, then.
                log.debug("disk \(name): \(conflict); the commit begins anew")
                continue
            } catch {
                if lastCommitError == nil {
                    context.problem(
                        "disk \(name): commit failed: \(error); it is tried again until it succeeds, and nothing is lost meanwhile"
                    )
                }
                hasFailed = true
                lastCommitError = "\(error)"
                storeErrors += 1
                await context.environment.sleep(ns: backoffMs * 1_000_000)
                backoffMs = min(backoffMs * 2, 5_000)
                continue
            }
            if committing == nil, waiting.map({ !isDue($0) }) ?? !isHeadStale { break }
        }
        isCommitting = false
        scheduleCommit()
    }

    /// Makes `layer` the next generation.
    private func commit(_ layer: Layer) async throws {
        if context.settings.fault == .commitPastSafePoint, !active.isEmpty {
            view.commitActiveToo(next: Layer(pages: pages))
        }
        if context.settings.fault == .journalFreedEarly { journal.release(upTo: layer.lastSequence) }
        let limit = CommitLimit(
            context.grace, bucket: context.locations.nearBucket, environment: context.environment)
        let base = head
        let writer = CommitWriter(disk: self, layer: layer)
        let (written, newBytes) = try await writer.write()
        // A roll-back that only this process knows of must not be hidden by a generation that went past it.
        try await journal.whenEndsAreAppended(upTo: layer.lastSequence)
        guard lost == nil else { return }
        guard head.generation == base.generation else {
            throw CatalogError(.conflict, "disk '\(name)': its data was moved to another location meanwhile")
        }
        try await heads.archive(base)
        // Of what was written upon `base`, and of nothing that the head may have become since.
        let record = GenerationRecord(
            diskID: base.diskID, generation: base.generation + 1, epoch: base.epoch, kind: layer.kind,
            committedAtMs: context.environment.wallMs, journalSequence: layer.lastSequence, newBytes: newBytes,
            manifest: written)
        // One that took too long is tried again from the beginning, with new objects; the layers are all still here.
        try await swapHead(.advance(record), within: limit)
        guard lost == nil else { return }
        precondition(head.generation == record.generation)
        let current = written.sizeBytes == head.sizeBytes ? written : head.manifest(cache: context.manifests)
        if let committed = view.endCommit(current) { discard(committed) }
        journal.release(upTo: head.journalSequence)
        commits += 1
        log.debug("disk \(name): generation \(head.generation) committed, \(newBytes) bytes stored")
        var ready: [(DeviceError?) -> Void] = []
        commitWaiters.removeAll { waiter in
            if waiter.sequence <= head.journalSequence { ready.append(waiter.done) }
            return waiter.sequence <= head.journalSequence
        }
        for done in ready { done(nil) }
        context.rooms.mayHaveCome()
    }
}

extension GenerationKind {
    /// How a safe-point record in the journal names it.
    var journalNumber: UInt64 {
        switch self {
        case .btrfsFull: 1
        case .btrfsLog: 2
        case .flush: 3
        case .clean: 4
        case .imported: 5
        case .resized: 6
        case .journalFull: 7
        // Never in a journal: they are made on the store.
        case .forked: 8
        case .rolledBack: 9
        case .received: 10
        case .localized: 11
        case .cut: 12
        }
    }

    init?(journalNumber: UInt64) {
        guard let kind = Self.allCases.first(where: { $0.journalNumber == journalNumber }) else { return nil }
        self = kind
    }
}
