// What a layer holds of single slices, in the order of their numbers: a directory of sorted chunks. A slice with one page
// takes 16 bytes, one with more a record besides, which grows with its pages. So memory follows what was touched, a look
// costs two binary searches, and whoever walks need not sort.
//
// Always holds: numbers ascend within and across chunks; no chunk is empty; `bytes` is what all of it takes on the heap.

internal import BlockCache
internal import Glibc

/// What a layer holds of one slice: a word that is a page itself, or the address of a record.
struct LayerSlice {
    fileprivate var word: UInt64

    init(page: Int, slot: UInt32?) {
        word = UInt64(slot ?? 0) << 32 | (slot == nil ? 0 : 1 << 8) | UInt64(page) << 1 | 1
    }
    init(_ record: SliceRecord) { word = UInt64(UInt(bitPattern: record.base)) }

    var isSingle: Bool { word & 1 == 1 }
    /// The one page, and its slot where it is data. For singles.
    var page: Int { Int(word >> 1 & 127) }
    var singleSlot: UInt32? { word & 1 << 8 == 0 ? nil : UInt32(word >> 32) }
    var record: SliceRecord { SliceRecord(base: UnsafeMutableRawPointer(bitPattern: UInt(word))!) }

    private var singleMask: PageMask {
        let bit: UInt64 = 1 << UInt64(page & 63)
        return page < 64 ? PageMask(low: bit) : PageMask(high: bit)
    }
    @inline(__always)
    var data: PageMask { isSingle ? (singleSlot == nil ? .none : singleMask) : record.data }
    @inline(__always)
    var zero: PageMask { isSingle ? (singleSlot == nil ? singleMask : .none) : record.zero }

    /// The slot of a page that has data.
    @inline(__always)
    func slot(_ wanted: Int) -> UInt32 {
        isSingle ? UInt32(word >> 32) : record.slots[record.data.rank(wanted)]
    }

    /// Calls `body` with the slot of each page that has data, in the order of the pages.
    func forEachSlot(_ body: (UInt32) -> Void) {
        if isSingle {
            if let slot = singleSlot { body(slot) }
        } else {
            let slots = record.slots
            for i in 0..<record.data.count { body(slots[i]) }
        }
    }
}

/// Two masks, and the slots of the data pages in their order. On the heap, in steps of what malloc hands out anyway.
struct SliceRecord {
    fileprivate let base: UnsafeMutableRawPointer

    private static let slotsAt = 36
    /// Slots for which there is room in 40, 56, 88, 152, 280 and 552 bytes.
    static func capacity(for count: Int) -> Int {
        switch count {
        case ...1: 1
        case ...5: 5
        case ...13: 13
        case ...29: 29
        case ...61: 61
        default: 128
        }
    }
    static func bytes(_ capacity: Int) -> Int { heapBytes(slotsAt + capacity * 4) }

    init(data: PageMask, zero: PageMask, capacity: Int) {
        base = malloc(SliceRecord.slotsAt + capacity * 4)!
        self.data = data
        self.zero = zero
        self.capacity = capacity
    }
    fileprivate init(base: UnsafeMutableRawPointer) { self.base = base }

    var data: PageMask {
        @inline(__always) get { base.load(as: PageMask.self) }
        nonmutating set { base.storeBytes(of: newValue, as: PageMask.self) }
    }
    var zero: PageMask {
        @inline(__always) get { base.load(fromByteOffset: 16, as: PageMask.self) }
        nonmutating set { base.storeBytes(of: newValue, toByteOffset: 16, as: PageMask.self) }
    }
    var capacity: Int {
        get { Int(base.load(fromByteOffset: 32, as: UInt32.self)) }
        nonmutating set { base.storeBytes(of: UInt32(newValue), toByteOffset: 32, as: UInt32.self) }
    }
    var slots: UnsafeMutablePointer<UInt32> {
        (base + SliceRecord.slotsAt).assumingMemoryBound(to: UInt32.self)
    }

    /// The record with room for `capacity` slots; this one is gone.
    func resized(_ capacity: Int) -> SliceRecord {
        let moved = SliceRecord(base: realloc(base, SliceRecord.slotsAt + capacity * 4)!)
        moved.capacity = capacity
        return moved
    }
    func free() { Glibc.free(base) }
}

