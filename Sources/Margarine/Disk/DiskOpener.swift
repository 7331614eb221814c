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
    /// The machine was started anew since this scratch directory was last used: what was not synced may be gone.
    package var hasRebooted: Bool
    package init(id: String, host: String, hasRebooted: Bool) {
        self.id = id
        self.host = host
        self.hasRebooted = hasRebooted
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
    let isAlive: OwnerProbe

    static let journalRoot = "journal"
    static let lostRoot = "lost"

    static func journalFolder(_ name: String, _ id: ObjectID) -> String { "\(journalRoot)/\(name).\(id)" }

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
        let (heads, head) = (found.heads, found.head)
        if head.isReadOnly { throw AttachError(.refused, "disk '\(name)' is read-only: nobody can own it") }
        try AttachError.checkSize(
            head.sizeBytes, of: "disk '\(name)'", "`margined disk resize --shrink` makes it smaller")
        let isMine = head.owner?.server == server.id
        if onlyOwn, !isMine { throw AttachError(.refused, "disk '\(name)' is not this server's any more") }
        if let owner = head.owner, !isMine, takeover == .dead { try await checkDead(owner, heads) }

        let folder = DiskOpener.journalFolder(name, head.diskID)
        let pages = DirtyPages(arena: context.arena)
        var replayed: ReplayedJournal?
        var survives = isMine
        if isMine {
            // After a power loss what no safe point covers may have holes: nobody can go on from it. A folder that has not
            // even the mark of the attachment has lost it that way, at whatever start.
            survives = !server.hasRebooted && Journal.isLeft(in: folder, context.scratch)
            replayed = try await replay(folder, head, pages)
        } else {
            // Before the head says that the disk is ours: from then on a journal in this folder would be taken for good.
            try await setAside(folder)
        }

        var next = head
        next.epoch += 1
        next.owner = Head.Owner(server: server.id, host: server.host, sinceMs: context.environment.wallMs)
        if survives, let gone = head.session,
            replayed?.lostSessions.contains(JournalFormat.sessionSum(gone)) == true
        {
            // Decided before, and the head had not heard of it when the server ended.
            next.lose(session: gone)
            next.session = nil
        }
        if !survives {
            if let gone = head.session {
                context.log.notice("disk \(name): session '\(gone)' did not end cleanly, and its last writes are lost")
                next.lose(session: gone)
            }
            next.session = session.flatMap { next.lostSessions.contains($0) ? nil : $0 }
        }
        let swap = try await AttachError.wrap { () throws(CatalogError) in
            try await heads.swap(next, expecting: found.etag)
        }
        switch swap {
        case .lost: return nil
        case .won(let tag):
            return make(next, tag, heads, folder, pages, replayed, survives: survives)
        }
    }

    private func make(
        _ head: Head, _ tag: ETag, _ heads: HeadStore, _ folder: String, _ pages: DirtyPages,
        _ replayed: ReplayedJournal?, survives: Bool
    ) -> Disk {
        let journal = Journal(
            folder: folder, diskID: head.diskID, epoch: head.epoch, lastSequence: head.journalSequence, pages: pages,
            context: context)
        if let replayed {
            journal.adopt(replayed.segments, lastSequence: replayed.lastSequence)
            if replayed.records > 0 {
                context.log.notice(
                    "disk \(name): \(replayed.records) journal records taken up again\(replayed.tornBytes > 0 ? ", \(replayed.tornBytes) bytes of an unfinished one cut off" : "")"
                )
            }
        }
        journal.release(upTo: head.journalSequence)
        journal.markAttached()
        let disk = Disk(
            name: name, head: head, headTag: tag, manifest: head.manifest(cache: context.manifests),
            serverID: server.id,
            heads: heads, context: context, replayed: replayed, pages: pages, journal: journal)
        if survives, head.session != nil || !disk.active.isEmpty {
            // Its client may come back, to find exactly what it was told.
            let found = Session(name: head.session, host: nil, address: "unknown", sinceMs: context.environment.wallMs)
            found.droppedAtNs = context.environment.nowNs
            disk.session = found
            disk.openWindow()
            disk.startCommit()
        } else {
            disk.rollBack()
        }
        return disk
    }

    /// Another server has the disk: may it be taken?
    private func checkDead(_ owner: Head.Owner, _ heads: HeadStore) async throws(AttachError) {
        let sign: String?
        do { sign = try await isAlive(owner.server, heads) } catch {
            throw AttachError(
                .unavailable, "disk '\(name)': whether server \(owner.server) is alive can't be told: \(error)")
        }
        if let sign {
            throw AttachError(
                .refused,
                "disk '\(name)' belongs to server \(owner.server) on \(owner.host), which is alive (\(sign)); "
                    + "detach it there, or take it with `margined disk release \(name) --force`")
        }
        context.log.notice("disk \(name): taken over from server \(owner.server) on \(owner.host), which is dead")
    }

    private func replay(_ folder: String, _ head: Head, _ pages: DirtyPages) async throws(AttachError)
        -> ReplayedJournal
    {
        do {
            return try await JournalReplay.run(
                folder: folder, diskID: head.diskID, base: head.journalSequence, pages: pages, scratch: context.scratch)
        } catch {
            throw AttachError(
                .unavailable,
                "disk '\(name)': its journal can't be taken up: \(error). Nothing was changed; mend the scratch disk, or give "
                    + "up what only the journal holds with `margined disk release \(name) --force`")
        }
    }

    /// Someone else had the disk since this journal was written: it must never be replayed. Kept for those who want to look.
    private func setAside(_ folder: String) async throws(AttachError) {
        do throws(ScratchError) {
            let numbers = try JournalReplay.segmentNumbers(in: folder, scratch: context.scratch)
            if numbers.isEmpty { return }
            let target =
                "\(DiskOpener.lostRoot)/\(folder.dropFirst(DiskOpener.journalRoot.count + 1)).\(context.environment.wallMs)"
            _ = try context.scratch.open("\(target)/set-aside", create: true)
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
