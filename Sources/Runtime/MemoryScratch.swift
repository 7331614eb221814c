// A scratch disk in memory for tests and simulation, which can lose power.
//
// It knows, for each file, what is durable and what was only written; and of the names, which are durable and which
// changes of names were not synced. A power cut keeps any part of the rest that a journaling file system may keep:
// - of un-synced writes, each is kept, dropped or torn into 512-byte sectors; where a kept one shares a sector with an
//   earlier one, that one's bytes in this sector are kept too (the page cache holds them together);
// - of un-synced changes of names, a prefix of their order; a directory that was synced is current, and so is whatever
//   that depends on.
// It is stricter than ext4 or btrfs where these promise more than POSIX: a file's sync does not make its name durable.

import Glibc
import Synchronization

/// A scratch disk in memory. Any thread may call it.
///
/// Completions go to `deliver`, else to the calling loop, else to a loop of this type's own.
public final class MemoryScratch: ScratchDisk {
    /// Runs a completion later: never within the call that hands it over.
    public typealias Deliver = @Sendable (@escaping @Sendable () -> Void) -> Void

    /// A kind of call, for `failNext`.
    public enum Call: Sendable { case open, write, read, sync, truncate, list, syncDirectory, rename, remove }

    let deliver: Deliver?
    let capacityBytes: UInt64?
    let state = Mutex(State())

    struct State {
        var names: [String: MemoryInode] = [:]
        var durableNames: [String: MemoryInode] = [:]
        /// Each with the number of its call.
        var changes: [(number: UInt64, change: NameChange)] = []
        var nextNumber: UInt64 = 0
        var failures: [Failure] = []
        /// What fails until it is told otherwise.
        var failing: [Call: (errno: Int32, path: String)] = [:]
        var writesInline = true
        var isFull = false
        var holdsCompletions = false
        var held: [Held] = []
        var counts = Counts()
    }

    /// A change of names that no sync of its directory has covered, in the order of the calls.
    enum NameChange {
        case create(String, MemoryInode)
        case remove(String)
        case rename(String, to: String)

        var paths: [String] {
            switch self {
            case .create(let path, _), .remove(let path): [path]
            case .rename(let from, let to): [from, to]
            }
        }

        func apply(to names: inout [String: MemoryInode]) {
            switch self {
            case .create(let path, let inode): names[path] = inode
            case .remove(let path): names[path] = nil
            case .rename(let from, let to): names[to] = names.removeValue(forKey: from)
            }
        }
    }

    struct Failure {
        var call: Call
        var errno: Int32
        var path: String?
    }

    struct Held {
        var deliver: Deliver
        var completion: @Sendable () -> Void
    }

    /// What was asked of the disk so far.
    public struct Counts: Sendable, Equatable {
        public var writes = 0
        public var writtenBytes: UInt64 = 0
        public var reads = 0
        public var syncs = 0
    }

    /// An empty disk. Writes that would make its files longer than `capacityBytes` in sum fail with ENOSPC.
    public convenience init(capacityBytes: UInt64? = nil, deliver: Deliver? = nil) {
        self.init(names: [:], capacityBytes: capacityBytes, deliver: deliver)
    }

    init(names: [String: MemoryInode], capacityBytes: UInt64?, deliver: Deliver?) {
        self.deliver = deliver
        self.capacityBytes = capacityBytes
        state.withLock {
            $0.names = names
            $0.durableNames = names
        }
    }

    // MARK: ScratchDisk

    public func open(_ path: String, create: Bool) throws(ScratchError) -> any ScratchFile {
        checkPath(path)
        try fail(.open, path)
        let inode = state.withLock { state -> MemoryInode? in
            if let inode = state.names[path] { return inode }
            guard create else { return nil }
            let inode = MemoryInode()
            state.change(.create(path, inode))
            return inode
        }
        guard let inode else { throw ScratchError(ENOENT, "open", path) }
        return MemoryFile(inode, path: path, disk: self)
    }

    public func list(_ directory: String) throws(ScratchError) -> [String] {
        if !directory.isEmpty { checkPath(directory) }
        try fail(.list, directory)
        let prefix = directory.isEmpty ? "" : directory + "/"
        let names = state.withLock { state in
            Set(
                state.names.keys.filter { $0.hasPrefix(prefix) }.map { path in
                    String(path.dropFirst(prefix.count).prefix { $0 != "/" })
                })
        }
        return names.sorted()
    }

    public func remove(_ path: String) throws(ScratchError) {
        checkPath(path)
        try fail(.remove, path)
        state.withLock { state in
            if state.names[path] != nil { state.change(.remove(path)) }
        }
    }

    public func rename(_ from: String, to: String) throws(ScratchError) {
        checkPath(from)
        checkPath(to)
        try fail(.rename, from)
        let isThere = state.withLock { state in
            guard state.names[from] != nil else { return false }
            state.change(.rename(from, to: to))
            return true
        }
        if !isThere { throw ScratchError(ENOENT, "rename", "\(from) to \(to)") }
    }

