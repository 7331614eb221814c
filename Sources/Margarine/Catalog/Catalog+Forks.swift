// Forks: a new head on the root of an existing generation. No block is read or copied, whatever the size of the disk.
//
// Always holds: a fork that is there to stay names a generation that was still named by its source after the fork's head
// could be seen, so that no collection can have missed both.

import BlockCache
internal import ObjectStore
internal import Runtime

extension Catalog {
    /// Makes a disk out of a generation of another one: the current one, or the one that is asked for. Its own generations
    /// count from 1 and its history is its own.
    ///
    /// - Parameters:
    ///   - generation: nil: the current one; of a read-only fork the newest that can be mounted without writing. 0: the
    ///     disk as it was before its first one.
    ///   - readOnly: nobody ever writes the fork; any number of clients may attach it, at any number of servers.
    ///   - mayNeedLog: take the generation that is asked for also where it can't be mounted without writing.
    ///   - location: where the head of the fork is to be; nil: near. What the generation names stays where it is.
    package func fork(
        _ source: String, generation: UInt64? = nil, as name: String, readOnly: Bool = false, location: UInt8? = nil,
        mayNeedLog: Bool = false
    ) async throws(CatalogError) -> DiskInfo {
        try DiskName.check(name)
        for _ in 0..<Self.maxAttempts {
            let found = try await load(source)
            let record = try await recordToFork(found, generation, readOnly: readOnly && !mayNeedLog)
            let spot = try await store.spot(for: name, at: location ?? store.locations.near)
            let isCurrent = record?.generation ?? found.head.generation == found.head.generation
            var head = try newHead(
                name, over: spot.head, sizeBytes: isCurrent ? found.head.sizeBytes : record!.sizeBytes,
                options: found.head.options)
            head.isReadOnly = readOnly
            if let record { head.advance(to: record.again(in: head, kind: .forked, from: found.head, store: store)) }
            guard case .won(let etag) = try await spot.heads.swap(head, expecting: spot.etag) else { continue }
            if let record, try await !isStillNamed(record, of: found) {
                head.bury()
                _ = try? await spot.heads.swap(head, expecting: etag)
                throw Self.hasLeft(source, record.generation)
            }
            return try await info(head, at: spot.heads)
        }
        throw Self.conflict(name)
    }

    private func recordToFork(
        _ found: Store.Found, _ generation: UInt64?, readOnly: Bool
    ) async throws(CatalogError) -> GenerationRecord? {
        let head = found.head
        if let generation {
            // Before its first generation a disk is empty. One that was made anew counts on from the one before it.
            if generation == 0 || (head.record == nil && generation == head.generation) { return nil }
            let record = try await keptRecord(generation, of: found)
            if readOnly, try await needsLogReplay(record) {
                throw CatalogError(
                    .invalid,
                    "generation \(generation) of disk '\(head.name)' ends with a btrfs log, which can't be mounted read-only; leave the generation out to get the newest that can"
                )
            }
            return record
        }
        guard readOnly, let current = head.record else { return head.record }
        if try await !needsLogReplay(current) { return current }
        for number in try await keptNumbers(found).reversed() where number < head.generation {
            let record = try await found.heads.record(head, generation: number)
            if try await !needsLogReplay(record) { return record }
        }
        throw CatalogError(
            .notFound,
            "no kept generation of disk '\(head.name)' ends with a full btrfs commit, which mounting read-only needs; sync the file system (or unmount it), or fork without --read-only"
        )
    }

    /// Whether the generation is a btrfs with a log tree, which only a mount that may write can replay.
    func needsLogReplay(_ record: GenerationRecord) async throws(CatalogError) -> Bool {
        if record.kind == .btrfsFull { return false }
        if record.kind == .btrfsLog { return true }
        let page = try await GenerationReader(record, store: store).bytes(
            at: SuperBlock.offset, count: SuperBlock.lengthBytes)
        return page.withUnsafeBytes { SuperBlock($0.baseAddress!) }.map { $0.logRoot != 0 } ?? false
    }

    /// Whether the source still names the generation. Asked once the fork can be seen.
    private func isStillNamed(_ record: GenerationRecord, of found: Store.Found) async throws(CatalogError) -> Bool {
        let name = found.head.name
        if let now = try await found.heads.load(name)?.head, !now.deleted, now.record == record { return true }
        return try await found.heads.isKept(record, of: name)
    }
}

extension GenerationRecord {
    /// The same bytes as the next generation of `head`, which may be of another disk.
    func again(in head: Head, kind: GenerationKind, from source: Head, store: Store) -> GenerationRecord {
        var next = self
        next.diskID = head.diskID
        next.generation = head.generation + 1
        next.epoch = head.epoch
        next.kind = kind
        next.committedAtMs = store.environment.wallMs
        next.journalSequence = head.diskID == source.diskID ? source.journalSequence : 0
        next.newBytes = 0
        next.origin = Origin(disk: source.name, diskID: source.diskID, generation: generation)
        return next
    }
}
