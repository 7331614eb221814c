// Sessions: who may send requests, what a lost connection means, and rolling back. Rules 1 to 3 of the design's "What a
// dropped connection means" are here.
//
// Always holds: at most one session; a request of a connection that left never takes effect afterwards; a session name whose
// acknowledged writes were undone is in `lostSessions` before anyone else is admitted.

internal import BlockCache
internal import Logging
internal import Runtime

extension Disk {
    /// How long an admission stands before its connection must have joined.
    private static let admissionMs: UInt64 = 30_000

    private var isLive: Bool { !clients.isEmpty || (session?.admissions ?? 0) > 0 }

    /// Decides whether a client may attach, and makes it part of the running session or the first of a new one.
    func admit(session name: String?, client: ClientIdentity) async throws(AttachError) -> Admission {
        // A named session finds what it was told, or is refused.
        if session == nil || name == nil { try await confirmOwnership() }
        while !unjournaledLosses.isEmpty, journal.failure == nil, lost == nil {
            await context.environment.sleep(ns: 1_000_000)
        }
        if !unjournaledLosses.isEmpty, lost == nil {
            throw AttachError(
                .unavailable,
                "disk '\(self.name)' went back to its last safe point, and its journal can't be written to say so; mend the scratch disk and start margined anew"
            )
        }
        if let lost { throw AttachError(.refused, "disk '\(self.name)': \(lost)") }
        if isDraining { throw AttachError(.shutdown, "the server is shutting down") }
        if let name, lostSessions.contains(name) {
            throw AttachError(
                .refused,
                "disk '\(self.name)' went back to its last safe point while session '\(name)' was away, so that session can't go on; "
                    + "unmount, and attach under a new session name")
        }
        if let running = session, !running.admits(name: name, host: client.host, isLive: isLive) {
            if isLive {
                throw AttachError(
                    .refused,
                    "disk '\(self.name)' is in use by \(running.description); a disk has one writer: detach there first"
                )
            }
            // The client that was away has been replaced: its writes stay, but it may never go on.
            replace(running.name)
            session = nil
        }
        windowTimer?.cancel()
        windowTimer = nil
        let admitted: Session
        if let session {
            admitted = session
        } else {
            if let ended, !ended.isOver, ended.name != name { replace(ended.name) }
            ended = nil
            admitted = Session(
                name: name, host: client.host, address: client.address, sinceMs: context.environment.wallMs)
            session = admitted
        }
        admitted.admissions += 1
        let ticket = Admission.Ticket(admitted)
        do throws(AttachError) {
            if head.session != admitted.name, admitted.name != nil { try await recordSession() }
        } catch {
            lapse(ticket)
            throw error
        }
        context.after(ns: Disk.admissionMs * 1_000_000) { [weak self] in self?.lapse(ticket) }
        return Admission(ticket) { [weak self, loop = context.loop] ticket in
            loop.post { [weak self] in self?.lapse(ticket) }
        }
    }

    /// The head names the session before its first request is served.
    private func recordSession() async throws(AttachError) {
        do {
            try await swapHead(.none)
        } catch {
            throw AttachError(.unavailable, "disk '\(name)': the session could not be recorded: \(error)")
        }
        if let lost { throw AttachError(.refused, "disk '\(name)': \(lost)") }
    }

    /// An admission that was never joined: its client has gone within the handshake.
    private func lapse(_ ticket: Admission.Ticket) {
        guard !ticket.isRedeemed else { return }
        ticket.isRedeemed = true
        ticket.session.admissions -= 1
        if session === ticket.session, lost == nil, !isLive { connectionsGone(clean: false) }
    }

