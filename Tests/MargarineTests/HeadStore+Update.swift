// A server's change of its head, for tests that have no server.

import BlockCache
import ObjectStore

@testable import Margarine

/// How an owner's change of its head ended.
enum HeadUpdate: Sendable {
    /// Stored, with what others changed meanwhile (options, size).
    case done(Head, ETag)
    /// The head is still ours and has another generation: an earlier swap of ours, whose answer was lost, took effect.
    /// Nothing was changed.
    case stale(Head, ETag)
    /// The disk is another's, or nobody's, or deleted: stop serving it.
    case lost(Head?)
}

extension HeadStore {
    /// Writes a server's record, whatever is there.
    func beat(_ server: ServerRecord) async throws(CatalogError) {
        let bytes = ControlObject.seal(server, kind: "server", format: ServerRecord.format)
        _ = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.put(ServerRecord.key(server.id), bytes, if: .none)
        }
    }

    /// Changes a head that this server owns, as it knows it. Beside it others may change options and size: then the change
    /// is made to the head as it is now. When `change` advances the generation, the one before is archived first.
    ///
    /// - Parameter change: what to change; may be called several times, each time with a head of the same owner, epoch and
    ///   generation.
    func update(
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
}
