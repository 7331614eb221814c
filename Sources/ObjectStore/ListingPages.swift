// Going through all of a listing.

/// A listing that may be longer than a page, one page after the other. Used by one task at a time.
package final class ListingPages {
    private let bucket: any Bucket
    private let prefix: String
    private let folders: Bool
    private var after: String?
    private var isAtEnd = false

    /// - Parameters: as of `Bucket.list`.
    package init(_ bucket: any Bucket, prefix: String, after: String? = nil, folders: Bool = false) {
        self.bucket = bucket
        self.prefix = prefix
        self.after = after
        self.folders = folders
    }

    /// The next page; nil: that was all. After an error it may be asked for again.
    package func next() async throws(StoreError) -> Listing? {
        if isAtEnd { return nil }
        let page = try await bucket.list(prefix: prefix, after: after, folders: folders, limit: 1000)
        after = page.next
        isAtEnd = page.next == nil
        return page
    }
}
