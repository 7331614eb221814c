// What the owner of a disk wants its head to say: the next head is a pure function of the present one, an intent, and what the
// owner knows of its sessions. Nothing changes but by the swap that stores it.

/// Why the head is swapped.
enum HeadIntent {
    /// To say what is known (`HeadNotes`), and nothing else.
    case note
    /// A new generation.
    case advance(GenerationRecord)
    /// A client is to be served, of this session (nil: it has no name). Any other session's claim ends.
    case admit(String?)
    /// This server has the disk no more.
    case release
}

/// A named session that has ended here.
struct EndedSession: Equatable, Sendable {
    var name: String
    /// The journal record up to which it must be committed: elsewhere, without that, it must not go on.
    var sequence: UInt64
    /// It ended with DISC: its client is done. If not, it may come back until somebody else is served.
    var isOver: Bool
}

/// What a disk's owner knows that its head has to say.
struct HeadNotes: Equatable, Sendable {
    /// The named session that has the disk, served or away.
    var session: String?
    /// Named by the opening, for the client that is about to be admitted.
    var opening: String?
    /// The last named session, once it has ended.
    var ended: EndedSession?
    /// Sessions that went back, as far as the head does not say so yet.
    var lost: [String] = []
    /// Those among them whose roll-back is not in the journal yet. The head must not know of it before: a restart would find
    /// the session lost and its writes still there.
    var unjournaled: Set<String> = []
    /// What must be committed before somebody's wish (`Head.commitWanted`) is fulfilled, by journal sequence.
    var wantedSequence: UInt64 = 0
    /// For tests of the tests: `Fault.lostSessionResumes` and `Fault.replacedSessionResumes`.
    var fault: Fault?

    /// The session that may go on with the disk as it is: it has the disk, or ended without DISC and with nothing undone.
    var claimant: String? {
        if let session { return session }
        guard let ended, !ended.isOver, fault != .replacedSessionResumes else { return nil }
        return ended.name
    }

    /// What the stored head says need not be said again.
    mutating func settle(by head: Head) {
        lost = lost.filter { unjournaled.contains($0) || !head.lostSessions.contains($0) }
        if let ended, ended.isOver, ended.sequence <= head.journalSequence { self.ended = nil }
    }
}

extension Head {
    /// The head that carries out `intent`.
    func next(_ intent: HeadIntent, _ notes: HeadNotes) -> Head {
        var next = self
        var isGivenBack = false
        switch intent {
        case .note, .admit: break
        case .advance(let record): next.advance(to: record)
        case .release:
            next.owner = nil
            isGivenBack = true
        }
        if next.commitWanted != nil, notes.wantedSequence <= next.journalSequence { next.commitWanted = nil }
        for name in notes.lost where !next.lostSessions.contains(name) {
            // A disk that is given back is never replayed: then the head alone knows.
            if isGivenBack || !notes.unjournaled.contains(name) { next.lose(session: name) }
        }
        if case .admit(let name) = intent {
            if let claimant = notes.claimant, claimant != name, notes.fault != .lostSessionResumes {
                next.lose(session: claimant)
            }
            next.session = name
        } else {
            next.session = next.holder(notes, isGivenBack: isGivenBack)
        }
        // Whose admission was not carried through in the end has displaced nobody.
        if let session = next.session { next.regain(session: session) }
        return next
    }

    /// Whom the head names: who has the disk, or must not go on elsewhere.
    private func holder(_ notes: HeadNotes, isGivenBack: Bool) -> String? {
        // For whom it was opened has nothing of it before he is admitted.
        if let name = notes.session ?? (isGivenBack ? nil : notes.opening) { return name }
        if let ended = notes.ended, !ended.isOver || ended.sequence > journalSequence { return ended.name }
        if !isGivenBack, let session, notes.unjournaled.contains(session) { return session }
        return nil
    }
}
