// Listing a directory bucket in byte order of keys. A folder sorts by its name with the `/` behind it, so that walking
// the folders in that order gives the keys in order. Of a folder with very many names only the next few are kept
// and sorted, and what a page did not need is kept for the page that follows.

import Glibc
import Synchronization

/// A name in a folder.
struct FolderEntry {
    /// With `/` behind it when it is a folder.
    var name: String
    var isFolder: Bool { name.utf8.last == UInt8(ascii: "/") }
}

/// The names of one folder that follow the end of a page.
struct ReadAhead {
    var folder: String
    /// The entries follow this name.
    var bound: String
    var entries: ArraySlice<FolderEntry>
    /// Whether the folder has names beyond the entries.
    var hasMore: Bool
    /// The folder's modification time before it was read: when it is another one, the names may be others.
    var modified: timespec
}

extension DirectoryBucket {
    /// How many names of one folder are kept at once.
    private static let window = 16_384

    func listPage(prefix: String, after: String?, folders: Bool, limit: Int) throws(StoreError) -> Listing {
        var page = ListingPage(prefix: prefix, after: after, folders: folders, limit: limit)
        // The folder that the prefix names; its last component may be the beginning of names.
        let base = prefix.utf8.lastIndex(of: UInt8(ascii: "/")).map { String(prefix[...$0]) } ?? ""
        _ = try walk(base, &page)
        return page.listing
    }

    /// Adds the keys below `folder` ("" or ending with `/`) to the page; false once the page is full.
    private func walk(_ folder: String, _ page: inout ListingPage) throws(StoreError) -> Bool {
        // Names up to this one are behind the page's beginning.
        var bound = ""
        if let after = page.after {
            if after.utf8.starts(with: folder.utf8) {
                bound = String(after.utf8.dropFirst(folder.utf8.count))!
            } else if comesBefore(folder, after) {
                return true  // Every key in here comes before `after`.
            }
        }
        let start = page.prefix.hasPrefix(folder) ? String(page.prefix.dropFirst(folder.count)) : ""
        while true {
            var names = try entries(of: folder, after: bound, start: start)
            while let entry = names.entries.first {
                guard try add(entry, of: folder, &page) else {
                    // The next page goes on behind the entry before this one, or inside this one.
                    names.bound = bound
                    if start.isEmpty { keep(names) }
                    return false
                }
                names.entries.removeFirst()
                // Behind a folder come the names that are greater than everything in it.
                bound = entry.isFolder ? endOfFolder(entry.name) : entry.name
            }
            guard names.hasMore else { return true }
        }
    }

    /// False when the page is full.
    private func add(_ entry: FolderEntry, of folder: String, _ page: inout ListingPage) throws(StoreError) -> Bool {
        let key = folder + entry.name
        if !entry.isFolder {
            guard let status = Self.status(path(of: key)) else { return true }  // Removed meanwhile.
            return page.add(key: key) {
                (
                    UInt64(status.st_size),
                    Int64(status.st_mtim.tv_sec) * 1000 + Int64(status.st_mtim.tv_nsec / 1_000_000)
                )
            }
        }
        guard page.folder(of: key) != nil else { return try walk(key, &page) }
        // A folder stands for its keys: it is listed when it has one behind `after`.
        var probe = ListingPage(prefix: key, after: page.after, folders: false, limit: 1)
        _ = try walk(key, &probe)
        guard let first = probe.listing.items.first else { return true }
        return page.add(key: first.key) { (0, 0) }
    }

