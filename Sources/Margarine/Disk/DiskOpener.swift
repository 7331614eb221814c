// Attaching a disk to this server: who has it, whether its journal is still good, and the swap that makes it ours. Straight
// through, once for each attachment.

internal import BlockCache
internal import Logging
internal import ObjectStore
internal import Runtime

/// What a server is, for heads and heartbeats.
package struct ServerIdentity: Sendable {
    /// Kept in the scratch directory: whoever has the directory is this server.
    package var id: String
    package var host: String
    /// Of this start of the machine. A journal of another one may have lost what was not synced.
    package var bootID: String
    package init(id: String, host: String, bootID: String) {
        self.id = id
        self.host = host
        self.bootID = bootID
    }
}

struct DiskOpener {
    let name: String
    /// Of the client for whom it is opened.
    let session: String?
    let server: ServerIdentity
    let takeover: Takeover
    let store: Store
    /// The head as it was just now, to save asking again.
    var known: Store.Found?
    let context: DiskContext
    let owners: OwnerWatch
    let leases: Leases
    let failed: FailedOpenings

    static let journalRoot = "journal"
    static let lostRoot = "lost"

    static func folderName(_ name: String, _ id: ObjectID) -> String { "\(name).\(id)" }
    static func journalFolder(_ name: String, _ id: ObjectID) -> String { "\(journalRoot)/\(folderName(name, id))" }

    /// The disk whose journal a folder is; nil for foreign names.
    static func disk(ofJournal folder: String) -> (name: String, id: ObjectID)? {
        guard let dot = folder.lastIndex(of: "."), let id = ObjectID(folder[folder.index(after: dot)...]) else {
            return nil
        }
        return (String(folder[..<dot]), id)
    }

    /// Attaches. With `onlyOwn`, only a disk that is this server's already (at start).
    func open(onlyOwn: Bool = false) async throws(AttachError) -> Disk {
        for number in 0..<5 {
            if let disk = try await attempt(onlyOwn: onlyOwn, known: number == 0 ? known : nil) {
                disk.isFresh = !onlyOwn
                return disk
            }
        }
        throw AttachError(.unavailable, "disk '\(name)': other servers keep changing its head; try again")
    }

