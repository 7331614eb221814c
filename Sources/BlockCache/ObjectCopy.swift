// Whole block objects, for those who copy them from one location to another as they are.
//
// Always holds: what is put under a name is, byte for byte, an object of that name whose every checksum holds.

public import ObjectStore
public import Runtime

/// A block object that an entry names.
public enum BlockObject: Sendable {
    case base(BaseRef)
    /// Any of its segments.
    case delta(DeltaRef)

    public var id: ObjectID {
        switch self {
        case .base(let ref): ref.id
        case .delta(let ref): ref.id
        }
    }
    public var location: UInt8 {
        switch self {
        case .base(let ref): ref.location
        case .delta(let ref): ref.location
        }
    }

    /// Copies it to `target`, unless it is there already. Fetches and checks all of it, up to some 16 MiB.
    ///
    /// - Returns: the bytes copied; 0: it was there.
    public func copy(
        from source: any Bucket, to target: any Bucket, environment: any Environment
    ) async throws(StoreError) -> UInt64 {
        if try await isThere(target) { return 0 }
        var bytes: [UInt8] = []
        for attempt in 1... {
            let fetched = try await source.get(id.blockKey, range: nil).bytes
            guard let wrong = await environment.offload({ problem(fetched) }) else {
                bytes = fetched
                break
            }
            // Damaged under way, perhaps: once more.
            if attempt == 2 {
                throw StoreError(.corrupt, "block object \(id) in \(source.name): \(wrong); it is not copied")
            }
        }
        _ = try await target.put(id.blockKey, bytes, if: .none)
        return UInt64(bytes.count)
    }

    /// Objects appear whole or not at all, so one of that name is it; its length is looked at all the same.
    private func isThere(_ target: any Bucket) async throws(StoreError) -> Bool {
        do throws(StoreError) {
            let found = try await target.get(id.blockKey, range: 0..<0)
            switch self {
            case .base(let ref): return found.totalLengthBytes == UInt64(ref.lengthBytes)
            case .delta(let ref): return found.totalLengthBytes >= UInt64(ref.offsetBytes) + UInt64(ref.lengthBytes)
            }
        } catch {
            if error.kind == .notFound { return false }
            throw error
        }
    }

    /// What is wrong with the bytes of the object; nil: nothing.
    func problem(_ bytes: [UInt8]) -> String? {
        switch self {
        case .base(let ref):
            guard bytes.count == Int(ref.lengthBytes) else {
                return "it has \(bytes.count) bytes, its manifest says \(ref.lengthBytes)"
            }
            return checkWhole(.base(ref), ByteView(bytes)).first?.description
        case .delta(let ref):
            do throws(FormatError) {
                let index = try ByteView(bytes).withBytes { (all) throws(FormatError) in try DeltaIndex(decoding: all) }
                guard index.id == ref.id else { return "it is delta object \(index.id)" }
                guard
                    index.segments.contains(where: {
                        $0.offsetBytes == ref.offsetBytes && $0.lengthBytes == ref.lengthBytes
                    })
                else { return "it lacks the segment at \(ref.offsetBytes)" }
                for segment in index.segments {
                    let start = Int(segment.offsetBytes)
                    let view = ByteView(bytes).part(start..<start + Int(segment.lengthBytes))
                    let header = try view.withBytes { (all) throws(FormatError) in try SegmentHeader(decoding: all) }
                    let found = DeltaRef(
                        id: ref.id, location: ref.location, offsetBytes: segment.offsetBytes,
                        lengthBytes: segment.lengthBytes, touchedSlices: header.touchedSlices,
                        zeroedSlices: header.zeroedSlices)
                    if let problem = checkWhole(.segment(found), view).first { return problem.description }
                }
                return nil
            } catch {
                return "\(error)"
            }
        }
    }
}
