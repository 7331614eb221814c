// A bucket in a directory: keys are paths of plain files, so that a store can be looked at, copied and backed up with
// ordinary tools. Several processes may use one directory at once.
//
// Always holds:
// - A file under a key is whole and durable from the moment its name exists: it is written and synced under `.tmp`
//   and then renamed (or, where the key must be absent, linked, which fails when the name exists).
// - Whoever changes what a key names holds the lock of that key (`.locks/NN`, flock), from looking at the present
//   file until the change is done. That makes conditions exact, also between processes.
// - No two puts to a key ever have the same tag. The tag is the inode number and the modification time, and a put
//   sets a time later than the one it replaces; files are never written again.
// - Names that begin with a dot are no keys: listings do not see the two folders above.

import Glibc
import Synchronization

/// A bucket whose objects are files below one directory.
public final class DirectoryBucket: Bucket {
    public let name: String
    let root: String
    let pool: BlockingPool
    /// Names that a listing read beyond its page, for the page that follows.
    let readAhead = Mutex<ReadAhead?>(nil)
    private let settled = Mutex(SettledFolders())

    private static let lockCount: UInt64 = 64
    /// How long a put waits for another process to release a key's lock.
    private static let lockTimeoutMs = 30_000
    /// Leftovers of writers that died are removed at open when they are older than this.
    private static let staleAgeSeconds = 3600

    /// Opens a directory as a bucket, making it (not its parents) where it is missing, unless `readOnly`.
    ///
    /// - Parameter readOnly: nothing is made, cleaned up or tried out, so that a directory that may only be read will do.
    /// - Throws: `.refused` when the directory cannot be used or does not keep times to the nanosecond.
    public static func open(path: String, readOnly: Bool = false) async throws(StoreError) -> DirectoryBucket {
        let bucket = DirectoryBucket(path: path)
        try bucket.pool.prepare()
        try await bucket.pool.run { () throws(StoreError) in try bucket.prepare(readOnly: readOnly) }
        return bucket
    }

    private init(path: String) {
        var path = path
        while path.count > 1, path.hasSuffix("/") { path.removeLast() }
        root = path
        name = "file://\(path)"
        pool = BlockingPool(name: "mg-files", threads: 8)
    }

