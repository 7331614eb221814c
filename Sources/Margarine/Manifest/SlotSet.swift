// Which of a page's 512 slots are in use, and how many before a given one: what makes a sparse page small in memory
// and a lookup in it a popcount.

/// A set of slots 0 to 511 with constant-time rank.
struct SlotSet: Sendable, Equatable {
    private var words: InlineArray<8, UInt64> = InlineArray(repeating: 0)
    private var before: InlineArray<8, UInt16> = InlineArray(repeating: 0)
    private(set) var count = 0

    init() {}

    /// From slots in ascending order, none twice.
    init(ascending slots: some Sequence<Int>) {
        for slot in slots {
            precondition(slot >= 0 && slot < 512)
            words[slot >> 6] |= 1 << UInt64(slot & 63)
            count += 1
        }
        var sum: UInt16 = 0
        for i in 0..<8 {
            before[i] = sum
            sum += UInt16(words[i].nonzeroBitCount)
        }
        precondition(Int(sum) == count)
    }

    /// The position of `slot` among the used ones; nil if unused.
    @inline(__always) func rank(_ slot: Int) -> Int? {
        let word = words[slot >> 6]
        let bit = UInt64(1) << UInt64(slot & 63)
        if word & bit == 0 { return nil }
        return Int(before[slot >> 6]) + (word & (bit - 1)).nonzeroBitCount
    }

    /// The first used slot that is `slot` or later; nil if there is none. `slot` may be 512.
    func next(from slot: Int) -> Int? {
        var index = slot >> 6
        if index >= 8 { return nil }
        var word = words[index] & (UInt64.max << UInt64(slot & 63))
        while word == 0 {
            index += 1
            if index == 8 { return nil }
            word = words[index]
        }
        return index << 6 + word.trailingZeroBitCount
    }

    /// The used slots, ascending.
    var slots: [Int] {
        var all: [Int] = []
        all.reserveCapacity(count)
        var slot = next(from: 0)
        while let s = slot {
            all.append(s)
            slot = next(from: s + 1)
        }
        return all
    }

    static func == (a: SlotSet, b: SlotSet) -> Bool {
        for i in 0..<8 where a.words[i] != b.words[i] { return false }
        return true
    }
}
