// Writing: pages are copied into the active layer and queued for the journal in one synchronous step. A write that
// covers pages only in part is merged with their bytes of that instant, so concurrent sub-page writes lose nothing.

internal import BlockCache
internal import Glibc
internal import ObjectStore
internal import Runtime

/// 4 KiB of zeroes, for merging ends of zeroed ranges.
private nonisolated(unsafe) let zeroPage: UnsafeRawPointer = {  // never written again
    let page = UnsafeMutableRawPointer.allocate(byteCount: Geometry.pageBytes, alignment: 4096)
    memset(page, 0, Geometry.pageBytes)
    return UnsafeRawPointer(page)
}()

extension Disk {
    /// What came of a try to apply a write.
    enum Applied {
        case done
        case needs(Missing)
        case full
    }

    /// Why nothing can be written at all, if so.
    private var refusal: DeviceError? {
        if lost != nil { return .shutdown }
        return journal.failure == nil ? nil : .io
    }

    package func tryWrite(
        offset: UInt64, lengthBytes: Int, from buffer: UnsafeRawPointer, client: any DeviceClient
    ) -> Inline {
        if let refusal { return .failed(refusal) }
        if !isProven { return .later }
        switch apply(offset, lengthBytes, buffer, nil) {
        case .done: return .done
        case .needs, .full: return .later
        }
    }

    func submitWrite(_ request: DeviceRequest) {
        if let refusal { return finish(request, refusal) }
        if case .done = apply(request.offset, Int(request.lengthBytes), request.buffer!, nil) {
            return acknowledge(request)
        }
        let (offset, length, buffer) = (request.offset, Int(request.lengthBytes), request.buffer!)
        retry(request) { [self] journaled in apply(offset, length, buffer, journaled) }
    }

    func submitZero(_ request: DeviceRequest) {
        if let refusal { return finish(request, refusal) }
        let what = Zeroing(
            offset: request.offset, lengthBytes: request.lengthBytes, isExact: request.kind == .writeZeroes)
        if case .done = applyZero(what, nil) { return acknowledge(request) }
        retry(request) { [self] journaled in applyZero(what, journaled) }
    }

    /// A range to be zeroed.
    private struct Zeroing {
        var offset: UInt64
        var lengthBytes: UInt64
        /// Trimming is advice: only whole pages. Zeroing is not: its ends are merged like writes.
        var isExact: Bool
    }

    /// Tries again and again: brings near what is missing, waits for room. A request of a dead session stops here: it is
    /// looked at again right before each try, and nothing suspends between the look and the effect.
    private func retry(_ request: DeviceRequest, _ attempt: @escaping (JournalPages?) -> Applied) {
        let ticket = RequestTicket(request)
        nonisolated(unsafe) let attempt = attempt  // stays on this loop
        waitingWrites.enter(ticket) { [self] in
            var journaled: JournalPages?
            var wasWoken = false
            while true {
                let refused = refusal ?? (isDead(ticket) ? .shutdown : nil)
                let applied = refused == nil ? attempt(journaled) : .done
                if case .full = applied {
                    // Zeroes need no more than the pages at their ends.
                    let wanted = ticket.request
                    let isWrite = wanted.kind == .write
                    let pages = isWrite ? Disk.pageCount(wanted.offset, wanted.lengthBytes) : 2
                    await waitForRoom(pages: pages, again: wasWoken)
                    wasWoken = true
                    continue
                }
                // It took what it was woken for, or needs it no more: the next one's turn.
                if wasWoken { wakeNextForRoom() }
                wasWoken = false
                if let refused { return give(up: ticket, refused) }
                switch applied {
                case .done: return taken(ticket)
                case .full: break
                case .needs(let missing):
                    do {
                        // Tried while what was loaded can't leave the cache.
                        let done = try await bring(missing, into: &journaled) { journaled in
                            if refusal != nil || isDead(ticket) { return false }
                            if case .done = attempt(journaled) { return true }
                            return false
                        }
                        if done { return taken(ticket) }
                    } catch let error as StoreError where error.isOutage {
                        // A write waits for the store: failing it would lose what the file system believes written.
                        await context.environment.sleep(ns: 200_000_000)
                    } catch {
                        guard ticket.isOpen else { return }
                        context.problem(
                            "disk \(name): a write at \(ticket.request.offset) needs bytes that can't be read: \(error)",
                            kind: "\(name) write")
                        return give(up: ticket, .io)
                    }
                }
            }
        }
    }

