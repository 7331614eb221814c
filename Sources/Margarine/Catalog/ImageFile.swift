// Raw images on this machine: what `disk export` writes and `disk import` reads. Local files beside the store; not the
// scratch disk, and nothing that an engine touches. Calls block: they are made on worker threads.

import BlockCache
import Glibc

/// Where an exported image goes: a file, which becomes sparse, or standard output.
package final class ImageOutput: @unchecked Sendable {  // used by one task at a time
    private let fd: Int32
    private let name: String
    private let path: String?
    private let wasCreated: Bool
    /// A regular file: what is not written is a hole.
    private let isSparse: Bool
    private var position: UInt64 = 0
    private var isEmptied = false
    private var isFinished = false

    /// Opens `path` for writing; `-` is standard output. What is in it stays until the first byte of the image is there.
    package init(path: String) throws(CatalogError) {
        if path == "-" {
            (fd, name, self.path, wasCreated, isSparse) = (STDOUT_FILENO, "standard output", nil, false, false)
            return
        }
        var created = true
        var fd = Glibc.open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
        if fd < 0, errno == EEXIST {
            created = false
            fd = Glibc.open(path, O_WRONLY | O_CLOEXEC)
        }
        if fd < 0 { throw fileError("cannot write '\(path)'") }
        var status = stat()
        let isRegular = fstat(fd, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
        (self.fd, name, self.path, wasCreated, isSparse) = (fd, "'\(path)'", path, created, isRegular)
    }

    /// Writes the first `count` of the bytes at `offset`.
    func write(_ bytes: [UInt8], count: Int, at offset: UInt64) throws(CatalogError) {
        try bytes.withUnsafeBytes { all -> Result<Void, CatalogError> in
            do throws(CatalogError) {
                return .success(try write(UnsafeRawBufferPointer(rebasing: all[..<count]), at: offset))
            } catch { return .failure(error) }
        }.get()
    }

    /// Writes bytes at `offset`, which is not before the end of what was written; all between is zeroes.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(CatalogError) {
        precondition(offset >= position)
        try skip(to: offset)
        guard isSparse else { return try writeAll(bytes) }
        // Runs of pages that are not zeroes.
        var start = 0
        while start < bytes.count {
            let end = min(bytes.count, start + Geometry.pageBytes)
            if isZero(UnsafeRawBufferPointer(rebasing: bytes[start..<end])) {
                start = end
                continue
            }
            var runEnd = end
            while runEnd < bytes.count {
                let next = min(bytes.count, runEnd + Geometry.pageBytes)
                if isZero(UnsafeRawBufferPointer(rebasing: bytes[runEnd..<next])) { break }
                runEnd = next
            }
            position = offset + UInt64(start)
            try writeAll(UnsafeRawBufferPointer(rebasing: bytes[start..<runEnd]))
            start = runEnd
        }
        position = offset + UInt64(bytes.count)
    }

    /// Ends the image at `sizeBytes` and makes it durable.
    func finish(sizeBytes: UInt64) throws(CatalogError) {
        try skip(to: sizeBytes)
        if isSparse, ftruncate(fd, off_t(clamping: sizeBytes)) != 0 || sizeBytes > UInt64(off_t.max) {
            throw fileError("cannot make \(name) \(sizeBytes) bytes long")
        }
        // A pipe or a terminal has nothing to sync.
        if fsync(fd) != 0, errno != EINVAL, errno != EROFS, errno != ENOTSUP { throw fileError("cannot sync \(name)") }
        isFinished = true
    }

    private func skip(to offset: UInt64) throws(CatalogError) {
        if isSparse {
            if !isEmptied, ftruncate(fd, 0) != 0 { throw fileError("cannot empty \(name)") }
            isEmptied = true
            position = offset
            return
        }
        let zeroes = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { zeroes.deallocate() }
        zeroes.initializeMemory(as: UInt8.self, repeating: 0)
        while position < offset {
            let count = Int(min(offset - position, UInt64(zeroes.count)))
            try writeAll(UnsafeRawBufferPointer(rebasing: zeroes[..<count]))
        }
    }

    private func writeAll(_ bytes: UnsafeRawBufferPointer) throws(CatalogError) {
        var done = 0
        while done < bytes.count {
            let count =
                isSparse
                ? pwrite(fd, bytes.baseAddress! + done, bytes.count - done, off_t(clamping: position))
                : Glibc.write(fd, bytes.baseAddress! + done, bytes.count - done)
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { throw fileError("cannot write \(name)") }
            done += count
            position += UInt64(count)
        }
    }

    deinit {
        guard let path else { return }
        // Half an image helps nobody.
        if !isFinished, wasCreated, isOurs(path) { unlink(path) }
        close(fd)
    }

    /// Whether the name is still this file's: somebody may have put another in its place.
    private func isOurs(_ path: String) -> Bool {
        var (own, present) = (stat(), stat())
        return fstat(fd, &own) == 0 && lstat(path, &present) == 0 && own.st_dev == present.st_dev
            && own.st_ino == present.st_ino
    }
}

/// A raw image to be imported: a file, whose holes cost nothing, or a block device.
package final class ImageInput: @unchecked Sendable {  // `pread` alone, from any thread; the rest by one task
    private let fd: Int32
    private let path: String
    /// Length of the image in bytes.
    package let sizeBytes: UInt64

    package init(path: String) throws(CatalogError) {
        let fd = Glibc.open(path, O_RDONLY | O_CLOEXEC)
        if fd < 0 { throw fileError("cannot read '\(path)'") }
        var status = stat()
        guard fstat(fd, &status) == 0, [S_IFREG, S_IFBLK].contains(status.st_mode & S_IFMT) else {
            close(fd)
            throw CatalogError(.file, "'\(path)' is no file and no block device: only those can be imported")
        }
        let end = lseek(fd, 0, SEEK_END)
        if end < 0 {
            defer { close(fd) }
            throw fileError("cannot find the length of '\(path)'")
        }
        (self.fd, self.path, sizeBytes) = (fd, path, UInt64(end))
    }

    /// The first byte from `offset` on that may not be zero; nil: none.
    func nextData(from offset: UInt64) -> UInt64? {
        if offset >= sizeBytes { return nil }
        let seekData: Int32 = 3
        let found = lseek(fd, off_t(offset), seekData)
        if found < 0 { return errno == ENXIO ? nil : offset }
        return UInt64(found)
    }

    /// Fills `buffer` from `offset`; what lies behind the end of the image is zeroes.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(CatalogError) {
        let wanted = Int(min(UInt64(buffer.count), sizeBytes > offset ? sizeBytes - offset : 0))
        var done = 0
        while done < wanted {
            let count = pread(fd, buffer.baseAddress! + done, wanted - done, off_t(offset) + off_t(done))
            if count < 0 && errno == EINTR { continue }
            if count < 0 { throw fileError("cannot read '\(path)'") }
            guard count > 0 else { throw CatalogError(.file, "'\(path)' became shorter while it was read") }
            done += count
        }
        if wanted < buffer.count { memset(buffer.baseAddress! + wanted, 0, buffer.count - wanted) }
    }

    deinit { close(fd) }
}

private func fileError(_ what: String) -> CatalogError {
    CatalogError(.file, "\(what): \(String(cString: strerror(errno)))")
}
