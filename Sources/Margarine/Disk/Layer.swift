// The writes, trims and zeroes of one disk between two freezes, in order-free form: for each page its newest state.
// A page is data (a slot), zeroes, or untouched (look below). Only the active layer changes; a frozen one is merged into
// an older frozen one, or committed, or dropped.

internal import BlockCache

/// What a layer says of one page.
enum LayerPage {
    case untouched
    case zero
    case data(UInt32)
}

/// The pages of one slice that a layer touched.
struct LayerSlice {
    /// Number of the slice, counted from the start of the disk.
    var number: UInt64
    var data: PageMask
    var zero: PageMask
    /// 128 slots; those outside `data` mean nothing.
    let slots: UnsafeMutablePointer<UInt32>
}

/// Owned by its disk's loop.
package final class Layer {
    private let pages: DirtyPages
    private var slices: [LayerSlice] = []
    /// Open addressing: position in `slices` + 1, 0 for an empty place. Its count is a power of two.
    private var places: [UInt32] = []
    /// Slices wholly zeroed, unless `slices` says otherwise of single pages.
    private(set) var zeroed = SliceRanges()
    /// Pages with data.
    private(set) var dataPages = 0
    /// The last journal record whose effect is in this layer (or the safe point that froze it).
    var lastSequence: UInt64 = 0
    /// Monotonic time of the first safe point that waits in it, once frozen.
    var frozenAtNs: UInt64 = 0
    var kind: GenerationKind = .flush

    init(pages: DirtyPages) { self.pages = pages }

    deinit { drop() }

    var isEmpty: Bool { slices.isEmpty && zeroed.isEmpty }
    var dataBytes: Int { dataPages * Geometry.pageBytes }
    /// Roughly what its bookkeeping costs in memory.
    var overheadBytes: Int { slices.count * 600 + zeroed.count * 16 }

    // MARK: Looking

    @inline(__always)
    func find(_ number: UInt64) -> Int? {
        if slices.isEmpty { return nil }
        let mask = places.count - 1
        var i = Layer.hash(number) & mask
        while true {
            let place = places[i]
            if place == 0 { return nil }
            if slices[Int(place) - 1].number == number { return Int(place) - 1 }
            i = (i + 1) & mask
        }
    }

    /// What this layer says of page `page` (0..<128) of slice `number`.
    @inline(__always)
    func page(_ page: Int, of number: UInt64) -> LayerPage {
        if let i = find(number) {
            if slices[i].data.contains(page) { return .data(slices[i].slots[page]) }
            if slices[i].zero.contains(page) { return .zero }
        }
        return !zeroed.isEmpty && zeroed.contains(number) ? .zero : .untouched
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
        var data = PageMask.none
        var zero = !zeroed.isEmpty && zeroed.contains(number) ? PageMask.all : .none
        if let i = find(number) {
            data = slices[i].data
            zero = (zero | slices[i].zero) & ~data
        }
        return Masks(data: data, zero: zero)
    }

    func slot(_ page: Int, of number: UInt64) -> UInt32? {
        guard let i = find(number), slices[i].data.contains(page) else { return nil }
        return slices[i].slots[page]
    }

    /// Numbers of all slices with single pages, unordered; `zeroed` comes on top.
    var touchedSlices: [UInt64] { slices.filter { !($0.data | $0.zero).isEmpty }.map(\.number) }

    // MARK: Changing (the active layer only)

    /// Makes `slot` the data of the page; the slot that was there is freed.
    func put(_ slot: UInt32, page: Int, of number: UInt64) {
        let i = findOrAdd(number)
        if slices[i].data.contains(page) {
            pages.free(slices[i].slots[page])
        } else {
            slices[i].data.insert(page)
            slices[i].zero.remove(page)
            dataPages += 1
        }
        slices[i].slots[page] = slot
    }

    /// Zeroes single pages of one slice.
    func zero(_ mask: PageMask, of number: UInt64) {
        let i = findOrAdd(number)
        discard(mask, at: i)
        slices[i].zero = slices[i].zero | mask
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

    /// Zeroes whole slices: O(ranges + touched slices among them).
    func zero(slices range: Range<UInt64>) {
        if range.isEmpty { return }
        if UInt64(slices.count) < range.upperBound - range.lowerBound {
            for i in slices.indices where range.contains(slices[i].number) { clear(i) }
        } else {
            for number in range { if let i = find(number) { clear(i) } }
        }
        zeroed.insert(range)
    }

    /// Puts everything of `newer` over this layer; `newer` is empty afterwards. O(what `newer` touched).
    func merge(_ newer: Layer) {
        for range in newer.zeroed.ranges { zero(slices: range) }
        for j in newer.slices.indices {
            let s = newer.slices[j]
            if !s.zero.isEmpty { zero(s.zero, of: s.number) }
            if s.data.isEmpty { continue }
            let i = findOrAdd(s.number)
            discard(s.data, at: i)
            slices[i].data = slices[i].data | s.data
            slices[i].zero = slices[i].zero & ~s.data
            s.data.forEach { slices[i].slots[$0] = s.slots[$0] }
            dataPages += s.data.count
            newer.dataPages -= s.data.count
            newer.slices[j].data = .none
        }
        newer.drop()
        lastSequence = max(lastSequence, newer.lastSequence)
    }

    /// Forgets everything and frees its slots.
    func drop() {
        for i in slices.indices {
            clear(i)
            slices[i].slots.deallocate()
        }
        slices = []
        places = []
        zeroed = SliceRanges()
    }

    // MARK: Private

    private func clear(_ i: Int) {
        discard(slices[i].data, at: i)
        slices[i].zero = .none
    }

    /// Frees the slots of `mask` that have data.
    private func discard(_ mask: PageMask, at i: Int) {
        let gone = slices[i].data & mask
        if gone.isEmpty { return }
        gone.forEach { pages.free(slices[i].slots[$0]) }
        slices[i].data = slices[i].data & ~gone
        dataPages -= gone.count
    }

    private func findOrAdd(_ number: UInt64) -> Int {
        if let i = find(number) { return i }
        if (slices.count + 1) * 4 > places.count * 3 { grow() }
        slices.append(
            LayerSlice(number: number, data: .none, zero: .none, slots: .allocate(capacity: Geometry.pagesPerSlice)))
        place(slices.count - 1)
        return slices.count - 1
    }

    private func grow() {
        places = [UInt32](repeating: 0, count: max(16, places.count * 2))
        for i in slices.indices { place(i) }
    }

    private func place(_ position: Int) {
        let mask = places.count - 1
        var i = Layer.hash(slices[position].number) & mask
        while places[i] != 0 { i = (i + 1) & mask }
        places[i] = UInt32(position + 1)
    }

    /// Fibonacci hashing: neighbours spread, no attacker gains from collisions within one own disk.
    @inline(__always)
    private static func hash(_ number: UInt64) -> Int {
        Int(truncatingIfNeeded: (number &* 0x9e37_79b9_7f4a_7c15) >> 20)
    }
}

extension PageMask {
    /// Calls `body` with each page in the mask, ascending.
    @inline(__always)
    func forEach(_ body: (Int) -> Void) {
        var bits = low
        while bits != 0 {
            body(bits.trailingZeroBitCount)
            bits &= bits - 1
        }
        bits = high
        while bits != 0 {
            body(64 + bits.trailingZeroBitCount)
            bits &= bits - 1
        }
    }
}
