// One committed generation of one disk. The head carries the current one; when the next is committed the record has
// been put under `disks/<name>/generations/<n>` before, so history is what heads have said, and nothing else: a commit
// that never won its head leaves no record.
//
// Always holds: the bytes of a record are a function of its value, so whoever writes the record of generation n writes
// the same bytes.

package import BlockCache

/// How a generation came to be.
package enum GenerationKind: String, Sendable, Codable, CaseIterable {
    /// A btrfs transaction, with its super block.
    case btrfsFull
    /// A btrfs fsync (log tree) commit.
    case btrfsLog
    /// A completed FLUSH or FUA write.
    case flush
    /// The last connection ended with DISC, or the server drained.
    case clean
    /// The journal was full and no safe point came: an instant like that of a power cut.
    case journalFull
    /// An image file.
    case imported
    /// The disk was made smaller.
    case resized
    /// The first of a disk that began as another one's generation.
    case forked
    /// An earlier generation of the same disk once more.
    case rolledBack
    /// Out of a stream of `disk send`.
    case received
    /// The same bytes at another location.
    case localized
    /// One instant of several disks that were forked together.
    case cut
}

package struct GenerationRecord: Sendable, Equatable, Codable {
    package var diskID: ObjectID
    /// From 1 on, never used twice under one disk name.
    package var generation: UInt64
    /// The epoch of the owner that committed it.
    package var epoch: UInt64
    /// Size of the disk at that instant.
    package var sizeBytes: UInt64
    package var kind: GenerationKind
    /// Wall clock, milliseconds since 1970.
    package var committedAtMs: Int64
    /// Everything up to this record of the owner's journal is in it.
    package var journalSequence: UInt64
    package var usedBlocks: UInt64
    /// Stored bytes that its entries name.
    package var storedBytes: UInt64
    /// Bytes that this commit put into the store (blocks and pages).
    package var newBytes: UInt64
    /// Levels of the manifest; a function of `sizeBytes`, kept for people.
    package var depth: Int
    /// The top of the manifest; nil when the disk is all zeroes.
    package var root: PageRef?
    /// Which generation it is the same as: of `forked`, `rolledBack` and `received`.
    package var origin: Origin?

    /// A generation of some disk, perhaps of another store.
    package struct Origin: Sendable, Equatable, Codable {
        /// Its name then.
        package var disk: String
        package var diskID: ObjectID
        package var generation: UInt64
        package init(disk: String, diskID: ObjectID, generation: UInt64) {
            self.disk = disk
            self.diskID = diskID
            self.generation = generation
        }

        enum CodingKeys: String, CodingKey { case disk, diskID, generation }
        package init(from decoder: any Decoder) throws {
            let c = try decoder.container(keyedBy: CodingKeys.self)
            disk = try c.decode(String.self, forKey: .disk)
            diskID = try c.decodeObjectID(.diskID)
            generation = try c.decode(UInt64.self, forKey: .generation)
        }
        package func encode(to encoder: any Encoder) throws {
            var c = encoder.container(keyedBy: CodingKeys.self)
            try c.encode(disk, forKey: .disk)
            try c.encode(diskID.description, forKey: .diskID)
            try c.encode(generation, forKey: .generation)
        }
    }

    static let format = 2
    /// Format 1 has no `origin` and fewer kinds.
    static let oldestFormat = 1

    package init(
        diskID: ObjectID, generation: UInt64, epoch: UInt64, kind: GenerationKind, committedAtMs: Int64,
        journalSequence: UInt64, newBytes: UInt64, manifest: Manifest
    ) {
        precondition(
            manifest.depth == ManifestShape.depth(sizeBytes: manifest.sizeBytes),
            "a manifest that an edit has written has all its levels")
        self.diskID = diskID
        self.generation = generation
        self.epoch = epoch
        self.kind = kind
        self.committedAtMs = committedAtMs
        self.journalSequence = journalSequence
        self.newBytes = newBytes
        sizeBytes = manifest.sizeBytes
        usedBlocks = manifest.usedBlocks
        storedBytes = manifest.storedBytes
        depth = manifest.depth
        root = manifest.root
    }

    /// Key of the record of one generation; listings of a disk's records come in ascending order.
    package static func key(disk name: String, generation: UInt64) -> String {
        let digits = String(generation)
        return folder(disk: name) + String(repeating: "0", count: 20 - digits.count) + digits
    }
    package static func folder(disk name: String) -> String { "disks/\(name)/generations/" }

    func encoded() -> [UInt8] { ControlObject.seal(self, kind: "generation", format: Self.format) }

    /// Reads and checks the record stored under `key`.
    static func decode(_ bytes: [UInt8], key: String) throws(CatalogError) -> GenerationRecord {
        let record = try ControlObject.open(
            Self.self, bytes, kind: "generation", format: format, oldest: oldestFormat, what: "'\(key)'")
        try record.check(what: "'\(key)'")
        return record
    }

    /// What must hold for any record.
    func check(what: String) throws(CatalogError) {
        guard generation >= 1, generation < ControlObject.countLimit, epoch < ControlObject.countLimit,
            journalSequence < ControlObject.countLimit, ControlObject.times.contains(committedAtMs),
            DiskSize.isStorable(sizeBytes), depth == ManifestShape.depth(sizeBytes: sizeBytes),
            usedBlocks == root?.usedBlocks ?? 0, storedBytes == root?.storedBytes ?? 0,
            usedBlocks <= ManifestShape.blocks(sizeBytes: sizeBytes),
            origin.map({ DiskName.isValid($0.disk) && $0.generation < ControlObject.countLimit }) ?? true
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
    }

    enum CodingKeys: String, CodingKey {
        case diskID, generation, epoch, sizeBytes, kind, committedAtMs, journalSequence, usedBlocks, storedBytes,
            newBytes, depth, root, origin
    }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        diskID = try c.decodeObjectID(.diskID)
        generation = try c.decode(UInt64.self, forKey: .generation)
        epoch = try c.decode(UInt64.self, forKey: .epoch)
        sizeBytes = try c.decode(UInt64.self, forKey: .sizeBytes)
        kind = try c.decode(GenerationKind.self, forKey: .kind)
        committedAtMs = try c.decode(Int64.self, forKey: .committedAtMs)
        journalSequence = try c.decode(UInt64.self, forKey: .journalSequence)
        usedBlocks = try c.decode(UInt64.self, forKey: .usedBlocks)
        storedBytes = try c.decode(UInt64.self, forKey: .storedBytes)
        newBytes = try c.decode(UInt64.self, forKey: .newBytes)
        depth = try c.decode(Int.self, forKey: .depth)
        root = try c.decodeIfPresent(PageRef.self, forKey: .root)
        origin = try c.decodeIfPresent(Origin.self, forKey: .origin)
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(diskID.description, forKey: .diskID)
        try c.encode(generation, forKey: .generation)
        try c.encode(epoch, forKey: .epoch)
        try c.encode(sizeBytes, forKey: .sizeBytes)
        try c.encode(kind, forKey: .kind)
        try c.encode(committedAtMs, forKey: .committedAtMs)
        try c.encode(journalSequence, forKey: .journalSequence)
        try c.encode(usedBlocks, forKey: .usedBlocks)
        try c.encode(storedBytes, forKey: .storedBytes)
        try c.encode(newBytes, forKey: .newBytes)
        try c.encode(depth, forKey: .depth)
        try c.encodeIfPresent(root, forKey: .root)
        try c.encodeIfPresent(origin, forKey: .origin)
    }
}
