// Safe points: the instants at which the acknowledged bytes are a consistent file system. Which they are depends on the
// disk's rule; what happens at one is always the same: the active layer is frozen and a record is journaled.
//
// Always holds: but for the rule `btrfs`, which its operator chose, no flush is answered while something acknowledged before
// it is in no safe point. What is no safe point is gone with a lost connection, so nothing less is a flush.

internal import BlockCache
internal import Glibc
internal import Logging
internal import ObjectStore
internal import Runtime

extension Disk {
    /// The bytes up to now are consistent: freezes the active layer (O(1), or O(what it touched) where one waits already).
    /// One without changes makes a generation only to free the journal of records that mark what became of sessions.
    func markSafePoint(_ kind: GenerationKind) {
        endMirrorWait()
        freeze(kind)
    }

    /// `markSafePoint` for who waits for mirrors himself.
    func freeze(_ kind: GenerationKind) {
        lastSafePointNs = nowNs
        let frees = kind == .journalFull && journal.lastSequence > head.journalSequence
        if active.isEmpty, !frees { return }
        safePoints += 1
        let isTorn = context.settings.fault == .superBlockOvertakes && (kind == .btrfsFull || kind == .btrfsLog)
        let torn = isTorn ? superBlockAlone() : nil
        let sequence = journal.mark(.safePoint, kind.journalNumber)
        journal.rotateIfFilling()
        let isFirst = waiting == nil
        let frozen = view.freeze(
            next: Layer(pages: pages), torn: torn, newerLoses: context.settings.fault == .layersMergedWrongly)
        if isFirst { frozen.frozenAtNs = nowNs }
        frozen.lastSequence = sequence
        frozen.kind = kind
        active.lastSequence = sequence
        if kind == .flush { return commitUnlessSuperBlockFollows() }
        superBlockTimer?.cancel()
        superBlockTimer = nil
        if kind == .cut { return }
        if kind == .btrfsFull { commitFullTransaction() }
        scheduleCommit()
    }

    /// For `Fault.superBlockOvertakes`: a layer with a copy of the active one's super block and nothing else.
    private func superBlockAlone() -> Layer {
        let layer = Layer(pages: pages)
        guard let present = active.slot(Int(SuperBlock.page), of: 0), let bytes = pages.bytes(present) else {
            return layer
        }
        let slot = pages.make()
        pages.bytes(slot)!.copyMemory(from: bytes, byteCount: Geometry.pageBytes)
        layer.put(slot, page: Int(SuperBlock.page), of: 0)
        journal.write(first: SuperBlock.page, slots: [slot])
        return layer
    }

    // MARK: Flush

    /// Whether a flush makes a safe point. Under `auto` it always does, whatever stands at 64 KiB: that a file system is
    /// btrfs does not tell who flushes.
    private var flushesAreSafePoints: Bool {
        if context.settings.fault == .flushTakenForSafePoint { return true }
        if context.settings.fault == .flushWithoutSafePoint, superBlocks.generation != nil { return false }
        return head.options.safePoints != .btrfs
    }

    func submitFlush(_ request: DeviceRequest) {
        if journal.failure != nil { return finish(request, .io) }
        endMirrorWait()
        flushCame()
        whenAppended { [self] error in
            if let error { return finish(request, error) }
            makeDurable { [self] error in
                if error == nil { superBlocks.isFlushed = true }
                finish(request, error)
            }
        }
    }

    /// A flush, or a FUA write that was applied: what was acknowledged before becomes safe, if the rule says so.
    func flushCame() {
        if active.isEmpty {
            lastSafePointNs = nowNs
            return
        }
        superBlocks.flushCame()
        if flushesAreSafePoints { return markSafePoint(.flush) }
        if superBlocks.unfollowed == Disk.suspiciousFlushes {
            log.warning(
                "disk \(name): \(superBlocks.unfollowed) flushes without a super block of btrfs: under safe-points = btrfs they save nothing from a lost connection; if something else than btrfs uses the disk, use `margined disk set \(name) --safe-points auto`"
            )
        }
    }

    /// Flushes without a super block that no btrfs sends.
    private static let suspiciousFlushes = 100

    /// Calls `done` when everything acknowledged before is as durable as the disk's `durability` says.
    func makeDurable(_ done: @escaping (DeviceError?) -> Void) {
        switch head.options.durability {
        case .memory: done(nil)
        case .scratch: journal.sync { done($0 == nil ? nil : .io) }
        case .store: whenCommitted(upTo: (waiting ?? committing)?.lastSequence ?? head.journalSequence, done)
        }
    }

    /// Calls `done` once the generation with everything up to `sequence` is in the object store.
    func whenCommitted(upTo sequence: UInt64, _ done: @escaping (DeviceError?) -> Void) {
        if lost != nil { return done(.shutdown) }
        if sequence <= head.journalSequence { return done(nil) }
        commitWaiters.append((sequence, done))
        startCommit()
    }
}
