// Who is attached to a disk. A session is one client's attachment over any number of connections; it outlives their loss
// for the disk's resume window.

internal import Logging
internal import Runtime

/// From how many addresses the connections of one named session may come at a time.
public enum SessionAddresses: String, Sendable, CaseIterable {
    case one
    case any
}

/// Owned by its disk's loop.
final class Session {
    /// From `NAME?session=ID`; nil for an unnamed one.
    let name: String?
    /// Host of its connections; nil when the session was found in a journal and nobody has resumed it yet.
    private(set) var host: String?
    private(set) var address: String
    private var hasToldOfMore = false
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

    /// Whether a connection of `client` that names `name` (or nothing) belongs to this session. While it is live its
    /// connections come from one host, or two clients would write: the same name may stand in two configurations.
    func admits(_ name: String?, _ client: ClientIdentity, isLive: Bool, addresses: SessionAddresses) -> Bool {
        guard name == self.name else { return false }
        return !isLive || host == client.host || (name != nil && addresses == .any)
    }

    /// A connection of `client` was admitted.
    func welcome(_ client: ClientIdentity, isLive: Bool, disk: String, _ log: Logger) {
        if !isLive {
            host = client.host
            address = client.address
        } else if name == nil, !client.isProcess, !hasToldOfMore {
            hasToldOfMore = true
            log.notice(
                "disk \(disk): a further connection from the address of its client, without a session name, is taken for the same client; were they two, both would write: name attachments (NAME?session=ID)",
                metadata: ["first": "\(address)", "client": "\(client.address)"])
        }
    }

    /// What another client hears that is not admitted. The name of a session is its key: it is told to nobody.
    func refusal(_ name: String?, disk: String, wallMs: Int64) -> AttachError {
        let seconds = max(0, wallMs - sinceMs) / 1000
        if let name, name == self.name {
            return AttachError(
                .refused,
                "disk '\(disk)' is in use by this session at another address (\(address), for \(seconds) s); detach there first, or let the server take a session from several addresses (session-addresses = \"any\")"
            )
        }
        return AttachError(
            .refused,
            "disk '\(disk)' is in use by another client (\(address), for \(seconds) s); a disk has one writer: detach there first"
        )
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
