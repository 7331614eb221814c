// Streams of `disk send`: what is accepted says the same when it is written again.

import BlockCache
@testable import Margarine

extension FuzzTarget {
    static let stream = FuzzTarget(name: "stream", maxInputBytes: 8192, allocationBaseBytes: 2 << 20) { input in
        try stream([UInt8](input))
        try stream(sealed([UInt8](input)))
    }

    /// Bytes given out piece by piece.
    private final class Source: @unchecked Sendable {  // one reader
        let bytes: [UInt8]
        var position = 0
        init(_ bytes: [UInt8]) { self.bytes = bytes }
        func read(_ most: Int) -> [UInt8] {
            let end = position + min(most, bytes.count - position)
            defer { position = end }
            return Array(bytes[position..<end])
        }
    }

    /// What the bytes are read as; nil: they are refused.
    private static func parse(_ source: Source) -> (StreamDescription, [StreamBlock])? {
        do {
            let reader = StreamReader { source.read($0) }
            let description = try reader.begin()
            var blocks: [StreamBlock] = []
            while let block = try reader.next() { blocks.append(block) }
            return (description, blocks)
        } catch { return nil }
    }

    private static func stream(_ bytes: [UInt8]) throws {
        let source = Source(bytes)
        guard let (description, blocks) = parse(source) else { return }
        try require(source.position == bytes.count, "accepted before its end")
        var writer = StreamWriter()
        var again = writer.begin(description)
        for block in blocks { for piece in writer.add(block) { again += piece } }
        again += writer.end()
        guard let (other, others) = parse(Source(again)) else { throw Finding("what was accepted is refused again") }
        try require(other == description && others.count == blocks.count, "a stream is read back otherwise")
        let end = ManifestShape.blocks(sizeBytes: description.sizeBytes)
        for (a, b) in zip(blocks, others) {
            try require(
                a.block == b.block && a.changed == b.changed && a.zeroed == b.zeroed && a.slices == b.slices,
                "a block is read back otherwise")
            try require(a.block.value < end, "a block behind the end of the disk")
            try require(a.slices.count == (a.changed & ~a.zeroed).nonzeroBitCount, "slices without a place")
        }
        for (a, b) in zip(blocks, blocks.dropFirst()) { try require(a.block < b.block, "blocks out of order") }
    }

    /// The bytes with all checksums made right, as far as records can be made out.
    private static func sealed(_ input: [UInt8]) -> [UInt8] {
        var bytes = input
        func u32(_ at: Int) -> Int {
            at + 4 <= bytes.count ? (0..<4).reduce(0) { $0 | Int(bytes[at + $1]) << (8 * $1) } : 0
        }
        func sum(_ range: Range<Int>, _ seed: UInt64) -> UInt64 {
            bytes[range].withUnsafeBytes { xxh3($0, seed: seed) }
        }
        func put(_ value: UInt64, at: Int) {
            guard at + 8 <= bytes.count else { return }
            for i in 0..<8 { bytes[at + i] = UInt8(truncatingIfNeeded: value >> UInt64(8 * i)) }
        }
        let text = 16..<16 + u32(12)
        let digits = 16 + "{\"margarine\":\"stream\",\"format\":1,\"checksum\":\"".utf8.count
        guard text.upperBound + 8 <= bytes.count, digits + 18 <= text.upperBound else { return bytes }
        let inner = sum(digits + 18..<text.upperBound, 0)
        for digit in 0..<16 {
            bytes[digits + digit] = Array("0123456789abcdef".utf8)[Int(inner >> UInt64(60 - 4 * digit) & 15)]
        }
        var seed = sum(0..<text.upperBound, 0)
        put(seed, at: text.upperBound)
        var at = text.upperBound + 8
        while at + 40 <= bytes.count {
            let slices = bytes[at] == UInt8(ascii: "B") ? (u32(at + 24) & ~u32(at + 28)).nonzeroBitCount : 0
            let end = at + 32 + 16 * slices
            var stored = end + 8
            for i in 0..<slices {
                let length = u32(at + 32 + 16 * i + 4)
                guard stored + length <= bytes.count else { return bytes }
                put(sum(stored..<stored + length, 0), at: at + 32 + 16 * i + 8)
                stored += length
            }
            guard end + 8 <= bytes.count else { return bytes }
            seed = sum(at..<end, seed)
            put(seed, at: end)
            at = stored
        }
        return bytes
    }
}
