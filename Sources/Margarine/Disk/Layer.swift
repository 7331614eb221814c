// The writes, trims and zeroes of one disk between two freezes, in order-free form: for each page its newest state.
// A page is data (a slot), zeroes, or untouched (look below). Only the active layer changes; a frozen one is merged into
// an older frozen one, or committed, or dropped.
//
// Always holds: what its tables take on the heap is charged to its disk's `DirtyPages`; a slice that is zeroes throughout
// is in `zeroed` alone.

internal import BlockCache

/// What a layer says of one page.
enum LayerPage {
    case untouched
    case zero
    case data(UInt32)
}

/// Owned by its disk's loop.
package final class Layer {
    private let pages: DirtyPages
    /// Slices of which single pages were touched.
    private var slices = SliceTable()
    /// Slices wholly zeroed, unless `slices` says otherwise of single pages.
    private(set) var zeroed = SliceRanges()
    /// Pages with data.
    private(set) var dataPages = 0
    /// What the records of `slices` take on the heap.
    private var recordBytes = 0
    private var chargedBytes = 0
    /// The last search, good until `slices` changes: a page is looked for right before it is put.
    private var lastNumber = UInt64.max
    private var lastSearch = (at: SliceTable.Position(chunk: 0, index: 0), isThere: false)

    /// The last journal record whose effect is in this layer (or the safe point that froze it).
    var lastSequence: UInt64 = 0
    /// Monotonic time of the first safe point that waits in it, once frozen.
    var frozenAtNs: UInt64 = 0
    var kind: GenerationKind = .flush

    init(pages: DirtyPages) { self.pages = pages }

    deinit { drop() }

    var isEmpty: Bool { slices.isEmpty && zeroed.isEmpty }
    var dataBytes: Int { dataPages * Geometry.pageBytes }
    /// What its tables take in memory. The slots of its pages are counted by `DirtyPages`.
    var overheadBytes: Int { slices.bytes + recordBytes + zeroed.bytes }

    // MARK: Looking

    @inline(__always)
    private func search(_ number: UInt64) -> (at: SliceTable.Position, isThere: Bool) {
        if number == lastNumber { return lastSearch }
        lastSearch = slices.search(number)
        lastNumber = number
        return lastSearch
    }

    @inline(__always)
    private func find(_ number: UInt64) -> LayerSlice? {
        if slices.isEmpty { return nil }
        let found = search(number)
        return found.isThere ? slices[found.at] : nil
    }

    @inline(__always)
    private func isZeroed(_ number: UInt64) -> Bool { !zeroed.isEmpty && zeroed.contains(number) }

    /// What this layer says of page `page` (0..<128) of slice `number`.
    @inline(__always)
    func page(_ page: Int, of number: UInt64) -> LayerPage {
        if let slice = find(number) {
            if slice.data.contains(page) { return .data(slice.slot(page)) }
            if slice.zero.contains(page) { return .zero }
        }
        return isZeroed(number) ? .zero : .untouched
    }

    /// The pages of one slice that a layer touched.
    struct Masks {
        var data: PageMask
        var zero: PageMask
        var touched: PageMask { data | zero }
    }

    /// The data and zero pages of a slice.
    @inline(__always)
    func masks(of number: UInt64) -> Masks {
        let below = isZeroed(number) ? PageMask.all : .none
        guard let slice = find(number) else { return Masks(data: .none, zero: below) }
        let data = slice.data
        return Masks(data: data, zero: (below | slice.zero) & ~data)
    }

    func slot(_ page: Int, of number: UInt64) -> UInt32? {
        guard let slice = find(number), slice.data.contains(page) else { return nil }
        return slice.slot(page)
    }

    /// The first slice from `number` on with single pages; `zeroed` comes on top.
    func nextTouched(atOrAfter number: UInt64) -> UInt64? {
        slices.next(atOrAfter: number).map { slices.number($0) }
    }

    /// The first block from `block` on of which more is to be said than that all of it is zeroes.
    func nextBlock(atOrAfter block: UInt64) -> UInt64? {
        let per = UInt64(Geometry.slicesPerBlock)
        let touched = nextTouched(atOrAfter: block * per).map { $0 / per }
        var from = block * per
        while let range = zeroed.range(after: from) {
            let first = max(range.lowerBound, from) / per
            if let touched, touched <= first { return touched }
            if range.lowerBound > first * per || range.upperBound < (first + 1) * per { return first }
            // It covers whole blocks: what matters is where it ends.
            if range.upperBound % per != 0 { return min(touched ?? .max, range.upperBound / per) }
            from = range.upperBound
        }
        return touched
    }

    /// Calls `body` with each touched slice of `range`, ascending.
    func forEachTouched(in range: Range<UInt64>, _ body: (UInt64, Masks) -> Void) {
        if let zero = zeroed.range(after: range.lowerBound), zero.lowerBound < range.upperBound {
            for number in range {
                let masks = masks(of: number)
                if !masks.touched.isEmpty { body(number, masks) }
            }
            return
        }
        var next = slices.next(atOrAfter: range.lowerBound)
        while let at = next, slices.number(at) < range.upperBound {
            body(slices.number(at), Masks(data: slices[at].data, zero: slices[at].zero))
            next = slices.next(after: at)
        }
    }

    // MARK: Changing (the active layer only)

    /// Makes `slot` the data of the page; the slot that was there is freed.
    func put(_ slot: UInt32, page: Int, of number: UInt64) {
        let found = search(number)
        if !found.isThere {
            insert(number, LayerSlice(page: page, slot: slot), at: found.at)
            dataPages += 1
            return settle()
        }
        let old = slices[found.at]
        if old.isSingle {
            if old.page == page {
                if let before = old.singleSlot { pages.free(before) } else { dataPages += 1 }
                slices[found.at] = LayerSlice(page: page, slot: slot)
                return
            }
            slices[found.at] = LayerSlice(record(of: old, count: 2))
        }
        put(slot, page, in: slices[found.at].record, at: found.at)
        settle()
    }

    private func put(_ slot: UInt32, _ page: Int, in record: SliceRecord, at: SliceTable.Position) {
        var record = record
        var data = record.data
        let rank = data.rank(page)
        if data.contains(page) {
            pages.free(record.slots[rank])
            record.slots[rank] = slot
            return
        }
        let count = data.count
        if count == record.capacity {
            record = resized(record, for: count + 1)
            slices[at] = LayerSlice(record)
        }
        let slots = record.slots
        if rank < count { (slots + rank + 1).update(from: slots + rank, count: count - rank) }
        slots[rank] = slot
        data.insert(page)
        record.data = data
        var zero = record.zero
        if !zero.isEmpty {
            zero.remove(page)
            record.zero = zero
        }
        dataPages += 1
    }

    /// Zeroes single pages of one slice.
    func zero(_ mask: PageMask, of number: UInt64) {
        if mask.isEmpty { return }
        let found = search(number)
        // Where the whole slice is zeroed, only data over it needs to be taken away.
        let added = isZeroed(number) ? PageMask.none : mask
        if found.isThere {
            zero(mask, adding: added, number, at: found.at)
        } else if added.isAll {
            zeroed.insert(number..<number + 1)
        } else if !added.isEmpty {
            insert(number, slice(zero: added), at: found.at)
        }
        settle()
    }

    private func zero(_ mask: PageMask, adding added: PageMask, _ number: UInt64, at: SliceTable.Position) {
        let old = slices[at]
        let zero = old.zero | added
        let left = old.data & ~mask
        if left.isEmpty {
            free(old)
            if added.isEmpty || zero.isAll {
                slices.remove(at: at)
                lastNumber = .max
                if !added.isEmpty { zeroed.insert(number..<number + 1) }
            } else {
                slices[at] = slice(zero: zero)
            }
        } else if old.isSingle {
            // Its page stays.
            if added.isEmpty { return }
            let record = record(of: old, count: 1)
            record.zero = zero
            slices[at] = LayerSlice(record)
        } else {
            discard(old.data & mask, of: old.record)
            old.record.zero = zero
            if left.count < old.record.capacity / 4 {
                slices[at] = LayerSlice(resized(old.record, for: left.count))
            }
        }
    }

    /// Zeroes whole pages, counted from the start of the disk, in any number.
    func zero(pages range: Range<UInt64>) {
        if range.isEmpty { return }
        let per = UInt64(Geometry.pagesPerSlice)
        let first = (range.lowerBound + per - 1) / per
        let last = range.upperBound / per
        if first > last {  // within one slice
            let start = last * per
            return zero(PageMask(pages: Int(range.lowerBound - start)..<Int(range.upperBound - start)), of: last)
        }
        if range.lowerBound % per != 0 { zero(PageMask(pages: Int(range.lowerBound % per)..<Int(per)), of: first - 1) }
        if range.upperBound % per != 0 { zero(PageMask(pages: 0..<Int(range.upperBound % per)), of: last) }
        zero(slices: first..<last)
    }

    /// Zeroes whole slices: O(touched slices among them).
    func zero(slices range: Range<UInt64>) {
        if range.isEmpty { return }
        lastNumber = .max
        slices.remove(range) { free($0) }
        zeroed.insert(range)
        settle()
    }

    /// Puts everything of `newer` over this layer; `newer` is empty afterwards. O(what `newer` touched).
    func merge(_ newer: Layer) {
        lastSequence = max(lastSequence, newer.lastSequence)
        newer.zeroed.forEach { zero(slices: $0) }
        var next = newer.slices.next(atOrAfter: 0)
        while let at = next {
            take(newer.slices[at], newer.slices.number(at))
            next = newer.slices.next(after: at)
        }
        newer.slices = SliceTable()
        newer.recordBytes = 0
        newer.dataPages = 0
        newer.drop()
        settle()
    }

    /// Takes over a slice of a newer layer, with its slots.
    private func take(_ newer: LayerSlice, _ number: UInt64) {
        let found = search(number)
        if !found.isThere, !isZeroed(number) {
            insert(number, newer, at: found.at)
            if !newer.isSingle { recordBytes += SliceRecord.bytes(newer.record.capacity) }
            dataPages += newer.data.count
            return
        }
        zero(newer.zero, of: number)
        newer.data.forEach { put(newer.slot($0), page: $0, of: number) }
        if !newer.isSingle { newer.record.free() }
    }

    /// Forgets everything and frees its slots.
    func drop() { while !drop(atMost: .max) {} }

    /// Forgets about `limit` slices and frees their slots. true: nothing is left.
    func drop(atMost limit: Int) -> Bool {
        lastNumber = .max
        slices.removeLast(limit) { free($0) }
        if slices.isEmpty { zeroed = SliceRanges() }
        settle()
        return slices.isEmpty
    }

    // MARK: Private

    private func insert(_ number: UInt64, _ slice: LayerSlice, at: SliceTable.Position) {
        lastSearch = (slices.insert(number, slice, at: at), true)
        lastNumber = number
    }

    /// Tells the disk what the tables take now.
    @inline(__always)
    private func settle() {
        let now = overheadBytes
        if now == chargedBytes { return }
        pages.charge(now - chargedBytes)
        chargedBytes = now
    }

    /// Frees the slots of a slice and its record.
    private func free(_ slice: LayerSlice) {
        slice.forEachSlot { pages.free($0) }
        dataPages -= slice.data.count
        guard !slice.isSingle else { return }
        recordBytes -= SliceRecord.bytes(slice.record.capacity)
        slice.record.free()
    }

    /// A slice of zeroes and nothing else.
    private func slice(zero: PageMask) -> LayerSlice {
        if zero.count == 1 {
            let page = zero.low != 0 ? zero.low.trailingZeroBitCount : 64 + zero.high.trailingZeroBitCount
            return LayerSlice(page: page, slot: nil)
        }
        let capacity = SliceRecord.capacity(for: 0)
        recordBytes += SliceRecord.bytes(capacity)
        return LayerSlice(SliceRecord(data: .none, zero: zero, capacity: capacity))
    }

    /// A record with what a single says, and room for `count` slots.
    private func record(of single: LayerSlice, count: Int) -> SliceRecord {
        let capacity = SliceRecord.capacity(for: count)
        recordBytes += SliceRecord.bytes(capacity)
        let record = SliceRecord(data: single.data, zero: single.zero, capacity: capacity)
        if let slot = single.singleSlot { record.slots[0] = slot }
        return record
    }

    private func resized(_ record: SliceRecord, for count: Int) -> SliceRecord {
        let capacity = SliceRecord.capacity(for: count)
        recordBytes += SliceRecord.bytes(capacity) - SliceRecord.bytes(record.capacity)
        return record.resized(capacity)
    }

    /// Frees the slots of `gone`, all of which have data, and closes the gaps.
    private func discard(_ gone: PageMask, of record: SliceRecord) {
        if gone.isEmpty { return }
        let slots = record.slots
        var from = 0
        var to = 0
        record.data.forEach { page in
            if gone.contains(page) {
                pages.free(slots[from])
            } else {
                slots[to] = slots[from]
                to += 1
            }
            from += 1
        }
        record.data = record.data & ~gone
        dataPages -= gone.count
    }
}
