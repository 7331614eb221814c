// The name of a listening unix socket in the file system: whose it is, and taking and giving it up without harm to another
// process that takes the same path.
//
// Always holds: a name is looked at, removed and bound under the lock of its folder, so of two processes of ours neither
// takes the other's fresh socket for a dead one; a name is removed only while its own socket is open (then no other file can
// have got its inode number) and only if it still is that socket.

import Glibc

/// The file of a socket that this process has bound.
public struct SocketFile: Sendable {
    public let path: String
    private let device: UInt64
    private let inode: UInt64

    /// nil where nothing of that name is a socket.
    init?(_ path: String) {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else { return nil }
        self.path = path
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
    }

    /// Removes the name if it is still this socket's. Call before the socket is closed.
    public func remove() {
        let lock = FolderLock(of: path)
        if let present = SocketFile(path), present.device == device, present.inode == inode { unlink(path) }
        withExtendedLifetime(lock) {}
    }
}

/// Holds the folder of a path against other processes of ours. Best effort: a folder that can't be read, or that somebody
/// else keeps locked, is done without.
final class FolderLock {
    private let descriptor: Int32
    private static let patienceMs = 2_000

    init(of path: String) {
        let folder = path.lastIndex(of: "/").map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "."
        descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { return }
        for _ in 0..<Self.patienceMs {
            if flock(descriptor, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK && errno != EINTR { return }
            usleep(1000)
        }
    }

    deinit { if descriptor >= 0 { close(descriptor) } }
}
