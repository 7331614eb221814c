// What a slice is made of: a base, and the segments over it. Both are an extent of an object with a header in front that
// says where the stored bytes of each slice are.

import Glibc

enum Layer: Sendable {
    case base(BaseRef)
    case segment(DeltaRef)

    /// An extent up to this size is fetched whole.
    static let smallBytes = 1 << 20

    var id: ObjectID {
        switch self {
        case .base(let ref): ref.id
        case .segment(let ref): ref.id
        }
    }
    var location: UInt8 {
        switch self {
        case .base(let ref): ref.location
        case .segment(let ref): ref.location
        }
    }
    /// Where it lies in its object.
    var extent: Range<UInt64> {
        switch self {
        case .base(let ref): 0..<UInt64(ref.lengthBytes)
        case .segment(let ref): UInt64(ref.offsetBytes)..<UInt64(ref.offsetBytes) + UInt64(ref.lengthBytes)
        }
    }
    /// Length of the object, where a manifest says it.
    var totalBytes: UInt64? {
        switch self {
        case .base(let ref): UInt64(ref.lengthBytes)
        case .segment: nil
        }
    }

    /// How much of the front to fetch when the header is not known: all of a small extent, else the header, and with it the
    /// slice where that is the first one stored.
    func frontBytes(wanting slice: SliceIndex) -> UInt64 {
        let length = UInt64(extent.count)
        if length <= UInt64(Self.smallBytes) { return length }
        let header: Int
        let stored: UInt32
        switch self {
        case .base(let ref): (header, stored) = (BaseHeader.lengthBytes, ref.nonzeroSlices)
        case .segment(let ref): (header, stored) = (SegmentHeader.maxLengthBytes, ref.touchedSlices & ~ref.zeroedSlices)
        }
        let isFirst = stored.trailingZeroBitCount == slice.value
        return min(length, UInt64(header + (isFirst ? Geometry.sliceBytes : 0)))
    }

    func decodeHeader(_ bytes: UnsafeRawBufferPointer) throws(FormatError) -> LayerHeader {
        switch self {
        case .base(let ref): .base(try BaseHeader(decoding: bytes, of: ref))
        case .segment(let ref): .segment(try SegmentHeader(decoding: bytes, of: ref))
        }
    }
}

enum LayerHeader: Sendable {
    case base(BaseHeader)
    case segment(SegmentHeader)

    /// Where the stored bytes of `slice` are, from the start of the extent.
    func storedRange(_ slice: SliceIndex) -> Range<UInt64> {
        switch self {
        case .base(let header): header.slices[slice.value].range
        case .segment(let header): header.patch(slice)?.range ?? 0..<0
        }
    }
    /// Ends of stored slices, ascending.
    var cuts: [UInt64] {
        switch self {
        case .base(let header): header.slices.compactMap { $0.codec == .zero ? nil : $0.range.upperBound }
        case .segment(let header): header.patches.compactMap { $0.codec == .zero ? nil : $0.range.upperBound }
        }
    }
}

/// The stored bytes of one layer of one slice, and what says how to check and unpack them.
struct LayerPart: Sendable {
    var header: LayerHeader
    var bytes: ByteView
    var fromScratch: Bool
}

/// A layer whose bytes are not what they should be.
struct LayerProblem: Sendable {
    var index: Int
    var error: FormatError
    var fromScratch: Bool
}

enum FetchedLayer: Sendable {
    case part(LayerPart)
    case problem(LayerProblem)
}

/// Checks and applies layers, oldest first, over `below` (nil: zeroes). For a worker thread. Gives the first layer that is
/// no good; the frame's bytes are then of no use.
func applyLayers(_ parts: [LayerPart], over below: Lent?, _ slice: SliceIndex, into frame: Lent) -> LayerProblem? {
    if let below {
        memcpy(frame.pointer, below.pointer, Geometry.sliceBytes)
    } else if case .base? = parts.first?.header {
        // It fills the whole frame.
    } else {
        memset(frame.pointer, 0, Geometry.sliceBytes)
    }
    for (index, part) in parts.enumerated() {
        do throws(FormatError) {
            try part.bytes.withBytes { (bytes) throws(FormatError) in
                switch part.header {
                case .base(let header): try header.unpack(slice, stored: bytes, into: frame.pointer)
                case .segment(let header):
                    guard let patch = header.patch(slice) else { throw .corrupt("segment lacks slice \(slice.value)") }
                    try SegmentHeader.apply(patch, stored: bytes, to: frame.pointer)
                }
            }
        } catch { return LayerProblem(index: index, error: error, fromScratch: part.fromScratch) }
    }
    return nil
}
