// Base and delta objects: what is accepted is encoded to the same bytes, and unpacks to what its checksums stand for.

@testable import BlockCache
import Glibc

extension FuzzTarget {
    /// A base object.
    static let base = FuzzTarget(name: "base", maxInputBytes: 4096, allocationBaseBytes: 1 << 20) { input in
        try base(input)
        let sealed = Sealed(copying: input)
        for slice in 0..<Geometry.slicesPerBlock {
            let record = 48 + 24 * slice
            guard let offset = sealed.get(record + 4, as: UInt32.self),
                let length = sealed.get(record + 8, as: UInt32.self), length > 0
            else { continue }
            sealed.seal(Int(offset), Int(length), at: record + 16)
        }
        sealed.seal(0, 816, at: 816)
        try sealed.read { try base($0) }
    }

    private static func base(_ object: UnsafeRawBufferPointer) throws {
        guard let header = try? BaseHeader(decoding: object) else { return }
        try require(object.prefix(BaseHeader.lengthBytes).elementsEqual(header.encoded()), "a header encodes otherwise")
        let length = header.slices.reduce(UInt64(BaseHeader.lengthBytes)) { $0 + UInt64($1.lengthBytes) }
        try require(length == header.objectLengthBytes, "slices of \(length) bytes in \(header.objectLengthBytes)")
        let ref = BaseRef(
            id: header.id, location: 0, lengthBytes: UInt32(header.objectLengthBytes),
            nonzeroSlices: header.nonzeroSlices)
        try require(try BaseHeader(decoding: object, of: ref) == header, "a header decodes otherwise")
        // One is enough: unpacking half a megabyte is what takes the time.
        let frame = Frame.shared
        for (index, slice) in header.slices.enumerated() where slice.codec != .zero {
            guard let stored = part(object, slice.range) else { return }
            do {
                try header.unpack(SliceIndex(index), stored: stored, into: frame.pointer)
            } catch { continue }
            try require(xxh3(stored) == slice.checksum, "slice \(index) unpacks against its checksum")
            return
        }
    }

    /// A delta object, or one segment of it.
    static let delta = FuzzTarget(name: "delta", maxInputBytes: 4096, allocationBaseBytes: 1 << 20) { input in
        try delta(input)
        try sealedDelta(input).read { try delta($0) }
    }

    private static func sealedDelta(_ input: UnsafeRawBufferPointer) -> Sealed {
        let sealed = Sealed(copying: input)
        func sealSegment(_ start: Int, _ sealed: borrowing Sealed) {
            guard let count = sealed.get(start + 12, as: UInt32.self), (1...32).contains(count) else { return }
            for patch in 0..<Int(count) {
                let record = start + 48 + 56 * patch
                guard let offset = sealed.get(record + 40, as: UInt32.self),
                    let length = sealed.get(record + 44, as: UInt32.self), length > 0
                else { continue }
                sealed.seal(start + Int(offset), Int(length), at: record + 48)
            }
            let length = SegmentHeader.lengthBytes(patches: Int(count))
            sealed.seal(start, length - 8, at: start + length - 8)
        }
        if sealed.get(0) == SegmentHeader.magic {
            sealSegment(0, sealed)
        } else if let count = sealed.get(12, as: UInt32.self), count <= UInt32(input.count / 16) {
            for segment in 0..<Int(count) {
                sealSegment(Int(sealed.get(40 + 16 * segment + 8, as: UInt32.self) ?? 0), sealed)
            }
            let length = DeltaIndex.lengthBytes(segments: Int(count))
            sealed.seal(0, length - 8, at: length - 8)
        }
        return sealed
    }

    private static func delta(_ object: UnsafeRawBufferPointer) throws {
        try segment(object)
        guard let index = try? DeltaIndex(decoding: object) else { return }
        try require(
            object.prefix(DeltaIndex.lengthBytes(segments: index.segments.count)).elementsEqual(index.encoded()),
            "an index encodes otherwise")
        try require(Int(index.objectLengthBytes) == object.count, "an index of another length")
        for found in index.segments {
            let range = UInt64(found.offsetBytes)..<UInt64(found.offsetBytes) + UInt64(found.lengthBytes)
            guard let bytes = part(object, range) else { throw Finding("a segment outside its object") }
            try segment(bytes)
        }
    }

    private static func segment(_ bytes: UnsafeRawBufferPointer) throws {
        guard let header = try? SegmentHeader(decoding: bytes) else { return }
        try require(bytes.prefix(header.lengthBytes).elementsEqual(header.encoded()), "a segment encodes otherwise")
        let ref = DeltaRef(
            id: header.id, location: 0, offsetBytes: header.offsetBytes, lengthBytes: header.segmentLengthBytes,
            touchedSlices: header.touchedSlices, zeroedSlices: header.zeroedSlices)
        try require(try SegmentHeader(decoding: bytes, of: ref) == header, "a segment decodes otherwise")
        let frame = Frame.shared
        for patch in header.patches {
            guard let stored = part(bytes, patch.range.lowerBound == 0 ? 0..<0 : patch.range) else { return }
            // Three pages tell: the first of no mask, the first of zeroes, and the last that there is.
            let pages = 0..<Geometry.pagesPerSlice
            let untouched = pages.first { !patch.data.contains($0) && !patch.zeroes.contains($0) }
            let zero = pages.first { patch.zeroes.contains($0) }
            if let untouched { frame.fill(untouched, 0xa5) }
            if let zero { frame.fill(zero, 0xa5) }
            do {
                try SegmentHeader.apply(patch, stored: stored, to: frame.pointer)
            } catch { continue }
            try require(stored.isEmpty || xxh3(stored) == patch.checksum, "a patch is applied against its checksum")
            if let untouched {
                try require(frame.isFilled(untouched, 0xa5), "page \(untouched) of no mask was changed")
            }
            if let zero { try require(frame.isFilled(zero, 0), "page \(zero) was not zeroed") }
        }
    }

    private static func part(_ bytes: UnsafeRawBufferPointer, _ range: Range<UInt64>) -> UnsafeRawBufferPointer? {
        guard range.upperBound <= UInt64(bytes.count) else { return nil }
        return UnsafeRawBufferPointer(rebasing: bytes[Int(range.lowerBound)..<Int(range.upperBound)])
    }
}

/// A slice in memory, made once: half a megabyte for each input would be all that is measured.
private final class Frame: @unchecked Sendable {  // targets run one at a time
    let pointer = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 4096)
    static let shared = Frame()

    func fill(_ page: Int, _ byte: UInt8) {
        memset(pointer + page * Geometry.pageBytes, Int32(byte), Geometry.pageBytes)
    }

    func isFilled(_ page: Int, _ byte: UInt8) -> Bool {
        UnsafeRawBufferPointer(start: pointer + page * Geometry.pageBytes, count: Geometry.pageBytes)
            .allSatisfy { $0 == byte }
    }
}
