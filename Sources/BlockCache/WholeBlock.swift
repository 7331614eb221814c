// A whole block at once, past every cache: for those who copy a disk out, cut it off or fold deltas into a new base.
//
// Always holds: every byte given was checked against the checksum over its stored form.

import Glibc
public import ObjectStore
public import Runtime

/// All 16 MiB of a block: one GET for each base or delta that it is made of, the work on a worker thread.
///
/// - Throws: `.corrupt` when the bytes fail their checksums twice, `.notFound` when the store lost an object,
///   `.refused` for a format that is not known and for a location that is not in `locations`.
public func readBlock(
    _ entry: BlockEntry, from locations: [any Bucket], environment: any Environment
) async throws(StoreError) -> [UInt8] {
    let parts = BlockPart.needed(by: entry)
    var isSecond = false
    while true {
        var stored: [[UInt8]] = []
        for part in parts {
            guard Int(part.location) < locations.count else {
                throw StoreError(
                    .refused, "block object \(part.id) is at location \(part.location), which is not configured")
            }
            stored.append(try await locations[Int(part.location)].get(part.id.blockKey, range: part.extent).bytes)
        }
        let fetched = stored
        switch await environment.offload({ composeBlock(parts, fetched) }) {
        case .success(let block): return block
        case .failure(let error):
            // Damaged under way, perhaps: once more.
            if isSecond || error.kind != .corrupt { throw error }
            isSecond = true
        }
    }
}

/// A base or a segment, and what of it is to be seen in the block.
private struct BlockPart: Sendable {
    enum Form: Sendable {
        case base(BaseRef)
        case segment(DeltaRef)
    }
    var form: Form
    /// Slices that take bytes from this part: it has some, and no later part makes them zeroes.
    var slices: UInt32

    var id: ObjectID {
        switch form {
        case .base(let ref): ref.id
        case .segment(let ref): ref.id
        }
    }
    var location: UInt8 {
        switch form {
        case .base(let ref): ref.location
        case .segment(let ref): ref.location
        }
    }
    /// Where it lies in its object.
    var extent: Range<UInt64> {
        switch form {
        case .base(let ref): 0..<UInt64(ref.lengthBytes)
        case .segment(let ref): UInt64(ref.offsetBytes)..<UInt64(ref.offsetBytes) + UInt64(ref.lengthBytes)
        }
    }

    /// The parts of which something is to be seen, oldest first.
    static func needed(by entry: BlockEntry) -> [BlockPart] {
        var parts: [BlockPart] = []
        var open = UInt32.max
        for ref in entry.deltas.reversed() {
            parts.append(BlockPart(form: .segment(ref), slices: ref.touchedSlices & ~ref.zeroedSlices & open))
            open &= ~ref.zeroedSlices
        }
        if let base = entry.base { parts.append(BlockPart(form: .base(base), slices: base.nonzeroSlices & open)) }
        return parts.filter { $0.slices != 0 }.reversed()
    }

    /// Applies the part's stored bytes to a block that holds what the parts before it made.
    func apply(_ stored: UnsafeRawBufferPointer, to block: UnsafeMutableRawPointer) throws(FormatError) {
        guard stored.count == extent.count else { throw .corrupt("is cut short") }
        switch form {
        case .base(let ref):
            let header = try BaseHeader(decoding: stored, of: ref)
            for slice in seen {
                let range = header.slices[slice.value].range
                try header.unpack(
                    slice, stored: stored.part(Int(range.lowerBound)..<Int(range.upperBound)),
                    into: block + slice.value * Geometry.sliceBytes)
            }
        case .segment(let ref):
            let header = try SegmentHeader(decoding: stored, of: ref)
            for slice in seen {
                guard let patch = header.patch(slice) else { throw .corrupt("lacks slice \(slice.value)") }
                let range = Int(patch.range.lowerBound)..<Int(patch.range.upperBound)
                try SegmentHeader.apply(
                    patch, stored: stored.part(range), to: block + slice.value * Geometry.sliceBytes)
            }
        }
    }

    private var seen: [SliceIndex] {
        (0..<Geometry.slicesPerBlock).filter { slices & 1 << UInt32($0) != 0 }.map { SliceIndex($0) }
    }
}

private func composeBlock(_ parts: [BlockPart], _ stored: [[UInt8]]) -> Result<[UInt8], StoreError> {
    var failure: StoreError?
    let block = [UInt8](unsafeUninitializedCapacity: Geometry.blockBytes) { out, count in
        memset(out.baseAddress!, 0, Geometry.blockBytes)
        count = Geometry.blockBytes
        for (part, bytes) in zip(parts, stored) where failure == nil {
            bytes.withUnsafeBytes { bytes in
                do throws(FormatError) {
                    try part.apply(bytes, to: UnsafeMutableRawPointer(out.baseAddress!))
                } catch {
                    failure = StoreError(
                        error.kind == .corrupt ? .corrupt : .refused,
                        "block object \(part.id) at location \(part.location): \(error)")
                }
            }
        }
    }
    return failure.map { .failure($0) } ?? .success(block)
}
