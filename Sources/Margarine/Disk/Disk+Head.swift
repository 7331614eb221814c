// Swapping the head: the one place where this server says something about a disk that others hear. One swap at a time.

internal import BlockCache
internal import Logging
internal import ObjectStore
internal import Runtime

/// What a swap of the head says, besides the present session.
enum HeadChange {
    case none
    /// A new generation.
    case advance(GenerationRecord)
    /// This server has the disk no more.
    case release
}

extension Disk {
    /// Stores the head with `change` applied, and with the present session. When a user changed options or size meanwhile,
    /// those are taken over. When another server has the disk, it is lost here, and nothing was changed.
    ///
    /// - Parameter limit: of what the head is to name.
    /// - Throws: `.conflict` when the head has got another generation than the one that `change` follows: make it anew, upon
    ///   that one. Else the store failed, or the limit is over; nothing is known to have changed. Try again.
    func swapHead(_ change: HeadChange, within limit: CommitLimit? = nil) async throws(CatalogError) {
        await headTurn()
        let failure = await swapInTurn(change, within: limit)
        endHeadTurn()
        if let failure { throw failure }
    }

    private func swapInTurn(_ change: HeadChange, within limit: CommitLimit?) async -> CatalogError? {
        while lost == nil {
            do throws(CatalogError) {
                try await limit?.check(what: "disk '\(name)': a commit")
            } catch {
                return error
            }
            // Whoever looked at the head meanwhile may have found another generation in it.
            if case .advance(let record) = change, head.generation + 1 != record.generation {
                return CatalogError(
                    .conflict,
                    "disk '\(name)': an earlier commit took effect after all, or its data was moved meanwhile")
            }
            let next = nextHead(change)
            switch await outcome(of: next) {
            case .success(.won(let tag)):
                head = next
                headTag = tag
                headIsStale = false
                return nil
            case .success(.lost(_, let tag?)) where context.settings.fault == .lostSwapTakenForWon:
                head = next
                headTag = tag
                return nil
            case .success(.lost(let found?, let tag?)):
                if !adopt(found, tag) { lose(Disk.describeLoss(found)) }
            case .success(.lost):
                lose("its head is gone from the store")
            case .failure(let error):
                // It may have taken effect after all: look before the next try.
                if error.kind == .store(.unclear) { await lookAgain() }
                return error
            }
        }
        return nil
    }

    /// The head as it is to be, with the present session.
    private func nextHead(_ change: HeadChange) -> Head {
        var next = head
        switch change {
        case .none: break
        case .advance(let record): next.advance(to: record)
        case .release: next.owner = nil
        }
        if next.commitWanted != nil, wantedSequence <= next.journalSequence { next.commitWanted = nil }
        if let ended, ended.sequence <= next.journalSequence { self.ended = nil }
        // A disk that is given back is never replayed: then the head alone knows.
        let isGivenBack = next.owner == nil
        let unjournaled = next.session.map { unjournaledLosses.contains($0) } ?? false
        next.session = isGivenBack ? nil : session?.name ?? ended?.name ?? (unjournaled ? next.session : nil)
        for name in lostSessions where !next.lostSessions.contains(name) {
            if isGivenBack || !unjournaledLosses.contains(name) { next.lose(session: name) }
        }
        return next
    }

    private func outcome(of next: Head) async -> Result<HeadSwap, CatalogError> {
        do throws(CatalogError) {
            return .success(try await heads.swap(next, expecting: headTag))
        } catch {
            return .failure(error)
        }
    }

    private func lookAgain() async {
        guard let found = await loaded() else { return }
        if !adopt(found.head, found.etag) { lose(Disk.describeLoss(found.head)) }
    }

    private func loaded() async -> (head: Head, etag: ETag)? { try? await heads.load(name) }

    /// Takes over what a user changed in the head. false: it is no longer ours.
    private func adopt(_ found: Head, _ tag: ETag) -> Bool {
        guard !found.deleted, found.diskID == head.diskID else { return false }
        let isOurs = found.epoch == head.epoch && found.owner?.server == serverID
        guard isOurs || context.settings.fault == .epochIgnored else { return false }
        let grew = found.sizeBytes != head.sizeBytes
        // A commit of ours whose answer was lost, or the same bytes at another location: what is read through the layers
        // stays the same.
        let moved = isOurs && found.generation != head.generation
        let isWanted = found.commitWanted != nil && found.commitWanted != head.commitWanted
        head = found
        headTag = tag
        if isWanted {
            noteWanted()
            startCommit()
        }
        if grew { log.notice("disk \(name): its size is \(found.sizeBytes) bytes now") }
        if grew || moved { view.adopt(found.manifest(cache: context.manifests)) }
        return true
    }

    /// What is safe now is to be committed at once, and the wish for it taken out of the head.
    func noteWanted() {
        wantedSequence = (waiting ?? committing)?.lastSequence ?? head.journalSequence
        headIsStale = true
    }

    private static func describeLoss(_ found: Head) -> String {
        if found.deleted { return "it was deleted" }
        guard let owner = found.owner else { return "it was taken from this server by force (epoch \(found.epoch))" }
        return "server \(owner.server) on \(owner.host) has taken it (epoch \(found.epoch))"
    }

    /// Looks whether the disk is still ours, and at what users changed. Called with every heartbeat.
    func checkOwnership() async {
        guard lost == nil, !isReleasing else { return }
        _ = await lookAtHead()
    }

    /// Before somebody is served who can't tell by his own writes: another server may have had the disk since this one was
    /// last used, and what is here would be old.
    func confirmOwnership() async throws(AttachError) {
        if isFresh {
            isFresh = false
            return
        }
        guard await lookAtHead() else {
            throw AttachError(
                .unavailable, "disk '\(name)': the store can't be asked whether another server has it; try again")
        }
    }

    /// Takes over what the stored head says. false: it can't be read.
    private func lookAtHead() async -> Bool {
        await headTurn()
        defer { endHeadTurn() }
        if lost != nil { return true }
        guard let found = await loaded() else { return false }
        if lost == nil, found.etag != headTag, !adopt(found.head, found.etag) { lose(Disk.describeLoss(found.head)) }
        return true
    }

    private func headTurn() async {
        if !isSwapping {
            isSwapping = true
            return
        }
        await withCheckedContinuation { swapWaiters.append($0) }
    }

    private func endHeadTurn() {
        if swapWaiters.isEmpty {
            isSwapping = false
        } else {
            swapWaiters.removeFirst().resume()
        }
    }
}
