// The state of collection is the first location's; every other one has a copy of it, for the grace period alone, so that
// whoever writes at one location needs no other to know how long it may take.
//
// Always holds: before a grace period is lowered, every copy says the lower one already; so no copy ever says a longer one
// than holds, for longer than the store itself gives its writers to hear of it.

import ObjectStore

enum GraceCopies {
    /// Brings the copies up to a state of the round `state.rounds`, which nobody else begins any more once it is stored.
    static func write(_ state: CollectionState, _ store: Store) async throws(CatalogError) {
        var copy = CollectionState()
        copy.graceMs = state.graceMs
        copy.rounds = state.rounds
        for (number, bucket) in store.locations.buckets.enumerated() where number > 0 {
            for attempt in 1... {
                let found = try await CollectionState.load(bucket)
                if let there = found?.state, there.rounds > copy.rounds || there.graceMs == copy.graceMs { break }
                copy.nonce = store.environment.objectID()
                let bytes = copy.encoded()
                let outcome = try await CatalogError.wrap { () async throws(StoreError) in
                    try await bucket.swap(
                        CollectionState.key, bytes, if: (found?.etag).map { .matches($0) } ?? .absent)
                }
                if case .won = outcome { break }
                if attempt == Catalog.maxAttempts {
                    throw CatalogError(.conflict, "\(bucket.name): others keep changing '\(CollectionState.key)'")
                }
            }
        }
    }
}
