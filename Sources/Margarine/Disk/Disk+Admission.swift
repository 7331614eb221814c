// How a client comes to a disk: admitted by `Tenure`, with what it changes recorded in the head first. A failed attach changes
// nothing.

internal import BlockCache
internal import Logging
internal import Runtime

extension Disk {
    /// How long an admission stands before its connection must have joined.
    private static let admissionMs: UInt64 = 30_000

    /// Decides whether a client may attach, and makes it part of the running session or the first of a new one. What can be
    /// decided here is decided before the store is asked.
    ///
    /// - Returns: nil when the disk is this server's no more: open it anew.
    func admit(
        session name: String?, client: ClientIdentity, _ asker: Asker
    ) async throws(AttachError) -> Admission? {
        context.loop.assertOwner()
        var isBack = false
        defer { if isBack { returning -= 1 } }
        while true {
            try await waitForLosses(asker)
            try asker.check()
            if let name, isLost(name) { throw lostSession(name) }
            let isMember =
                session?.admits(
                    name, client, isLive: tenure.isServing, addresses: context.settings.sessionAddresses) ?? true
            switch happen(isMember ? .asked : .otherAsked) {
            case .admit: return makeAdmission(session!, client, isLive: true)
            case .askStore: return try await askStore(name, client, asker, isMember: isMember)
            case .wait:
                // It came back in time, though another one's outcome is to be awaited.
                if isMember, tenure == .challenged, !isBack {
                    isBack = true
                    returning += 1
                }
                await undecided.wait(asker)
            case .reopen:
                while isLeaving {
                    await leaving.wait(asker)
                    try asker.check()
                }
                return nil
            case .inUse: throw session!.refusal(name, disk: self.name, wallMs: context.environment.wallMs)
            case .stopping: throw AttachError(.shutdown, "the server is shutting down")
            case nil: throw AttachError(.unavailable, "disk '\(self.name)' can't be attached; see the server's log")
            }
        }
    }

    /// What this admission changes is asked of the store, while nobody else's is decided.
    private func askStore(
        _ name: String?, _ client: ClientIdentity, _ asker: Asker, isMember: Bool
    ) async throws(AttachError) -> Admission? {
        let replaces = !isMember || session == nil
        if context.settings.fault == .failedAttachReplaces, !isMember { displace() }
        do throws(AttachError) {
            try await prepare(name, asker, replaces: replaces)
        } catch {
            notes.opening = nil
            happen(.denied)
            startCommit()
            if lost != nil { return nil }
            throw error
        }
        switch happen(.granted) {
        case .admit: break
        case .stopping:
            notes.opening = nil
            startCommit()
            throw AttachError(.shutdown, "the server is shutting down")
        default: return nil
        }
        if replaces {
            notes.ended = nil
            forgetSuperBlocks()
            session = Session(
                name: name, host: client.host, address: client.address, sinceMs: context.environment.wallMs)
        }
        notes.opening = nil
        return makeAdmission(session!, client, isLive: false)
    }

    /// Everything that an admission has to wait for. Changes nothing but the head, and that last; what it says of a client that
    /// went away meanwhile is taken back by the next swap.
    private func prepare(_ name: String?, _ asker: Asker, replaces: Bool) async throws(AttachError) {
        if let name, name != notes.claimant, name != head.session {
            let isForgotten = try await AttachError.wrap { [head] () throws(CatalogError) in
                try await self.heads.isForgotten(name, of: head)
            }
            if isForgotten { throw lostSession(name) }
        }
        // A named session finds what it was told, or is refused.
        if replaces || name == nil { try await confirmOwnership() }
        try asker.check()
        do {
            try await swapHead(.admit(name))
        } catch {
            throw AttachError(.unavailable, "disk '\(self.name)': the session could not be recorded: \(error)")
        }
        if let lost { throw AttachError(.refused, "disk '\(self.name)': \(lost)") }
        // Nobody was served: the head is put right again.
        try asker.check()
    }

    /// For `Fault.failedAttachReplaces`: the session ends before its successor is recorded.
    private func displace() {
        if let name = session?.name { notes.lost.append(name) }
        session = nil
    }

    /// A roll-back that the journal does not have yet comes first, whoever was rolled back: after a crash what it undid would
    /// be there again, under a client that has seen it gone.
    private func waitForLosses(_ asker: Asker) async throws(AttachError) {
        var isUnwritten: Bool { journal.isMissingEnds || !notes.unjournaled.isEmpty }
        while isUnwritten, journal.failure == nil, lost == nil {
            try asker.check()
            if !awaitsAppend {
                awaitsAppend = true
                whenAppended { [self] _ in
                    awaitsAppend = false
                    appending.wakeAll()
                }
            }
            if awaitsAppend { await appending.wait(asker) }
        }
        if isUnwritten, lost == nil {
            throw AttachError(
                .unavailable,
                "disk '\(name)' went back to its last safe point, and its journal can't be written to say so; attach again once the scratch disk can be written"
            )
        }
    }

    /// Whether the session is known to have lost what it was told.
    private func isLost(_ name: String) -> Bool {
        name != notes.claimant && (notes.lost.contains(name) || head.lostSessions.contains(name))
    }

    private func lostSession(_ name: String) -> AttachError {
        AttachError(
            .refused,
            "disk '\(self.name)' went back, or served another client, while session '\(name)' was away, so that session can't go on; "
                + "unmount, and attach under a new session name")
    }

    // MARK: Admissions

    /// - Parameter isLive: the session was being served before.
    private func makeAdmission(_ admitted: Session, _ client: ClientIdentity, isLive: Bool) -> Admission {
        admitted.welcome(client, isLive: isLive, disk: name, log)
        admitted.admissions += 1
        let ticket = Admission.Ticket(admitted)
        ticket.timer = context.after(ns: Disk.admissionMs * 1_000_000) { [weak self] in self?.lapse(ticket) }
        return Admission(ticket) { [weak self, loop = context.loop] ticket in
            loop.post { [weak self] in self?.lapse(ticket) }
        }
    }

    /// An admission that was never joined: its client has gone within the handshake.
    private func lapse(_ ticket: Admission.Ticket) {
        guard ticket.redeem(), session === ticket.session, lost == nil else { return }
        if clients.isEmpty, ticket.session.admissions == 0 { connectionsGone(clean: false) }
    }

    package func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        context.loop.assertOwner()
        guard let ticket = (admission as? Admission)?.ticket, session === ticket.session, tenure.isServing,
            ticket.redeem()
        else {
            return ready(AttachError(.refused, "disk '\(name)': the attachment has lapsed; attach again"))
        }
        happen(.joined)
        ticket.session.droppedAtNs = nil
        let others = clients
        clients.append(client)
        if others.isEmpty { return ready(nil) }
        nonisolated(unsafe) let waiting = (client: client, others: others, ready: ready)  // stays on this loop
        context.spawn { [self] in
            await settle(waiting.others, for: waiting.client)
            let stands = lost == nil && isConnected(waiting.client)
            waiting.ready(stands ? nil : AttachError(.refused, "disk '\(name)' is no longer served here"))
        }
    }
}
