// Manifest pages: a page that is accepted is the one and only encoding of what it holds.

import BlockCache
@testable import Margarine

extension FuzzTarget {
    static let page = FuzzTarget(name: "page", maxInputBytes: 16 << 10) { input in
        try page(input)
        let sealed = Sealed(copying: input)
        sealed.put(UInt32(input.count), at: 12)
        sealed.seal(0, input.count - 8, at: input.count - 8)
        try sealed.read { try page($0) }
    }

    private static func page(_ bytes: UnsafeRawBufferPointer) throws {
        var id = ObjectID(high: 0, low: 0)
        if bytes.count >= 32 {
            id.high = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: 16, as: UInt64.self))
            id.low = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: 24, as: UInt64.self))
        }
        let array = [UInt8](bytes)
        guard let page = try? ManifestPage.decode(array, id: id) else { return }
        try require(page.encoded() == array, "a page encodes otherwise")
        try require(page.usedBlocks >= 1, "a page without blocks")
        try require(
            page.usedBlocks <= ManifestShape.blocksUnder(level: page.level), "more blocks than there are under it")
        // What follows from an accepted entry must not overflow anywhere.
        for entry in page.entries {
            try require(entry.nonzeroSlices != 0, "an entry of zeroes")
            for slice in 0..<Geometry.slicesPerBlock {
                let isZero = entry.key(SliceIndex(slice)) == nil
                try require(
                    isZero == (entry.nonzeroSlices & 1 << UInt32(slice) == 0), "slice \(slice) is zero and is not")
            }
        }
    }
}
