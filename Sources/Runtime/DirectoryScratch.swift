// The scratch disk as a directory of a local file system.
//
// Always holds: nothing outside the directory is opened (paths are relative, without `..`); of two daemons only one
// holds its lock.

import CLinux
import Glibc
import Synchronization

/// A scratch directory. Files opened from it do their I/O on the `Loop` that asks, or, asked from any other thread, on a
/// loop of the directory's own, where `done` is then called.
public final class DirectoryScratch: ScratchDisk {
    private let root: ScratchRoot
    private let lock = Mutex<FileDescriptor?>(nil)

    private static let lockName = "lock"

    /// Opens the directory, made with its parents where missing (for this user only).
    public init(path: String) throws(ScratchError) {
        for end in path.indices where end != path.startIndex && path[end] == "/" {
            _ = mkdir(String(path[..<end]), 0o755)
        }
        if mkdir(path, 0o700) < 0, errno != EEXIST { throw ScratchError(errno, "mkdir", path) }
        let fd = Glibc.open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard fd >= 0 else { throw ScratchError(errno, "open", path) }
        root = try ScratchRoot(directory: FileDescriptor(owning: fd), path: path)
    }

    /// Takes the directory for this process until the last reference to this object goes. Fails when another one has it.
    public func lockExclusively() throws(ScratchError) {
        let path = root.fullPath(DirectoryScratch.lockName)
        let fd = openat(root.directory.raw, DirectoryScratch.lockName, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw ScratchError(errno, "open", path) }
        let file = FileDescriptor(owning: fd)
        let error = mg_lock_exclusively(fd)
        if error == -EWOULDBLOCK {
            throw ScratchError(
                errno: EWOULDBLOCK,
                description: "scratch directory \(root.path) is in use by another margined (pid \(holder(fd)));"
                    + " stop it or use another --scratch")
        }
        guard error == 0 else { throw ScratchError(-error, "flock", path) }
        let text = "\(getpid())\n"
        guard ftruncate(fd, 0) == 0, pwrite(fd, text, text.utf8.count, 0) == text.utf8.count else {
            throw ScratchError(errno, "write", path)
        }
        lock.withLock { $0 = file }
    }

    private func holder(_ fd: Int32) -> String {
        let text = String(unsafeUninitializedCapacity: 16) { buffer in max(0, pread(fd, buffer.baseAddress, 16, 0)) }
        return Int32(text.prefix { $0 != "\n" }).map { String($0) } ?? "unknown"
    }

    public func open(_ path: String, create: Bool) throws(ScratchError) -> any ScratchFile {
        checkPath(path)
        let flags = O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0)
        var fd = openat(root.directory.raw, path, flags, 0o600)
        if fd < 0, errno == ENOENT, create {
            try makeFolders(above: path)
            fd = openat(root.directory.raw, path, flags, 0o600)
        }
        guard fd >= 0 else { throw ScratchError(errno, "open", root.fullPath(path)) }
        return try DirectoryFile(FileDescriptor(owning: fd), path: root.fullPath(path), root: root)
    }

    /// Names in a directory, sorted; empty where the directory is missing. The lock file is not among them.
    public func list(_ directory: String) throws(ScratchError) -> [String] {
        checkDirectory(directory)
        let fd = openDirectory(directory)
        if fd < 0, errno == ENOENT { return [] }
        guard fd >= 0, let stream = fdopendir(fd) else {
            let error = ScratchError(errno, "list", root.fullPath(directory))
            if fd >= 0 { close(fd) }
            throw error
        }
        defer { closedir(stream) }
        var names: [String] = []
        while true {
            errno = 0
            guard let entry = readdir(stream) else { break }
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                String(cString: UnsafeRawPointer($0).assumingMemoryBound(to: CChar.self))
            }
            if name == "." || name == ".." || (directory.isEmpty && name == DirectoryScratch.lockName) { continue }
            names.append(name)
        }
        guard errno == 0 else { throw ScratchError(errno, "list", root.fullPath(directory)) }
        return names.sorted()
    }

    /// Removes a file or an empty folder; a missing one is no error. Open files stay readable until closed.
    public func remove(_ path: String) throws(ScratchError) {
        checkPath(path)
        if unlinkat(root.directory.raw, path, 0) == 0 || errno == ENOENT { return }
        if errno == EISDIR, unlinkat(root.directory.raw, path, AT_REMOVEDIR) == 0 { return }
        throw ScratchError(errno, "remove", root.fullPath(path))
    }

    private func makeFolders(above path: String) throws(ScratchError) {
        for end in path.indices where path[end] == "/" {
            if mkdirat(root.directory.raw, String(path[..<end]), 0o700) < 0, errno != EEXIST {
                throw ScratchError(errno, "mkdir", root.fullPath(String(path[..<end])))
            }
        }
    }

    public func rename(_ from: String, to: String) throws(ScratchError) {
        checkPath(from)
        checkPath(to)
        try makeFolders(above: to)
        guard renameat(root.directory.raw, from, root.directory.raw, to) == 0 else {
            throw ScratchError(errno, "rename", "\(root.fullPath(from)) to \(root.fullPath(to))")
        }
    }

    /// Makes the names in `directory` durable, and its own name up to the scratch directory.
    public func syncDirectory(_ directory: String) async throws(ScratchError) {
        checkDirectory(directory)
        var path = directory[...]
        while true {
            let fd = openDirectory(String(path))
            let name = root.fullPath(String(path))
            guard fd >= 0 else { throw ScratchError(errno, "open", name) }
            let descriptor = FileDescriptor(owning: fd)
            let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
                root.start(
                    DiskOperation(.syncDirectory, descriptor, path: name) { continuation.resume(returning: $0) },
                    on: root.callerLoop)
            }
            if let error { throw error }
            if path.isEmpty { return }
            path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)]
        }
    }

    public func freeBytes() throws(ScratchError) -> UInt64 {
        var status = statvfs()
        guard fstatvfs(root.directory.raw, &status) == 0 else { throw ScratchError(errno, "statvfs", root.path) }
        return UInt64(status.f_bavail) * UInt64(status.f_frsize)
    }

    private func openDirectory(_ path: String) -> Int32 {
        openat(root.directory.raw, path.isEmpty ? "." : path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    }

    private func checkDirectory(_ path: String) {
        if !path.isEmpty { checkPath(path) }
    }

    private func checkPath(_ path: String) {
        precondition(ScratchPath.isValid(path), "not a path within the scratch directory: \(path)")
    }
}

