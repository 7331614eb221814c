// Who may use a disk: one state, and one pure function that says what each event makes of it. Everything that decides about
// clients, the resume window, giving the disk back and the end goes through `Tenure.transition`; no flag beside it says
// the same thing in another way.
//
// Always holds:
// - While somebody's admission waits for the store (`admitting`, `challenged`, `overdue`) the disk is not given back, and
//   nothing is undone.
// - While the disk is being given back (`releasing`) nobody is admitted: who asks waits for the outcome.
// - What an admission changes becomes true when the store has taken it, and not before.

/// The states. `Docs/Tenure.md` has a picture, made from `transition`.
enum Tenure: String, CaseIterable, Sendable {
    /// Nobody has it; it is given back after a while.
    case idle
    /// The first client's admission waits for the store.
    case admitting
    /// Admitted: no connection has joined yet, or none is left while one is within its handshake.
    case reserved
    /// Connections are served.
    case live
    /// The session lost its last connection without DISC; its resume window runs.
    case away
    /// As `away`, and somebody's admission waits for the store: the session's own client, or another one.
    case challenged
    /// As `challenged`, and the window has ended meanwhile.
    case overdue
    /// The head that gives it back is on its way to the store.
    case releasing
    /// Given back. Whoever wants it opens it anew.
    case released
    /// The server ends: nobody is admitted, what is safe is committed.
    case draining
    /// Another server has it, or it was deleted.
    case lost
}

/// What happens to a disk.
enum TenureEvent: String, CaseIterable, Sendable {
    /// A client asks that belongs to the session that has the disk; anybody, where there is no session.
    case asked
    /// Another client asks.
    case otherAsked
    /// The store has taken what an admission changes.
    case granted
    /// It has not, or something else kept the client out: nothing has changed.
    case denied
    /// A connection of an admitted client joins.
    case joined
    /// The last connection left, and another one is within its handshake.
    case unjoined
    /// Nobody is left, and the last one ended with DISC.
    case endedCleanly
    /// Nobody is left, without DISC.
    case cut
    case windowEnded
    /// It was idle for `release-after`, and is clean.
    case restEnded
    /// The store has the head that gives the disk back.
    case gaveBack
    /// It could not be given back.
    case keptIt
    /// The server ends.
    case serverEnds
    /// Another server has the disk, or it was deleted.
    case taken
}

/// What a client that asks is told.
enum TenureAnswer: String, Sendable {
    /// Admitted, at once.
    case admit
    /// The store is asked first: `granted` or `denied` must follow.
    case askStore
    /// Somebody else's outcome comes first: ask again then.
    case wait
    /// Another client has it.
    case inUse
    /// The server ends.
    case stopping
    /// It is this server's no more: open it anew.
    case reopen
}

/// What is to be done, in this order.
enum TenureEffect: String, Sendable {
    /// The session ends with everything acknowledged in a safe point.
    case endSession
    /// Start the resume window.
    case openWindow
    /// Go back to the last safe point; the session ends.
    case rollBack
    /// Start the time after which an idle disk is given back.
    case rest
    /// Give the disk back.
    case release
    /// Nothing of it is this server's any more.
    case leave
}

struct TenureStep: Equatable, Sendable {
    var next: Tenure
    var answer: TenureAnswer?
    var effects: [TenureEffect]

    init(_ next: Tenure, _ answer: TenureAnswer? = nil, _ effects: [TenureEffect] = []) {
        self.next = next
        self.answer = answer
        self.effects = effects
    }
}

extension Tenure {
    /// What `event` makes of `state`. nil: it cannot happen there.
    ///
    /// The time of rest ends when `idle` does; the resume window, when neither `away` nor `challenged` is left.
    static func transition(_ state: Tenure, _ event: TenureEvent) -> TenureStep? {
        switch event {
        case .asked: asked(state)
        case .otherAsked: otherAsked(state)
        case .granted: granted(state)
        case .denied: denied(state)
        case .joined: joined(state)
        case .unjoined: unjoined(state)
        case .endedCleanly: endedCleanly(state)
        case .cut: cut(state)
        case .windowEnded: windowEnded(state)
        case .restEnded: restEnded(state)
        case .gaveBack: gaveBack(state)
        case .keptIt: keptIt(state)
        case .serverEnds: serverEnds(state)
        case .taken: taken(state)
        }
    }

    private static func asked(_ state: Tenure) -> TenureStep? {
        switch state {
        case .idle: TenureStep(.admitting, .askStore)
        case .admitting: TenureStep(.admitting, .wait)
        case .reserved: TenureStep(.reserved, .admit)
        case .live: TenureStep(.live, .admit)
        case .away: TenureStep(.challenged, .askStore)
        case .challenged: TenureStep(.challenged, .wait)
        case .overdue: TenureStep(.overdue, .wait)
        case .releasing: TenureStep(.releasing, .wait)
        case .released: TenureStep(.released, .reopen)
        case .draining: TenureStep(.draining, .stopping)
        case .lost: TenureStep(.lost, .reopen)
        }
    }

