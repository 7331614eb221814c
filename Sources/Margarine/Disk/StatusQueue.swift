// BLOCK_STATUS of a device: answered within the turn where manifest and layers are in memory and the turn has work left, else
// in line for the next turn, or for the manifest pages that are missing.
//
// Always holds: one turn of the loop does at most about `BlockStatus.workPerTurn` for a device, however many ask; an answer
// is of one instant.

internal import BlockCache
internal import ObjectStore
internal import Runtime

/// What has a block status.
protocol HasBlockStatus: AnyObject, Sendable {
    var context: DiskContext { get }
    /// For messages.
    var title: String { get }
    /// One step, over the view of now; `outdated` is what `outdatedGeneration` gave when the request came.
    func status(_ range: Range<UInt64>, onlyOne: Bool, outdated: Manifest?, work: inout Int) -> BlockStatus.Step
    /// Brings a manifest page near.
    func load(_ page: MissingPage) async throws(StoreError)
    /// For `Fault.statusReadsTwice`; nil.
    func outdatedGeneration() -> Manifest?
    func finish(_ request: DeviceRequest, _ error: DeviceError?)
}

/// Owned by its device's loop.
final class StatusQueue: @unchecked Sendable {
    private unowned let source: any HasBlockStatus
    private let loading: RequestLine
    private var waiting: [RequestTicket] = []
    private var work: Int
    private let workPerTurn: Int
    private var isRefillDue = false

    init(_ source: any HasBlockStatus) {
        self.source = source
        loading = RequestLine(limit: RequestLine.statuses, source.context)
        workPerTurn = source.context.settings.fault == .memoryNotBounded ? .max / 2 : BlockStatus.workPerTurn
        work = workPerTurn
    }

    /// Requests that wait for manifest pages now.
    var loadingCount: Int { loading.running }

    func submit(_ request: DeviceRequest) {
        source.context.loop.assertOwner()
        let ticket = RequestTicket(request)
        if waiting.isEmpty, work > 0 { answer(ticket) } else { waiting.append(ticket) }
        refillLater()
    }

    func removeClosed() {
        waiting.removeAll { !$0.isOpen }
        loading.removeClosed()
    }

    /// With the next turn there is work to be done again.
    private func refillLater() {
        if isRefillDue { return }
        isRefillDue = true
        // The device is held until then.
        source.context.loop.post { [self, source] in
            _ = source
            isRefillDue = false
            work = workPerTurn
            var answered = 0
            while work > 0, answered < waiting.count {
                if waiting[answered].isOpen { answer(waiting[answered]) }
                answered += 1
            }
            waiting.removeFirst(answered)
            if !waiting.isEmpty { refillLater() }
        }
    }

    private func answer(_ ticket: RequestTicket) {
        let outdated = source.outdatedGeneration()
        if let missing = step(ticket, outdated) { load(missing, for: ticket, outdated) }
    }

    /// Answers, or says what is missing.
    private func step(_ ticket: RequestTicket, _ outdated: Manifest?) -> MissingPage? {
        let request = ticket.request
        let range = request.offset..<request.offset + request.lengthBytes
        switch source.status(range, onlyOne: request.onlyOneExtent, outdated: outdated, work: &work) {
        case .extents(let extents):
            request.extents = extents
            if ticket.close() { source.finish(request, nil) }
            return nil
        case .needs(let page): return page
        }
    }

    private func load(_ missing: MissingPage, for ticket: RequestTicket, _ outdated: Manifest?) {
        let timeoutMs = source.context.settings.requestTimeoutMs
        ticket.timer = source.context.after(ns: UInt64(timeoutMs) * 1_000_000) { [self] in
            fail(ticket, "was not answered by the store in \(timeoutMs) ms\(source.context.locations.troubles)")
        }
        loading.enter(ticket) { [self, source] in
            var missing: MissingPage? = missing
            while ticket.isWanted, let page = missing {
                do throws(StoreError) {
                    if let outdated { try await outdated.load(page) } else { try await source.load(page) }
                    if ticket.isWanted { missing = step(ticket, outdated) }
                } catch {
                    guard error.isOutage else {
                        return fail(ticket, "failed: \(error)")
                    }
                    await source.context.environment.sleep(ns: 200_000_000)
                }
            }
            // Its client has left, or it was answered.
            if ticket.close() { source.finish(ticket.request, .shutdown) }
        }
    }

    private func fail(_ ticket: RequestTicket, _ why: String) {
        guard ticket.close() else { return }
        source.context.problem("\(source.title): block status at \(ticket.request.offset) \(why)")
        source.finish(ticket.request, .io)
    }
}

extension Disk: HasBlockStatus {
    var title: String { "disk \(name)" }

    func submitBlockStatus(_ request: DeviceRequest) { statuses.submit(request) }

    func status(_ range: Range<UInt64>, onlyOne: Bool, outdated: Manifest?, work: inout Int) -> BlockStatus.Step {
        if let outdated { return BlockStatus.step(range, onlyOne: onlyOne, outdated, view.layers, work: &work) }
        return view.status(range, onlyOne: onlyOne, work: &work)
    }
}
