// The files of a journal: what recovery hands over, where the next records go, and what is removed.

internal import BlockCache
internal import Runtime

extension Journal {
    // MARK: Taking up

    /// Takes over what recovery found. What is not part of the journal is gone for good before anything can be written:
    /// should power be lost, it would else come back once the generation has gone past what it contradicts.
    func adopt(_ found: ReplayedJournal, mustRewrite: Bool) async throws(ScratchError) {
        for (segment, lengthBytes) in found.torn {
            try segment.file.truncate(to: lengthBytes)
            do throws(ScratchError) { try await segment.file.sync() } catch {
                // What else of the file was in the page cache only may be lost to later syncs too.
                await marker.syncFailedBeforeAttach()
                throw error
            }
            segment.lengthBytes = lengthBytes
        }
        for segment in found.dead.reversed() { try scratch.remove(segment.path) }
        if !found.dead.isEmpty { try await scratch.syncDirectory(folder) }
        if mustRewrite { for segment in found.segments { try await Journal.rewrite(segment) } }
        for segment in found.segments {
            segments[segment.number] = segment
            liveBytes += segment.lengthBytes
        }
        nextNumber = max(nextNumber, found.nextNumber)
        lastID = found.lastID
        goOn(behind: found.lastSequence)
        // What was found may still be in the page cache only: the next sync covers it.
        syncedSequence = 0
        directoryIsSynced = false
    }

    /// After a failed sync the kernel takes for clean what it could not write, and the next sync would say that all is well:
    /// so it is given every byte again.
    private static func rewrite(_ segment: Segment) async throws(ScratchError) {
        var offset: UInt64 = 0
        while offset < segment.lengthBytes {
            let count = Int(min(1 << 20, segment.lengthBytes - offset))
            try await segment.file.write(try await segment.file.read(count: count, at: offset), at: offset)
            offset += UInt64(count)
        }
    }

    // MARK: Writing

    func writableSegment() throws(ScratchError) -> Segment {
        if let current, current.lengthBytes < segmentBytes { return current }
        let number = nextNumber
        let path = Journal.path(folder, number)
        let file = try scratch.open(path, create: true)
        try file.truncate(to: 0)
        // The header goes in front of the first batch, in the same write.
        let segment = Segment(number: number, file: file, path: path, lengthBytes: 0, lastSequence: appendedSequence)
        segment.id = max(1, context.environment.randomBits())
        nextNumber += 1
        segments[number] = segment
        current = segment
        directoryIsSynced = false
        return segment
    }

    static func path(_ folder: String, _ number: UInt32) -> String {
        let digits = String(number)
        return folder + "/" + String(repeating: "0", count: 10 - digits.count) + digits + ".journal"
    }

    /// A new segment begins once one is this long: a share of the limit, so that commits free something of a small one.
    private var segmentBytes: UInt64 {
        let settings = context.settings
        return min(UInt64(settings.journalSegmentBytes), max(settings.journalLimitBytes / 16, 1 << 20))
    }

    // MARK: Removing

    /// At a safe point of a journal that is filling up, the next record begins a new segment: the old one can go as soon as
    /// the safe point is committed.
    func rotateIfFilling() {
        guard flight == nil, liveBytes > context.settings.journalLimitBytes / 4 || context.journals.isFilling else {
            return
        }
        current = nil
    }

    /// The store has everything up to `sequence`: removes the segments that hold nothing else. Should a loss of power bring
    /// one back, all of it lies within what the generation holds.
    func release(upTo sequence: UInt64, newestFirst: Bool = false) {
        if let current, current.lastSequence <= sequence, flight == nil, current.lengthBytes > 1 << 20 || queued.isEmpty
        {
            self.current = nil
        }
        for segment in segments.values.sorted(by: { ($0.number < $1.number) != newestFirst })
        where segment.lastSequence <= sequence && segment !== current && segment !== flight?.segment {
            segments[segment.number] = nil
            liveBytes -= segment.lengthBytes
            do { try scratch.remove(segment.path) } catch {
                context.problem("\(segment.path) can't be removed: \(error)")
            }
        }
        if segments.isEmpty, flight == nil {
            freeBuffers()
            marker.close()
        }
    }

    /// Removes every segment: the disk was released clean.
    func removeAll() {
        // First, for what it says is about them.
        Journal.unmarkAttached(folder, scratch)
        // Newest first: should a loss of power bring some back, none of them goes on from one that is gone.
        release(upTo: .max, newestFirst: true)
        abandon()
        // And the folder, where nothing is left in it.
        try? scratch.remove(folder)
    }

    // MARK: The notes of an attached disk

    // A disk whose journal is empty is attached all the same: the daemon that starts next takes it up, or gives it back.
    // As long as that is not done nobody else can have the disk, for this server lives.

    /// Says so before the head does, and durably: a loss of power may take the mark of the attachment and every segment.
    static func noteOwned(_ folder: String, _ scratch: any ScratchDisk) async throws(ScratchError) {
        let names = try scratch.list(folder)
        if !names.contains(where: isNote) { _ = try scratch.open(folder + "/" + ownedName, create: true) }
        try await scratch.syncDirectory(folder)
    }

    /// Removes what says that the disk was attached.
    static func unmarkAttached(_ folder: String, _ scratch: any ScratchDisk) {
        try? scratch.remove(JournalMark.path(folder))
        try? scratch.remove(folder + "/" + ownedName)
    }

    /// And the folder, where nothing is left in it.
    static func forget(_ folder: String, _ scratch: any ScratchDisk) {
        unmarkAttached(folder, scratch)
        try? scratch.remove(folder)
    }

    /// Whether there are segments, or that can't be told.
    static func hasSegments(_ folder: String, _ scratch: any ScratchDisk) -> Bool {
        guard let names = try? scratch.list(folder) else { return true }
        return names.contains { $0.hasSuffix(".journal") }
    }

    /// Whether a disk with this folder was attached, or has a journal, when its server ended.
    static func isLeft(in folder: String, _ scratch: any ScratchDisk) -> Bool {
        // One that can't be read is looked at by those who say why.
        guard let names = try? scratch.list(folder) else { return true }
        return names.contains(where: isNote)
    }

    private static func isNote(_ name: String) -> Bool {
        name.hasSuffix(".journal") || name == JournalMark.name || name == ownedName
    }

    /// The empty file that says that the head names this server, or is about to.
    static let ownedName = "owned"
}