    // MARK: Bucket

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try checkKey(key)
        return try await pool.run { [self] () throws(StoreError) in try read(key, range) }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try checkKey(key)
        return try await pool.run { [self] () throws(StoreError) in try write(key, bytes, condition) }
    }

    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try checkListing(prefix: prefix, limit: limit)
        return try await pool.run { [self] () throws(StoreError) in
            try listPage(prefix: prefix, after: after, folders: folders, limit: limit)
        }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        for key in keys { try checkKey(key) }
        try await pool.run { [self] () throws(StoreError) in try remove(keys) }
    }

    // MARK: Opening

    private func prepare(readOnly: Bool) throws(StoreError) {
        guard root.hasPrefix("/") else { throw StoreError(.refused, "\(name): the path of a store must be absolute") }
        var status = stat()
        if stat(root, &status) != 0 {
            guard errno == ENOENT, !readOnly else { throw failure("look at", root) }
            // Its parent must exist: a mistyped path is not to become a new, empty store.
            if mkdir(root, 0o777) != 0, errno != EEXIST { throw failure("make", root) }
            try syncFolder(parent(of: root))
        } else if status.st_mode & S_IFMT != S_IFDIR {
            throw StoreError(.refused, "\(name): not a directory")
        }
        if readOnly { return }
        for folder in ["\(root)/.tmp", "\(root)/.locks"] where mkdir(folder, 0o777) != 0 && errno != EEXIST {
            throw failure("make", folder)
        }
        removeStaleFiles()
        try checkTimes()
    }

    /// A file system that rounds times could give two puts one tag.
    private func checkTimes() throws(StoreError) {
        let (path, fd) = try makeTemporaryFile()
        defer {
            close(fd)
            unlink(path)
        }
        let wanted = timespec(tv_sec: 1_700_000_000, tv_nsec: 123_456_789)
        guard setModified(fd, wanted) else { throw failure("set the time of", path) }
        guard let status = Self.status(fd), status.st_mtim.tv_sec == wanted.tv_sec,
            status.st_mtim.tv_nsec == wanted.tv_nsec
        else {
            throw StoreError(
                .refused, "\(name): this file system does not keep times to the nanosecond; use ext4, XFS, btrfs or NFS"
            )
        }
    }

    private func removeStaleFiles() {
        let folder = "\(root)/.tmp"
        guard let names = Self.names(in: folder) else { return }
        let oldest = Int(now().tv_sec) - Self.staleAgeSeconds
        for entry in names {
            var status = stat()
            let path = "\(folder)/\(entry.name)"
            if lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG, Int(status.st_mtim.tv_sec) < oldest {
                unlink(path)
            }
        }
    }

    // MARK: Reading

    private func read(_ key: String, _ range: Range<UInt64>?) throws(StoreError) -> StoredObject {
        let path = self.path(of: key)
        let fd = retryingInterrupts { Glibc.open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) }
        guard fd >= 0 else { throw isMissing(errno) ? notFound(key) : failure("open", path) }
        defer { close(fd) }
        guard let status = Self.status(fd) else { throw failure("look at", path) }
        guard status.st_mode & S_IFMT == S_IFREG else { throw notFound(key) }
        let length = UInt64(status.st_size)
        let part = range?.within(length) ?? 0..<length
        var readBytes = 0
        errno = 0
        let bytes = [UInt8](unsafeUninitializedCapacity: part.count) { buffer, count in
            while readBytes < part.count {
                let offset = Int(part.lowerBound) + readBytes
                let step = retryingInterrupts {
                    pread(fd, buffer.baseAddress! + readBytes, part.count - readBytes, offset)
                }
                if step <= 0 { break }
                readBytes += step
            }
            count = readBytes
        }
        guard bytes.count == part.count else {
            // Files here are never written again; a shorter one has been tampered with, or cannot be read.
            throw StoreError(
                .unavailable,
                "\(name): reading '\(key)' ended after \(bytes.count) of \(part.count) bytes: \(text(errno))")
        }
        return StoredObject(bytes: bytes, etag: Self.tag(status), totalLengthBytes: length)
    }

    // MARK: Writing

    private func write(_ key: String, _ bytes: [UInt8], _ condition: PutCondition) throws(StoreError) -> ETag {
        let path = self.path(of: key)
        // Most lost swaps are seen here, before anything is written.
        if condition != .none { try check(condition, key, present(path)) }
        let (temporary, fd) = try makeTemporaryFile()
        var isNamed = false
        defer {
            close(fd)
            if !isNamed { unlink(temporary) }
        }
        try writeAll(fd, bytes, key)
        var modified = now()
        guard setModified(fd, modified), fsync(fd) == 0 else { throw failure("write", key) }

        let folder = parent(of: path)
        var attempts = 0
        while true {
            do throws(StoreError) {
                try makeFolders(of: key)
            } catch {
                // Another call just removed one of them because it was empty.
                attempts += 1
                guard error.kind == .notFound else { throw error }
                if attempts >= 100 { throw StoreError(.unavailable, error.description) }
                settled.withLock { $0.forget() }
                continue
            }
            let lock = try lock(key)
            defer { close(lock) }
            let current = try present(path)
            try check(condition, key, current)
            if let current, !isBefore(current.st_mtim, modified) {
                // The clock went back, or was never ahead of the one that wrote the present file.
                modified = next(current.st_mtim)
                guard setModified(fd, modified), fsync(fd) == 0 else { throw failure("write", key) }
            }
            let named: Int32
            if condition == .absent {
                named = link(temporary, path)
                if named == 0 {
                    unlink(temporary)
                } else if errno == EEXIST {
                    throw conditionFailed(name, key, condition)
                }
            } else {
                named = rename(temporary, path)
            }
            if named == 0 { break }
            // A folder that became empty was removed between making it and here.
            attempts += 1
            guard errno == ENOENT, attempts < 100 else { throw failure("name", path) }
            settled.withLock { $0.forget() }
        }
        isNamed = true
        do throws(StoreError) {
            try syncFolder(folder)
        } catch {
            // A folder that is gone was removed because the object has been deleted since.
            guard error.kind == .notFound else { throw StoreError(.unclear, error.description) }
        }
        guard let status = Self.status(fd) else { throw StoreError(.unclear, failure("look at", path).description) }
        return Self.tag(status)
    }

    /// What is there under a path, nil when nothing is.
    private func present(_ path: String) throws(StoreError) -> stat? {
        if let status = Self.status(path) { return status }
        guard isMissing(errno) else { throw failure("look at", path) }
        return nil
    }

    private func check(_ condition: PutCondition, _ key: String, _ current: stat?) throws(StoreError) {
        switch condition {
        case .none:
            if let current, current.st_mode & S_IFMT == S_IFDIR {
                throw StoreError(.refused, "\(name): '\(key)' is a folder of other keys")
            }
        case .absent: if current != nil { throw conditionFailed(name, key, condition) }
        case .matches(let tag):
            guard let current, Self.tag(current) == tag else { throw conditionFailed(name, key, condition) }
        }
    }

    private func writeAll(_ fd: Int32, _ bytes: [UInt8], _ key: String) throws(StoreError) {
        let written = bytes.withUnsafeBytes { buffer in
            var done = 0
            while done < buffer.count {
                let step = retryingInterrupts { Glibc.write(fd, buffer.baseAddress! + done, buffer.count - done) }
                if step < 0 { return false }
                done += step
            }
            return true
        }
        if !written { throw failure("write", key) }
    }

    private func remove(_ keys: [String]) throws(StoreError) {
        var folders: Set<String> = []
        for key in keys {
            let path = self.path(of: key)
            let lock = try lock(key)
            defer { close(lock) }
            if unlink(path) == 0 {
                folders.insert(parent(of: path))
            } else if errno == EISDIR {
                continue  // A folder of other keys: there is no object of this name.
            } else if !isMissing(errno) {
                throw failure("remove", path)
            }
        }
        for folder in folders {
            // An empty folder is nothing to a bucket. Removing one fails while it holds anything.
            var folder = folder
            while folder != root, rmdir(folder) == 0 {
                settled.withLock { $0.forget() }
                folder = parent(of: folder)
            }
            do throws(StoreError) {
                try syncFolder(folder)
            } catch {
                guard error.kind == .notFound else { throw error }  // Another call removed it.
            }
        }
    }

    // MARK: Folders, locks, temporary files

    /// Makes the folders that `key` lies in, durably; `.notFound` when one of them was removed meanwhile.
    private func makeFolders(of key: String) throws(StoreError) {
        let folder = key.utf8.lastIndex(of: UInt8(ascii: "/")).map { String(key[..<$0]) } ?? ""
        if folder.isEmpty || settled.withLock({ $0.names.contains(folder) }) { return }
        var path = root
        for component in folder.split(separator: "/") {
            let above = path
            path += "/\(component)"
            if mkdir(path, 0o777) != 0, errno != EEXIST { throw errno == ENOENT ? gone(path) : failure("make", path) }
            // Also when it exists: who made it may not have come as far as this.
            try syncFolder(above)
        }
        settled.withLock { $0.add(folder) }
    }

    /// Takes the lock that all changes of `key` are made under; closing the descriptor releases it.
    private func lock(_ key: String) throws(StoreError) -> Int32 {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in key.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        let path = "\(root)/.locks/\(hash % Self.lockCount)"
        var fd = Glibc.open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o666)
        if fd < 0, errno == ENOENT {
            mkdir("\(root)/.locks", 0o777)
            fd = Glibc.open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o666)
        }
        guard fd >= 0 else { throw failure("open", path) }
        var waitedMs = 0
        while flock(fd, LOCK_EX | LOCK_NB) != 0 {
            if errno == EINTR { continue }
            guard errno == EWOULDBLOCK, waitedMs < Self.lockTimeoutMs else {
                let reason = errno == EWOULDBLOCK ? "another process holds it for long" : text(errno)
                close(fd)
                throw StoreError(.unavailable, "\(name): cannot lock \(path): \(reason)")
            }
            usleep(1000)
            waitedMs += 1
        }
        return fd
    }

    private func makeTemporaryFile() throws(StoreError) -> (path: String, fd: Int32) {
        let folder = "\(root)/.tmp"
        for _ in 0..<2 {
            let path = "\(folder)/\(getpid())-\(String(UInt64.random(in: 0 ... .max), radix: 16))"
            let fd = Glibc.open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
            if fd >= 0 { return (path, fd) }
            guard errno == ENOENT, access(root, F_OK) == 0, mkdir(folder, 0o777) == 0 else { break }
        }
        throw failure("make a file in", folder)
    }

    /// Makes the names in a folder durable; `.notFound` when it does not exist.
    private func syncFolder(_ path: String) throws(StoreError) {
        let fd = Glibc.open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard fd >= 0 else { throw errno == ENOENT ? gone(path) : failure("open", path) }
        defer { close(fd) }
        guard fsync(fd) == 0 else { throw failure("sync", path) }
    }

    func path(of key: String) -> String { "\(root)/\(key)" }

    // MARK: Errors

    /// An error of the call that just failed, from errno.
    func failure(_ verb: String, _ what: String) -> StoreError {
        let code = errno
        let kind: StoreError.Kind =
            switch code {
            // Rights, a mount that is gone or read-only: for people to mend, and the objects may all be there.
            case EACCES, EPERM, EROFS, ENOENT: .denied
            case ENOTDIR, EISDIR, ENAMETOOLONG, ELOOP, EINVAL, EOPNOTSUPP, EXDEV: .refused
            default: .unavailable
            }
        return StoreError(kind, "\(name): cannot \(verb) \(what): \(text(code))\(advice(code))", cause: text(code))
    }

    private func advice(_ code: Int32) -> String {
        switch code {
        case EACCES, EPERM: "; margined's user must be able to read and write everything in \(root)"
        case EROFS: "; the file system of \(root) is mounted read-only"
        case ENOENT: "; is \(root) mounted?"
        case ESTALE, ENOTCONN, ENODEV, EIO: "; look at the file system of \(root), and mount it again"
        case ENOSPC, EDQUOT: "; free some space in \(root)"
        case EMFILE, ENFILE: "; raise the limit of open files (ulimit -n)"
        default: ""
        }
    }

    private func gone(_ path: String) -> StoreError {
        StoreError(.notFound, "\(name): \(path) has been removed meanwhile")
    }

    private func notFound(_ key: String) -> StoreError { StoreError(.notFound, "\(name): there is no object '\(key)'") }
}