    /// Its connection has left: it must not take effect any more.
    private func isDead(_ ticket: RequestTicket) -> Bool {
        !ticket.isOpen || (ticket.request.isCancelled && context.settings.fault != .deadWriteLands)
    }

    private func give(up ticket: RequestTicket, _ error: DeviceError) {
        if ticket.close() { finish(ticket.request, error) }
    }

    /// It has taken effect: who leaves from now on changes nothing.
    private func taken(_ ticket: RequestTicket) {
        if ticket.close() { acknowledge(ticket.request) }
    }

    /// Brings near what a merge lacked, and tries it while that can't go away.
    private func bring(
        _ missing: Missing, into journaled: inout JournalPages?, _ attempt: (JournalPages?) -> Bool
    ) async throws -> Bool {
        switch missing {
        case .nothing: break
        case .manifest(let block): try await load(.entry(block))
        case .slice(let entry, let slice, let pages):
            let present = journaled
            // A write that ends in two slices needs both at once, and a small cache may never hold both.
            let kept: [UInt8]? = try await context.withSlice(entry, slice) {
                if attempt(present) { return nil }
                let page = $0 + pages.lowerBound * Geometry.pageBytes
                return Array(UnsafeRawBufferPointer(start: page, count: Geometry.pageBytes))
            }
            guard let kept else { return true }
            var have = journaled ?? JournalPages()
            have.add(entry.key(slice)!, page: pages.lowerBound, kept)
            journaled = have
        case .page(let slot):
            var have = journaled ?? JournalPages()
            for piece in journal.pieces(of: [slot]) { have.add(piece.location(0), try await journal.read(piece)) }
            journaled = have
        }
        return attempt(journaled)
    }

    /// A taken request is answered once its record is in the journal, and with FUA once it is as durable as a flush.
    private func acknowledge(_ request: DeviceRequest) {
        if request.fua { flushCame() }
        whenAppended { [self] error in
            if let error { return finish(request, error) }
            if !request.fua { return finish(request, nil) }
            makeDurable { [self] in finish(request, $0) }
        }
    }

    static func pageCount(_ offset: UInt64, _ length: UInt64) -> Int {
        let first = offset / UInt64(Geometry.pageBytes)
        let last = (offset + length - 1) / UInt64(Geometry.pageBytes)
        return Int(min(last - first + 1, UInt64(JournalFormat.maxPages)))
    }

    // MARK: Applying

