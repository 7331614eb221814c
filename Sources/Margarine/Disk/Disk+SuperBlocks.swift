// Following btrfs: safe points at the writes of its super block, and the mirrors that belong to them.
//
// A full commit writes the primary super block and at once, without waiting, its mirrors. They come in any order, on any
// connection. So what is committed waits for them a moment: without them a fork would have mirrors one generation old, which
// its first scrub calls damage. A mirror that comes late makes the safe point once more, with what was written beside it: the
// next transaction's data, which nothing refers to yet.

internal import BlockCache
internal import Runtime

extension Disk {
    /// What a wait for mirrors holds up.
    struct HeldCommit {
        var isWanted = false
        var isFull = false
    }

    /// Safe points of btrfs come by themselves.
    var expectsSuperBlocks: Bool { head.options.safePoints == .btrfs || superBlocks.isFollowed }

    var awaitsMirrors: Bool { mirrorTimer != nil }

    /// A write touched the page where btrfs keeps its primary super block.
    func superBlockPageChanged() {
        if head.options.safePoints == .flush { return }
        guard let found = activeSuperBlock(page: SuperBlock.page) else { return superBlocks.superBlockWent() }
        switch superBlocks.superBlockCame(found) {
        case .none: endMirrorWait()
        case .log: markSafePoint(.btrfsLog)
        case .full:
            endMirrorWait()
            awaitMirrors(of: found)
            freeze(.btrfsFull)
        }
    }

    /// The session is over: the next one's writes are to be judged by themselves.
    func forgetSuperBlocks() {
        endMirrorWait()
        superBlocks = SuperBlockWatch(isFlushed: head.options.safePoints == .btrfs)
    }

    private func activeSuperBlock(page: UInt64) -> SuperBlock? {
        let perSlice = UInt64(Geometry.pagesPerSlice)
        guard let slot = active.slot(Int(page % perSlice), of: page / perSlice), let bytes = pages.bytes(slot) else {
            return nil
        }
        return SuperBlock(bytes, at: page * UInt64(Geometry.pageBytes))
    }

    // MARK: Mirrors

    private func awaitMirrors(of found: SuperBlock) {
        let missing = found.mirrorPages(sizeBytes: sizeBytes).filter {
            activeSuperBlock(page: $0)?.generation != found.generation
        }
        if missing.isEmpty { return }
        superBlocks.expectMirrors(missing)
        mirrorTimer = context.after(ns: UInt64(context.settings.mirrorsWithinMs) * 1_000_000) { [weak self] in
            self?.endMirrorHold()
        }
    }

    /// A write touched these pages while mirrors are due.
    func mirrorMayHaveCome(within written: ClosedRange<UInt64>) {
        for page in superBlocks.missingMirrors where written.contains(page) {
            guard let found = activeSuperBlock(page: page), superBlocks.mirrorCame(found, page: page) else { continue }
            freeze(.btrfsFull)
        }
        if superBlocks.missingMirrors.isEmpty { endMirrorWait() }
    }

    /// Mirrors have come, or will not.
    func endMirrorWait() {
        superBlocks.expectMirrors([])
        endMirrorHold()
    }

    /// Lets commits go on. A mirror that comes yet belongs to a further safe point.
    private func endMirrorHold() {
        guard let timer = mirrorTimer else { return }
        timer.cancel()
        mirrorTimer = nil
        let held = heldCommit
        heldCommit = HeldCommit()
        if held.isFull { commitFullTransaction() }
        if held.isWanted { startCommit() } else { scheduleCommit() }
    }

    // MARK: When to commit

    /// Once in a commit interval a full commit of btrfs becomes a generation at once, before the log commits that follow it
    /// take its place: those can't be mounted on a device that is read-only, and a file system with many fsyncs would have
    /// no generation for read-only forks.
    func commitFullTransaction() {
        if awaitsMirrors { return heldCommit.isFull = true }
        guard !isCommitting, committing == nil, waiting != nil, lost == nil, !cutComesFirst,
            nowNs >= lastFullNs + UInt64(context.settings.commitIntervalMs) * 1_000_000
        else { return }
        lastFullNs = nowNs
        view.beginCommit()
        startCommit()
    }

    /// Where btrfs is followed, a flush's safe point is committed only if no super block soon takes its place.
    func commitUnlessSuperBlockFollows() {
        guard superBlocks.isFollowed else { return scheduleCommit() }
        if superBlockTimer != nil { return }
        superBlockTimer = context.after(ns: UInt64(context.settings.superBlockWithinMs) * 1_000_000) { [weak self] in
            self?.superBlockTimer = nil
            self?.scheduleCommit()
        }
    }
}