/// What malloc takes for `count` bytes.
func heapBytes(_ count: Int) -> Int { max(32, (count + 8 + 15) & ~15) }

/// Owned by its layer.
struct SliceTable: ~Copyable {
    /// Where an entry is, or would be. Good until the table changes.
    struct Position: Equatable {
        var chunk: Int
        var index: Int
    }
    private struct Chunk {
        /// `capacity` numbers, and behind them as many slices.
        var numbers: UnsafeMutablePointer<UInt64>
        var count: Int
        var capacity: Int
        var slices: UnsafeMutablePointer<LayerSlice> {
            UnsafeMutableRawPointer(numbers + capacity).assumingMemoryBound(to: LayerSlice.self)
        }
    }
    private static let maxEntries = 256
    private static let stepEntries = 32

    /// The first number of each chunk; of the first one a number that is not above it.
    private var firsts: UnsafeMutablePointer<UInt64>
    private var chunks: UnsafeMutablePointer<Chunk>
    private var chunkCount = 0
    private var chunkCapacity = 0
    /// Slices in the table.
    private(set) var count = 0
    /// What chunks, directory and guesses take; records are their owner's.
    private(set) var bytes = 0

    /// Where slices were found, by the low bits of their hashes: chunk << 8 | index. What it says is held against the table,
    /// so it may be wrong.
    private var guesses: UnsafeMutablePointer<UInt32>
    private var guessMask = -1
    private static let maxGuesses = 16_384

    init() {
        firsts = .allocate(capacity: 0)
        chunks = .allocate(capacity: 0)
        guesses = .allocate(capacity: 0)
    }

    deinit {
        guesses.deallocate()
        for c in 0..<chunkCount { chunks[c].numbers.deallocate() }
        firsts.deallocate()
        chunks.deallocate()
    }

    var isEmpty: Bool { count == 0 }

    @inline(__always)
    subscript(at: Position) -> LayerSlice {
        get { chunks[at.chunk].slices[at.index] }
        nonmutating set { chunks[at.chunk].slices[at.index] = newValue }
    }
    @inline(__always)
    func number(_ at: Position) -> UInt64 { chunks[at.chunk].numbers[at.index] }

    /// Where `number` is, or where it belongs.
    @inline(__always)
    func search(_ number: UInt64) -> (at: Position, isThere: Bool) {
        if guessMask >= 0 {
            let guess = Int(guesses[SliceTable.hash(number) & guessMask])
            let at = Position(chunk: guess >> 8, index: guess & 255)
            if at.chunk < chunkCount, at.index < chunks[at.chunk].count, chunks[at.chunk].numbers[at.index] == number {
                return (at, true)
            }
        }
        return searchAll(number)
    }

    /// Neighbours spread.
    @inline(__always)
    private static func hash(_ number: UInt64) -> Int {
        Int(truncatingIfNeeded: (number &* 0x9e37_79b9_7f4a_7c15) >> 40)
    }

    private func searchAll(_ number: UInt64) -> (at: Position, isThere: Bool) {
        if chunkCount == 0 { return (Position(chunk: 0, index: 0), false) }
        var low = 0
        var span = chunkCount
        while span > 1 {
            let half = span / 2
            low = firsts[low + half] <= number ? low + half : low
            span -= half
        }
        let chunk = chunks[low]
        var index = 0
        span = chunk.count
        while span > 1 {
            let half = span / 2
            index = chunk.numbers[index + half] <= number ? index + half : index
            span -= half
        }
        let found = chunk.numbers[index]
        if found < number { index += 1 }
        if found == number, guessMask >= 0, low < 1 << 24 {
            guesses[SliceTable.hash(number) & guessMask] = UInt32(low << 8 | index)
        }
        return (Position(chunk: low, index: index), found == number)
    }

    /// The first entry whose number is not below `number`.
    func next(atOrAfter number: UInt64) -> Position? {
        let at = search(number).at
        if chunkCount == 0 { return nil }
        return settled(at)
    }
    /// The entry behind `at`.
    func next(after at: Position) -> Position? { settled(Position(chunk: at.chunk, index: at.index + 1)) }
    private func settled(_ at: Position) -> Position? {
        if at.index < chunks[at.chunk].count { return at }
        return at.chunk + 1 < chunkCount ? Position(chunk: at.chunk + 1, index: 0) : nil
    }

