// Who is attached to a disk. A session is one client's attachment over any number of connections; it outlives their loss
// for the disk's resume window.

internal import Runtime

/// Owned by its disk's loop.
final class Session {
    /// From `NAME?session=ID`; nil for an unnamed one.
    let name: String?
    /// Host of its first connection; nil when the session was found in a journal and anyone unnamed may resume it.
    let host: String?
    let address: String
    let sinceMs: Int64
    /// Admitted by the handshake, and not joined yet.
    var admissions = 0
    /// Monotonic time at which its last connection was lost without DISC.
    var droppedAtNs: UInt64?

    /// The last journal record when one of its connections last ended with DISC.
    var cleanSequence: UInt64 = 0

    init(name: String?, host: String?, address: String, sinceMs: Int64) {
        self.name = name
        self.host = host
        self.address = address
        self.sinceMs = sinceMs
    }

    /// Whether a connection that names `name` (or nothing) from `host` belongs to this session.
    func admits(name: String?, host: String, isLive: Bool) -> Bool {
        guard name == self.name else { return false }
        return name != nil || self.host == nil || self.host == host || !isLive
    }

    var description: String { name.map { "session '\($0)'" } ?? "a client at \(address)" }
}

/// What the handshake got and `join` redeems; lapses when it is dropped without that. Sendable because only the disk's loop
/// looks inside.
final class Admission: @unchecked Sendable {
    /// What is left of it for the disk.
    final class Ticket: @unchecked Sendable {
        let session: Session
        private var isRedeemed = false
        /// Ends it if it is not joined in time.
        var timer: LoopTimer?
        init(_ session: Session) { self.session = session }

        /// true once: the admission is joined, or has lapsed.
        func redeem() -> Bool {
            if isRedeemed { return false }
            isRedeemed = true
            timer?.cancel()
            timer = nil
            session.admissions -= 1
            return true
        }
    }
    let ticket: Ticket
    private let dropped: @Sendable (Ticket) -> Void

    /// - Parameter dropped: called from wherever the last reference goes.
    init(_ ticket: Ticket, dropped: @escaping @Sendable (Ticket) -> Void) {
        self.ticket = ticket
        self.dropped = dropped
    }
    deinit { dropped(ticket) }
}
