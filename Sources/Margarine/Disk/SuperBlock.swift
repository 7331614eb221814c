// Recognises a btrfs super block. Layout and checksum kinds: kernel fs/btrfs (struct btrfs_super_block,
// btrfs_check_super_csum); the sequence of writes around it: shared facts on btrfs.

internal import BlockCache
internal import CB2
internal import CCrypto
internal import CLibraries
internal import CLinux

/// The fields of a valid super block that decide on safe points.
package struct SuperBlock: Equatable, Sendable {
    /// Byte offset of the primary copy.
    package static let offset: UInt64 = 64 << 10
    /// Byte offsets of its mirrors, on devices that reach beyond them (kernel: btrfs_sb_offset).
    package static let mirrorOffsets: [UInt64] = [64 << 20, 256 << 30]
    package static let lengthBytes = 4096
    /// The page it is in.
    static let page = offset / UInt64(Geometry.pageBytes)

    package var generation: UInt64
    /// Not 0: an fsync's log tree commit.
    package var logRoot: UInt64
    /// How many devices the file system has.
    package var deviceCount: UInt64
    /// What the file system uses of this device.
    package var deviceBytes: UInt64

    /// The super block in the 4,096 bytes at `p`, which lie at byte `offset` of the device. nil unless magic, own address
    /// and checksum are right.
    package init?(_ p: UnsafeRawPointer, at offset: UInt64 = SuperBlock.offset) {
        func word(_ at: Int) -> UInt64 { UInt64(littleEndian: p.loadUnaligned(fromByteOffset: at, as: UInt64.self)) }
        guard word(0x40) == 0x4d5f_5366_5248_425f /* "_BHRfS_M" */, word(0x30) == offset, SuperBlock.checks(p)
        else { return nil }
        generation = word(0x48)
        logRoot = word(0x60)
        deviceCount = word(0x88)
        deviceBytes = word(0xd1)
    }

    /// The pages where its mirrors go on a disk of `sizeBytes`.
    func mirrorPages(sizeBytes: UInt64) -> [UInt64] {
        SuperBlock.mirrorOffsets.filter { $0 + UInt64(SuperBlock.lengthBytes) < min(deviceBytes, sizeBytes) }
            .map { $0 / UInt64(Geometry.pageBytes) }
    }

    private static func checks(_ p: UnsafeRawPointer) -> Bool {
        let body = p + 0x20
        let length = lengthBytes - 0x20
        let stored = UnsafeRawBufferPointer(start: p, count: 32)
        func matches(_ sum: UInt64, _ bytes: Int) -> Bool {
            withUnsafeBytes(of: sum.littleEndian) { stored.prefix(bytes).elementsEqual($0.prefix(bytes)) }
        }
        switch UInt16(littleEndian: p.loadUnaligned(fromByteOffset: 0xc4, as: UInt16.self)) {
        case 0: return matches(UInt64(mg_crc32c(0, body, length)), 4)
        case 1: return matches(mg_xxh64(body, length), 8)
        case 2:
            var sum = [UInt8](repeating: 0, count: 32)
            SHA256(body.assumingMemoryBound(to: UInt8.self), length, &sum)
            return stored.elementsEqual(sum)
        case 3:
            var sum = [UInt8](repeating: 0, count: 32)
            blake2b(&sum, body, nil, 32, length, 0)
            return stored.elementsEqual(sum)
        default: return false
        }
    }
}
