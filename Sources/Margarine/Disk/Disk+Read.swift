// Reading: layers newest first, then the committed generation. One rule keeps it right: a run of bytes is put together in
// one synchronous step from the state of that instant, or not at all. What is missing is brought near, and the step is
// tried again, so that nothing a load began with can be stale by the time it ends.

internal import BlockCache
internal import Glibc
internal import ObjectStore
internal import Runtime

/// What kept a run from being put together.
enum Missing {
    case nothing
    case manifest(BlockIndex)
    /// Of it these pages.
    case slice(BlockEntry, SliceIndex, pages: Range<Int>)
    /// A dirty page that is in the journal only.
    case page(UInt32)
}

/// What was brought near for one request and may leave the caches again before it is used: dirty pages read back from the
/// journal, and the page at an end of a write. A journal location, and a slice's key, names the same bytes for ever.
struct JournalPages {
    private struct StoredPage: Hashable {
        var key: SliceKey
        var page: Int
    }
    private var pages: [JournalLocation: [UInt8]] = [:]
    private var stored: [StoredPage: [UInt8]] = [:]
    /// Bytes `from`… of a slice, if they lie in a page that is here.
    func copy(_ key: SliceKey?, from: Int, count: Int, into: UnsafeMutableRawPointer) -> Bool {
        let start = from / Geometry.pageBytes
        guard let key, let page = stored[StoredPage(key: key, page: start)],
            from + count <= (start + 1) * Geometry.pageBytes
        else { return false }
        page.withUnsafeBytes {
            into.copyMemory(from: $0.baseAddress! + from % Geometry.pageBytes, byteCount: count)
        }
        return true
    }
    mutating func add(_ key: SliceKey, page: Int, _ bytes: [UInt8]) { stored[StoredPage(key: key, page: page)] = bytes }
    func copy(_ location: JournalLocation, from: Int, count: Int, into: UnsafeMutableRawPointer) -> Bool {
        guard let page = pages[location] else { return false }
        page.withUnsafeBytes { into.copyMemory(from: $0.baseAddress! + from, byteCount: count) }
        return true
    }
    mutating func add(_ location: JournalLocation, _ bytes: [UInt8]) { pages[location] = bytes }
}

/// A run of bytes within one slice, and where it goes.
struct Run: @unchecked Sendable {  // the pointer belongs to the request that waits for the run
    var offset: UInt64
    var count: Int
    var target: UnsafeMutableRawPointer
}

extension Disk {
    package func tryRead(offset: UInt64, lengthBytes: Int, into buffer: UnsafeMutableRawPointer) -> Inline {
        if lost != nil { return .failed(.shutdown) }
        var at = 0
        while at < lengthBytes {
            let here = offset + UInt64(at)
            let count = min(lengthBytes - at, Geometry.sliceBytes - Int(here % UInt64(Geometry.sliceBytes)))
            guard case .nothing = compose(Run(offset: here, count: count, target: buffer + at), nil) else {
                return .later
            }
            at += count
        }
        hits += 1
        return .done
    }

    func submitRead(_ request: DeviceRequest) {
        misses += 1
        let ticket = RequestTicket(request)
        ticket.timer = context.after(ns: UInt64(context.settings.requestTimeoutMs) * 1_000_000) { [self] in
            guard ticket.close() else { return }
            context.problem(
                "disk \(name): a read at \(ticket.request.offset) was not answered by the store in \(context.settings.requestTimeoutMs) ms\(context.locations.troubles)"
            )
            storeErrors += 1
            finish(ticket.request, .io)
        }
        coldReads.enter(ticket) { [self] in
            let runs = Disk.runs(ticket.request.offset, Int(ticket.request.lengthBytes), ticket.request.buffer!)
            let error = await fill(runs, ticket)
            if ticket.close() { finish(ticket.request, error) }
        }
    }

    static func runs(_ offset: UInt64, _ length: Int, _ target: UnsafeMutableRawPointer) -> [Run] {
        var runs: [Run] = []
        var at = 0
        while at < length {
            let here = offset + UInt64(at)
            let count = min(length - at, Geometry.sliceBytes - Int(here % UInt64(Geometry.sliceBytes)))
            runs.append(Run(offset: here, count: count, target: target + at))
            at += count
        }
        return runs
    }

    /// Fills all runs, cold ones side by side. Without a ticket: until it succeeds or fails.
    func fill(_ runs: [Run], _ ticket: RequestTicket?) async -> DeviceError? {
        var cold: [Run] = []
        for run in runs { if case .nothing = compose(run, nil) {} else { cold.append(run) } }
        if cold.isEmpty { return nil }
        if cold.count == 1 { return await fill(cold[0], ticket) }
        let loop = context.loop
        return await withTaskGroup(of: DeviceError?.self) { group in
            var next = 0
            var failure: DeviceError?
            func add() {
                let run = cold[next]
                next += 1
                group.addTask(executorPreference: loop) { [self] in await fill(run, ticket) }
            }
            while next < min(cold.count, 16) { add() }
            while let result = await group.next() {
                if let result { failure = result }
                if failure == nil, next < cold.count { add() }
            }
            return failure
        }
    }