    private func attempt(onlyOwn: Bool, known: Store.Found?) async throws(AttachError) -> Disk? {
        var found = known
        if found == nil { found = try await AttachError.wrap { () throws(CatalogError) in try await store.find(name) } }
        guard let found, !found.head.deleted else {
            throw AttachError(.unknown, "there is no disk '\(name)'")
        }
        let (heads, head) = (found.heads, failed.unsay(found.head))
        if head.isReadOnly { throw AttachError(.refused, "disk '\(name)' is read-only: nobody can own it") }
        try AttachError.checkSize(
            head.sizeBytes, of: "disk '\(name)'", "`margined disk resize --shrink` makes it smaller")
        let isMine = head.owner?.server == server.id
        if onlyOwn, !isMine { throw AttachError(.refused, "disk '\(name)' is not this server's any more") }

        let folder = DiskOpener.journalFolder(name, head.diskID)
        if known != nil, !isMine, Journal.isLeft(in: folder, context.scratch) {
            // What the caller knows may be of before this server had the disk, and left a journal in which all is good.
            return try await attempt(onlyOwn: onlyOwn, known: nil)
        }
        if let owner = head.owner, !isMine, takeover != .force { try await clear(owner, head, heads) }
        let pages = DirtyPages(arena: context.arena)
        var replayed: ReplayedJournal?
        var past = JournalPast(trust: .lost, survives: false)
        if isMine {
            // After a power loss what no safe point covers may have holes: nobody can go on from it.
            (past, replayed) = try await replay(folder, head, pages)
        } else {
            // Before the head says that the disk is ours: from then on a journal in this folder would be taken for good.
            try await setAside(folder)
        }

        var next = head
        next.epoch += 1
        next.owner = Head.Owner(server: server.id, host: server.host, sinceMs: context.environment.wallMs)
        if past.survives, let gone = head.session,
            replayed?.lostSessions.contains(JournalFormat.sessionSum(gone)) == true
        {
            // Decided before, and the head had not heard of it when the server ended.
            next.lose(session: gone)
            next.session = nil
        }
        // Given back in order: everything is committed, and whom the head names has lost nothing so far.
        let claimant = head.owner == nil ? head.session : nil
        if !past.survives, claimant == nil {
            if let gone = head.session {
                context.log.notice("disk \(name): session '\(gone)' did not end cleanly, and its last writes are lost")
                next.lose(session: gone)
            }
            next.session = try await opening(next, heads)
        }
        try await noteOwned(folder)
        // Before the swap is sent: whoever takes the disk from then on finds the claim.
        let claim = try await makeClaim(next, at: heads.location)
        var isSent = Sent.not
        do throws(AttachError) {
            if let owner = head.owner, !isMine, takeover == .force { try await warn(owner, head, heads) }
            let swap: HeadSwap
            do throws(CatalogError) { swap = try await heads.swap(next, expecting: found.etag) } catch {
                if error.kind == .store(.unclear) { isSent = .unclear }
                throw AttachError(error)
            }
            guard case .won(let tag) = swap else {
                claim.end()
                if !isMine { Journal.forget(folder, context.scratch) }
                return nil
            }
            isSent = .won
            if let reason = claim.lostReason {
                throw AttachError(.unavailable, "disk '\(name)': \(reason); try again")
            }
            let disk = try await begin(next, tag, heads, folder, pages, past, replayed, claim, claimant: claimant)
            failed.forget(head.diskID)
            return disk
        } catch {
            claim.end()
            if isSent != .not, !past.survives {
                // Taken for nothing: its head is to name no session that was never served, or that would count as lost.
                let opening = FailedOpening(sent: next, session: claimant, wasMine: isMine)
                await failed.undo(opening, heads, context, atOnce: isSent == .won)
            }
            throw error
        }
    }

    /// Whether the store has the head that takes the disk.
    private enum Sent { case not, unclear, won }

    /// The disk, from a head that was won. Its journal is made ready first: nothing may be appended to one that is not.
    private func begin(
        _ head: Head, _ tag: ETag, _ heads: HeadStore, _ folder: String, _ pages: DirtyPages, _ past: JournalPast,
        _ replayed: ReplayedJournal?, _ claim: Claim, claimant: String?
    ) async throws(AttachError) -> Disk {
        let journal = Journal(
            folder: folder, diskID: head.diskID, epoch: head.epoch, lastSequence: head.journalSequence,
            pages: pages, context: context)
        var disk: Disk?
        do throws(ScratchError) {
            if let replayed { try await journal.adopt(replayed, mustRewrite: past.mustRewrite) }
            journal.release(upTo: head.journalSequence)
            if past.survives { try await journal.marker.attach(bootID: server.bootID, synced: past.synced) }
            let made = make(
                head, tag, heads, pages, journal, replayed, claim, survives: past.survives, claimant: claimant)
            disk = made
            if !past.survives {
                try await rolledBack(journal)
                try await journal.marker.attach(bootID: server.bootID, synced: past.synced)
            }
            return made
        } catch {
            disk?.lose("its journal can't be made ready")
            // Whoever tries again must not find a write of this one under way.
            while let disk, disk.isLeaving { await context.environment.sleep(ns: 5_000_000) }
            throw AttachError(
                .unavailable,
                "disk '\(name)': its journal can't be made ready: \(error). Nothing is lost; attach again once the scratch disk can be written"
            )
        }
    }

    /// Waits until the journal says that the disk went back. Only then may it be marked with this boot: the next start
    /// would take what power has torn for what a crash left whole.
    private func rolledBack(_ journal: Journal) async throws(ScratchError) {
        let patienceNs = UInt64(min(5_000, context.settings.requestTimeoutMs)) * 1_000_000
        let deadline = context.environment.nowNs + patienceNs
        while journal.appendedSequence < journal.lastSequence {
            if let failure = journal.failure { throw failure }
            if context.environment.nowNs >= deadline {
                throw ScratchError(
                    errno: 28 /* ENOSPC */,
                    description: "there is no room to note that the disk went back to its last safe point")
            }
            await context.environment.sleep(ns: 10_000_000)
        }
    }

