// Data for the tests of this room, from a seed.

import BlockCache

/// SplitMix64: small, and the same everywhere.
struct Random: RandomNumberGenerator {
    var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return z ^ z >> 31
    }
}

/// Kinds of slice content.
enum Sample: CaseIterable {
    case zeroes, text, noise, sparse

    func slice(seed: UInt64) -> [UInt8] { bytes(Geometry.sliceBytes, seed: seed) }

    func bytes(_ count: Int, seed: UInt64) -> [UInt8] {
        if self == .noise { return noiseBytes(count, seed: seed) }
        var random = Random(seed: seed)
        return [UInt8](unsafeUninitializedCapacity: count) { out, initialised in
            let words = UnsafeMutableRawBufferPointer(out).bindMemory(to: UInt64.self)
            out.initialize(repeating: 0)
            switch self {
            case .zeroes, .noise: break
            case .text:
                let phrase = random.next()
                for i in 0..<words.count { words[i] = i % 7 == 0 ? UInt64(i) : phrase &+ UInt64(i % 5) }
            case .sparse: for i in stride(from: 0, to: words.count, by: 1024) { words[i] = random.next() | 1 }
            }
            initialised = count
        }
    }
}

/// Random bytes, copied from a pool of them: tests need a lot.
private let pool: [UInt64] = {
    var random = Random(seed: 1)
    return (0..<(2 * Geometry.sliceBytes / 8)).map { _ in random.next() }
}()

private func noiseBytes(_ count: Int, seed: UInt64) -> [UInt8] {
    var random = Random(seed: seed)
    return pool.withUnsafeBytes { pool in
        var bytes: [UInt8] = []
        while bytes.count < count {
            let start = Int(random.next() % UInt64(Geometry.sliceBytes))
            bytes += pool[start..<start + min(count - bytes.count, Geometry.sliceBytes)]
        }
        return bytes
    }
}

extension ObjectID {
    static func sample(_ n: UInt64) -> ObjectID { ObjectID(high: n &* 0x1234_5678_9ABC_DEF1, low: ~n) }
}