    /// The next names of a folder behind `bound` that begin with `start`, sorted.
    private func entries(of folder: String, after bound: String, start: String) throws(StoreError) -> ReadAhead {
        let path = folder.isEmpty ? root : path(of: String(folder.dropLast()))
        let status = Self.status(path)
        if let status, start.isEmpty, let kept = takeKept(folder, bound, status.st_mtim) { return kept }
        var next: [FolderEntry] = []
        var hasMore = false
        let boundBytes = Array(bound.utf8)
        // Of a folder with very many names most are none of these, and are passed over as they come.
        var lastBytes: [UInt8] = []
        let isRead = Self.forEachName(in: path) { bytes, isFolder in
            if !isFolder, !precedes(boundBytes, bytes) { return }
            if hasMore, precedes(lastBytes, bytes) { return }
            guard let entry = FolderEntry(bytes, isFolder: isFolder) else { return }
            if !bound.isEmpty, !comesBefore(bound, entry.name) {
                // A folder that the bound lies in still has keys to give.
                guard entry.isFolder, bound.utf8.starts(with: entry.name.utf8), bound != endOfFolder(entry.name) else {
                    return
                }
            }
            // `start` names the beginning of the last component, so a folder cannot lie on the way to it.
            guard entry.name.utf8.starts(with: start.utf8) else { return }
            next.append(entry)
            if next.count >= 2 * Self.window {
                next.sort { comesBefore($0.name, $1.name) }
                next.removeLast(next.count - Self.window)
                hasMore = true
                lastBytes = Array(next[next.count - 1].name.utf8)
            }
        }
        guard let status, isRead else {
            if !folder.isEmpty, errno == ENOENT || errno == ENOTDIR {
                return ReadAhead(folder: folder, bound: bound, entries: [], hasMore: false, modified: timespec())
            }
            throw failure("list", path)
        }
        next.sort { comesBefore($0.name, $1.name) }
        if next.count > Self.window {
            next.removeLast(next.count - Self.window)
            hasMore = true
        }
        return ReadAhead(folder: folder, bound: bound, entries: next[...], hasMore: hasMore, modified: status.st_mtim)
    }

    private func takeKept(_ folder: String, _ bound: String, _ modified: timespec) -> ReadAhead? {
        if bound.isEmpty { return nil }
        return readAhead.withLock { slot in
            guard let kept = slot, kept.folder == folder, kept.bound == bound, kept.modified.tv_sec == modified.tv_sec,
                kept.modified.tv_nsec == modified.tv_nsec
            else { return nil }
            slot = nil
            return kept
        }
    }

    private func keep(_ names: ReadAhead) {
        // Times of folders advance in steps of up to 10 ms: within one, a change would go unseen.
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        let ageMs = (now.tv_sec - names.modified.tv_sec) * 1000 + (now.tv_nsec - names.modified.tv_nsec) / 1_000_000
        if ageMs > 1000, !names.entries.isEmpty { readAhead.withLock { $0 = names } }
    }

    /// The names in a directory that can be components of keys (and all names in `.tmp`), or nil and errno.
    static func names(in path: String) -> [FolderEntry]? {
        var entries: [FolderEntry] = []
        let isRead = forEachName(in: path) { bytes, isFolder in
            if let entry = FolderEntry(bytes, isFolder: isFolder) { entries.append(entry) }
        }
        return isRead ? entries : nil
    }

    /// Calls `body` with every name of a file or folder in a directory, in no order; false, and errno, when it can't be read.
    private static func forEachName(in path: String, _ body: (UnsafeBufferPointer<UInt8>, _ isFolder: Bool) -> Void)
        -> Bool
    {
        guard let directory = opendir(path) else { return false }
        defer { closedir(directory) }
        while true {
            errno = 0
            guard let entry = readdir(directory) else { return errno == 0 }
            let kind = Int(entry.pointee.d_type)
            withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: UInt8.self, capacity: 256) { name in
                    let bytes = UnsafeBufferPointer(start: name, count: strnlen(UnsafeRawPointer(name), 256))
                    if kind == Int(DT_DIR) || kind == Int(DT_REG) { return body(bytes, kind == Int(DT_DIR)) }
                    guard kind == Int(DT_UNKNOWN),
                        let status = status("\(path)/\(String(decoding: bytes, as: UTF8.self))")
                    else { return }
                    let type = status.st_mode & S_IFMT
                    if type == S_IFDIR || type == S_IFREG { body(bytes, type == S_IFDIR) }
                }
            }
        }
    }
}

extension FolderEntry {
    /// nil: the name can't be a component of a key.
    fileprivate init?(_ bytes: UnsafeBufferPointer<UInt8>, isFolder: Bool) {
        let name = String(decoding: bytes, as: UTF8.self)
        guard isValidKey(name) else { return nil }
        self.init(name: isFolder ? name + "/" : name)
    }
}

/// Whether `a` comes before `b` in byte order.
private func precedes(_ a: [UInt8], _ b: UnsafeBufferPointer<UInt8>) -> Bool {
    let order = a.withUnsafeBytes {
        memcmp($0.baseAddress ?? UnsafeRawPointer(b.baseAddress!), b.baseAddress!, min(a.count, b.count))
    }
    return order < 0 || (order == 0 && a.count < b.count)
}

private func strnlen(_ bytes: UnsafeRawPointer, _ limit: Int) -> Int {
    Glibc.strnlen(bytes.assumingMemoryBound(to: CChar.self), limit)
}