    /// Puts one run together, bringing near what is missing until it succeeds or fails, or nobody wants it any more.
    private func fill(_ run: Run, _ ticket: RequestTicket?) async -> DeviceError? {
        var journaled: JournalPages?
        var missing = Missing.nothing
        var isFirst = true
        var backoffMs: UInt64 = 50
        while true {
            if lost != nil { return .shutdown }
            if ticket?.isWanted == false { return .shutdown }
            if isFirst { missing = compose(run, journaled) }
            isFirst = false
            do {
                switch missing {
                case .nothing: return nil
                case .manifest(let block): try await load(.entry(block))
                case .slice(let entry, let slice, _):
                    let present = journaled
                    let left = try await context.withSlice(entry, slice) { _ in
                        ticket?.isWanted == false || lost != nil ? nil : compose(run, present)
                    }
                    guard let left else { return .shutdown }
                    missing = left
                    continue
                case .page: journaled = try await journalPages(of: run, have: journaled ?? JournalPages())
                }
            } catch let error as StoreError {
                guard error.kind == .unavailable || error.kind == .unclear else {
                    context.problem("disk \(name): read at \(run.offset), \(run.count) bytes, failed: \(error)")
                    storeErrors += 1
                    return .io
                }
                await context.environment.sleep(ns: backoffMs * 1_000_000)
                backoffMs = min(backoffMs * 2, 2_000)
            } catch {
                context.problem("disk \(name): read at \(run.offset), \(run.count) bytes, failed: \(error)")
                return .io
            }
            isFirst = true
        }
    }

    /// Puts a run within one slice together from memory, as of now.
    func compose(_ run: Run, _ journaled: JournalPages?) -> Missing {
        let number = run.offset / UInt64(Geometry.sliceBytes)
        let start = Int(run.offset % UInt64(Geometry.sliceBytes))
        let pages = start / Geometry.pageBytes..<(start + run.count + Geometry.pageBytes - 1) / Geometry.pageBytes
        let active = view.active
        let (waiting, committing) = (view.waiting, view.committing)
        let a = active.isEmpty ? PageMask.none : active.masks(of: number).touched
        let w = waiting?.masks(of: number).touched ?? .none
        var c = committing?.masks(of: number).touched ?? .none
        if context.settings.fault == .committingLayerNotRead { c = .none }
        let touched = a | w | c
        let wanted = PageMask(pages: pages)
        if !(wanted & ~touched).isEmpty {
            let block = BlockIndex(number / UInt64(Geometry.slicesPerBlock))
            let slice = SliceIndex(Int(number % UInt64(Geometry.slicesPerBlock)))
            switch view.entry(block) {
            case .notLoaded: return .manifest(block)
            case .entry(nil): memset(run.target, 0, run.count)
            case .entry(let entry?):
                if !context.loader.tryCopy(entry, slice, offset: start, count: run.count, into: run.target),
                    journaled?.copy(entry.key(slice), from: start, count: run.count, into: run.target) != true
                {
                    return .slice(entry, slice, pages: pages)
                }
            }
        }
        if (wanted & touched).isEmpty { return .nothing }
        for page in pages {
            let from = max(page * Geometry.pageBytes, start)
            let to = min((page + 1) * Geometry.pageBytes, start + run.count)
            let target = run.target + (from - start)
            let state: LayerPage
            if a.contains(page) {
                state = active.page(page, of: number)
            } else if w.contains(page) {
                state = waiting!.page(page, of: number)
            } else if c.contains(page) {
                state = committing!.page(page, of: number)
            } else {
                continue
            }
            switch state {
            case .zero: memset(target, 0, to - from)
            case .data(let slot):
                if let bytes = self.pages.bytes(slot) {
                    target.copyMemory(from: bytes + from % Geometry.pageBytes, byteCount: to - from)
                } else if journaled?.copy(
                    self.pages[slot].location, from: from % Geometry.pageBytes, count: to - from, into: target) != true
                {
                    return .page(slot)
                }
            case .untouched: preconditionFailure("a touched page is untouched")
            }
        }
        return .nothing
    }

    /// Reads every page of the run that is in the journal only.
    private func journalPages(of run: Run, have: JournalPages) async throws(ScratchError) -> JournalPages {
        let number = run.offset / UInt64(Geometry.sliceBytes)
        let start = Int(run.offset % UInt64(Geometry.sliceBytes))
        let range = start / Geometry.pageBytes..<(start + run.count + Geometry.pageBytes - 1) / Geometry.pageBytes
        var slots: [UInt32] = []
        for page in range {
            for layer in view.layers {
                if case .untouched = layer.page(page, of: number) { continue }
                if case .data(let slot) = layer.page(page, of: number), pages.bytes(slot) == nil { slots.append(slot) }
                break
            }
        }
        var result = have
        for piece in journal.pieces(of: slots) {
            let bytes = try await journal.read(piece)
            for i in piece.sums.indices {
                result.add(piece.location(i), Array(bytes[i * Geometry.pageBytes..<(i + 1) * Geometry.pageBytes]))
            }
        }
        return result
    }
}
