// What becomes of a disk when clients come and go: the state machine's steps carried out, lost connections, rolling back and
// giving the disk back. Rules 1 to 3 of the design's "What a dropped connection means" are here.
//
// Always holds: at most one session; a request of a connection that left never takes effect afterwards; a session whose
// acknowledged writes were undone is in `notes.lost` or in the head before anyone else is admitted.

internal import BlockCache
internal import Logging
internal import Runtime

extension Disk {
    // MARK: The state machine

    /// Lets `event` happen: the one place where `tenure` changes.
    @discardableResult
    func happen(_ event: TenureEvent) -> TenureAnswer? {
        context.loop.assertOwner()
        guard let step = Tenure.transition(tenure, event) ?? faulty(event) else {
            // A mistake of ours: better no service than a wrong one.
            context.problem("disk \(name): '\(event)' can't happen while it is '\(tenure)'")
            if event != .taken { lose("an internal error (\(event) while \(tenure))") }
            return nil
        }
        let last = tenure
        tenure = step.next
        if tenure != .away, tenure != .challenged {
            windowTimer?.cancel()
            windowTimer = nil
        }
        if tenure != .idle, context.settings.fault != .releaseIgnoresAdmission {
            restTimer?.cancel()
            restTimer = nil
        }
        for effect in step.effects { carryOut(effect) }
        if last.isUndecided, last != step.next { undecided.wakeAll() }
        return step.answer
    }

    /// For `Fault.releaseIgnoresAdmission`: what a release does that nothing holds up.
    private func faulty(_ event: TenureEvent) -> TenureStep? {
        guard context.settings.fault == .releaseIgnoresAdmission else { return nil }
        switch event {
        case .gaveBack: return TenureStep(.released, nil, [.leave])
        case .restEnded: return TenureStep(tenure, nil, [.release])
        case .keptIt: return TenureStep(tenure)
        default: return nil
        }
    }

    private func carryOut(_ effect: TenureEffect) {
        switch effect {
        case .endSession: endSession(isOver: true)
        case .openWindow: openWindow()
        case .rollBack: rollBack()
        case .rest: rest()
        case .release:
            isFresh = false
            context.spawn { [self] in await giveBack() }
        case .leave: leaveDisk()
        }
    }

    /// Begins as the opening found it: `found` may come back, to find exactly what it was told.
    func begin(found: Session?) {
        precondition(tenure == .idle && session == nil)
        if let found {
            session = found
            found.droppedAtNs = nowNs
            tenure = .away
            openWindow()
            startCommit()
        } else {
            rollBack()
            rest()
        }
    }

    // MARK: Connections

    func isConnected(_ client: any DeviceClient) -> Bool { clients.contains { $0 === client } }

    func hasPendingWrite(of client: any DeviceClient) -> Bool {
        pendingRequests.values.contains {
            $0.client === client && $0.kind.changesData && !$0.isCancelled
        }
    }

    package func leave(_ client: any DeviceClient, clean: Bool) {
        context.loop.assertOwner()
        guard let place = clients.firstIndex(where: { $0 === client }) else { return }
        clients.remove(at: place)
        cancelRequests(of: client)
        wakeAllForRoom()
        if clean { session?.cleanSequence = journal.lastSequence }
        if lost != nil || !clients.isEmpty { return }
        if session?.admissions == 0 { return connectionsGone(clean: clean) }
        happen(.unjoined)
        if clean {
            // Another one is within its handshake, or was cut there, and has written nothing: what there is ended cleanly.
            markSafePoint(.clean)
            _ = journal.append()
        }
    }

    /// The last connection is gone. A client that ended with DISC is done, though a connection that it had given up before
    /// be found dead only now: then nothing was written since.
    func connectionsGone(clean: Bool) {
        if clean || session.map({ $0.cleanSequence > 0 && $0.cleanSequence >= active.lastSequence }) ?? false {
            markSafePoint(.clean)
            _ = journal.append()
            happen(.endedCleanly)
            startCommit()
        } else {
            session?.droppedAtNs = nowNs
            happen(.cut)
        }
    }

    /// Keeps a session without connections for the resume window, then rolls back.
    private func openWindow() {
        let window = head.options.resumeWindowMs
        if window == 0 {
            happen(.windowEnded)
            return
        }
        windowTimer = context.after(ns: UInt64(window) * 1_000_000) { [weak self] in self?.windowIsOver() }
    }

    /// It does not end while a client of the session waits for another one's outcome: that one came back in time.
    private func windowIsOver() {
        if returning == 0 { return _ = happen(.windowEnded) }
        windowTimer = context.after(ns: 100_000_000) { [weak self] in self?.windowIsOver() }
    }

