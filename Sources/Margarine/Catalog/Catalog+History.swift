// The generations of a disk: which are kept, keeping some for good, and going back to one.

import BlockCache
internal import ObjectStore
internal import Runtime

extension Catalog {
    /// The generations that the disk keeps, oldest first, the current one last. What history has let go is not among them,
    /// though it may still be in the store.
    package func generations(_ name: String) async throws(CatalogError) -> [GenerationRecord] {
        let found = try await load(name)
        return try await inParallel(try await keptNumbers(found), limit: 16) {
            (number) async throws(CatalogError) -> GenerationRecord? in
            do throws(CatalogError) {
                return try await found.heads.record(found.head, generation: number)
            } catch {
                // Of another disk that had this name, or gone since it was listed.
                if error.kind == .notFound { return nil }
                throw error
            }
        }.compactMap { $0 }
    }

    /// Numbers of the recorded generations that the disk keeps, ascending, with the current one.
    func keptNumbers(_ found: Store.Found) async throws(CatalogError) -> [UInt64] {
        var numbers = try await found.heads.recordedGenerations(found.head.name).filter(found.head.keeps)
        if let record = found.head.record, numbers.last != record.generation { numbers.append(record.generation) }
        return numbers
    }

    /// The record of a generation that the disk keeps.
    func keptRecord(_ number: UInt64, of found: Store.Found) async throws(CatalogError) -> GenerationRecord {
        try await found.heads.keptRecord(found.head, generation: number)
    }

    static func hasLeft(_ name: String, _ number: UInt64) -> CatalogError {
        CatalogError(.notFound, "generation \(number) of disk '\(name)' has left its history")
    }

    // MARK: Pins

    /// Keeps a generation until it is unpinned, whatever the rule of history says.
    package func pin(_ name: String, generation: UInt64) async throws(CatalogError) -> DiskInfo {
        _ = try await keptRecord(generation, of: try await load(name))
        var diskID: ObjectID?
        let pinned = try await change(name) { (head: inout Head, _) async throws(CatalogError) in
            guard head.keeps(generation) else { throw Self.hasLeft(name, generation) }
            head.pin(generation)
            diskID = head.diskID
            guard head.pinned.contains(generation) else {
                throw CatalogError(
                    .invalid,
                    "disk '\(name)' has \(Head.maxPinned) pinned generations, the most there can be; unpin some")
            }
        }
        // It may have been about to leave when the pin came.
        let now = try await load(name)
        if now.head.diskID == diskID, now.head.generation != generation {
            let isThere: Bool
            do throws(CatalogError) {
                isThere = try await now.heads.isKept(
                    try await now.heads.record(now.head, generation: generation), of: name)
            } catch {
                guard error.kind == .notFound else { throw error }
                isThere = false
            }
            if !isThere {
                _ = try? await unpin(name, generation: generation)
                throw Self.hasLeft(name, generation)
            }
        }
        return pinned
    }

    /// Lets history's rule decide on a generation again.
    package func unpin(_ name: String, generation: UInt64) async throws(CatalogError) -> DiskInfo {
        try await change(name) { (head: inout Head, _) async throws(CatalogError) in
            guard head.pinned.contains(generation) else {
                throw CatalogError(.notFound, "generation \(generation) of disk '\(name)' is not pinned")
            }
            head.unpin(generation)
        }
    }

    // MARK: Going back

    /// Makes the disk what it was at a generation, its size included: by a new generation that equals the old one, so that
    /// what was there until now stays in history.
    ///
    /// - Parameter force: also when a server has the disk: it loses it, and with it what it did not commit. A server that
    ///   died holding the disk counts, for it may come back with writes that it acknowledged.
    package func rollBack(
        _ name: String, to generation: UInt64, force: Bool = false
    ) async throws(CatalogError) -> DiskInfo {
        let first = try await load(name)
        _ = try await keptRecord(generation, of: first)
        try await refuseOwned(first, force: force, "roll it back")
        // It must not leave history meanwhile.
        let wasPinned = first.head.pinned.contains(generation)
        if !wasPinned { _ = try await pin(name, generation: generation) }
        let failure: CatalogError?
        do throws(CatalogError) {
            try await advanceBack(name, to: generation, diskID: first.head.diskID, force: force)
            failure = nil
        } catch {
            failure = error
        }
        if !wasPinned { _ = try? await unpin(name, generation: generation) }
        if let failure { throw failure }
        return try await show(name)
    }

