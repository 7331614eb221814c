// Safe points: the instants at which the acknowledged bytes are a consistent file system. Which they are depends on the
// disk's rule; what happens at one is always the same: the active layer is frozen and a record is journaled.

internal import BlockCache
internal import Glibc
internal import ObjectStore
internal import Runtime

extension Disk {
    /// The rule in force: `auto` follows what stands at 64 KiB.
    var rule: SafePointRule {
        switch head.options.safePoints {
        case .auto: hasSuperBlock ? .btrfs : .flush
        case let chosen: chosen
        }
    }

    /// The bytes up to now are consistent: freezes the active layer (O(1), or O(what it touched) where one waits already).
    /// One without changes makes a generation only to free the journal of records that mark what became of sessions.
    func markSafePoint(_ kind: GenerationKind) {
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
        if kind == .btrfsFull { commitFullTransaction() }
        scheduleCommit()
    }

    /// Once in a commit interval a full commit of btrfs becomes a generation at once, before the log commits that follow it
    /// take its place: those can't be mounted on a device that is read-only, and a file system with many fsyncs would have
    /// no generation for read-only forks.
    private func commitFullTransaction() {
        guard !isCommitting, committing == nil, lost == nil,
            nowNs >= lastFullNs + UInt64(context.settings.commitIntervalMs) * 1_000_000
        else { return }
        lastFullNs = nowNs
        view.beginCommit()
        startCommit()
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

    /// A write touched the page where btrfs keeps its primary super block.
    func superBlockPageChanged() {
        guard let slot = active.slot(Int(SuperBlock.page), of: 0), let bytes = pages.bytes(slot),
            let found = SuperBlock(bytes)
        else {
            hasSuperBlock = false
            return
        }
        // mkfs on a used disk begins again at a low generation, after a super block that was none.
        let goesOn = !hasSuperBlock || found.generation >= lastSuperGeneration
        hasSuperBlock = true
        if rule == .btrfs, flushedSinceSuper, goesOn {
            let isLogCommit = found.logRoot != 0 && found.generation == lastSuperGeneration
            markSafePoint(isLogCommit ? .btrfsLog : .btrfsFull)
            flushedSinceSuper = false
        }
        lastSuperGeneration = found.generation
    }

    /// Looks at 64 KiB as the disk is now: at attach, and after a roll-back.
    func lookForSuperBlock() async -> DeviceError? {
        guard sizeBytes >= SuperBlock.offset + UInt64(SuperBlock.lengthBytes) else {
            hasSuperBlock = false
            return nil
        }
        switch await readSuperBlock() {
        case .failed(let error): return error
        case .found(let found):
            hasSuperBlock = found != nil
            needsSuperBlockLook = false
            lastSuperGeneration = found?.generation ?? 0
            return nil
        }
    }

    private enum Looked: Sendable {
        case found(SuperBlock?)
        case failed(DeviceError)
    }

    /// What lies at 64 KiB; an error when the store does not give it in the time that a request has.
    private func readSuperBlock() async -> Looked {
        await withCheckedContinuation { continuation in
            let request = DeviceRequest()
            request.kind = .read
            let ticket = ReadTicket(request)
            ticket.timer = context.after(ns: UInt64(context.settings.requestTimeoutMs) * 1_000_000) { [self] in
                guard ticket.close() else { return }
                context.problem(
                    "disk \(name): what is on it could not be read in \(context.settings.requestTimeoutMs) ms\(context.locations.troubles)"
                )
                storeErrors += 1
                continuation.resume(returning: .failed(.io))
            }
            context.spawn { [self] in
                let page = UnsafeMutableRawPointer.allocate(byteCount: SuperBlock.lengthBytes, alignment: 16)
                defer { page.deallocate() }
                let run = Run(offset: SuperBlock.offset, count: SuperBlock.lengthBytes, target: page)
                let error = await fill([run], ticket)
                guard ticket.close() else { return }
                continuation.resume(returning: error.map { .failed($0) } ?? .found(SuperBlock(page)))
            }
        }
    }

    // MARK: Flush

    func submitFlush(_ request: DeviceRequest) {
        if journal.failure != nil { return finish(request, .io) }
        if rule == .flush || context.settings.fault == .flushTakenForSafePoint { markSafePoint(.flush) }
        whenAppended { [self] error in
            if let error { return finish(request, error) }
            makeDurable { [self] error in
                if error == nil { flushedSinceSuper = true }
                finish(request, error)
            }
        }
    }

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
