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
    private static let window = 32_768

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
        guard let status, let all = Self.names(in: path) else {
            if !folder.isEmpty, errno == ENOENT || errno == ENOTDIR {
                return ReadAhead(folder: folder, bound: bound, entries: [], hasMore: false, modified: timespec())
            }
            throw failure("list", path)
        }
        var next: [FolderEntry] = []
        var hasMore = false
        for entry in all {
            if !bound.isEmpty, !comesBefore(bound, entry.name) {
                // A folder that the bound lies in still has keys to give.
                guard entry.isFolder, bound.utf8.starts(with: entry.name.utf8), bound != endOfFolder(entry.name) else {
                    continue
                }
            }
            // `start` names the beginning of the last component, so a folder cannot lie on the way to it.
            guard entry.name.utf8.starts(with: start.utf8) else { continue }
            next.append(entry)
            if next.count >= 2 * Self.window {
                next.sort { comesBefore($0.name, $1.name) }
                next.removeLast(next.count - Self.window)
                hasMore = true
            }
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
        guard let directory = opendir(path) else { return nil }
        defer { closedir(directory) }
        var entries: [FolderEntry] = []
        while true {
            errno = 0
            guard let entry = readdir(directory) else { return errno == 0 ? entries : nil }
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            guard isValidKey(name) else { continue }
            var kind = Int(entry.pointee.d_type)
            if kind == Int(DT_UNKNOWN), let status = status("\(path)/\(name)") {
                kind =
                    status.st_mode & S_IFMT == S_IFDIR
                    ? Int(DT_DIR) : status.st_mode & S_IFMT == S_IFREG ? Int(DT_REG) : kind
            }
            if kind == Int(DT_DIR) { entries.append(FolderEntry(name: name + "/")) }
            if kind == Int(DT_REG) { entries.append(FolderEntry(name: name)) }
        }
    }
}