    // MARK: Rolling back

    /// Goes back to the last safe point: drops the active layer, O(what it touched). The session ends; if anything of it was
    /// undone it can never go on.
    func rollBack() {
        if !active.isEmpty {
            log.notice(
                "disk \(name): rolled back to its last safe point: \(active.dataBytes) bytes of \(session?.description ?? "a lost session") are undone"
            )
            let gone = session?.name
            let sum = gone.map { JournalFormat.sessionSum($0) } ?? 0
            if let gone, context.settings.fault != .lostSessionResumes {
                notes.lost.append(gone)
                notes.unjournaled.insert(gone)
            }
            session = nil
            journal.mark(.rollBack, context.settings.fault == .lostSessionResumes ? 0 : sum)
            if context.settings.fault != .rollBackSkipped { discard(view.rollBack(to: Layer(pages: pages))) }
            active.lastSequence = journal.lastSequence
            whenAppended { [self] error in
                guard error == nil, let gone, notes.unjournaled.remove(gone) != nil else { return }
                startCommit()
            }
        }
        endSession(isOver: false)
        startCommit()
    }

    /// The session has ended with everything in safe points. The head names it until they are committed: on another server,
    /// which knows nothing of them, it must not go on. `isOver`: its client is done.
    private func endSession(isOver: Bool) {
        if let name = session?.name {
            notes.ended = EndedSession(
                name: name, sequence: (waiting ?? committing)?.lastSequence ?? 0, isOver: isOver)
        }
        session = nil
        forgetSuperBlocks()
    }

    // MARK: Giving the disk back

    /// A disk that nobody uses is given back after a while, so that it costs nothing and any server may take it.
    private func rest() {
        restTimer?.cancel()
        let delay = UInt64(context.settings.releaseAfterMs) * 1_000_000
        restTimer = context.after(ns: delay) { [weak self] in
            guard let self, lost == nil else { return }
            restTimer = nil
            if isClean { happen(.restEnded) } else if tenure == .idle { rest() }
        }
    }

    private func giveBack() async {
        do {
            try await swapHead(.release)
        } catch {
            log.notice("disk \(name): could not be given back: \(error)")
            happen(.keptIt)
            return
        }
        if lost == nil { happen(.gaveBack) }
    }

    /// Ends service for a shutdown: connections end, what is safe is committed. What a session may still resume stays in
    /// the journal, and the disk stays this server's.
    func drain() async {
        let isReserved = tenure == .reserved
        happen(.serverEnds)
        for client in clients {
            clients.removeAll { $0 === client }
            cancelRequests(of: client)
            client.disconnect(reason: "the server is shutting down")
        }
        // Admitted, and not joined: it has been told of nothing that is not in a safe point, and may go on anywhere.
        if isReserved, lost == nil, active.isEmpty { endSession(isOver: false) }
        wakeAllForRoom()
        await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
            whenAppended { [self] _ in journal.sync { _ in done.resume() } }
        }
        while lost == nil, waiting != nil || committing != nil || isCommitting {
            startCommit()
            await context.environment.sleep(ns: 5_000_000)
        }
        if lost != nil { return }
        if session == nil, isClean { return await giveBack() }
        log.notice(
            "disk \(name) is not given back: \(active.dataBytes) bytes since its last safe point wait in the scratch directory, where \(session?.description ?? "its client") may go on after the next start"
        )
    }

    // MARK: The end

    /// Another server has the disk (or it was deleted), or nobody can be served here now: stop serving it at once.
    func lose(_ reason: String, isStillOurs: Bool = false) {
        guard lost == nil else { return }
        self.isStillOurs = isStillOurs
        lost = reason
        log.error("disk \(name): \(reason); it is no longer served here")
        happen(.taken)
    }

    /// It is this server's no more: lost, or given back.
    private func leaveDisk() {
        let isGivenBack = lost == nil
        let reason = lost ?? "it was given back; attach again"
        lost = reason
        commitTimer?.cancel()
        cancelRequests(of: nil)
        let last = clients
        clients = []
        for client in last { client.disconnect(reason: reason) }
        let waiters = commitWaiters
        commitWaiters = []
        for waiter in waiters { waiter.done(.shutdown) }
        let appends = appendWaiters
        appendWaiters = []
        for waiter in appends { waiter.done(.shutdown) }
        wakeAllForRoom()
        endParked()
        claim.end()
        if isGivenBack {
            journal.removeAll()
            return onGone(self)
        }
        // Its journal may be taken up again here at once: not before the last append has landed.
        isLeaving = true
        journal.abandon { [self] in
            isLeaving = false
            leaving.wakeAll()
            onGone(self)
        }
    }
}