    // MARK: Changing

    /// Puts an entry where `search` said it belongs. Returns where it is.
    mutating func insert(_ number: UInt64, _ slice: LayerSlice, at: Position) -> Position {
        var at = at
        count += 1
        if chunkCount == 0 {
            addChunk(at: 0, capacity: 8, first: number)
        } else if chunks[at.chunk].count == SliceTable.maxEntries {
            at = split(at, number)
        }
        if chunks[at.chunk].count == chunks[at.chunk].capacity { grow(at.chunk) }
        let chunk = chunks[at.chunk]
        let behind = chunk.count - at.index
        (chunk.numbers + at.index + 1).update(from: chunk.numbers + at.index, count: behind)
        (chunk.slices + at.index + 1).update(from: chunk.slices + at.index, count: behind)
        chunk.numbers[at.index] = number
        chunk.slices[at.index] = slice
        chunks[at.chunk].count += 1
        if at.index == 0 { firsts[at.chunk] = number }
        if count > guessMask, guessMask < SliceTable.maxGuesses - 1, count > 8 { resizeGuesses((guessMask + 1) * 4) }
        return at
    }

    /// Makes room in a full chunk. What comes in ascending order leaves full chunks behind.
    private mutating func split(_ at: Position, _ number: UInt64) -> Position {
        let full = chunks[at.chunk].count
        if at.index == full {
            if at.chunk + 1 < chunkCount, chunks[at.chunk + 1].count < SliceTable.maxEntries {
                return Position(chunk: at.chunk + 1, index: 0)
            }
            addChunk(at: at.chunk + 1, capacity: SliceTable.stepEntries, first: number)
            return Position(chunk: at.chunk + 1, index: 0)
        }
        let kept = full / 2
        let moved = full - kept
        addChunk(at: at.chunk + 1, capacity: moved + SliceTable.stepEntries, first: chunks[at.chunk].numbers[kept])
        let (from, to) = (chunks[at.chunk], chunks[at.chunk + 1])
        to.numbers.update(from: from.numbers + kept, count: moved)
        to.slices.update(from: from.slices + kept, count: moved)
        chunks[at.chunk + 1].count = moved
        chunks[at.chunk].count = kept
        resize(at.chunk, kept + SliceTable.stepEntries)
        return at.index <= kept ? at : Position(chunk: at.chunk + 1, index: at.index - kept)
    }

    private mutating func grow(_ c: Int) {
        let capacity = chunks[c].capacity
        let wanted = capacity < SliceTable.stepEntries ? capacity * 2 : capacity + SliceTable.stepEntries
        resize(c, min(wanted, SliceTable.maxEntries))
    }

    private mutating func resize(_ c: Int, _ capacity: Int) {
        let old = chunks[c]
        var new = Chunk(numbers: .allocate(capacity: capacity * 2), count: old.count, capacity: capacity)
        new.numbers.update(from: old.numbers, count: old.count)
        new.slices.update(from: old.slices, count: old.count)
        swap(&chunks[c], &new)
        old.numbers.deallocate()
        bytes += heapBytes(capacity * 16) - heapBytes(old.capacity * 16)
    }

    private mutating func addChunk(at c: Int, capacity: Int, first: UInt64) {
        if chunkCount == chunkCapacity { resizeDirectory(max(4, chunkCapacity + chunkCapacity / 2)) }
        (firsts + c + 1).update(from: firsts + c, count: chunkCount - c)
        (chunks + c + 1).update(from: chunks + c, count: chunkCount - c)
        firsts[c] = first
        chunks[c] = Chunk(numbers: .allocate(capacity: capacity * 2), count: 0, capacity: capacity)
        chunkCount += 1
        bytes += heapBytes(capacity * 16)
    }

    private mutating func resizeDirectory(_ capacity: Int) {
        let (oldFirsts, oldChunks) = (firsts, chunks)
        firsts = .allocate(capacity: capacity)
        chunks = .allocate(capacity: capacity)
        firsts.update(from: oldFirsts, count: chunkCount)
        chunks.update(from: oldChunks, count: chunkCount)
        oldFirsts.deallocate()
        oldChunks.deallocate()
        bytes += directoryBytes(capacity) - directoryBytes(chunkCapacity)
        chunkCapacity = capacity
    }

