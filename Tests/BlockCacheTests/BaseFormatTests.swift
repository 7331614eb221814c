import Testing

@testable import BlockCache

/// Decodes a whole base object the way a reader does; the slices, zeroes as nil.
func decodeBase(_ object: [UInt8], _ ref: BaseRef) throws -> [[UInt8]?] {
    let header = try object.withUnsafeBytes { b in try BaseHeader(decoding: b, of: ref) }
    var slices: [[UInt8]?] = []
    for (i, record) in header.slices.enumerated() {
        guard record.range.upperBound <= UInt64(object.count) else { throw FormatError.corrupt("cut short") }
        if record.codec == .zero {
            slices.append(nil)
            continue
        }
        var out = [UInt8](repeating: 0xEE, count: Geometry.sliceBytes)
        try out.withUnsafeMutableBytes { out in
            try object.withUnsafeBytes { b throws in
                try header.unpack(
                    SliceIndex(i), stored: b.part(Int(record.range.lowerBound)..<Int(record.range.upperBound)),
                    into: out.baseAddress!)
            }
        }
        slices.append(out)
    }
    return slices
}

struct BaseFormatTests {
    private func encode(_ slices: [Int: [UInt8]], id: ObjectID = .sample(7)) -> (object: [UInt8], ref: BaseRef) {
        var encoder = BaseEncoder(id: id, location: 2)
        for (i, bytes) in slices { bytes.withUnsafeBytes { encoder.add(from: $0.baseAddress!, at: SliceIndex(i)) } }
        let size = encoder.sizeBytes
        let result = encoder.finish()
        #expect(result.object.count == size)
        return result
    }

    @Test func everyKindOfSliceComesBack() throws {
        var slices: [Int: [UInt8]] = [:]
        for (i, sample) in Sample.allCases.enumerated() { slices[i * 9] = sample.slice(seed: UInt64(i)) }
        slices[31] = Sample.noise.slice(seed: 99)
        let (object, ref) = encode(slices)
        #expect(ref.lengthBytes == UInt32(object.count))
        #expect(ref.location == 2)
        #expect(ref.nonzeroSlices == 1 << 9 | 1 << 18 | 1 << 27 | 1 << 31)
        let decoded = try decodeBase(object, ref)
        for i in 0..<32 {
            if let expected = slices[i], i != 0 { #expect(decoded[i] == expected) } else { #expect(decoded[i] == nil) }
        }
    }

    @Test func aBlockOfZeroesIsAHeader() throws {
        let encoder = BaseEncoder(id: .sample(1), location: 0)
        #expect(encoder.isZero)
        let (object, ref) = encoder.finish()
        #expect(object.count == BaseHeader.lengthBytes && ref.nonzeroSlices == 0)
        #expect(try decodeBase(object, ref).allSatisfy { $0 == nil })
    }

    @Test func aFullBlockOfNoiseIsTheLongestObject() throws {
        let noise = Sample.noise.slice(seed: 5)
        let (object, ref) = encode(Dictionary(uniqueKeysWithValues: (0..<32).map { ($0, noise) }))
        #expect(object.count == BaseHeader.maxObjectBytes)
        #expect(try decodeBase(object, ref).allSatisfy { $0 == noise })
    }

    /// The layout is a promise: this is Docs/Format.md read by hand.
    @Test func theLayoutIsTheDocumentedOne() {
        let (object, _) = encode(
            [3: Sample.noise.slice(seed: 4)], id: ObjectID(high: 0x0102_0304_0506_0708, low: 0x1112))
        #expect(Array(object[0..<8]) == Array("MGBASE\0\0".utf8))
        #expect(Array(object[8..<16]) == [1, 0, 0, 0, 0x38, 0x03, 0, 0])
        #expect(Array(object[16..<32]) == [8, 7, 6, 5, 4, 3, 2, 1, 0x12, 0x11, 0, 0, 0, 0, 0, 0])
        #expect(Array(object[32..<40]) == [0, 0, 8, 0, 32, 0, 0, 0])
        #expect(Array(object[40..<48]) == [0x38, 0x03, 8, 0, 0, 0, 0, 0])
        #expect(object[48..<120].allSatisfy { $0 == 0 })
        #expect(Array(object[120..<136]) == [1, 0, 0, 0, 0x38, 0x03, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0])
        #expect(object.count == 0x338 + 0x80000)
    }

    @Test func everyFlippedByteIsNoticed() {
        let (object, ref) = encode([0: Sample.sparse.slice(seed: 8), 30: Sample.sparse.slice(seed: 9)])
        var damaged = object
        for i in object.indices {
            for bit: UInt8 in [0x01, 0x80, 0xFF] {
                damaged[i] = object[i] ^ bit
                #expect(throws: FormatError.self, "byte \(i) of \(object.count)") { try decodeBase(damaged, ref) }
            }
            damaged[i] = object[i]
        }
    }

    @Test func everyTruncationIsNoticed() {
        let (object, ref) = encode([5: Sample.sparse.slice(seed: 8)])
        for count in 0..<object.count {
            #expect(throws: FormatError.self, "\(count) bytes of \(object.count)") {
                try decodeBase(Array(object[0..<count]), ref)
            }
        }
    }

    @Test func unknownVersionIsSaidToBeThat() {
        var (object, ref) = encode([5: Sample.sparse.slice(seed: 8)])
        object[8] = 2
        let error = #expect(throws: FormatError.self) { try decodeBase(object, ref) }
        #expect(error?.kind == .unknownVersion)
        #expect(error?.description.contains("version 2") == true)
    }

    @Test func anotherObjectUnderThisNameIsRefused() {
        let slices = [5: Sample.sparse.slice(seed: 8)]
        let (object, ref) = encode(slices)
        let (other, _) = encode(slices, id: .sample(8))
        #expect(throws: FormatError.self) { try decodeBase(other, ref) }
        var wrong = ref
        wrong.lengthBytes += 1
        #expect(throws: FormatError.self) { try decodeBase(object, wrong) }
        wrong = ref
        wrong.nonzeroSlices |= 1
        #expect(throws: FormatError.self) { try decodeBase(object, wrong) }
    }

    /// Headers whose checksum is right but whose records lie: made by a broken writer or a forger.
    @Test func recordsThatLieAreRefused() throws {
        let (object, ref) = encode([1: Sample.sparse.slice(seed: 8), 2: Sample.sparse.slice(seed: 9)])
        let good = try object.withUnsafeBytes { b in try BaseHeader(decoding: b, of: ref) }
        let lies: [(String, (inout BaseHeader) -> Void)] = [
            ("overlap", { $0.slices[2].offsetBytes -= 1 }),
            ("gap", { $0.slices[2].offsetBytes += 1 }),
            ("inside the header", { $0.slices[1].offsetBytes = 0 }),
            ("longer than the object", { $0.slices[2].lengthBytes += 1 }),
            ("length that wraps", { $0.slices[2].lengthBytes = .max }),
            ("raw of another length", { $0.slices[1].codec = .raw }),
            ("zstd of a whole slice", { $0.slices[1].lengthBytes = UInt32(Geometry.sliceBytes) }),
            ("zeroes with bytes", { $0.slices[1].codec = .zero }),
            ("swapped", { $0.slices.swapAt(1, 2) }),
            ("object length", { $0.objectLengthBytes += 1 }),
        ]
        for (name, lie) in lies {
            var header = good
            lie(&header)
            let bytes = header.encoded() + object[BaseHeader.lengthBytes...]
            #expect(throws: FormatError.self, "\(name)") { try decodeBase(bytes, ref) }
        }
    }
}
