// The manifest pages in memory: of all disks and generations of one loop, under one bound. Pages are named by the
// random id of their object, so nothing here is ever stale.
//
// Always holds: `residentBytes` is the sum over resident pages, at most `budgetBytes` plus one page; a page is being
// fetched at most once at a time. Owned by its loop (or by one task, off loops).

import BlockCache
import ObjectStore

/// Loaded manifest pages by object id, least recently used leaving first (a clock).
package final class ManifestCache: @unchecked Sendable {  // owned by its loop
    /// A cache slot. Holders may keep it: `page` turns nil when the page leaves memory.
    final class Resident {
        fileprivate(set) var page: ManifestPage?
        var isUsed = true
        init(_ page: ManifestPage) { self.page = page }
    }

    package let locations: Locations
    package let budgetBytes: Int
    package private(set) var residentBytes = 0
    /// Pages fetched from the store since the start.
    package private(set) var fetches: UInt64 = 0
    private var pages: [ObjectID: Resident] = [:]
    private var ring: [Resident] = []
    private var hand = 0
    private var waiters: [ObjectID: [CheckedContinuation<Result<ManifestPage, StoreError>, Never>]] = [:]

    package init(_ locations: Locations, budgetBytes: Int = 64 << 20) {
        self.locations = locations
        self.budgetBytes = budgetBytes
    }

    /// The page if it is in memory.
    func resident(_ id: ObjectID) -> Resident? {
        guard let resident = pages[id] else { return nil }
        resident.isUsed = true
        return resident
    }

    /// The page, from memory or the store. Callers that ask for a page under way wait for that one.
    func page(_ ref: PageRef, level: Int, index: UInt64) async throws(StoreError) -> ManifestPage {
        if let page = resident(ref.id)?.page {
            try page.check(ref, level: level, index: index)
            return page
        }
        if waiters[ref.id] != nil {
            let result = await withCheckedContinuation { waiters[ref.id]!.append($0) }
            let page = try result.get()
            try page.check(ref, level: level, index: index)
            return page
        }
        waiters[ref.id] = []
        let result = await Self.fetch(ref, level: level, index: index, locations)
        fetches += 1
        if case .success(let page) = result { insert(page) }
        for waiter in waiters.removeValue(forKey: ref.id)! { waiter.resume(returning: result) }
        return try result.get()
    }

    /// Gets and checks a page; touches nothing of the cache, so it may run anywhere.
    static func fetch(
        _ ref: PageRef, level: Int, index: UInt64, _ locations: Locations
    ) async -> Result<ManifestPage, StoreError> {
        let first = await fetchOnce(ref, level: level, index: index, locations)
        // Damaged under way, perhaps: once more.
        guard case .failure(let error) = first, error.kind == .corrupt else { return first }
        return await fetchOnce(ref, level: level, index: index, locations)
    }

    private static func fetchOnce(
        _ ref: PageRef, level: Int, index: UInt64, _ locations: Locations
    ) async -> Result<ManifestPage, StoreError> {
        do throws(StoreError) {
            let bucket = try locations.bucket(ref.location)
            let object = try await bucket.get(ref.id.manifestKey, range: nil)
            let page = try ManifestPage.decode(object.bytes, id: ref.id)
            guard object.bytes.count == Int(ref.lengthBytes) else {
                throw StoreError(
                    .corrupt,
                    "manifest page \(ref.id) in \(bucket.name) has \(object.bytes.count) bytes, not \(ref.lengthBytes)")
            }
            try page.check(ref, level: level, index: index)
            return .success(page)
        } catch {
            return .failure(error)
        }
    }

    func insert(_ page: ManifestPage) { _ = hold(page) }

    /// The cache slot of a page, which comes into memory if it is not there.
    func hold(_ page: ManifestPage) -> Resident {
        if let resident = resident(page.id) { return resident }
        evict(to: budgetBytes - page.residentBytes)
        let resident = Resident(page)
        pages[page.id] = resident
        ring.append(resident)
        residentBytes += page.residentBytes
        return resident
    }

    /// Lets pages go until at most `bytes` are held; 0 drops them all. They are fetched again when needed.
    package func evict(to bytes: Int) {
        while residentBytes > max(0, bytes), !ring.isEmpty {
            if hand >= ring.count { hand = 0 }
            let resident = ring[hand]
            if resident.isUsed, bytes > 0 {
                resident.isUsed = false
                hand += 1
                continue
            }
            let page = resident.page!
            resident.page = nil
            pages[page.id] = nil
            residentBytes -= page.residentBytes
            ring[hand] = ring[ring.count - 1]
            ring.removeLast()
        }
    }
}

extension ManifestPage {
    /// That the page is the one the reference above it means.
    func check(_ ref: PageRef, level: Int, index: UInt64) throws(StoreError) {
        guard self.level == level, self.index == index else {
            throw StoreError(
                .corrupt,
                "manifest page \(id) is page \(self.index) of level \(self.level), not \(index) of \(level) as named above it"
            )
        }
        guard usedBlocks == ref.usedBlocks, storedBytes == ref.storedBytes else {
            throw StoreError(.corrupt, "manifest page \(id) does not hold what the page above it says")
        }
    }
}
