// One instant of several disks. While all of them are held no write takes effect on any, so what each of them has then is what
// a loss of power would leave of the machine that writes them: a file system over several disks starts from that.
//
// Always holds: a hold ends by itself, and so does the wish for one, under which no commit begins; a safe point made under a
// hold is a generation by itself, and counts only if the hold stood when it was made.

internal import BlockCache
internal import Runtime

/// No write takes effect while it stands.
final class DiskHold: @unchecked Sendable {  // touched on its disk's loop only
    /// What was active when it began.
    fileprivate let active: Layer
    fileprivate var timer: LoopTimer?
    fileprivate init(active: Layer) { self.active = active }
}

/// A cut that waits for the commit that is under way.
final class CutWish: @unchecked Sendable {  // touched on its disk's loop only
    fileprivate var timer: LoopTimer?
}

/// The generation that a cut becomes. Finished on its disk's loop.
final class CutTicket: @unchecked Sendable {  // touched on its disk's loop only
    private var result: Result<UInt64, CutError>?
    private var waiter: CheckedContinuation<Result<UInt64, CutError>, Never>?

    func finish(_ result: Result<UInt64, CutError>) {
        guard self.result == nil else { return }
        self.result = result
        waiter?.resume(returning: result)
        waiter = nil
    }

    func wait() async -> Result<UInt64, CutError> {
        if let result { return result }
        return await withCheckedContinuation { waiter = $0 }
    }
}

package struct CutError: Error, CustomStringConvertible {
    package var description: String
}

extension Disk {
    /// Longest hold.
    private static let holdNs: UInt64 = 1_000_000_000
    /// Longest wait for the store to have a cut.
    static let cutCommitNs: UInt64 = 25_000_000_000

    // MARK: Its turn

    /// Lets no commit begin after the one that is under way, until `endWish`, or for `ns`.
    func wishCut(forNs ns: UInt64) -> CutWish {
        let wish = CutWish()
        cutWishes.append(wish)
        wish.timer = context.after(ns: ns) { [weak self, weak wish] in if let wish { self?.endWish(wish) } }
        return wish
    }

    func endWish(_ wish: CutWish) {
        guard let place = cutWishes.firstIndex(where: { $0 === wish }) else { return }
        cutWishes.remove(at: place)
        wish.timer?.cancel()
        if !cutWishes.isEmpty { return }
        let isPutOff = isCommitPutOff
        isCommitPutOff = false
        if isPutOff { startCommit() } else { scheduleCommit() }
    }

    /// Whether a cut comes before the next commit. A server that ends has no time for it.
    var cutComesFirst: Bool { !cutWishes.isEmpty && committing == nil && tenure != .draining }

    /// What keeps a cut from having its turn, for people.
    var cutObstacle: String? {
        if lost != nil { return "is no longer served here" }
        if !proves() { return "is not known to be this server's still: the store does not say so" }
        guard isCommitting || committing != nil else { return hold == nil ? nil : "is held for another cut" }
        let seconds = commitStartedNs.map { (nowNs - min($0, nowNs)) / 1_000_000_000 } ?? 0
        return "is being committed, for \(seconds) s now\(lastCommitError.map { ": \($0)" } ?? "")"
    }

    // MARK: Its instant

    /// Holds writes back, if no commit is under way that a cut would have to wait for, and no mirror of a super block is due
    /// that could not come. nil: not now, or it is not known whether the disk is still this server's.
    func beginHold() -> DiskHold? {
        guard lost == nil, proves(), hold == nil, !awaitsMirrors, !isCommitting, committing == nil else { return nil }
        let hold = DiskHold(active: active)
        hold.timer = context.after(ns: Disk.holdNs) { [weak self, weak hold] in
            if let hold { self?.endHold(hold) }
        }
        self.hold = hold
        return hold
    }

    /// Lets writes go on, if it is this hold that stops them.
    func endHold(_ hold: DiskHold) {
        guard self.hold === hold else { return }
        hold.timer?.cancel()
        self.hold = nil
        lookForRoom()
    }

    /// Makes what the disk has a generation of its own. nil: the hold is over (another one may stand), or something else
    /// happened under it.
    func cut(under hold: DiskHold, withinNs: UInt64 = Disk.cutCommitNs) -> CutTicket? {
        guard self.hold === hold, hold.active === active, lost == nil, proves() else { return nil }
        endMirrorWait()
        guard !isCommitting, committing == nil else { return nil }
        let ticket = CutTicket()
        if active.isEmpty, waiting == nil {
            ticket.finish(.success(head.generation))
            return ticket
        }
        freeze(.cut)
        guard let layer = waiting else { return nil }
        layer.kind = .cut
        view.beginCommit()
        let name = name
        context.after(ns: withinNs) {
            ticket.finish(
                .failure(CutError(description: "disk '\(name)' could not be committed in time; see `margined status`")))
        }
        // Told in the same step in which the head gets the generation.
        whenCommitted(upTo: layer.lastSequence) { [weak self] error in
            if error == nil, let self { return ticket.finish(.success(head.generation)) }
            ticket.finish(.failure(CutError(description: "disk '\(name)' is no longer served here")))
        }
        return ticket
    }
}