    /// Waits a little for a proof that this server may take disks at the location of the head.
    private func makeClaim(_ head: Head, at location: UInt8) async throws(AttachError) -> Claim {
        let environment = context.environment
        let deadline = environment.nowNs + 10_000_000_000
        while true {
            if let claim = leases[location].claim(head.diskID, epoch: head.epoch, nowNs: environment.bootNs) {
                return claim
            }
            if environment.nowNs >= deadline {
                throw AttachError(
                    .unavailable,
                    "disk '\(name)': this server's heartbeat can't be written at the disk's location\(context.locations.troubles), so it may take no disks there; try again"
                )
            }
            await environment.sleep(ns: 20_000_000)
        }
    }

    /// The session to name at once, which saves a swap: that of the client that asks, unless it is lost.
    private func opening(_ next: Head, _ heads: HeadStore) async throws(AttachError) -> String? {
        guard let session, !next.lostSessions.contains(session) else { return nil }
        let isForgotten = try await AttachError.wrap { () throws(CatalogError) in
            try await heads.isForgotten(session, of: next)
        }
        return isForgotten ? nil : session
    }

    private func make(
        _ head: Head, _ tag: ETag, _ heads: HeadStore, _ pages: DirtyPages, _ journal: Journal,
        _ replayed: ReplayedJournal?, _ claim: Claim, survives: Bool, claimant: String?
    ) -> Disk {
        if let replayed {
            if replayed.records > 0 {
                context.log.notice(
                    "disk \(name): \(replayed.records) journal records taken up again\(replayed.tornBytes > 0 ? ", \(replayed.tornBytes) bytes of an unfinished one cut off" : "")"
                )
            }
        }
        let disk = Disk(
            name: name, head: head, headTag: tag, manifest: head.manifest(cache: context.manifests),
            serverID: server.id,
            heads: heads, context: context, replayed: replayed, pages: pages, journal: journal,
            claim: claim)
        claim.whenLost { [weak disk, loop = context.loop] reason, isStillOurs in
            loop.post { [weak disk] in disk?.lose(reason, isStillOurs: isStillOurs) }
        }
        if survives, head.session != nil || !disk.active.isEmpty {
            // Its client may come back, to find exactly what it was told.
            disk.begin(
                found: Session(name: head.session, host: nil, address: "unknown", sinceMs: context.environment.wallMs))
        } else {
            if let claimant {
                disk.notes.ended = EndedSession(name: claimant, sequence: 0, isOver: false)
            } else {
                disk.notes.opening = head.session
            }
            disk.begin(found: nil)
        }
        return disk
    }

    /// Another server has the disk, and loses it by force: the last step before the swap, for it loses the disk by this.
    private func warn(_ owner: Head.Owner, _ head: Head, _ heads: HeadStore) async throws(AttachError) {
        try await AttachError.wrap { () throws(CatalogError) in
            try await owners.note(TakenDisk(diskID: head.diskID, epoch: head.epoch + 1), from: owner.server, heads)
        }
    }

    /// Another server has the disk: sees that it is gone.
    private func clear(_ owner: Head.Owner, _ head: Head, _ heads: HeadStore) async throws(AttachError) {
        let state: OwnerState
        do throws(CatalogError) {
            var isTold = false
            state = try await owners.settle(owner.server, heads) { unchangedMs, ofMs in
                if isTold { return }
                isTold = true
                context.log.notice(
                    "disk \(name): its server \(owner.server) on \(owner.host) may have died; it is watched for \((ofMs - unchangedMs + 999) / 1000) s more before the disk is taken"
                )
            }
        } catch {
            throw AttachError(
                .unavailable, "disk '\(name)': whether server \(owner.server) is alive can't be told: \(error)")
        }
        if case .alive(let sign) = state {
            throw AttachError(
                .refused,
                "disk '\(name)' belongs to server \(owner.server) on \(owner.host), which is alive (\(sign)); "
                    + "detach it there, or take it with `margined disk release \(name) --force`")
        }
        if case .gone(let how) = state {
            context.log.notice(
                "disk \(name): taken over from server \(owner.server) on \(owner.host), which is dead (\(how))")
        }
    }

