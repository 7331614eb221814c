// One committed generation, attached read-only: `NAME@GENERATION`. It is not owned, never changes, and any number of
// clients may have it.

internal import BlockCache
internal import Glibc
internal import ObjectStore
internal import Runtime

/// Owned by its context's loop.
package final class Snapshot: BlockDevice, @unchecked Sendable {
    package let name: String
    package let sizeBytes: UInt64
    package var isReadOnly: Bool { true }
    let manifest: Manifest
    let context: DiskContext
    private let coldReads: RequestLine
    private lazy var statuses = StatusQueue(self)
    private var clients: [ObjectIdentifier: any DeviceClient] = [:]
    private var finished: [DeviceRequest] = []
    private var pending: [ObjectIdentifier: DeviceRequest] = [:]
    private var submitted: UInt64 = 0
    /// Told of each client that has left, and of each admission that was not joined.
    private let left: @Sendable () -> Void

    init(name: String, manifest: Manifest, context: DiskContext, left: @escaping @Sendable () -> Void) {
        self.name = name
        self.manifest = manifest
        self.context = context
        self.left = left
        coldReads = RequestLine(limit: RequestLine.reads, context)
        sizeBytes = manifest.sizeBytes
    }

    /// An admitted client that has not joined yet. Lapses when it is dropped, or after a while. Sendable because only the
    /// snapshot's loop looks inside.
    final class Ticket: @unchecked Sendable {
        private let state: State
        private let loop: Loop
        private let left: @Sendable () -> Void

        fileprivate final class State: @unchecked Sendable {
            var isRedeemed = false
            var timer: LoopTimer?
        }

        fileprivate init(loop: Loop, left: @escaping @Sendable () -> Void) {
            self.loop = loop
            self.left = left
            state = State()
        }

        deinit { loop.post { [state, left] in Ticket.lapse(state, left) } }

        fileprivate func start(_ context: DiskContext) {
            state.timer = context.after(ns: 30_000_000_000) { [state, left] in Ticket.lapse(state, left) }
        }

        /// true once, and only before it has lapsed.
        func redeem() -> Bool { Ticket.end(state) }

        private static func lapse(_ state: State, _ left: () -> Void) { if end(state) { left() } }

        private static func end(_ state: State) -> Bool {
            if state.isRedeemed { return false }
            state.isRedeemed = true
            state.timer?.cancel()
            state.timer = nil
            return true
        }
    }

    /// Admits a client that the manager has counted.
    func admit() -> Ticket {
        context.loop.assertOwner()
        let ticket = Ticket(loop: context.loop, left: left)
        ticket.start(context)
        return ticket
    }

    package func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        context.loop.assertOwner()
        guard let ticket = admission as? Ticket, ticket.redeem() else {
            return ready(AttachError(.refused, "\(name): the attachment has lapsed; attach again"))
        }
        clients[ObjectIdentifier(client)] = client
        ready(nil)
    }

    package func leave(_ client: any DeviceClient, clean: Bool) {
        context.loop.assertOwner()
        guard clients.removeValue(forKey: ObjectIdentifier(client)) != nil else { return }
        let gone = pending.values.filter { $0.client === client }
        for request in gone.sorted(by: { $0.deviceState < $1.deviceState }) {
            request.isCancelled = true
            if let ticket = request.deviceObject as? RequestTicket, ticket.close() { finish(request, .shutdown) }
        }
        coldReads.removeClosed()
        statuses.removeClosed()
        left()
    }

    package func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
        for run in Disk.runs(offset, lengthBytes, buffer) {
            guard case .nothing = compose(run) else { return .later }
        }
        return .done
    }

    package func tryWrite(
        offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
    ) -> Inline { .failed(.notPermitted) }

    package func endTurn(client: any DeviceClient) -> TurnEnd { .acknowledged }

    package func submit(_ request: DeviceRequest) {
        context.loop.assertOwner()
        pending[ObjectIdentifier(request)] = request
        submitted += 1
        request.deviceState = submitted
        switch request.kind {
        case .read: read(request)
        case .blockStatus: statuses.submit(request)
        case .flush: finish(request, nil)
        case .cache: finish(request, nil)
        case .write, .trim, .writeZeroes: finish(request, .notPermitted)
        }
    }

    private func compose(_ run: Run) -> Missing {
        let number = run.offset / UInt64(Geometry.sliceBytes)
        let block = BlockIndex(number / UInt64(Geometry.slicesPerBlock))
        let slice = SliceIndex(Int(number % UInt64(Geometry.slicesPerBlock)))
        switch manifest.entry(block) {
        case .notLoaded: return .manifest(block)
        case .entry(nil): memset(run.target, 0, run.count)
        case .entry(let entry?):
            let start = Int(run.offset % UInt64(Geometry.sliceBytes))
            if !context.loader.tryCopy(entry, slice, offset: start, count: run.count, into: run.target) {
                let first = start / Geometry.pageBytes
                return .slice(
                    entry, slice, pages: first..<(start + run.count + Geometry.pageBytes - 1) / Geometry.pageBytes)
            }
        }
        return .nothing
    }

    private func read(_ request: DeviceRequest) {
        let ticket = RequestTicket(request)
        ticket.timer = context.after(ns: UInt64(context.settings.requestTimeoutMs) * 1_000_000) { [self] in
            guard ticket.close() else { return }
            context.problem(
                "\(name): a read at \(ticket.request.offset) was not answered by the store in \(context.settings.requestTimeoutMs) ms\(context.locations.troubles)",
                kind: "\(name) read late")
            finish(ticket.request, .io)
        }
        coldReads.enter(ticket) { [self] in
            var error: DeviceError?
            let wanted = ticket.request
            for run in Disk.runs(wanted.offset, Int(wanted.lengthBytes), wanted.buffer!) where error == nil {
                error = await fill(run, ticket)
            }
            if ticket.close() { finish(ticket.request, error) }
        }
    }

    private func fill(_ run: Run, _ ticket: RequestTicket) async -> DeviceError? {
        while true {
            if !ticket.isWanted { return .shutdown }
            do {
                switch compose(run) {
                case .nothing: return nil
                case .manifest(let block): try await manifest.load(block)
                case .slice(let entry, let slice, _):
                    let isFilled = try await context.withSlice(entry, slice) { _ in
                        if ticket.isWanted, case .nothing = compose(run) { return true }
                        return false
                    }
                    if isFilled { return nil }
                case .page: preconditionFailure("a generation has no journal")
                }
            } catch {
                guard error.isOutage else {
                    context.problem(
                        "\(name): read at \(run.offset), \(run.count) bytes, failed: \(error)",
                        kind: "\(name) read \(error.kind)")
                    return .io
                }
                await context.environment.sleep(ns: 200_000_000)
            }
        }
    }

    func finish(_ request: DeviceRequest, _ error: DeviceError?) {
        pending[ObjectIdentifier(request)] = nil
        request.deviceObject = nil
        request.error = error
        finished.append(request)
        if finished.count == 1 {
            context.loop.post { [self] in
                let done = finished
                finished = []
                for request in done { request.client.completed(request) }
            }
        }
    }
}

extension Snapshot: HasBlockStatus {
    var title: String { name }

    func status(_ range: Range<UInt64>, onlyOne: Bool, outdated: Manifest?, work: inout Int) -> BlockStatus.Step {
        BlockStatus.step(range, onlyOne: onlyOne, manifest, [], work: &work)
    }
    func load(_ page: MissingPage) async throws(StoreError) { try await manifest.load(page) }
    func outdatedGeneration() -> Manifest? { nil }
}