    private static func otherAsked(_ state: Tenure) -> TenureStep? {
        switch state {
        // Without a session there is no other client.
        case .idle, .admitting, .releasing: nil
        case .reserved: TenureStep(.reserved, .inUse)
        case .live: TenureStep(.live, .inUse)
        case .away: TenureStep(.challenged, .askStore)
        case .challenged: TenureStep(.challenged, .wait)
        case .overdue: TenureStep(.overdue, .wait)
        case .released: TenureStep(.released, .reopen)
        case .draining: TenureStep(.draining, .stopping)
        case .lost: TenureStep(.lost, .reopen)
        }
    }

    private static func granted(_ state: Tenure) -> TenureStep? {
        switch state {
        case .admitting, .challenged, .overdue: TenureStep(.reserved, .admit)
        case .draining: TenureStep(.draining, .stopping)
        // The server ended, and gave it back meanwhile.
        case .released: TenureStep(.released, .reopen)
        case .lost: TenureStep(.lost, .reopen)
        case .idle, .reserved, .live, .away, .releasing: nil
        }
    }

    private static func denied(_ state: Tenure) -> TenureStep? {
        switch state {
        case .admitting: TenureStep(.idle, nil, [.rest])
        // Its window goes on as if nobody had asked.
        case .challenged: TenureStep(.away)
        case .overdue: TenureStep(.idle, nil, [.rollBack, .rest])
        case .draining: TenureStep(.draining)
        case .released: TenureStep(.released)
        case .lost: TenureStep(.lost)
        case .idle, .reserved, .live, .away, .releasing: nil
        }
    }

    private static func joined(_ state: Tenure) -> TenureStep? {
        switch state {
        case .reserved, .live: TenureStep(.live)
        case .idle, .admitting, .away, .challenged, .overdue, .releasing, .released, .draining, .lost: nil
        }
    }

    private static func unjoined(_ state: Tenure) -> TenureStep? {
        switch state {
        case .live: TenureStep(.reserved)
        case .draining: TenureStep(.draining)
        case .lost: TenureStep(.lost)
        case .idle, .admitting, .reserved, .away, .challenged, .overdue, .releasing, .released: nil
        }
    }

    private static func endedCleanly(_ state: Tenure) -> TenureStep? {
        switch state {
        case .reserved, .live: TenureStep(.idle, nil, [.endSession, .rest])
        case .draining: TenureStep(.draining, nil, [.endSession])
        case .lost: TenureStep(.lost)
        case .idle, .admitting, .away, .challenged, .overdue, .releasing, .released: nil
        }
    }

    private static func cut(_ state: Tenure) -> TenureStep? {
        switch state {
        case .reserved, .live: TenureStep(.away, nil, [.openWindow])
        // What it may still resume stays in the journal.
        case .draining: TenureStep(.draining)
        case .lost: TenureStep(.lost)
        case .idle, .admitting, .away, .challenged, .overdue, .releasing, .released: nil
        }
    }

    private static func windowEnded(_ state: Tenure) -> TenureStep? {
        switch state {
        case .away: TenureStep(.idle, nil, [.rollBack, .rest])
        case .challenged: TenureStep(.overdue)
        case .idle, .admitting, .reserved, .live, .overdue, .releasing, .released, .draining, .lost: nil
        }
    }

    private static func restEnded(_ state: Tenure) -> TenureStep? {
        switch state {
        case .idle: TenureStep(.releasing, nil, [.release])
        case .admitting, .reserved, .live, .away, .challenged, .overdue, .releasing, .released, .draining, .lost: nil
        }
    }

    private static func gaveBack(_ state: Tenure) -> TenureStep? {
        switch state {
        case .releasing, .draining: TenureStep(.released, nil, [.leave])
        // Whoever took it did so after it was given back.
        case .lost: TenureStep(.lost)
        case .idle, .admitting, .reserved, .live, .away, .challenged, .overdue, .released: nil
        }
    }

    private static func keptIt(_ state: Tenure) -> TenureStep? {
        switch state {
        case .releasing: TenureStep(.idle, nil, [.rest])
        case .draining: TenureStep(.draining)
        case .lost: TenureStep(.lost)
        case .idle, .admitting, .reserved, .live, .away, .challenged, .overdue, .released: nil
        }
    }

    private static func serverEnds(_ state: Tenure) -> TenureStep? {
        switch state {
        case .idle, .admitting, .reserved, .live, .away, .challenged, .overdue, .releasing, .draining:
            TenureStep(.draining)
        case .released: TenureStep(.released)
        case .lost: TenureStep(.lost)
        }
    }

    private static func taken(_ state: Tenure) -> TenureStep? {
        switch state {
        case .idle, .admitting, .reserved, .live, .away, .challenged, .overdue, .releasing, .draining:
            TenureStep(.lost, nil, [.leave])
        case .released: TenureStep(.released)
        case .lost: TenureStep(.lost)
        }
    }

    /// Whether who asks has to wait for somebody else's outcome.
    var isUndecided: Bool {
        switch self {
        case .admitting, .challenged, .overdue, .releasing: true
        case .idle, .reserved, .live, .away, .released, .draining, .lost: false
        }
    }

    /// Whether a client has the disk, and may be served or join.
    var isServing: Bool {
        switch self {
        case .reserved, .live: true
        case .idle, .admitting, .away, .challenged, .overdue, .releasing, .released, .draining, .lost: false
        }
    }
}
