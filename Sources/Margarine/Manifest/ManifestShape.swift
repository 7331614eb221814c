// How the map of a disk's blocks is cut into pages: 512 slots a page, as many levels as the disk's size needs.
//
// Always holds: the number of levels is a function of the size alone, at least 1 and at most 5.

package import BlockCache

/// The arithmetic of the manifest tree. Level 0 is a leaf (its slots are blocks), level n's slots are pages of level n-1.
package enum ManifestShape {
    package static let slotBits: UInt64 = 9
    package static let slots = 512
    /// Levels of a tree over 2^40 blocks (512^5 = 2^45).
    package static let maxDepth = 5
    /// The largest size that the format holds: 16 EiB less one block. Disks are smaller (`DiskSize.maxBytes`).
    package static let maxSizeBytes: UInt64 = 0 &- UInt64(Geometry.blockBytes)
    package static let sectorBytes: UInt64 = 512

    /// Blocks that a disk of this size touches, the last one perhaps in part.
    package static func blocks(sizeBytes: UInt64) -> UInt64 {
        let block = UInt64(Geometry.blockBytes)
        return sizeBytes / block + (sizeBytes % block == 0 ? 0 : 1)
    }

    /// Levels of the tree of a disk of this size.
    package static func depth(sizeBytes: UInt64) -> Int {
        let needed = blocks(sizeBytes: sizeBytes)
        var depth = 1
        while needed > blocksUnder(level: depth - 1) { depth += 1 }
        precondition(depth <= maxDepth, "a disk of \(sizeBytes) bytes is larger than any")
        return depth
    }

    /// Blocks that lie under one page of this level.
    package static func blocksUnder(level: Int) -> UInt64 { 1 << (slotBits * UInt64(level + 1)) }

    /// Which page of this level has the block.
    static func pageIndex(_ block: UInt64, level: Int) -> UInt64 { block >> (slotBits * UInt64(level + 1)) }

    /// Which slot of its page of this level leads to the block.
    static func slot(_ block: UInt64, level: Int) -> Int { Int((block >> (slotBits * UInt64(level))) & 511) }
}

/// Where a manifest page is, and what lies below it.
package struct PageRef: Hashable, Sendable, Codable {
    package var id: ObjectID
    /// Which location of the store has it.
    package var location: UInt8
    /// Length of the page's object in bytes.
    package var lengthBytes: UInt32
    /// Blocks with an entry under this page; at least 1.
    package var usedBlocks: UInt64
    /// Stored bytes that those entries name (a delta counts where it is named).
    package var storedBytes: UInt64

    package init(id: ObjectID, location: UInt8, lengthBytes: UInt32, usedBlocks: UInt64, storedBytes: UInt64) {
        self.id = id
        self.location = location
        self.lengthBytes = lengthBytes
        self.usedBlocks = usedBlocks
        self.storedBytes = storedBytes
    }

    enum CodingKeys: String, CodingKey { case id, location, lengthBytes, usedBlocks, storedBytes }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        id = try c.decodeObjectID(.id)
        location = try c.decode(UInt8.self, forKey: .location)
        lengthBytes = try c.decode(UInt32.self, forKey: .lengthBytes)
        usedBlocks = try c.decode(UInt64.self, forKey: .usedBlocks)
        storedBytes = try c.decode(UInt64.self, forKey: .storedBytes)
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(id.description, forKey: .id)
        try c.encode(location, forKey: .location)
        try c.encode(lengthBytes, forKey: .lengthBytes)
        try c.encode(usedBlocks, forKey: .usedBlocks)
        try c.encode(storedBytes, forKey: .storedBytes)
    }
}

extension BlockEntry {
    /// Bytes in the store that this entry names.
    package var storedBytes: UInt64 {
        deltas.reduce(UInt64(base?.lengthBytes ?? 0)) { $0 + UInt64($1.lengthBytes) }
    }
}

extension KeyedDecodingContainer {
    /// An object id written as 32 hex digits.
    func decodeObjectID(_ key: Key) throws -> ObjectID {
        let text = try decode(String.self, forKey: key)
        guard let id = ObjectID(text) else {
            throw DecodingError.dataCorruptedError(
                forKey: key, in: self, debugDescription: "not an object id: \(text.prefix(64))")
        }
        return id
    }
}
