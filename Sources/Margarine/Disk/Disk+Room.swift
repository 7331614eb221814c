// Waiting for room: a write that finds none stands in its disk's line until it is woken. See RoomWaits.swift.

internal import BlockCache
internal import Runtime

extension Disk {
    /// Waits until trying again makes sense. `again`: it was woken, and the room was gone.
    func waitForRoom(pages count: Int, again: Bool) async {
        if hold == nil { askForRoom(pages: count) }
        // What was asked for may be there already: a full journal has got its safe point, or another loop gave room.
        if !again, hasRoom(pages: count) { return }
        await withCheckedContinuation { continuation in
            roomLine.add(RoomWaiter(pages: count, continuation: continuation), again: again)
            context.rooms.add(self)
            // Whoever freed room before this loop was known to wait has told nobody.
            if !again { context.rooms.mayHaveCome() }
        }
    }

    /// Has something committed, here or elsewhere, where that is what it takes.
    private func askForRoom(pages count: Int) {
        let bytes = UInt64(count * Geometry.pageBytes + 64 * 1024)
        // A large write may not fit into what is left of a small journal that is not filling yet.
        let isTooFull = journal.liveBytes > 0 && journal.liveBytes + bytes > context.settings.journalLimitBytes
        if isJournalFilling || isTooFull { commitAnyway() }
        if isCrowded { context.arena.askForRoom(for: pages) }
        guard !context.journals.hasRoom(bytes), !context.journals.askForRoom(nowNs: nowNs), !asksLater else { return }
        asksLater = true
        context.after(ns: JournalBudget.askPauseNs) { [weak self] in
            guard let self else { return }
            asksLater = false
            lookForRoom()
        }
    }

    /// Asks again for the first in the line, and wakes it if there is room.
    func lookForRoom() {
        guard let first = roomLine.first, lost == nil, hold == nil else { return }
        askForRoom(pages: first.pages)
        wakeNextForRoom()
    }

    /// Wakes the first in the line if there is room for it. It wakes the next.
    func wakeNextForRoom() {
        guard let first = roomLine.first, hasRoom(pages: first.pages) else { return }
        wakeFirst()
    }

    /// Something has ended: each looks whether it is still wanted.
    func wakeAllForRoom() { while !roomLine.isEmpty { wakeFirst() } }

    private func wakeFirst() {
        roomLine.takeFirst()?.continuation.resume()
        if roomLine.isEmpty { context.rooms.remove(self) }
    }
}