/// Paths within a scratch disk.
enum ScratchPath {
    /// Relative, of names joined by single `/`, none of them `.` or `..`.
    static func isValid(_ path: String) -> Bool {
        path.split(separator: "/", omittingEmptySubsequences: false).allSatisfy {
            !$0.isEmpty && $0 != "." && $0 != ".." && !$0.utf8.contains(0)
        }
    }

    /// The directory a path lies in; empty for the scratch directory itself.
    static func parent(_ path: String) -> String {
        path.lastIndex(of: "/").map { String(path[..<$0]) } ?? ""
    }
}

/// What a directory shares with its open files.
final class ScratchRoot: Sendable {
    let directory: FileDescriptor
    let path: String
    private let ownLoop = Mutex<Loop?>(nil)
    private let closer = WorkerPool(name: "closer", threads: 1)

    init(directory: FileDescriptor, path: String) throws(ScratchError) {
        self.directory = directory
        self.path = path
        try closer.prepare()
    }

    deinit {
        ownLoop.withLock { $0 }?.stop()
        closer.stop()
    }

    /// Lets go of a file without waiting for it: the last close of a removed one frees its pages and blocks, which takes
    /// the kernel most of a second for a gibibyte.
    func close(_ descriptor: FileDescriptor) {
        let last = LastReference(descriptor)
        closer.run { last.letGo() }
    }

    func fullPath(_ relative: String) -> String { relative.isEmpty ? path : "\(path)/\(relative)" }

    /// The loop of the calling thread, or else the one of this directory, started at the first such call; nil while the
    /// system has no descriptor or no thread for that.
    var callerLoop: Loop? {
        if let loop = Loop.current { return loop }
        return ownLoop.withLock { own in
            if let own { return own }
            guard let made = try? Loop(name: "scratch"), (try? made.start()) != nil else { return nil }
            own = made
            return made
        }
    }

    /// Without a loop the caller's thread, which is no loop's, does it and waits.
    func start(_ operation: DiskOperation, on loop: Loop?) {
        guard let loop else { return operation.performAll() }
        if loop.isCurrent {
            loop.disk.start(operation)
        } else {
            loop.post { loop.disk.start(operation) }
        }
    }
}

/// A descriptor that is to be closed here, not where an operation on it happens to end last.
private final class LastReference: @unchecked Sendable {  // used by one thread after the other
    private var descriptor: FileDescriptor?
    init(_ descriptor: FileDescriptor) { self.descriptor = descriptor }

    func letGo() {
        guard var descriptor = descriptor.take() else { return }
        for _ in 0..<1000 where !isKnownUniquelyReferenced(&descriptor) { usleep(1000) }
    }
}
