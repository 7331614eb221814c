// How a page of a listing is filled from keys that come in byte order: what is skipped, what is folded, where it ends.

/// A page of a listing in the making.
struct ListingPage {
    let prefix: String
    let after: String?
    let folders: Bool
    let limit: Int
    private(set) var listing = Listing(items: [], folders: [], next: nil)
    /// Where a page that ends here would go on.
    private var last: String?

    init(prefix: String, after: String?, folders: Bool, limit: Int) {
        self.prefix = prefix
        self.after = after
        self.folders = folders
        self.limit = limit
    }

    private var isFull: Bool { listing.items.count + listing.folders.count >= limit }

    /// The folder just below the prefix that `key` (or a folder's name with its `/`) lies in.
    func folder(of key: String) -> String? {
        guard folders else { return nil }
        let rest = key.utf8.dropFirst(prefix.utf8.count)
        guard let slash = rest.firstIndex(of: UInt8(ascii: "/")) else { return nil }
        return String(key[...slash])
    }

    /// Takes the next key; false when the page was full already, which also says that there are more pages.
    mutating func add(key: String, _ object: () -> (lengthBytes: UInt64, modifiedMs: Int64)) -> Bool {
        if let after, !comesBefore(after, key) { return true }
        if let folder = folder(of: key) {
            if listing.folders.last == folder { return true }
            if isFull { return end() }
            listing.folders.append(folder)
            last = endOfFolder(folder)
            return true
        }
        if isFull { return end() }
        let (length, modified) = object()
        listing.items.append(Listing.Item(key: key, lengthBytes: length, modifiedMs: modified))
        last = key
        return true
    }

    private mutating func end() -> Bool {
        listing.next = last
        return false
    }
}