    private mutating func resizeGuesses(_ wanted: Int) {
        let capacity = count == 0 ? 0 : min(max(wanted, 32), SliceTable.maxGuesses)
        guesses.deallocate()
        guesses = .allocate(capacity: capacity)
        guesses.initialize(repeating: 0, count: capacity)
        bytes += (capacity == 0 ? 0 : heapBytes(capacity * 4)) - (guessMask < 0 ? 0 : heapBytes((guessMask + 1) * 4))
        guessMask = capacity - 1
    }

    private func directoryBytes(_ capacity: Int) -> Int {
        capacity == 0 ? 0 : heapBytes(capacity * 8) + heapBytes(capacity * MemoryLayout<Chunk>.stride)
    }

    mutating func remove(at: Position) {
        count -= 1
        removeEntries(of: at.chunk, at.index..<at.index + 1)
        if chunks[at.chunk].count == 0 { removeChunks(at.chunk..<at.chunk + 1) }
    }

    /// Removes all entries of a range of numbers, after `body` has seen each.
    mutating func remove(_ range: Range<UInt64>, _ body: (LayerSlice) -> Void) {
        guard let first = next(atOrAfter: range.lowerBound) else { return }
        var emptied: Range<Int>?
        var c = first.chunk
        var start = first.index
        while c < chunkCount, chunks[c].numbers[start] < range.upperBound {
            var end = start
            while end < chunks[c].count, chunks[c].numbers[end] < range.upperBound {
                body(chunks[c].slices[end])
                end += 1
            }
            count -= end - start
            removeEntries(of: c, start..<end)
            if chunks[c].count == 0 { emptied = (emptied?.lowerBound ?? c)..<c + 1 }
            c += 1
            start = 0
        }
        if let emptied { removeChunks(emptied) }
    }

    /// Removes up to `limit` entries (whole chunks) from the end, after `body` has seen each.
    mutating func removeLast(_ limit: Int, _ body: (LayerSlice) -> Void) {
        var seen = 0
        while chunkCount > 0, seen < limit {
            let last = chunks[chunkCount - 1]
            for i in 0..<last.count { body(last.slices[i]) }
            seen += last.count
            count -= last.count
            removeChunks(chunkCount - 1..<chunkCount)
        }
    }

    private mutating func removeEntries(of c: Int, _ gone: Range<Int>) {
        let chunk = chunks[c]
        let behind = chunk.count - gone.upperBound
        (chunk.numbers + gone.lowerBound).update(from: chunk.numbers + gone.upperBound, count: behind)
        (chunk.slices + gone.lowerBound).update(from: chunk.slices + gone.upperBound, count: behind)
        chunks[c].count -= gone.count
        let left = chunks[c].count
        if left == 0 { return }
        if gone.lowerBound == 0 { firsts[c] = chunk.numbers[0] }
        if left < chunk.capacity / 4, chunk.capacity > SliceTable.stepEntries {
            resize(c, max(SliceTable.stepEntries, left * 2))
        }
    }

    private mutating func removeChunks(_ gone: Range<Int>) {
        for c in gone {
            chunks[c].numbers.deallocate()
            bytes -= heapBytes(chunks[c].capacity * 16)
        }
        let behind = chunkCount - gone.upperBound
        (firsts + gone.lowerBound).update(from: firsts + gone.upperBound, count: behind)
        (chunks + gone.lowerBound).update(from: chunks + gone.upperBound, count: behind)
        chunkCount -= gone.count
        if count == 0 { resizeGuesses(0) }
        if chunkCount < chunkCapacity / 4 { resizeDirectory(chunkCount == 0 ? 0 : chunkCount * 2) }
    }
}

extension PageMask {
    /// How many pages of the mask come before `page`.
    @inline(__always)
    func rank(_ page: Int) -> Int {
        page < 64
            ? (low & (1 << UInt64(page) &- 1)).nonzeroBitCount
            : low.nonzeroBitCount + (high & (1 << UInt64(page - 64) &- 1)).nonzeroBitCount
    }
}
