// Writes the mark of an attached disk: at the attach, and in the background after each sync. See JournalMark.swift.

internal import BlockCache
internal import Runtime

/// Owned by its disk's loop.
final class JournalMarker: @unchecked Sendable {  // owned by the disk's loop
    private let folder: String
    private let diskID: ObjectID
    private let context: DiskContext
    private var mark: JournalMark
    /// nil before the attach is marked: then there is nothing to tell.
    private var isAttached = false
    private var file: (any ScratchFile)?
    private var isWriting = false
    private var isStale = false
    private let slot: UnsafeMutableRawBufferPointer

    init(folder: String, diskID: ObjectID, epoch: UInt64, context: DiskContext) {
        self.folder = folder
        self.diskID = diskID
        self.context = context
        mark = JournalMark(epoch: epoch, boot: 0, synced: 0)
        slot = .allocate(byteCount: JournalMark.slotBytes, alignment: 8)
    }

    deinit { slot.deallocate() }

    /// From now on, what the journal holds was written since this start of the machine.
    func attach(bootID: String, synced: UInt64) async throws(ScratchError) {
        let found = try await JournalMark.find(in: folder, of: diskID, context.scratch)
        if case .mark(let before) = found { mark.count = before.count }
        mark.boot = JournalMark.bootSum(bootID)
        mark.synced = synced
        var bytes = [UInt8](repeating: 0, count: JournalMark.fileBytes)
        for _ in 0..<2 {
            mark.count += 1
            bytes.withUnsafeMutableBytes { mark.put($0.baseAddress! + mark.offset, of: diskID) }
        }
        let file = try context.scratch.open(JournalMark.path(folder), create: true)
        try await file.write(bytes, at: 0)
        isAttached = true
    }

    /// Records up to `sequence` survive a loss of power. Costs one write of 96 bytes, which nobody waits for.
    func synced(upTo sequence: UInt64) {
        mark.synced = max(mark.synced, sequence)
        write()
    }

    /// What the kernel has of the journal may not be what the disk has, though a later sync would say so.
    func syncFailed() {
        mark.hasSyncFailed = true
        write()
    }

    /// The same before the attach is marked: the mark that is there says so from now on, to the next attach.
    func syncFailedBeforeAttach() async {
        do throws(ScratchError) {
            guard case .mark(var before) = try await JournalMark.find(in: folder, of: diskID, context.scratch) else {
                return
            }
            before.count += 1
            before.hasSyncFailed = true
            var bytes = [UInt8](repeating: 0, count: JournalMark.slotBytes)
            bytes.withUnsafeMutableBytes { before.put($0.baseAddress!, of: diskID) }
            let file = try context.scratch.open(JournalMark.path(folder), create: false)
            try await file.write(bytes, at: UInt64(before.offset))
        } catch {
            context.problem("\(JournalMark.path(folder)) can't say that a sync has failed: \(error)")
        }
    }

    /// Lets go of the file until the next sync: an idle disk holds no descriptor.
    func close() { file = nil }

    private func write() {
        guard isAttached else { return }
        if isWriting {
            isStale = true
            return
        }
        do {
            let file = try file ?? context.scratch.open(JournalMark.path(folder), create: false)
            self.file = file
            mark.count += 1
            mark.put(slot.baseAddress!, of: diskID)
            isWriting = true
            let isDone = try withUnsafeTemporaryAllocation(of: UnsafeRawBufferPointer.self, capacity: 1) {
                vectors throws(ScratchError) in
                vectors.initializeElement(at: 0, to: UnsafeRawBufferPointer(slot))
                // The completion keeps the marker, whose slot the kernel reads.
                return try file.write(UnsafeBufferPointer(vectors), at: UInt64(mark.offset)) { [self] _ in written() }
            }
            if isDone { written() }
        } catch {
            // The mark only adds to what the records say; the next sync writes it again.
            isWriting = false
        }
    }

    private func written() {
        isWriting = false
        guard isStale else { return }
        isStale = false
        write()
    }
}
