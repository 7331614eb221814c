// btrfs super blocks of the simulated clients: valid ones, as far as the engine looks, that tell which write they were.

import CLinux

@testable import Margarine

enum SuperBlockPattern {
    /// The page at 64 KiB.
    static let granules: Range<UInt32> = 256..<272
    private static let magic: UInt64 = 0x4d5f_5366_5248_425f
    // Byte offsets in struct btrfs_super_block.
    private static let bytenr = 0x30
    private static let magicAt = 0x40
    private static let generation = 0x48
    private static let logRoot = 0x60
    private static let totalBytes = 0x70
    private static let checksumType = 0xc4

    /// - Parameter isLog: of an fsync, with a log tree, and the generation of the last full commit.
    static func fill(_ page: UnsafeMutableRawPointer, write: UInt32, generation: UInt64, isLog: Bool) {
        for granule in granules {
            Pattern.fill(
                page + Int(granule - granules.lowerBound) * Pattern.granuleBytes, write: write, granule: granule)
        }
        func put(_ value: UInt64, _ at: Int) {
            page.storeBytes(of: value.littleEndian, toByteOffset: at, as: UInt64.self)
        }
        put(SuperBlock.offset, bytenr)
        put(magic, magicAt)
        put(generation, self.generation)
        put(isLog ? 1 << 24 : 0, logRoot)
        put(UInt64(write), totalBytes)
        page.storeBytes(of: 0, toByteOffset: checksumType, as: UInt16.self)
        for at in stride(from: 0, to: 0x20, by: 8) { put(0, at) }
        put(UInt64(mg_crc32c(0, page + 0x20, SuperBlock.lengthBytes - 0x20)), 0)
    }

    /// The write that the first granule of a super block shows; nil: it is none, or is not as it was written.
    static func write(_ bytes: UnsafeRawPointer) -> UInt32? {
        func word(_ at: Int) -> UInt64 {
            UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: UInt64.self))
        }
        guard word(magicAt) == magic else { return nil }
        let write = UInt32(truncatingIfNeeded: word(totalBytes))
        let expected = UnsafeMutableRawPointer.allocate(byteCount: SuperBlock.lengthBytes, alignment: 16)
        defer { expected.deallocate() }
        fill(expected, write: write, generation: word(generation), isLog: word(logRoot) != 0)
        for at in stride(from: 0, to: Pattern.granuleBytes, by: 8) {
            let other = expected.load(fromByteOffset: at, as: UInt64.self)
            if bytes.loadUnaligned(fromByteOffset: at, as: UInt64.self) != other { return nil }
        }
        return write
    }
}
