// Makes delta objects. Packing a patch is a pure function for worker threads; the encoder collects patches block by
// block, knows how long the object would be, and puts it together at the end.

import Glibc

/// What one commit does to one slice, packed for a delta segment.
public struct EncodedPatch: Sendable, Equatable {
    public let slice: SliceIndex
    /// Pages whose bytes are stored: those handed in that were not all zeroes.
    public let data: PageMask
    /// Pages that become zeroes: those asked for, and those handed in that were all zeroes.
    public let zeroes: PageMask
    let codec: SliceCodec
    let stored: [UInt8]
    let checksum: UInt64
    /// Stored bytes of data, without the record.
    public var storedBytes: Int { stored.count }
}

/// How the data pages given to `encodePatch` lie in memory.
public enum PageLayout: Sendable {
    /// One behind the other, ascending, without gaps.
    case packed
    /// Each at its place in a 512 KiB slice.
    case inPlace
}

/// Packs the changed pages of one slice, for a worker thread. `data` and `zeroes` are disjoint and not both empty;
/// `pages` may be nil only where `data` is empty.
public func encodePatch(
    _ slice: SliceIndex, data: PageMask, zeroes: PageMask, pages: UnsafeRawPointer?, layout: PageLayout
) -> EncodedPatch {
    precondition((data & zeroes).isEmpty && !(data | zeroes).isEmpty)
    let page = Geometry.pageBytes
    var kept = PageMask.none
    var allZeroes = zeroes
    // Gathered into one run; pages of zeroes fall out on the way.
    let run = UnsafeMutableRawBufferPointer.allocate(byteCount: max(data.count, 1) * page, alignment: 16)
    defer { run.deallocate() }
    var packedIndex = 0
    var length = 0
    data.forEach { index in
        let source = pages! + (layout == .packed ? packedIndex : index) * page
        packedIndex += 1
        if isZero(UnsafeRawBufferPointer(start: source, count: page)) {
            allZeroes.insert(index)
        } else {
            memcpy(run.baseAddress! + length, source, page)
            length += page
            kept.insert(index)
        }
    }
    if kept.isEmpty {
        return EncodedPatch(slice: slice, data: .none, zeroes: allZeroes, codec: .zero, stored: [], checksum: 0)
    }
    let (codec, stored) = Codec.pack(UnsafeRawBufferPointer(rebasing: run[0..<length]))
    return EncodedPatch(
        slice: slice, data: kept, zeroes: allZeroes, codec: codec, stored: stored,
        checksum: stored.withUnsafeBytes { checksum($0) })
}

/// Collects the changed pages of many blocks and makes one delta object.
///
///     var encoder = DeltaEncoder(id: id, location: 0)
///     encoder.begin(BlockIndex(7))
///     encoder.add(encodePatch(SliceIndex(0), data: mask, zeroes: .none, pages: p, layout: .packed))
///     if encoder.sizeBytes > 8 << 20 { … finish and start another … }
///     let (object, refs) = encoder.finish()   // put object under id.blockKey
public struct DeltaEncoder: Sendable {
    private struct Segment: Sendable {
        var block: BlockIndex
        var patches: [EncodedPatch] = []
        var dataBytes = 0
        var sizeBytes: Int { SegmentHeader.lengthBytes(patches: patches.count) + dataBytes }
    }
    public let id: ObjectID
    public let location: UInt8
    private var segments: [Segment] = []
    private var closedBytes = 0

    public init(id: ObjectID, location: UInt8) {
        self.id = id
        self.location = location
    }

    public var isEmpty: Bool { segments.isEmpty }

    /// Length of the object that `finish` makes of what was added so far.
    public var sizeBytes: Int {
        DeltaIndex.lengthBytes(segments: segments.count) + closedBytes + (segments.last?.sizeBytes ?? 0)
    }

    /// Starts the segment of another block, after at least one patch of the one before.
    public mutating func begin(_ block: BlockIndex) {
        if let last = segments.last {
            precondition(!last.patches.isEmpty, "a segment without patches")
            closedBytes += last.sizeBytes
        }
        segments.append(Segment(block: block))
    }

    /// Adds a patch to the segment begun last; slices in ascending order, each once.
    public mutating func add(_ patch: EncodedPatch) {
        precondition(!segments.isEmpty, "begin a block first")
        let last = segments.count - 1
        precondition(segments[last].patches.last.map { $0.slice < patch.slice } ?? true, "slices out of order")
        segments[last].patches.append(patch)
        segments[last].dataBytes += patch.stored.count
    }

    /// Packs and adds a patch on this thread.
    public mutating func add(
        _ slice: SliceIndex, data: PageMask, zeroes: PageMask, pages: UnsafeRawPointer?, layout: PageLayout = .packed
    ) {
        add(encodePatch(slice, data: data, zeroes: zeroes, pages: pages, layout: layout))
    }

    /// The object's bytes, and for each block, in the order begun, what a manifest says of its segment. At least one
    /// block was begun. Copies the whole object: for a worker thread.
    public func finish() -> (object: [UInt8], refs: [(block: BlockIndex, ref: DeltaRef)]) {
        precondition(!segments.isEmpty && !segments[segments.count - 1].patches.isEmpty)
        let total = sizeBytes
        precondition(total <= Int(UInt32.max), "cut delta objects well below 4 GiB")
        var offset = DeltaIndex.lengthBytes(segments: segments.count)
        var parts: [[UInt8]] = [[]]
        var refs: [(block: BlockIndex, ref: DeltaRef)] = []
        var index = DeltaIndex(id: id, objectLengthBytes: UInt64(total), segments: [])
        for segment in segments {
            let header = header(of: segment, at: offset)
            parts.append(header.encoded())
            parts += segment.patches.map(\.stored)
            index.segments.append(
                .init(block: segment.block, offsetBytes: header.offsetBytes, lengthBytes: header.segmentLengthBytes))
            refs.append(
                (
                    segment.block,
                    DeltaRef(
                        id: id, location: location, offsetBytes: header.offsetBytes,
                        lengthBytes: header.segmentLengthBytes, touchedSlices: header.touchedSlices,
                        zeroedSlices: header.zeroedSlices)
                ))
            offset += segment.sizeBytes
        }
        parts[0] = index.encoded()
        return (concatenated(parts, total: total), refs)
    }

    private func header(of segment: Segment, at offset: Int) -> SegmentHeader {
        var position = SegmentHeader.lengthBytes(patches: segment.patches.count)
        let patches = segment.patches.map { patch -> StoredPatch in
            defer { position += patch.stored.count }
            return StoredPatch(
                slice: patch.slice, codec: patch.codec, data: patch.data, zeroes: patch.zeroes,
                offsetBytes: patch.codec == .zero ? 0 : UInt32(position), lengthBytes: UInt32(patch.stored.count),
                checksum: patch.checksum)
        }
        return SegmentHeader(
            id: id, block: segment.block, offsetBytes: UInt32(offset), segmentLengthBytes: UInt32(segment.sizeBytes),
            patches: patches)
    }
}
