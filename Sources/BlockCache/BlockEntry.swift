// What a manifest says of one block: a base object, and deltas over it. Everything it names is immutable, so an
// entry is a value that means the same bytes for ever.

/// The 128-bit random name of an immutable object.
public struct ObjectID: Hashable, Sendable, CustomStringConvertible {
    public var high: UInt64
    public var low: UInt64
    public init(high: UInt64, low: UInt64) {
        self.high = high
        self.low = low
    }
    /// 32 lower-case hex digits.
    public var description: String {
        String(unsafeUninitializedCapacity: 32) { digits in
            for place in 0..<32 {
                let nibble = UInt8((place < 16 ? high : low) >> UInt64(60 - 4 * (place & 15)) & 15)
                digits[place] = nibble < 10 ? UInt8(ascii: "0") + nibble : UInt8(ascii: "a") + nibble - 10
            }
            return 32
        }
    }
    /// From 32 lower-case hex digits; nil for anything else.
    public init?(_ text: some StringProtocol) {
        var (high, low): (UInt64, UInt64) = (0, 0)
        var count = 0
        for digit in text.utf8 {
            let nibble: UInt8
            switch digit {
            case UInt8(ascii: "0")...UInt8(ascii: "9"): nibble = digit - UInt8(ascii: "0")
            case UInt8(ascii: "a")...UInt8(ascii: "f"): nibble = digit - UInt8(ascii: "a") + 10
            default: return nil
            }
            high = high << 4 | low >> 60
            low = low << 4 | UInt64(nibble)
            count += 1
            if count > 32 { return nil }
        }
        guard count == 32 else { return nil }
        self.init(high: high, low: low)
    }
    /// Key of the block object of this name.
    public var blockKey: String { "blocks/" + description }
    /// Key of the manifest page of this name.
    public var manifestKey: String { "manifests/" + description }
}

/// A block object that holds a whole block.
public struct BaseRef: Hashable, Sendable {
    public var id: ObjectID
    /// Which location of the store has it; 0 is the only one of a store with one.
    public var location: UInt8
    /// Length of the object in bytes.
    public var lengthBytes: UInt32
    /// Bit i: slice i has bytes; where 0 it is all zeroes.
    public var nonzeroSlices: UInt32
    public init(id: ObjectID, location: UInt8, lengthBytes: UInt32, nonzeroSlices: UInt32) {
        self.id = id
        self.location = location
        self.lengthBytes = lengthBytes
        self.nonzeroSlices = nonzeroSlices
    }
}

/// A segment of a delta object: the pages of one block that one commit changed.
public struct DeltaRef: Hashable, Sendable {
    public var id: ObjectID
    public var location: UInt8
    /// Where this block's segment lies in the object.
    public var offsetBytes: UInt32
    public var lengthBytes: UInt32
    /// Bit i: the segment changes slice i.
    public var touchedSlices: UInt32
    /// Bit i: after it the whole of slice i is zeroes. A subset of `touchedSlices`.
    public var zeroedSlices: UInt32
    public init(
        id: ObjectID, location: UInt8, offsetBytes: UInt32, lengthBytes: UInt32, touchedSlices: UInt32,
        zeroedSlices: UInt32
    ) {
        self.id = id
        self.location = location
        self.offsetBytes = offsetBytes
        self.lengthBytes = lengthBytes
        self.touchedSlices = touchedSlices
        self.zeroedSlices = zeroedSlices
    }
}

/// The stored form of one block: nothing (all zeroes), a base, deltas over zeroes, or deltas over a base.
public struct BlockEntry: Hashable, Sendable {
    public var base: BaseRef?
    /// Oldest first; at most `maxDeltas`.
    public var deltas: [DeltaRef]
    public static let maxDeltas = 8
    public init(base: BaseRef?, deltas: [DeltaRef]) {
        self.base = base
        self.deltas = deltas
    }

    /// The identity of a slice's bytes: equal keys mean equal bytes, in every disk and fork. nil: all zeroes.
    ///
    /// It is the newest segment (or the base) that touched the slice: what lies below a segment was fixed when the
    /// segment was made.
    public func key(_ slice: SliceIndex) -> SliceKey? {
        let bit = UInt32(1) << UInt32(slice.value)
        for delta in deltas.reversed() where delta.touchedSlices & bit != 0 {
            if delta.zeroedSlices & bit != 0 { return nil }
            return SliceKey(id: delta.id, offsetBytes: delta.offsetBytes, slice: slice)
        }
        guard let base, base.nonzeroSlices & bit != 0 else { return nil }
        return SliceKey(id: base.id, offsetBytes: 0, slice: slice)
    }

    /// Bit i: slice i may hold something other than zeroes.
    public var nonzeroSlices: UInt32 {
        deltas.reduce(base?.nonzeroSlices ?? 0) { ($0 | $1.touchedSlices) & ~$1.zeroedSlices }
    }
}

/// Names the bytes of one slice in the memory cache.
public struct SliceKey: Hashable, Sendable {
    public var id: ObjectID
    /// 0 for a slice of a base, else the offset of the delta segment in its object (never 0).
    public var offsetBytes: UInt32
    public var slice: SliceIndex
    public init(id: ObjectID, offsetBytes: UInt32, slice: SliceIndex) {
        self.id = id
        self.offsetBytes = offsetBytes
        self.slice = slice
    }
}
