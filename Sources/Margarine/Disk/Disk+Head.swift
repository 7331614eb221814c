// The one writer of the head: a queue of intents, one at a time. What an intent means for the disk happens after its swap was
// won, and not before.

internal import BlockCache
internal import Logging
internal import ObjectStore
internal import Runtime

/// Hands out turns in the order in which they were asked for. Owned by one loop.
final class Turns {
    private var isTaken = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    func take() async {
        if isTaken { return await withCheckedContinuation { waiting.append($0) } }
        isTaken = true
    }

    func give() {
        if waiting.isEmpty { isTaken = false } else { waiting.removeFirst().resume() }
    }
}

extension Disk {
    /// Stores the head that carries out `intent`. When a user changed options or size meanwhile, those are taken over. When
    /// another server has the disk, it is lost here, and nothing was changed.
    ///
    /// - Parameter limit: of what the head is to name.
    /// - Throws: `.conflict` when the intent no longer fits: the head has got another generation than the one that it
    ///   follows (make it anew, upon that one), or the disk is in use again. Else the store failed, or the limit is over;
    ///   nothing is known to have changed. Try again.
    func swapHead(_ intent: HeadIntent, within limit: CommitLimit? = nil) async throws(CatalogError) {
        await headTurns.take()
        let failure = await swapInTurn(intent, within: limit)
        headTurns.give()
        if let failure { throw failure }
    }

    private func swapInTurn(_ intent: HeadIntent, within limit: CommitLimit?) async -> CatalogError? {
        while lost == nil {
            do throws(CatalogError) {
                try await limit?.check(what: "disk '\(name)': a commit")
                try stillFits(intent)
            } catch {
                return error
            }
            let next = head.next(intent, notes)
            // Saying what is said already costs nothing.
            switch intent {
            case .note, .admit: if next == head, !isHeadUnclear { return nil }
            case .advance, .release: break
            }
            switch await outcome(of: next) {
            case .success(.won(let tag)):
                won(next, tag)
                return nil
            case .success(.lost(_, let tag?)) where context.settings.fault == .lostSwapTakenForWon:
                won(next, tag)
                return nil
            case .success(.lost(let found?, let tag?)):
                if !adopt(found, tag) { lose(Disk.describeLoss(found)) }
            case .success(.lost):
                lose("its head is gone from the store")
            case .failure(let error):
                // It may have taken effect after all: look before the next try.
                if error.kind == .store(.unclear) {
                    isHeadUnclear = true
                    await lookInTurn()
                }
                return error
            }
        }
        return nil
    }

    /// Looks at what may have changed while the intent waited for its turn.
    private func stillFits(_ intent: HeadIntent) throws(CatalogError) {
        switch intent {
        case .note, .admit: break
        // Whoever looked at the head meanwhile may have found another generation in it.
        case .advance(let record):
            guard head.generation + 1 == record.generation else {
                throw CatalogError(
                    .conflict,
                    "disk '\(name)': an earlier commit took effect after all, or its data was moved meanwhile")
            }
        case .release:
            let isAsked =
                tenure == .releasing || tenure == .draining || context.settings.fault == .releaseIgnoresAdmission
            guard isAsked, isClean, session == nil || context.settings.fault == .releaseIgnoresAdmission else {
                throw CatalogError(.conflict, "disk '\(name)' is in use again")
            }
        }
    }

    private func won(_ next: Head, _ tag: ETag) {
        notes.settle(by: next)
        head = next
        // As it was stored.
        head.forgetSurplus()
        headTag = tag
        isHeadUnclear = false
    }

    /// The stored head does not say what it has to.
    var isHeadStale: Bool { isHeadUnclear || head.next(.note, notes) != head }

    private func outcome(of next: Head) async -> Result<HeadSwap, CatalogError> {
        do throws(CatalogError) {
            return .success(try await heads.swap(next, expecting: headTag))
        } catch {
            return .failure(error)
        }
    }

    /// Takes over what the stored head says. false: it can't be read.
    @discardableResult
    private func lookInTurn() async -> Bool {
        if lost != nil { return true }
        guard let found = try? await heads.load(name) else { return false }
        if lost != nil { return true }
        // What was sent without an answer may take effect after this look too: with the tag unchanged, only a swap that is
        // won makes sure that it never does.
        if found.etag != headTag, !adopt(found.head, found.etag) { lose(Disk.describeLoss(found.head)) }
        return true
    }

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
        isHeadUnclear = false
        if isWanted {
            noteWanted()
            startCommit()
        }
        if grew { log.notice("disk \(name): its size is \(found.sizeBytes) bytes now") }
        if grew || moved { view.adopt(found.manifest(cache: context.manifests)) }
        return true
    }

    /// What is safe now is to be committed at once, and the wish for it taken out of the head.
    func noteWanted() { notes.wantedSequence = (waiting ?? committing)?.lastSequence ?? head.journalSequence }

    private static func describeLoss(_ found: Head) -> String {
        if found.deleted { return "it was deleted" }
        guard let owner = found.owner else { return "it was taken from this server by force (epoch \(found.epoch))" }
        return "server \(owner.server) on \(owner.host) has taken it (epoch \(found.epoch))"
    }

    // MARK: Looking

    /// Looks whether the disk is still ours, and at what users changed. Called with every heartbeat.
    func checkOwnership() async {
        guard lost == nil, tenure != .releasing else { return }
        _ = await lookAtHead()
        if isHeadStale { startCommit() }
    }

    /// Who has a disk opened is admitted by then.
    private static let freshNs: UInt64 = 1_000_000_000

    /// Before somebody is served who can't tell by his own writes: another server may have had the disk since this one was
    /// last used, and what is here would be old.
    func confirmOwnership() async throws(AttachError) {
        let isJustOpened = isFresh && nowNs < openedNs + Disk.freshNs
        isFresh = false
        if isJustOpened { return }
        guard await lookAtHead() else {
            throw AttachError(
                .unavailable, "disk '\(name)': the store can't be asked whether another server has it; try again")
        }
    }

    /// Takes over what the stored head says. One look serves all who asked before it began. false: it can't be read.
    private func lookAtHead() async -> Bool {
        if lookWaiters.isEmpty {
            context.spawn { [self] in
                await headTurns.take()
                let served = lookWaiters
                lookWaiters = []
                let isDone = await lookInTurn()
                headTurns.give()
                for waiter in served { waiter.resume(returning: isDone) }
            }
        }
        return await withCheckedContinuation { lookWaiters.append($0) }
    }
}
