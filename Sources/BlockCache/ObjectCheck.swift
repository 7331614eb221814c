// A whole block object held against its own checksums and against everything that manifests say of it. Pure functions, for
// worker threads.

/// What a manifest says of a block object.
package enum NamedPart: Hashable, Sendable {
    case base(BaseRef)
    /// The segment of this block.
    case segment(DeltaRef, BlockIndex)

    package var id: ObjectID {
        switch self {
        case .base(let ref): ref.id
        case .segment(let ref, _): ref.id
        }
    }
    package var location: UInt8 {
        switch self {
        case .base(let ref): ref.location
        case .segment(let ref, _): ref.location
        }
    }
    /// Bytes that the object must have at least; a base has no more.
    package var neededBytes: UInt64 {
        switch self {
        case .base(let ref): UInt64(ref.lengthBytes)
        case .segment(let ref, _): UInt64(ref.offsetBytes) + UInt64(ref.lengthBytes)
        }
    }
    package var isBase: Bool {
        if case .base = self { return true }
        return false
    }
}

/// What is wrong with an object's bytes.
package struct ObjectFault: Error, Sendable, Equatable {
    package enum Kind: Sendable, Equatable {
        case corrupt
        /// Its end is missing.
        case truncated
        /// It is another object, and whole.
        case swapped
    }
    package var kind: Kind
    /// For people, to stand behind the object's name.
    package var text: String
}

/// Checks every byte of the block object of this id, and that it is what `parts` say.
package func checkObject(_ bytes: [UInt8], id: ObjectID, parts: [NamedPart]) -> ObjectFault? {
    bytes.withUnsafeBytes { object in
        if let own = ownID(object), own != id { return ObjectFault(kind: .swapped, text: "holds object \(own)") }
        let needed = parts.map(\.neededBytes).max() ?? 0
        if UInt64(object.count) < needed {
            return ObjectFault(
                kind: .truncated, text: "has \(object.count) bytes, its manifest needs \(needed)")
        }
        do throws(FormatError) {
            if magic(object) == BaseHeader.magic {
                try checkBase(object, id, parts)
            } else {
                try checkDelta(object, id, parts)
            }
            return nil
        } catch {
            return ObjectFault(kind: .corrupt, text: "\(error)")
        }
    }
}

private func magic(_ object: UnsafeRawBufferPointer) -> UInt64? {
    if object.count < 8 { return nil }
    var input = ByteReader(object)
    return input.u64()
}

/// Whose object it is, if its header is whole.
private func ownID(_ object: UnsafeRawBufferPointer) -> ObjectID? {
    if magic(object) == BaseHeader.magic { return try? BaseHeader(decoding: object).id }
    guard magic(object) == DeltaIndex.magic, object.count >= DeltaIndex.lengthBytes(segments: 1) else { return nil }
    var input = ByteReader(object)
    _ = input.u64()
    guard input.u32() == DeltaIndex.version else { return nil }
    let count = Int(input.u32())
    guard count >= 1, count <= object.count / 16, object.count >= DeltaIndex.lengthBytes(segments: count) else {
        return nil
    }
    let length = DeltaIndex.lengthBytes(segments: count)
    var tail = ByteReader(object.part(length - 8..<length))
    return tail.u64() == checksum(object.part(0..<length - 8)) ? input.id() : nil
}

private func checkBase(
    _ object: UnsafeRawBufferPointer, _ id: ObjectID, _ parts: [NamedPart]
) throws(FormatError) {
    let header = try BaseHeader(decoding: object)
    guard header.id == id else { throw .corrupt("holds base object \(header.id)") }
    guard header.objectLengthBytes == UInt64(object.count) else {
        throw .corrupt("base object of \(header.objectLengthBytes) bytes has \(object.count)")
    }
    let frame = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 64)
    defer { frame.deallocate() }
    for index in 0..<Geometry.slicesPerBlock where header.slices[index].codec != .zero {
        let range = header.slices[index].range
        try header.unpack(
            SliceIndex(index), stored: object.part(Int(range.lowerBound)..<Int(range.upperBound)), into: frame)
    }
    for part in parts {
        guard case .base(let ref) = part, ref.nonzeroSlices == header.nonzeroSlices,
            UInt64(ref.lengthBytes) == header.objectLengthBytes
        else { throw .corrupt("base object disagrees with a manifest about its kind, length or zero slices") }
    }
}

private func checkDelta(
    _ object: UnsafeRawBufferPointer, _ id: ObjectID, _ parts: [NamedPart]
) throws(FormatError) {
    let index = try DeltaIndex(decoding: object)
    guard index.id == id else { throw .corrupt("holds delta object \(index.id)") }
    let frame = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 64)
    defer { frame.deallocate() }
    var headers: [UInt32: SegmentHeader] = [:]
    for segment in index.segments {
        let start = Int(segment.offsetBytes)
        let bytes = object.part(start..<start + Int(segment.lengthBytes))
        let header = try SegmentHeader(decoding: bytes)
        guard header.id == id, header.block == segment.block, header.offsetBytes == segment.offsetBytes,
            header.segmentLengthBytes == segment.lengthBytes
        else { throw .corrupt("segment at \(start) is not what the index says") }
        for patch in header.patches {
            try SegmentHeader.apply(
                patch, stored: bytes.part(Int(patch.range.lowerBound)..<Int(patch.range.upperBound)), to: frame)
        }
        headers[segment.offsetBytes] = header
    }
    for part in parts {
        guard case .segment(let ref, let block) = part, let header = headers[ref.offsetBytes],
            header.block == block, header.segmentLengthBytes == ref.lengthBytes,
            header.touchedSlices == ref.touchedSlices, header.zeroedSlices == ref.zeroedSlices
        else { throw .corrupt("delta object disagrees with a manifest about a segment") }
    }
}