    package func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        guard let ticket = (admission as? Admission)?.ticket, !ticket.isRedeemed, lost == nil,
            session === ticket.session
        else {
            return ready(AttachError(.refused, "disk '\(name)': the attachment has lapsed; attach again"))
        }
        ticket.isRedeemed = true
        ticket.session.admissions -= 1
        ticket.session.droppedAtNs = nil
        let others = clients
        clients.append(client)
        if others.isEmpty { return ready(nil) }
        nonisolated(unsafe) let waiting = (client: client, others: others, ready: ready)  // stays on this loop
        context.spawn { [self] in
            await settle(waiting.others)
            let stands = lost == nil && isConnected(waiting.client)
            waiting.ready(stands ? nil : AttachError(.refused, "disk '\(name)' is no longer served here"))
        }
    }

    /// Before a further connection of a session is served, all that the others had sent takes effect or never will: they
    /// may be dead without knowing it, and their requests be sent again on the new one.
    private func settle(_ others: [any DeviceClient]) async {
        let deadline = nowNs + 2_000_000_000
        var isFirst = true
        while true {
            let unsettled = others.filter { other in
                guard isConnected(other) else { return false }
                let isIdle = other.absorb(isFirst: isFirst)
                return isConnected(other) && (!isIdle || hasPendingWrite(of: other))
            }
            isFirst = false
            if unsettled.isEmpty { return }
            if nowNs >= deadline {
                for other in unsettled {
                    let reason = "it held an unfinished request while another connection of its session began"
                    leave(other, clean: false)
                    other.disconnect(reason: reason)
                }
                return
            }
            await context.environment.sleep(ns: 10_000_000)
        }
    }

    private func isConnected(_ client: any DeviceClient) -> Bool { clients.contains { $0 === client } }

    private func hasPendingWrite(of client: any DeviceClient) -> Bool {
        pendingRequests.values.contains {
            $0.client === client && $0.kind != .read && $0.kind != .flush && !$0.isCancelled
        }
    }

    package func leave(_ client: any DeviceClient, clean: Bool) {
        guard let place = clients.firstIndex(where: { $0 === client }) else { return }
        clients.remove(at: place)
        for request in pendingRequests.values where request.client === client { request.isCancelled = true }
        if clean { session?.cleanSequence = journal.lastSequence }
        if lost != nil { return }
        if !isLive { return connectionsGone(clean: clean) }
        if clean, clients.isEmpty {
            // Another one is within its handshake, or was cut there, and has written nothing: what there is ended cleanly.
            markSafePoint(.clean)
            _ = journal.append()
        }
    }

    /// The last connection is gone. A client that ended with DISC is done, though a connection that it had given up before
    /// be found dead only now: then nothing was written since.
    private func connectionsGone(clean: Bool) {
        if clean || session.map({ $0.cleanSequence > 0 && $0.cleanSequence >= active.lastSequence }) ?? false {
            markSafePoint(.clean)
            _ = journal.append()
            endSession(isOver: true)
            startCommit()
            scheduleRelease()
            return
        }
        session?.droppedAtNs = nowNs
        openWindow()
    }

    /// Keeps a session without connections for the resume window, then rolls back.
    func openWindow() {
        let window = head.options.resumeWindowMs
        if window == 0 { return rollBack() }
        windowTimer?.cancel()
        windowTimer = context.after(ns: UInt64(window) * 1_000_000) { [weak self] in
            guard let self, lost == nil, !isLive, session != nil else { return }
            rollBack()
        }
    }

    /// Goes back to the last safe point: drops the active layer, O(what it touched). The session ends; if anything of it was
    /// undone it can never go on.
    func rollBack() {
        windowTimer?.cancel()
        windowTimer = nil
        if !active.isEmpty {
            log.notice(
                "disk \(name): rolled back to its last safe point: \(active.dataBytes) bytes of \(session?.description ?? "a lost session") are undone"
            )
            let gone = session?.name
            let sum = gone.map { JournalFormat.sessionSum($0) } ?? 0
            forget(gone)
            session = nil
            journal.mark(.rollBack, context.settings.fault == .lostSessionResumes ? 0 : sum)
            if context.settings.fault != .rollBackSkipped { active = Layer(pages: pages) }
            active.lastSequence = journal.lastSequence
            if let gone { unjournaledLosses.insert(gone) }
            whenAppended { [self] error in
                guard error == nil, let gone, unjournaledLosses.remove(gone) != nil else { return }
                headIsStale = true
                startCommit()
            }
        }
        endSession(isOver: false)
        startCommit()
        scheduleRelease()
    }

    /// The session has ended with everything in safe points. The head names it until they are committed: on another server,
    /// which knows nothing of them, it must not go on. `isOver`: its client is done.
    private func endSession(isOver: Bool) {
        if let name = session?.name {
            headIsStale = headIsStale || head.session != nil
            ended = Ended(name: name, sequence: (waiting ?? committing)?.lastSequence ?? 0, isOver: isOver)
        }
        session = nil
        forgetSuperBlocks()
    }

    /// A session that has ended, and the journal record up to which it must be committed.
    struct Ended {
        var name: String
        var sequence: UInt64
        var isOver: Bool
    }

    /// Another client is served after the session of that name: it may not go on.
    private func replace(_ name: String?) {
        guard let name else { return }
        forget(name)
        journal.mark(.sessionReplaced, JournalFormat.sessionSum(name))
        whenAppended { _ in }
    }

    /// The session may never come back.
    private func forget(_ name: String?) {
        guard let name, context.settings.fault != .lostSessionResumes else { return }
        lostSessions.removeAll { $0 == name }
        lostSessions.append(name)
        if lostSessions.count > Head.maxLostSessions { lostSessions.removeFirst() }
        headIsStale = true
    }

    // MARK: Giving the disk back

    /// A disk that nobody uses is given back after a while, so that it costs nothing and any server may take it.
    func scheduleRelease() {
        let delay = UInt64(context.settings.releaseAfterMs) * 1_000_000
        context.after(ns: delay) { [weak self] in
            guard let self, lost == nil, session == nil, !isDraining, !isLive else { return }
            context.spawn { [self] in await releaseIfIdle() }
        }
    }

    func releaseIfIdle() async {
        guard session == nil, !isLive, isClean, lost == nil else { return }
        isReleasing = true
        defer { isReleasing = false }
        do {
            try await swapHead(.release)
        } catch {
            log.notice("disk \(name): could not be given back: \(error)")
            return
        }
        guard lost == nil else { return }
        lost = "it was given back; attach again"
        wasReleased = true
        journal.removeAll()
        onGone(self)
    }

    /// Ends service for a shutdown: connections end, what is safe is committed. What a session may still resume stays in
    /// the journal, and the disk stays this server's.
    func drain() async {
        isDraining = true
        for client in clients {
            clients.removeAll { $0 === client }
            for request in pendingRequests.values where request.client === client { request.isCancelled = true }
            client.disconnect(reason: "the server is shutting down")
        }
        await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
            whenAppended { [self] _ in journal.sync { _ in done.resume() } }
        }
        while lost == nil, waiting != nil || committing != nil || isCommitting {
            startCommit()
            await context.environment.sleep(ns: 5_000_000)
        }
        if lost == nil, session == nil { await releaseIfIdle() }
    }
}
