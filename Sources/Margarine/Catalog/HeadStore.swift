// Heads, generation records and heartbeats in a bucket. Owns nothing; safe to use from anywhere, by any number at once.

package import BlockCache
package import ObjectStore
package import Runtime

/// How a swap of a head ended.
package enum HeadSwap: Sendable {
    /// The head is stored under this tag.
    case won(ETag)
    /// Another head is there (nil: none); ours will never be.
    case lost(Head?, ETag?)
}

/// How an owner's change of its head ended.
package enum HeadUpdate: Sendable {
    /// Stored, with what others changed meanwhile (options, size).
    case done(Head, ETag)
    /// The head is still ours and has another generation: an earlier swap of ours, whose answer was lost, took effect.
    /// Nothing was changed.
    case stale(Head, ETag)
    /// The disk is another's, or nobody's, or deleted: stop serving it.
    case lost(Head?)
}

package struct HeadStore: Sendable {
    package let bucket: any Bucket
    package let environment: any Environment
    /// Which location of the store these heads are in.
    package let location: UInt8

    package init(bucket: any Bucket, environment: any Environment, location: UInt8 = 0) {
        self.bucket = bucket
        self.environment = environment
        self.location = location
    }

    /// Names that have, or had, a disk here, ascending.
    package func names() async throws(CatalogError) -> [String] {
        var names: [String] = []
        var after: String?
        repeat {
            let place = after
            let page = try await CatalogError.wrap { () async throws(StoreError) in
                try await bucket.list(prefix: "disks/", after: place, folders: true, limit: 1000)
            }
            names += page.folders.map { String($0.dropFirst("disks/".utf8.count).dropLast()) }.filter(DiskName.isValid)
            after = page.next
        } while after != nil
        return names
    }

    /// The head of a disk, also when it is a tombstone; nil when the name has never been used.
    package func load(_ name: String) async throws(CatalogError) -> (head: Head, etag: ETag)? {
        try DiskName.check(name)
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(Head.key(disk: name), range: nil)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
        return (try Head.decode(object.bytes, name: name), object.etag)
    }

    /// Replaces the head that has the tag `expecting` (nil: there is none) by `head`, with a fresh nonce. Unclear answers
    /// are settled by reading back.
    ///
    /// Before a head with a new generation is swapped in, the one it replaces must be archived; `update` sees to that.
    ///
    /// - Throws: `.store(.unclear)` when even reading back failed: load the head before going on. Any other error means
    ///   that nothing was changed.
    package func swap(_ head: Head, expecting: ETag?) async throws(CatalogError) -> HeadSwap {
        var head = head
        head.nonce = environment.objectID()
        let condition: PutCondition = expecting.map { .matches($0) } ?? .absent
        let outcome = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(Head.key(disk: head.name), head.encoded(), if: condition)
        }
        switch outcome {
        case .won(let etag): return .won(etag)
        case .lost(nil): return .lost(nil, nil)
        case .lost(let object?): return .lost(try Head.decode(object.bytes, name: head.name), object.etag)
        }
    }

    /// Changes a head that this server owns, as it knows it. Beside it others may change options and size: then the change
    /// is made to the head as it is now. When `change` advances the generation, the one before is archived first.
    ///
    /// - Parameter change: what to change; may be called several times, each time with a head of the same owner, epoch and
    ///   generation.
    package func update(
        _ head: Head, _ etag: ETag, change: (inout Head) -> Void
    ) async throws(CatalogError) -> HeadUpdate {
        var current = (head: head, etag: etag)
        var isArchived = false
        for _ in 0..<Catalog.maxAttempts {
            var new = current.head
            change(&new)
            if new.generation != current.head.generation, !isArchived {
                try await archive(current.head)
                isArchived = true
            }
            switch try await swap(new, expecting: current.etag) {
            case .won(let etag): return .done(new, etag)
            case .lost(let found?, let etag?):
                guard !found.deleted, found.diskID == head.diskID, found.epoch == head.epoch, found.owner == head.owner
                else {
                    return .lost(found)
                }
                if found.generation != head.generation { return .stale(found, etag) }
                current = (found, etag)
            case .lost: return .lost(nil)
            }
        }
        throw Catalog.conflict(head.name)
    }

    /// Puts the record of the current generation of a stored head under its key, where history finds it. Must have been
    /// done before a head with a later generation is swapped in; may be done any number of times.
    package func archive(_ head: Head) async throws(CatalogError) {
        guard let record = head.record else { return }
        let key = GenerationRecord.key(disk: head.name, generation: record.generation)
        let bytes = record.encoded()
        let outcome = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(key, bytes, if: .absent)
        }
        // Another version of Margarine may have written the same record in other bytes.
        if case .lost(let other) = outcome {
            if let other, try GenerationRecord.decode(other.bytes, key: key) == record { return }
            throw CatalogError(
                .corrupt, "\(bucket.name): '\(key)' is not what the head of disk '\(head.name)' says of that generation"
            )
        }
    }

    /// The record of one generation of the disk: the head's own, or an archived one.
    package func record(_ head: Head, generation: UInt64) async throws(CatalogError) -> GenerationRecord {
        if let record = head.record, record.generation == generation { return record }
        let key = GenerationRecord.key(disk: head.name, generation: generation)
        let missing = CatalogError(.notFound, "disk '\(head.name)' has no generation \(generation)")
        if generation < 1 || generation >= head.generation { throw missing }
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(key, range: nil)
        } catch {
            throw error.kind == .notFound ? missing : CatalogError(error)
        }
        let found = try GenerationRecord.decode(object.bytes, key: key)
        if found.diskID != head.diskID { throw missing }
        guard found.generation == generation else {
            throw CatalogError(.corrupt, "'\(key)' is of generation \(found.generation)")
        }
        return found
    }
}

extension Environment {
    /// A fresh name for an immutable object.
    package func objectID() -> ObjectID { ObjectID(high: randomBits(), low: randomBits()) }
}
