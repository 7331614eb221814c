// Checking what is stored: everything of one entry, from the store itself.

import ObjectStore
import Runtime

/// Something wrong with what is stored of a block.
public struct BlockProblem: Sendable, Equatable, CustomStringConvertible {
    public enum Kind: Sendable, Equatable {
        /// The store does not have the object.
        case missing
        /// Its bytes are not what was written.
        case corrupt
        /// It could not be looked at.
        case unreachable
    }
    public var kind: Kind
    public var id: ObjectID
    public var location: UInt8
    /// nil: the object's header, or all of it.
    public var slice: SliceIndex?
    /// What is wrong, for people.
    public var description: String
}

extension BlockLoader {
    /// Reads everything that `entry` names from the store, past every cache, and checks it all. Empty: nothing is wrong.
    /// Fetches a layer at a time, up to 16 MiB.
    public func verify(_ entry: BlockEntry) async -> [BlockProblem] {
        var layers: [Layer] = entry.deltas.map { .segment($0) }
        if let base = entry.base { layers.insert(.base(base), at: 0) }
        var problems: [BlockProblem] = []
        for layer in layers { problems += await verify(layer) }
        return problems
    }

    private func verify(_ layer: Layer) async -> [BlockProblem] {
        func problem(_ kind: BlockProblem.Kind, _ text: String) -> [BlockProblem] {
            [BlockProblem(kind: kind, id: layer.id, location: layer.location, slice: nil, description: text)]
        }
        let object: StoredObject
        do throws(StoreError) {
            object = try await reader.bucket(layer.location, of: layer.id).get(layer.id.blockKey, range: layer.extent)
        } catch {
            switch error.kind {
            case .notFound: return problem(.missing, error.description)
            case .corrupt: return problem(.corrupt, error.description)
            default: return problem(.unreachable, error.description)
            }
        }
        guard object.bytes.count == layer.extent.count else {
            return problem(
                .corrupt,
                "block object \(layer.id) has \(object.totalLengthBytes) bytes, its manifest needs \(layer.extent.upperBound)"
            )
        }
        if let total = layer.totalBytes, total != object.totalLengthBytes {
            return problem(
                .corrupt, "block object \(layer.id) has \(object.totalLengthBytes) bytes, its manifest says \(total)")
        }
        let bytes = ByteView(object.bytes)
        return await environment.offload { checkWhole(layer, bytes) }
    }
}

/// Checks every slice of a layer; for a worker thread.
func checkWhole(_ layer: Layer, _ bytes: ByteView) -> [BlockProblem] {
    func problem(_ slice: SliceIndex?, _ error: FormatError) -> BlockProblem {
        BlockProblem(
            kind: .corrupt, id: layer.id, location: layer.location, slice: slice,
            description: "block object \(layer.id): \(error)")
    }
    let header: LayerHeader
    do throws(FormatError) {
        header = try bytes.withBytes { (all) throws(FormatError) in try layer.decodeHeader(all) }
    } catch { return [problem(nil, error)] }
    let frame = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 64)
    defer { frame.deallocate() }
    var problems: [BlockProblem] = []
    for index in 0..<Geometry.slicesPerBlock {
        let slice = SliceIndex(index)
        let range = header.storedRange(slice)
        if range.isEmpty { continue }
        let part = LayerPart(
            header: header, bytes: bytes.part(Int(range.lowerBound)..<Int(range.upperBound)), fromScratch: false)
        if let found = applyLayers([part], over: nil, slice, into: Lent(pointer: frame)) {
            problems.append(problem(slice, found.error))
        }
    }
    return problems
}
