import Testing

@testable import BlockCache

struct CodecTests {
    @Test(arguments: [0, 1, 2, 7, 8, 63, 64, 4095, 4096])
    func zeroDetectionSeesEveryByte(count: Int) {
        var bytes = [UInt8](repeating: 0, count: count)
        #expect(bytes.withUnsafeBytes { isZero($0) })
        for i in 0..<count {
            bytes[i] = 1
            #expect(!bytes.withUnsafeBytes { isZero($0) })
            bytes[i] = 0
        }
    }

    /// The XXH3 of nothing, as its reference implementation has it; the format depends on it.
    @Test func checksumIsXXH3() {
        #expect([UInt8]().withUnsafeBytes { checksum($0) } == 0x2D06_8005_38D3_94C2)
    }

    @Test func rawIsKeptWhereASixteenthIsNotSaved() {
        let noise = Sample.noise.slice(seed: 1)
        #expect(noise.withUnsafeBytes { Codec.pack($0) }.codec == .raw)
        // 15/16 noise and 1/16 zeroes compress to just about the limit, a bit more zeroes go below it.
        var mixed = noise
        for i in 0..<mixed.count / 8 { mixed[i] = 0 }
        let packed = mixed.withUnsafeBytes { Codec.pack($0) }
        #expect(packed.codec == .zstd)
        #expect(packed.stored.count <= mixed.count - mixed.count / 16)
    }

    @Test func unpackRefusesAnyOtherLength() {
        let text = Sample.text.slice(seed: 3)
        let (codec, stored) = text.withUnsafeBytes { Codec.pack($0) }
        #expect(codec == .zstd)
        var out = [UInt8](repeating: 9, count: text.count + 1)
        for count in [0, 1, text.count - 1, text.count + 1] {
            let ok = out.withUnsafeMutableBytes { out in
                stored.withUnsafeBytes {
                    Codec.unpack(codec, $0, into: UnsafeMutableRawBufferPointer(rebasing: out[0..<count]))
                }
            }
            #expect(!ok, "\(count) bytes")
        }
    }
}
