// A file of a scratch disk in memory.

import Glibc
import Synchronization

/// The bytes of a file, whatever its names. Guarded by the mutex of its disk.
final class MemoryInode: @unchecked Sendable {  // guarded by the mutex of its disk
    enum Change {
        case write([UInt8], at: Int)
        case truncate(to: Int)
    }
    /// What readers see.
    var current: [UInt8] = []
    /// What a power cut leaves for certain.
    var durable: [UInt8] = []
    /// What leads from the one to the other, in order; each with the number of its call.
    var pending: [(number: UInt64, change: Change)] = []
    var nextNumber: UInt64 = 0

    init(_ bytes: [UInt8] = []) {
        current = bytes
        durable = bytes
    }

    init(copying other: MemoryInode) {
        current = other.current
        durable = other.durable
        pending = other.pending
        nextNumber = other.nextNumber
    }

    func change(_ change: Change) {
        MemoryInode.apply(change, to: &current)
        pending.append((nextNumber, change))
        nextNumber += 1
    }

    /// Makes the changes before `number` durable; or forgets them, when the sync `failed`.
    func synced(before number: UInt64, failed: Bool) {
        let count = pending.prefix { $0.number < number }.count
        if !failed {
            for (_, change) in pending[..<count] { MemoryInode.apply(change, to: &durable) }
        }
        pending.removeFirst(count)
    }

    func flip(_ offset: Int, mask: UInt8) {
        precondition(offset < current.count, "no such byte")
        current[offset] ^= mask
        if offset < durable.count { durable[offset] ^= mask }
        for index in pending.indices {
            if case .write(var bytes, let start) = pending[index].change, start <= offset, offset < start + bytes.count
            {
                bytes[offset - start] ^= mask
                pending[index].change = .write(bytes, at: start)
            }
        }
    }

    static func apply(_ change: Change, to image: inout [UInt8]) {
        switch change {
        case .write(let bytes, let start): put(bytes[...], at: start, in: &image)
        case .truncate(let size): resize(&image, to: size)
        }
    }

    static func put(_ bytes: ArraySlice<UInt8>, at start: Int, in image: inout [UInt8]) {
        if image.count < start + bytes.count { resize(&image, to: start + bytes.count) }
        image.replaceSubrange(start..<start + bytes.count, with: bytes)
    }

    static func resize(_ image: inout [UInt8], to size: Int) {
        if size < image.count {
            image.removeLast(image.count - size)
        } else {
            image += [UInt8](repeating: 0, count: size - image.count)
        }
    }
}

/// One opening of a file.
final class MemoryFile: ScratchFile, @unchecked Sendable {  // `syncFailure` is guarded by the disk's mutex
    private let inode: MemoryInode
    private let path: String
    private let disk: MemoryScratch
    private var syncFailure: ScratchError?

    init(_ inode: MemoryInode, path: String, disk: MemoryScratch) {
        self.inode = inode
        self.path = path
        self.disk = disk
    }

    var sizeBytes: UInt64 { disk.state.withLock { [inode] _ in UInt64(inode.current.count) } }

    func write(
        _ buffers: UnsafeBufferPointer<UnsafeRawBufferPointer>, at offset: UInt64,
        done: @escaping @Sendable (ScratchError?) -> Void
    ) throws(ScratchError) -> Bool {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(buffers.reduce(0) { $0 + $1.count })
        for buffer in buffers { bytes.append(contentsOf: buffer) }
        if bytes.isEmpty { return true }
        let (isInline, error) = take(bytes, at: Int(offset))
        if isInline {
            if let error { throw error }
            return true
        }
        disk.complete { done(error) }
        return false
    }

    private func take(_ bytes: [UInt8], at offset: Int) -> (isInline: Bool, ScratchError?) {
        let failure = disk.takeFailure(.write, path)
        return disk.state.withLock { [inode, path, capacityBytes = disk.capacityBytes] state in
            let isInline = state.writesInline
            let growth = max(0, offset + bytes.count - inode.current.count)
            let isOver = capacityBytes.map { state.usedBytes + UInt64(growth) > $0 } ?? false
            if growth > 0, state.isFull || isOver {
                return (isInline, ScratchError(ENOSPC, "write", path))
            }
            let written = failure == nil ? bytes : Array(bytes.prefix(bytes.count / 2))
            if !written.isEmpty { inode.change(.write(written, at: offset)) }
            state.counts.writes += 1
            state.counts.writtenBytes += UInt64(written.count)
            return (isInline, failure)
        }
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, done: @escaping @Sendable (ScratchError?) -> Void
    ) {
        let failure = disk.takeFailure(.read, path)
        let target = Target(buffer: buffer)
        disk.complete { [self] in done(failure ?? copy(into: target, at: offset)) }
    }

    private func copy(into target: Target, at offset: UInt64) -> ScratchError? {
        disk.state.withLock { [inode, path] state in
            state.counts.reads += 1
            let count = target.buffer.count
            if count == 0 { return nil }
            guard offset <= UInt64(inode.current.count), inode.current.count - Int(offset) >= count else {
                return ScratchError(
                    errno: ENODATA,
                    description:
                        "read \(path): the file ends at byte \(inode.current.count), before the end of the request")
            }
            inode.current.withUnsafeBytes {
                target.buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[Int(offset)..<Int(offset) + count]))
            }
            return nil
        }
    }

    func sync(done: @escaping @Sendable (ScratchError?) -> Void) {
        let failure = disk.takeFailure(.sync, path)
        let covered = disk.state.withLock { [inode] state in
            state.counts.syncs += 1
            return inode.nextNumber
        }
        disk.complete { [self] in
            let result = disk.state.withLock { [self] _ in
                inode.synced(before: covered, failed: failure != nil)
                syncFailure = syncFailure ?? failure
                return syncFailure
            }
            done(result)
        }
    }

    func truncate(to size: UInt64) throws(ScratchError) {
        if let error = disk.takeFailure(.truncate, path) { throw error }
        disk.state.withLock { [inode] _ in inode.change(.truncate(to: Int(size))) }
    }

    private struct Target: @unchecked Sendable {  // the caller keeps it valid and alone until the completion
        let buffer: UnsafeMutableRawBufferPointer
    }
}