    /// Puts `length` bytes into the active layer and queues their record, or changes nothing.
    private func apply(_ offset: UInt64, _ length: Int, _ bytes: UnsafeRawPointer, _ journaled: JournalPages?)
        -> Applied
    {
        let size = UInt64(Geometry.pageBytes)
        let first = offset / size
        let end = offset + UInt64(length)
        let last = (end - 1) / size
        let count = Int(last - first + 1)
        if !hasRoom(pages: count) { return .full }

        // Pages at the ends that are covered in part: their merged images are made first, for they may be missing.
        let partial: (head: Bool, tail: Bool) = (
            offset % size != 0 || (first == last && end % size != 0), first != last && end % size != 0
        )
        var head: UInt32?
        var tail: UInt32?
        if partial.head {
            switch image(of: first, journaled) {
            case .success(let slot): head = slot
            case .failure(let missing): return .needs(missing.what)
            }
        }
        if partial.tail {
            switch image(of: last, journaled) {
            case .success(let slot): tail = slot
            case .failure(let missing):
                if let head { pages.discard(head) }
                return .needs(missing.what)
            }
        }

        let active = view.active
        slotRun.removeAll(keepingCapacity: true)
        var runStart = first
        var number = first / UInt64(Geometry.pagesPerSlice)
        for page in first...last {
            number = page / UInt64(Geometry.pagesPerSlice)
            let inSlice = Int(page % UInt64(Geometry.pagesPerSlice))
            let from = max(page * size, offset)
            let to = min((page + 1) * size, end)
            let source = bytes + Int(from - offset)
            let merged = page == first ? head : page == last ? tail : nil
            let slot: UInt32
            if let merged {
                slot = merged
            } else if let present = active.slot(inSlice, of: number), let target = pages.bytes(present),
                !pages[present].state.contains(.inFlight)
            {
                target.copyMemory(from: source, byteCount: Int(to - from))
                if pages[present].state.contains(.unjournaled) {
                    // Still queued: its record will carry these bytes.
                    flushRun(from: runStart)
                    runStart = page + 1
                } else {
                    pages[present].state.insert(.unjournaled)
                    slotRun.append(present)
                }
                continue
            } else {
                slot = pages.make()
            }
            pages.bytes(slot)!.advanced(by: Int(from % size)).copyMemory(from: source, byteCount: Int(to - from))
            active.put(slot, page: inSlice, of: number)
            slotRun.append(slot)
        }
        flushRun(from: runStart)
        active.lastSequence = journal.lastSequence
        if first <= SuperBlock.page, SuperBlock.page <= last { superBlockPageChanged() }
        if !superBlocks.missingMirrors.isEmpty { mirrorMayHaveCome(within: first...last) }
        return .done
    }

    private func flushRun(from first: UInt64) {
        if slotRun.isEmpty { return }
        journal.write(first: first, slots: slotRun)
        slotRun.removeAll(keepingCapacity: true)
    }

    private func applyZero(_ what: Zeroing, _ journaled: JournalPages?) -> Applied {
        let size = UInt64(Geometry.pageBytes)
        let end = what.offset + what.lengthBytes
        let first = (what.offset + size - 1) / size
        // The last page of a disk whose size is no multiple of a page counts as whole.
        let last = end == sizeBytes ? (end + size - 1) / size : end / size
        if !hasRoom(pages: 2) { return .full }
        if what.isExact {
            let zeroes = zeroPage
            let headEnd = min(end, first * size)
            if what.offset < headEnd {
                let applied = apply(what.offset, Int(headEnd - what.offset), zeroes, journaled)
                guard case .done = applied else { return applied }
            }
            if last * size < end, last >= first {
                let applied = apply(last * size, Int(end - last * size), zeroes, journaled)
                guard case .done = applied else { return applied }
            }
        }
        if first < last {
            journal.zero(first: first, count: last - first)
            active.zero(pages: first..<last)
            active.lastSequence = journal.lastSequence
            if first <= SuperBlock.page, SuperBlock.page < last { superBlocks.superBlockWent() }
        }
        return .done
    }

    private struct NotHere: Error {
        var what: Missing
    }

    /// A new slot with the page's present bytes.
    private func image(of page: UInt64, _ journaled: JournalPages?) -> Result<UInt32, NotHere> {
        let slot = pages.make()
        let run = Run(
            offset: page * UInt64(Geometry.pageBytes), count: Geometry.pageBytes, target: pages.bytes(slot)!)
        if context.settings.fault == .partialPageMergedWithZeroes {
            memset(pages.bytes(slot)!, 0, Geometry.pageBytes)
            return .success(slot)
        }
        let missing = compose(run, journaled)
        if case .nothing = missing { return .success(slot) }
        pages.discard(slot)
        return .failure(NotHere(what: missing))
    }
}
