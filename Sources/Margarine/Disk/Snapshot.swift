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
    private let context: DiskContext
    private var clients: [ObjectIdentifier: any DeviceClient] = [:]
    private var finished: [DeviceRequest] = []
    private var pending: [ObjectIdentifier: DeviceRequest] = [:]
    private(set) var admissions = 0
    /// Told when the last client has left.
    var onGone: (Snapshot) -> Void = { _ in }

    init(name: String, manifest: Manifest, context: DiskContext) {
        self.name = name
        self.manifest = manifest
        self.context = context
        sizeBytes = manifest.sizeBytes
    }

    final class Ticket: @unchecked Sendable {  // looked into on the loop only
        var isRedeemed = false
    }

    /// Counts a client that is about to join.
    func admit() -> Ticket {
        let ticket = Ticket()
        admissions += 1
        context.after(ns: 30_000_000_000) { [weak self] in self?.redeem(ticket) }
        return ticket
    }

    private func redeem(_ ticket: Ticket) {
        guard !ticket.isRedeemed else { return }
        ticket.isRedeemed = true
        admissions -= 1
        if clients.isEmpty, admissions == 0 { onGone(self) }
    }

    package func join(_ client: any DeviceClient, admission: AnyObject, ready: @escaping (AttachError?) -> Void) {
        clients[ObjectIdentifier(client)] = client
        if let ticket = admission as? Ticket { redeem(ticket) }
        ready(nil)
    }

    package func leave(_ client: any DeviceClient, clean: Bool) {
        guard clients.removeValue(forKey: ObjectIdentifier(client)) != nil else { return }
        for request in pending.values where request.client === client { request.isCancelled = true }
        if clients.isEmpty, admissions == 0 { onGone(self) }
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
        pending[ObjectIdentifier(request)] = request
        switch request.kind {
        case .read: read(request)
        case .blockStatus: status(request)
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
                return .slice(entry, slice)
            }
        }
        return .nothing
    }

    private func read(_ request: DeviceRequest) {
        let ticket = ReadTicket(request)
        ticket.timer = context.after(ns: UInt64(context.settings.requestTimeoutMs) * 1_000_000) { [self] in
            guard ticket.close() else { return }
            context.problem(
                "\(name): a read at \(ticket.request.offset) was not answered by the store in \(context.settings.requestTimeoutMs) ms\(context.locations.troubles)",
                kind: "\(name) read late")
            finish(ticket.request, .io)
        }
        context.spawn { [self] in
            var error: DeviceError?
            let wanted = ticket.request
            for run in Disk.runs(wanted.offset, Int(wanted.lengthBytes), wanted.buffer!) where error == nil {
                error = await fill(run, ticket)
            }
            if ticket.close() { finish(ticket.request, error) }
        }
    }

    private func fill(_ run: Run, _ ticket: ReadTicket) async -> DeviceError? {
        while true {
            if !ticket.isWanted { return .shutdown }
            do {
                switch compose(run) {
                case .nothing: return nil
                case .manifest(let block): try await manifest.load(block)
                case .slice(let entry, let slice):
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

    private func status(_ request: DeviceRequest) {
        nonisolated(unsafe) let request = request  // stays on this loop
        context.spawn { [self] in
            do throws(StoreError) {
                request.extents = try await extents(
                    request.offset..<request.offset + request.lengthBytes, request.onlyOneExtent)
                finish(request, nil)
            } catch {
                context.problem("\(name): block status at \(request.offset) failed: \(error)")
                finish(request, .io)
            }
        }
    }

    private func extents(_ range: Range<UInt64>, _ onlyOne: Bool) async throws(StoreError) -> [Extent] {
        let slice = UInt64(Geometry.sliceBytes)
        let block = UInt64(Geometry.blockBytes)
        var list = ExtentList()
        var position = range.lowerBound
        while position < range.upperBound, list.extents.count < 2 || !onlyOne {
            let used = try await manifest.nextUsed(from: BlockIndex(position / block))
            let start = min(used.map { $0.value * block } ?? .max, range.upperBound)
            if start > position {
                if !list.add(start - position, allocated: false) { break }
                position = start
                continue
            }
            let end = min(range.upperBound, (position / slice + 1) * slice)
            let entry = try await manifest.find(BlockIndex(position / block))
            let stored = entry?.key(SliceIndex(Int(position % block / slice))) != nil
            if !list.add(end - position, allocated: stored) { break }
            position = end
        }
        return onlyOne ? Array(list.extents.prefix(1)) : list.extents
    }

    private func finish(_ request: DeviceRequest, _ error: DeviceError?) {
        pending[ObjectIdentifier(request)] = nil
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