    public func syncDirectory(_ directory: String) async throws(ScratchError) {
        if !directory.isEmpty { checkPath(directory) }
        let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
            let failure = takeFailure(.syncDirectory, directory)
            let covered = state.withLock { $0.nextNumber }
            complete { [self] in
                if failure == nil { state.withLock { $0.makeDurable(directory, before: covered) } }
                continuation.resume(returning: failure)
            }
        }
        if let error { throw error }
    }

    public func freeBytes() throws(ScratchError) -> UInt64 {
        guard let capacityBytes else { return 1 << 40 }
        return state.withLock { state in capacityBytes - min(capacityBytes, state.usedBytes) }
    }

    // MARK: What tests turn

    /// Whether writes complete before their call returns (at first they do); if not, they are completed like reads.
    public var writesInline: Bool {
        get { state.withLock { $0.writesInline } }
        set { state.withLock { $0.writesInline = newValue } }
    }

    /// While true, writes that would make a file longer fail with ENOSPC.
    public var isFull: Bool {
        get { state.withLock { $0.isFull } }
        set { state.withLock { $0.isFull = newValue } }
    }

    /// The next `call` (on a path that begins with `path`, if given) fails with `errno`. A failing write still writes its
    /// first half; after a failed sync, what it was to cover never becomes durable, and no sync of that open file succeeds.
    public func failNext(_ call: Call, errno: Int32, path: String? = nil) {
        state.withLock { $0.failures.append(Failure(call: call, errno: errno, path: path)) }
    }

    /// Every `call` (on a path that begins with `path`) fails with `errno` from now on, as `failNext` says; nil: no longer.
    public func fail(_ call: Call, errno: Int32?, path: String = "") {
        state.withLock { $0.failing[call] = errno.map { ($0, path) } }
    }

    /// Turns one bit of a file over, as a failing device may.
    public func flipBit(_ path: String, at offset: UInt64, bit: Int = 0) {
        state.withLock { state in
            guard let inode = state.names[path] else { preconditionFailure("no file \(path)") }
            inode.flip(Int(offset), mask: 1 << UInt8(bit))
        }
    }

    /// While true, completions are kept back until `releaseCompletions`.
    public var holdsCompletions: Bool {
        get { state.withLock { $0.holdsCompletions } }
        set { state.withLock { $0.holdsCompletions = newValue } }
    }

    public var heldCompletions: Int { state.withLock { $0.held.count } }

    /// Delivers the completions kept back so far, in the order of their calls.
    public func releaseCompletions() {
        for held in takeHeld() { held.deliver(held.completion) }
    }

    /// Delivers the completions kept back so far, in any order.
    public func releaseCompletions(random: inout some RandomNumberGenerator) {
        for held in takeHeld().shuffled(using: &random) { held.deliver(held.completion) }
    }

    private func takeHeld() -> [Held] {
        state.withLock { state in
            defer { state.held = [] }
            return state.held
        }
    }

    public var counts: Counts { state.withLock { $0.counts } }

    /// The file's bytes as a reader sees them; nil if there is none.
    public func contents(_ path: String) -> [UInt8]? { state.withLock { $0.names[path]?.current } }

    // MARK: For its files

    func checkPath(_ path: String) {
        precondition(ScratchPath.isValid(path), "not a path within the scratch directory: \(path)")
    }

    func takeFailure(_ call: Call, _ path: String) -> ScratchError? {
        let errno = state.withLock { state -> Int32? in
            if let failing = state.failing[call], path.hasPrefix(failing.path) { return failing.errno }
            let index = state.failures.firstIndex { $0.call == call && path.hasPrefix($0.path ?? "") }
            return index.map { state.failures.remove(at: $0).errno }
        }
        return errno.map { ScratchError($0, "\(call)", path) }
    }

    private func fail(_ call: Call, _ path: String) throws(ScratchError) {
        if let error = takeFailure(call, path) { throw error }
    }

    /// Runs `completion` later, where the caller of this call expects it.
    func complete(_ completion: @escaping @Sendable () -> Void) {
        let deliver = self.deliver ?? { [loop = Loop.current ?? MemoryScratch.fallback] in loop.post($0) }
        let isHeld = state.withLock { state in
            if state.holdsCompletions { state.held.append(Held(deliver: deliver, completion: completion)) }
            return state.holdsCompletions
        }
        if !isHeld { deliver(completion) }
    }

    private static let fallback: Loop = {
        do {
            let loop = try Loop(name: "memory scratch")
            try loop.start()
            return loop
        } catch { preconditionFailure("no loop for memory scratch disks: \(error)") }
    }()
}

extension MemoryScratch.State {
    var usedBytes: UInt64 { names.values.reduce(0) { $0 + UInt64($1.current.count) } }

    mutating func change(_ change: MemoryScratch.NameChange) {
        change.apply(to: &names)
        changes.append((nextNumber, change))
        nextNumber += 1
    }

    /// Makes those of the changes before `number` durable that touch `directory`, and those they rest on.
    mutating func makeDurable(_ directory: String, before number: UInt64) {
        var needed: Set<String> = []
        var durable: [MemoryScratch.NameChange] = []
        for index in changes.indices.reversed() where changes[index].number < number {
            let paths = changes[index].change.paths
            if paths.contains(where: { ScratchPath.parent($0) == directory || needed.contains($0) }) {
                needed.formUnion(paths)
                durable.append(changes.remove(at: index).change)
            }
        }
        for change in durable.reversed() { change.apply(to: &durableNames) }
    }
}
