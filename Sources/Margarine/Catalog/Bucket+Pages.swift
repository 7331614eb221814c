// Listings that are longer than a page.

import ObjectStore

extension Bucket {
    /// Calls `body` with each page of a listing.
    func forEachPage(
        prefix: String, after: String? = nil, folders: Bool = false,
        _ body: (Listing) async throws(CatalogError) -> Void
    ) async throws(CatalogError) {
        let pages = ListingPages(self, prefix: prefix, after: after, folders: folders)
        while let page = try await CatalogError.wrap({ () async throws(StoreError) in try await pages.next() }) {
            try await body(page)
        }
    }
}
