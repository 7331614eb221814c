// Requests that wait for bytes of the store or of the journal. So many are under way at a time, whoever sent them and whether
// that client is still there or not; the others stand in line, where they cost nothing but themselves.
//
// Always holds: what a request holds outside its own buffer is bounded by the number under way; a request whose client has
// left is finished at once, and its place is free when what it had begun has ended.

internal import Runtime

extension DeviceRequest.Kind {
    /// Its effect has to be settled before a further connection of a session is served.
    var changesData: Bool { self == .write || self == .trim || self == .writeZeroes }
}

/// One request that may be answered (or given up) before what it waits for is there. Its buffer is touched only while the
/// ticket is open.
final class RequestTicket: @unchecked Sendable {  // owned by the disk's loop
    let request: DeviceRequest
    private(set) var isOpen = true
    var timer: LoopTimer?

    /// The device finds the ticket by the request from now on.
    init(_ request: DeviceRequest) {
        self.request = request
        request.deviceObject = self
    }

    /// Whether an answer is still wanted.
    var isWanted: Bool { isOpen && !request.isCancelled }

    /// true for the first to end it.
    func close() -> Bool {
        defer { isOpen = false }
        timer?.cancel()
        timer = nil
        return isOpen
    }
}
typealias ReadTicket = RequestTicket

/// Owned by its device's loop.
final class RequestLine: @unchecked Sendable {
    /// Reads of one device that are under way. Most wait for the scratch disk, which takes many at a time.
    static let reads = 1024
    /// Writes that merge pages: more than the connections to the store.
    static let writes = 64
    /// Block status requests that load manifest pages.
    static let statuses = 16

    private struct Waiting {
        var ticket: RequestTicket
        var work: @Sendable () async -> Void
    }
    private let limit: Int
    private let context: DiskContext
    private(set) var running = 0
    private var waiting: [Waiting] = []
    private var head = 0
    /// Those in line at most, after tickets that are closed were last taken out.
    private var sweepAt = 64

    init(limit: Int, _ context: DiskContext) {
        self.limit = context.settings.fault == .memoryNotBounded ? .max : limit
        self.context = context
    }

    /// In line, and not given up as far as is known.
    var waitingCount: Int { waiting.count - head }

    /// Runs `work` when it is the ticket's turn, if the ticket is open then.
    func enter(_ ticket: RequestTicket, _ work: @escaping @Sendable () async -> Void) {
        context.loop.assertOwner()
        if running < limit { return start(ticket, work) }
        waiting.append(Waiting(ticket: ticket, work: work))
        if waitingCount > sweepAt { removeClosed() }
    }

    /// Takes those out of the line whose tickets are closed.
    func removeClosed() {
        if waitingCount == 0 { return }
        waiting.removeFirst(head)
        head = 0
        waiting.removeAll { !$0.ticket.isOpen }
        sweepAt = 64 + 2 * waiting.count
    }

    private func start(_ ticket: RequestTicket, _ work: @escaping @Sendable () async -> Void) {
        running += 1
        context.spawn { [self] in
            // Its client may have left since: the request is another one's by now.
            if ticket.isOpen { await work() }
            running -= 1
            goOn()
        }
    }

    private func goOn() {
        while running < limit, head < waiting.count {
            let next = waiting[head]
            head += 1
            if next.ticket.isOpen { start(next.ticket, next.work) }
        }
        if head == waiting.count {
            waiting = []
            head = 0
        } else if head > 1024, head > waiting.count / 2 {
            waiting.removeFirst(head)
            head = 0
        }
    }
}

extension Disk {
    /// A client has left (nil: all of them have to): what it sent never takes effect any more, and is finished.
    func cancelRequests(of client: (any DeviceClient)?) {
        let gone = pendingRequests.values.filter { client == nil || $0.client === client }
        for request in gone.sorted(by: { $0.deviceState < $1.deviceState }) {
            request.isCancelled = true
            if context.settings.fault == .deadWriteLands, request.kind.changesData { continue }
            if context.settings.fault == .memoryNotBounded { continue }
            guard let ticket = request.deviceObject as? RequestTicket, ticket.close() else { continue }
            finish(request, .shutdown)
        }
        if context.settings.fault == .memoryNotBounded { return }
        coldReads.removeClosed()
        waitingWrites.removeClosed()
        statuses.removeClosed()
        prefetches.drop(client)
    }
}
