// Writes the mark of an attached disk: at the attach, and in the background after each sync. See JournalMark.swift.
//
// Always holds: that a sync has failed is written until it is in the file, and nobody takes the journal up before (`isQuiet`);
// a write that failed is done again in its own slot, so that the other one stays whole.

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
    /// The file does not say yet that a sync has failed.
    private var owesFailure = false
    private var waits = ScratchWaits()
    /// No write of the mark is under way, and none is owed.
    var isQuiet: Bool { !isWriting && !owesFailure }
    var onQuiet: () -> Void = {}
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
        let hadSyncFailed = mark.hasSyncFailed
        try await file.write(bytes, at: 0)
        isAttached = true
        if mark.hasSyncFailed != hadSyncFailed { syncFailed() }
    }

    /// Records up to `sequence` survive a loss of power. Costs one write of 96 bytes, which nobody waits for.
    func synced(upTo sequence: UInt64) {
        context.loop.assertOwner()
        mark.synced = max(mark.synced, sequence)
        write()
    }

    /// What the kernel has of the journal may not be what the disk has, though a later sync would say so.
    func syncFailed() {
        context.loop.assertOwner()
        mark.hasSyncFailed = true
        owesFailure = isAttached
        write()
    }

    /// The same before the attach is marked: returns once the mark that is there says so, to the next attach.
    func syncFailedBeforeAttach() async {
        var waits = ScratchWaits()
        while true {
            do throws(ScratchError) { return try await noteFailure() } catch {
                if waits.trouble == nil { tell(error) }
                await context.environment.sleep(ns: waits.begin(error))
            }
        }
    }

    private func noteFailure() async throws(ScratchError) {
        guard case .mark(var before) = try await JournalMark.find(in: folder, of: diskID, context.scratch) else {
            return
        }
        before.count += 1
        before.hasSyncFailed = true
        var bytes = [UInt8](repeating: 0, count: JournalMark.slotBytes)
        bytes.withUnsafeMutableBytes { before.put($0.baseAddress!, of: diskID) }
        let file = try context.scratch.open(JournalMark.path(folder), create: false)
        try await file.write(bytes, at: UInt64(before.offset))
    }

    private func tell(_ error: ScratchError) {
        context.problem(
            "\(JournalMark.path(folder)) can't say that a sync of the journal has failed: \(error); it is tried until it can, and the disk is not attached before"
        )
    }

    /// Lets go of the file until the next sync: an idle disk holds no descriptor.
    func close() { file = nil }

    private func write() {
        guard isAttached, !waits.isWaiting else { return }
        if isWriting {
            isStale = true
            return
        }
        mark.count += 1
        isWriting = true
        do throws(ScratchError) {
            let file: any ScratchFile
            if let open = self.file {
                file = open
            } else {
                file = try context.scratch.open(JournalMark.path(folder), create: false)
            }
            self.file = file
            mark.put(slot.baseAddress!, of: diskID)
            let isDone = try withUnsafePointer(to: UnsafeRawBufferPointer(slot)) { one throws(ScratchError) in
                // The completion keeps the marker, whose slot the kernel reads.
                try file.write(UnsafeBufferPointer(start: one, count: 1), at: UInt64(mark.offset)) { [self] in
                    written($0)
                }
            }
            if isDone { written(nil) }
        } catch {
            written(error)
        }
    }

    private func written(_ error: ScratchError?) {
        isWriting = false
        if let error {
            mark.count -= 1
            file = nil
            if owesFailure, error.errno != 2 /* ENOENT: nothing can be taken up by it */ { return writeLater(error) }
            // But for that, the mark only adds to what the records say, and the next sync writes it again.
        }
        if isStale {
            isStale = false
            return write()
        }
        owesFailure = false
        _ = waits.end()
        onQuiet()
    }

    private func writeLater(_ error: ScratchError) {
        if waits.trouble == nil { tell(error) }
        isStale = false
        context.after(ns: waits.begin(error)) { [self] in
            waits.isWaiting = false
            write()
        }
    }
}
