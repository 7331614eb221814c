// The gate in front of everything that is answered from memory, and behind everything that is acknowledged: the disk must
// have been this server's a short while ago, for certain. What comes when that is not known waits.
//
// Always holds: once a turn of a connection began without proof, nothing of it is served inline; nothing is acknowledged
// while `proves()` is false; whatever waits here ends by a proof, by the loss of the disk, with its connection, or (what
// only reads) after `requestTimeoutMs`. How many wait is bounded by what connections may have outstanding.

internal import BlockCache
internal import Runtime

/// What waits for a proof.
struct Parked {
    /// Not begun.
    var requests: [(request: DeviceRequest, sinceNs: UInt64)] = []
    /// Journaled and not told.
    var turn: UInt64?
    /// `finished` waits.
    var holdsFinished = false
    var timer: LoopTimer?
    var isAsking = false

    var isEmpty: Bool { requests.isEmpty && turn == nil && !holdsFinished }
}

extension Disk {
    /// How often it is looked whether who waits has gone or waited too long.
    private static let parkedTickNs: UInt64 = 250_000_000

    package func beginTurn() {
        context.loop.assertOwner()
        isProven = proves()
    }

    /// Whether the disk is this server's, for certain. Reads the clock.
    func proves() -> Bool {
        claim.stands(atNs: context.environment.bootNs) || context.settings.fault == .leaseNotAsked
    }

    /// The request begins once there is a proof.
    func park(_ request: DeviceRequest) {
        parked.requests.append((request, nowNs))
        waitForProof()
    }

    /// The results in `finished` are told once there is a proof.
    func parkFinished() {
        parked.holdsFinished = true
        waitForProof()
    }

    /// Everything up to this turn is in the journal; told once there is a proof.
    func park(turn: UInt64) {
        parked.turn = max(turn, parked.turn ?? 0)
        waitForProof()
    }

    private func waitForProof() {
        if !parked.isAsking {
            parked.isAsking = true
            claim.lease.whenProven { [weak self, loop = context.loop] in
                loop.post { [weak self] in self?.wasProven() }
            }
        }
        if parked.timer == nil {
            parked.timer = context.after(ns: Disk.parkedTickNs) { [weak self] in self?.lookAtParked() }
        }
    }

    private func wasProven() {
        parked.isAsking = false
        if !parked.isEmpty { unpark() }
    }

    /// Lets all go on, if there is a proof or nothing more to wait for.
    private func unpark() {
        guard lost != nil || proves() else { return waitForProof() }
        isProven = lost == nil
        parked.timer?.cancel()
        let now = parked
        parked = Parked()
        parked.isAsking = now.isAsking
        for (request, _) in now.requests {
            if request.isCancelled || lost != nil { finish(request, .shutdown) } else { begin(request) }
        }
        if let turn = now.turn, lost == nil { for client in clients { client.journaled(turn: turn, error: nil) } }
        if now.holdsFinished { deliverFinished() }
    }

    /// The disk is lost: nothing waits any more.
    func endParked() { unpark() }

    private func lookAtParked() {
        parked.timer = nil
        if lost != nil || proves() { return unpark() }
        let now = nowNs
        let patienceNs = UInt64(context.settings.requestTimeoutMs) * 1_000_000
        var over: [(DeviceRequest, DeviceError)] = []
        parked.requests.removeAll { waiting in
            let request = waiting.request
            if request.isCancelled {
                over.append((request, .shutdown))
                return true
            }
            // What changes the disk waits, as it does for the store and for room: failing it would lose what the file
            // system believes written.
            let mayFail = request.kind == .read || request.kind == .blockStatus || request.kind == .cache
            guard mayFail, now >= waiting.sinceNs + patienceNs else { return false }
            over.append((request, .io))
            return true
        }
        if over.contains(where: { $0.1 == .io }) {
            context.problem(
                "disk \(name): requests could not be answered in \(context.settings.requestTimeoutMs) ms: the store does not say whether the disk is still this server's\(context.locations.troubles)"
            )
        }
        for (request, error) in over { finish(request, error) }
        deliverFailed()
        if !parked.isEmpty { waitForProof() }
    }

    /// Errors say nothing of what the disk holds: they are told without a proof.
    private func deliverFailed() {
        let failed = finished.filter { $0.error != nil }
        if failed.isEmpty { return }
        finished.removeAll { $0.error != nil }
        parked.holdsFinished = parked.holdsFinished && !finished.isEmpty
        for request in failed { request.client.completed(request) }
    }
}
