// An edit of any number of blocks in bounded memory, for images and streams as large as a disk can be.

import BlockCache
import ObjectStore
import Runtime

/// Writes what has come together now and then, and goes on from there. A page that is written more than once that way is
/// garbage for the collector; blocks that come in about ascending order make few of those.
struct GradualEdit: Sendable {
    /// Blocks that are set between two writes: those of 32 full leaves.
    static let blocksPerWrite = 32 * ManifestShape.slots

    private var edit: ManifestEdit
    private var blocks = 0
    private let bucket: any Bucket
    private let location: UInt8
    private let environment: any Environment
    /// Bytes of the pages written so far.
    private(set) var bytesWritten: UInt64 = 0

    init(_ edit: ManifestEdit, to locations: Locations, environment: any Environment) {
        self.edit = edit
        bucket = locations.nearBucket
        location = locations.near
        self.environment = environment
    }

    /// As `ManifestEdit.set`.
    mutating func set(_ block: BlockIndex, _ entry: BlockEntry?) async throws(StoreError) {
        edit.set(block, entry)
        blocks += 1
        if blocks == Self.blocksPerWrite { edit = ManifestEdit(try await finish()) }
    }

    /// The manifest with all that was set.
    mutating func finish() async throws(StoreError) -> Manifest {
        let manifest = try await edit.write(to: bucket, location: location, environment: environment)
        bytesWritten += manifest.bytesWritten
        blocks = 0
        return manifest
    }
}
