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
        try await forEachName { names += $0 }
        return names
    }

    /// Calls `body` with the same, some at a time.
    package func forEachName(
        _ body: ([String]) async throws(CatalogError) -> Void
    ) async throws(CatalogError) {
        try await bucket.forEachPage(prefix: "disks/", folders: true) { (page) async throws(CatalogError) in
            try await body(
                page.folders.map { String($0.dropFirst("disks/".utf8.count).dropLast()) }.filter(DiskName.isValid))
        }
    }

    /// The numbers of the generations that have a record, of whatever disk that had the name, ascending.
    package func recordedGenerations(_ name: String) async throws(CatalogError) -> [UInt64] {
        var numbers: [UInt64] = []
        let folder = GenerationRecord.folder(disk: name)
        try await bucket.forEachPage(prefix: folder) { (page) async throws(CatalogError) in
            for item in page.items {
                guard let number = UInt64(item.key.dropFirst(folder.utf8.count)),
                    item.key == GenerationRecord.key(disk: name, generation: number)
                else { throw CatalogError(.corrupt, "\(bucket.name): '\(item.key)' is no record of a generation") }
                numbers.append(number)
            }
        }
        return numbers
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
    /// Before a head with a new generation is swapped in, the one it replaces must be archived.
    ///
    /// - Throws: `.store(.unclear)` when even reading back failed: load the head before going on. Any other error means
    ///   that nothing was changed.
    package func swap(_ head: Head, expecting: ETag?) async throws(CatalogError) -> HeadSwap {
        var head = head
        try await remember(head.surplusSessions, of: head)
        head.forgetSurplus()
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
