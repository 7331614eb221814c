// Listings that are longer than a page.

import ObjectStore

extension Bucket {
    /// Calls `body` with each page of a listing.
    func forEachPage(
        prefix: String, after: String? = nil, folders: Bool = false,
        _ body: (Listing) async throws(CatalogError) -> Void
    ) async throws(CatalogError) {
        var after = after
        repeat {
            let place = after
            let page = try await CatalogError.wrap { () async throws(StoreError) in
                try await list(prefix: prefix, after: place, folders: folders, limit: 1000)
            }
            try await body(page)
            after = page.next
        } while after != nil
    }
}