    private func replay(_ folder: String, _ head: Head, _ pages: DirtyPages) async throws(AttachError)
        -> (JournalPast, ReplayedJournal)
    {
        do {
            let past = try await JournalPast.find(
                in: folder, of: head.diskID, bootID: server.bootID, context.scratch)
            let replayed = try await JournalReplay.run(
                folder: folder, diskID: head.diskID, base: head.journalSequence, past: past, pages: pages,
                scratch: context.scratch, fault: context.settings.fault)
            return (past, replayed)
        } catch let error as ScratchError where error.isLack {
            throw AttachError(
                .unavailable, "disk '\(name)': its journal can't be read now: \(error). Nothing is lost; attach again")
        } catch {
            throw AttachError(
                .unavailable,
                "disk '\(name)': its journal can't be taken up: \(error). Nothing was changed; mend the scratch disk, or give "
                    + "up what only the journal holds with `margined disk release \(name) --force`")
        }
    }

    private func noteOwned(_ folder: String) async throws(AttachError) {
        do throws(ScratchError) {
            try await Journal.noteOwned(folder, context.scratch)
        } catch {
            throw AttachError(
                .unavailable,
                "disk '\(name)': the scratch disk can't note that the disk is this server's: \(error); attach again once it can be written"
            )
        }
    }

    /// Someone else had the disk since this journal was written: it must never be replayed. Kept for those who want to look.
    private func setAside(_ folder: String) async throws(AttachError) {
        do throws(ScratchError) {
            let numbers = try JournalReplay.segmentNumbers(in: folder, scratch: context.scratch)
            if numbers.isEmpty {
                // A mark is of that time too, and would speak of records that this one never had.
                try context.scratch.remove(JournalMark.path(folder))
                return
            }
            let target =
                "\(DiskOpener.lostRoot)/\(folder.dropFirst(DiskOpener.journalRoot.count + 1)).\(context.environment.wallMs)"
            _ = try context.scratch.open("\(target)/set-aside", create: true)
            try context.scratch.remove(JournalMark.path(folder))
            for number in numbers {
                try context.scratch.rename(Journal.path(folder, number), to: Journal.path(target, number))
            }
            try await context.scratch.syncDirectory(target)
            try await context.scratch.syncDirectory(folder)
            context.log.error(
                "disk \(name): another server had it since this one wrote its journal, which is set aside in '\(target)' of the scratch directory and not used; remove it when nobody misses the last writes"
            )
        } catch {
            throw AttachError(
                .unavailable,
                "disk '\(name)': the journal in '\(folder)' is of an earlier time and can't be set aside: \(error)")
        }
    }
}

extension AttachError {
    /// A disk, or generation, that an earlier version made larger than clients can use.
    static func checkSize(_ bytes: UInt64, of what: String, _ remedy: String) throws(AttachError) {
        guard bytes > DiskSize.maxBytes else { return }
        throw AttachError(.refused, "\(what) has \(bytes) bytes, which is too large: \(DiskSize.maxReason); \(remedy)")
    }

    /// Runs a call on heads, its errors told as the handshake's.
    static func wrap<T>(_ body: () async throws(CatalogError) -> T) async throws(AttachError) -> T {
        do throws(CatalogError) { return try await body() } catch { throw AttachError(error) }
    }

    init(_ error: CatalogError) {
        switch error.kind {
        case .notFound: self.init(.unknown, error.description)
        case .invalid: self.init(.invalid, error.description)
        case .owned, .exists, .conflict: self.init(.refused, error.description)
        case .corrupt, .store, .file, .tooSlow: self.init(.unavailable, error.description)
        }
    }
}