    private func advanceBack(
        _ name: String, to generation: UInt64, diskID: ObjectID, force: Bool
    ) async throws(CatalogError) {
        for _ in 0..<Self.maxAttempts {
            let found = try await load(name)
            let old = found.head
            guard old.diskID == diskID else { throw Self.conflict(name) }
            if old.isReadOnly {
                throw CatalogError(.invalid, "disk '\(name)' is read-only: it has one generation, and stays as it is")
            }
            try await refuseOwned(found, force: force, "roll it back")
            let record = try await found.heads.record(old, generation: generation)
            try DiskSize.check(record.sizeBytes)
            var head = old
            head.dispossess()
            head.sizeBytes = record.sizeBytes
            try await found.heads.archive(old)
            head.advance(to: record.again(in: head, kind: .rolledBack, from: old, store: store))
            // What may fail has come before: a server that is told has lost the disk.
            try await tell(found, epoch: head.epoch)
            if case .won = try await found.heads.swap(head, expecting: found.etag) { return }
        }
        throw Self.conflict(name)
    }

    /// Throws unless a change that takes the disk from its owner may be made.
    func refuseOwned(_ found: Store.Found, force: Bool, _ todo: String) async throws(CatalogError) {
        let head = found.head
        guard let owner = head.owner, !force else { return }
        // Either way it takes force: only the advice differs, and that is not worth watching for.
        switch try await owners.look(owner.server, found.heads, mayFence: false) {
        case .alive, .unknown: throw Self.owned(head, todo)
        case .gone: break
        }
        throw CatalogError(
            .owned,
            "disk '\(head.name)' was last served by \(owner.host), which did not give it back; attach it once to recover what that server acknowledged, or use --force to lose it"
        )
    }

    // MARK: Now

    /// Has the server of a disk commit its newest safe point, and waits for that. At once when nobody has the disk: then all
    /// is committed.
    ///
    /// - Parameter poke: called once the server can see that this is wanted, for those who have a faster way to tell it.
    package func commitNow(
        _ name: String, timeoutMs: UInt64 = 60_000, poke: @Sendable () -> Void = {}
    ) async throws(CatalogError) {
        let wanted = store.environment.objectID()
        var asked: Head?
        _ = try await change(name) { (head: inout Head, heads) async throws(CatalogError) in
            asked = nil
            guard let owner = head.owner else { return }
            try await refuseDead(owner, of: name, heads)
            head.commitWanted = wanted
            asked = head
        }
        guard let asked else { return }
        poke()
        let deadline = store.environment.nowNs + timeoutMs * 1_000_000
        while true {
            let found = try await load(name)
            let now = found.head
            // Another one's wish, which came later, is fulfilled no sooner than ours.
            if now.commitWanted == nil || now.epoch != asked.epoch || now.owner != asked.owner { return }
            try await refuseDead(asked.owner!, of: name, found.heads)
            if store.environment.nowNs >= deadline {
                throw CatalogError(
                    .conflict,
                    "disk '\(name)': its server on \(asked.owner?.host ?? "?") did not commit within \(timeoutMs / 1000) s; see its log"
                )
            }
            await store.environment.sleep(ns: 50_000_000)
        }
    }

    /// Throws when the owner is known to be dead. Waits for nothing, and takes nothing from it.
    private func refuseDead(_ owner: Head.Owner, of name: String, _ heads: HeadStore) async throws(CatalogError) {
        guard case .gone = try await owners.look(owner.server, heads, mayFence: false) else { return }
        throw CatalogError(
            .owned,
            "disk '\(name)' belongs to \(owner.host), which is not alive and can commit nothing; without --now its last committed generation is taken"
        )
    }
}

extension HeadStore {
    /// The record of a generation that the disk keeps.
    package func keptRecord(_ head: Head, generation: UInt64) async throws(CatalogError) -> GenerationRecord {
        let found = try await record(head, generation: generation)
        guard head.keeps(generation) else { throw Catalog.hasLeft(head.name, generation) }
        return found
    }

    /// Whether an archived generation is there and not about to leave.
    func isKept(_ record: GenerationRecord, of name: String) async throws(CatalogError) -> Bool {
        let key = GenerationRecord.key(disk: name, generation: record.generation)
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(key, range: nil)
        } catch {
            if error.kind == .notFound { return false }
            throw CatalogError(error)
        }
        guard try GenerationRecord.decode(object.bytes, key: key).diskID == record.diskID else { return false }
        return try await !isRetired(name, generation: record.generation)
    }
}