/// Folders that are known to exist durably, so that not every put syncs all folders above it.
private struct SettledFolders {
    private(set) var names: Set<String> = []
    private static let limit = 4096
    mutating func add(_ name: String) {
        if names.count >= Self.limit { names.removeAll() }
        names.insert(name)
    }
    mutating func forget() { names.removeAll() }
}

// MARK: Small helpers on system calls

extension DirectoryBucket {
    static func status(_ fd: Int32) -> stat? {
        var status = stat()
        return fstat(fd, &status) == 0 ? status : nil
    }

    static func status(_ path: String) -> stat? {
        var status = stat()
        return lstat(path, &status) == 0 ? status : nil
    }

    static func tag(_ status: stat) -> ETag {
        ETag(
            "\(String(status.st_ino, radix: 16))-\(String(status.st_mtim.tv_sec, radix: 16))-\(String(status.st_mtim.tv_nsec, radix: 16))"
        )
    }
}

private func isMissing(_ code: Int32) -> Bool { code == ENOENT || code == ENOTDIR }

private func text(_ code: Int32) -> String {
    code == 0 ? "the file is shorter than it was" : String(cString: strerror(code))
}

private func parent(of path: String) -> String {
    guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")), slash != path.startIndex else { return "/" }
    return String(path[..<slash])
}

private func now() -> timespec {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return time
}

private func next(_ time: timespec) -> timespec {
    time.tv_nsec < 999_999_999
        ? timespec(tv_sec: time.tv_sec, tv_nsec: time.tv_nsec + 1) : timespec(tv_sec: time.tv_sec + 1, tv_nsec: 0)
}

private func isBefore(_ a: timespec, _ b: timespec) -> Bool { (a.tv_sec, a.tv_nsec) < (b.tv_sec, b.tv_nsec) }

private func setModified(_ fd: Int32, _ time: timespec) -> Bool {
    let times = [time, time]
    return futimens(fd, times) == 0
}

private func retryingInterrupts<T: SignedInteger>(_ call: () -> T) -> T {
    while true {
        let result = call()
        if result >= 0 || errno != EINTR { return result }
    }
}
