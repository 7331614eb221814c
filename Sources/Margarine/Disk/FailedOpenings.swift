// Openings that came to nothing after the head that takes the disk was sent. Nobody was served under that head: the session
// that it names has lost nothing, and the disk is to go back to where it was.
//
// Always holds: no client was admitted under a head that is noted here; an opening of the same disk reads such a head as if
// it were undone already; one note for each disk, and one task that undoes it, until the store says that it is done.

internal import BlockCache
internal import ObjectStore
internal import Runtime
internal import Synchronization

struct FailedOpening: Sendable {
    /// The head that may be stored.
    let sent: Head
    /// Who may go on with the disk as it is.
    let session: String?
    /// The disk was this server's before.
    let wasMine: Bool
    /// Until then the store may still take what was sent; set by `FailedOpenings`.
    var deadlineNs: UInt64 = 0

    /// Whether this head is the one that was sent, whatever users or commits have changed in it since.
    func isWhat(_ head: Head) -> Bool {
        head.diskID == sent.diskID && head.epoch == sent.epoch && head.owner == sent.owner
    }

    func undone(_ head: Head) -> Head {
        var undone = head
        undone.session = session
        if !wasMine { undone.owner = nil }
        return undone
    }
}

/// Those of a server. Any thread may call it.
final class FailedOpenings: Sendable {
    private let openings = Mutex<[ObjectID: FailedOpening]>([:])

    /// What was sent, and not seen in the store since, is waited for so long.
    private static let landingNs: UInt64 = 120_000_000_000
    private static let firstPauseNs: UInt64 = 100_000_000
    private static let longestPauseNs: UInt64 = 5_000_000_000

    /// The head without what a failed opening put into it.
    func unsay(_ head: Head) -> Head {
        guard let opening = openings.withLock({ $0[head.diskID] }), opening.isWhat(head) else { return head }
        return opening.undone(head)
    }

    /// The disk was opened.
    func forget(_ disk: ObjectID) { openings.withLock { $0[disk] = nil } }

    /// Sees that the store says what it said before, by and by.
    ///
    /// - Parameter atOnce: tries it once before this returns.
    func undo(_ opening: FailedOpening, _ heads: HeadStore, _ context: DiskContext, atOnce: Bool) async {
        let id = opening.sent.diskID
        var sent = opening
        sent.deadlineNs = context.environment.nowNs + FailedOpenings.landingNs
        let opening = sent
        let isUnderWay = openings.withLock { openings in
            defer { openings[id] = opening }
            return openings[id] != nil
        }
        if atOnce, await isUndone(opening, heads, mayLand: false) { return forget(id, opening) }
        if isUnderWay { return }
        context.spawn { [self] in
            var pauseNs = FailedOpenings.firstPauseNs
            while let opening = openings.withLock({ $0[id] }) {
                await context.environment.sleep(ns: pauseNs)
                pauseNs = min(pauseNs * 2, FailedOpenings.longestPauseNs)
                let mayLand = context.environment.nowNs < opening.deadlineNs
                if await isUndone(opening, heads, mayLand: mayLand) { forget(id, opening) }
            }
        }
    }

    private func forget(_ id: ObjectID, _ opening: FailedOpening) {
        openings.withLock { if let noted = $0[id], noted.isWhat(opening.sent) { $0[id] = nil } }
    }

    /// Whether nothing is left to be undone. An opening that goes on meanwhile wins its swap, or this one does.
    private func isUndone(_ opening: FailedOpening, _ heads: HeadStore, mayLand: Bool) async -> Bool {
        do throws(CatalogError) {
            guard let found = try await heads.load(opening.sent.name) else { return true }
            if opening.isWhat(found.head) {
                let undone = opening.undone(found.head)
                if undone == found.head { return true }
                if case .won = try await heads.swap(undone, expecting: found.etag) { return true }
                return false
            }
            return found.head.epoch >= opening.sent.epoch || found.head.diskID != opening.sent.diskID || !mayLand
        } catch {
            return false
        }
    }
}
