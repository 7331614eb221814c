// The second seam: files of the scratch disk. The journal and the block files see no other file call,
// so that a simulator can tear, drop and lose what was not synced.
//
// Paths are relative to the scratch directory, with `/` between components.

/// Why a scratch call failed: the errno, with the call and path for people.
public struct ScratchError: Error, Sendable, CustomStringConvertible {
    public let errno: Int32
    public let description: String
    public init(errno: Int32, description: String) {
        self.errno = errno
        self.description = description
    }
}

/// The scratch directory of one daemon.
///
/// Directory calls are short and block the caller. A created, renamed or removed name is durable only after
/// `syncDirectory` on its parent.
public protocol ScratchDisk: Sendable {
    /// Opens for reading and writing. With `create`, makes the file (and its parent folders) where missing.
    func open(_ path: String, create: Bool) throws(ScratchError) -> any ScratchFile
    /// Names in a directory, sorted; empty where the directory is missing.
    func list(_ directory: String) throws(ScratchError) -> [String]
    /// Removes a file; a missing one is no error. Open files stay readable until closed.
    func remove(_ path: String) throws(ScratchError)
    /// Makes the parent folders of `to` where missing.
    func rename(_ from: String, to: String) throws(ScratchError)
    /// Makes the names in `directory` durable.
    func syncDirectory(_ directory: String) async throws(ScratchError)
    /// Bytes free for use on the file system that holds the scratch directory.
    func freeBytes() throws(ScratchError) -> UInt64
}

/// One open file of the scratch disk. Closed when the last reference goes.
///
/// Buffers must stay valid until the completion runs. Completions run on the `Loop` that made the call (in a
/// simulator: on the simulated executor), never before the call returned unless it says `.inline`.
public protocol ScratchFile: AnyObject, Sendable {
    /// Size in bytes, as of the last completed write or truncate.
    var sizeBytes: UInt64 { get }

    /// Writes all buffers one behind the other at `offset`. When the kernel can take them at once (page cache, no
    /// long wait expected) it does so before returning and gives `true`: `done` is then not called. Otherwise gives
    /// `false`, and `done` is called later on the calling loop. A short write is completed or reported as an error.
    func write(
        _ buffers: UnsafeBufferPointer<UnsafeRawBufferPointer>, at offset: UInt64,
        done: @escaping @Sendable (ScratchError?) -> Void
    ) throws(ScratchError) -> Bool

    /// Fills `buffer` from `offset`; fewer bytes in the file than asked for is an error (ENODATA). `done` is always called
    /// later.
    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, done: @escaping @Sendable (ScratchError?) -> Void
    )

    /// Makes everything durable whose write or truncate was called before, also where that is still under way (fdatasync,
    /// and the size). After a failure every later sync of this file fails: the kernel has forgotten what it could not write.
    func sync(done: @escaping @Sendable (ScratchError?) -> Void)

    func truncate(to size: UInt64) throws(ScratchError)
}
