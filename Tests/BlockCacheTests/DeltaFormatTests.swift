import Testing

@testable import BlockCache

/// Applies the segment `ref` names, slice by slice, to `below`, the way a reader does.
func applySegment(_ object: [UInt8], _ ref: DeltaRef, to below: [Int: [UInt8]]) throws -> [Int: [UInt8]] {
    guard Int(ref.offsetBytes) + Int(ref.lengthBytes) <= object.count else { throw FormatError.corrupt("cut short") }
    let segment = Array(object[Int(ref.offsetBytes)..<Int(ref.offsetBytes + ref.lengthBytes)])
    let header = try segment.withUnsafeBytes { b in try SegmentHeader(decoding: b, of: ref) }
    var result = below
    for patch in header.patches {
        var frame = below[patch.slice.value] ?? [UInt8](repeating: 0, count: Geometry.sliceBytes)
        try frame.withUnsafeMutableBytes { frame in
            try segment.withUnsafeBytes { b throws in
                try SegmentHeader.apply(
                    patch, stored: b.part(Int(patch.range.lowerBound)..<Int(patch.range.upperBound)),
                    to: frame.baseAddress!)
            }
        }
        result[patch.slice.value] = frame
    }
    return result
}

/// Random changes of one slice: the masks, the packed pages, and what the slice is afterwards.
func randomChange(
    of slice: [UInt8], _ random: inout Random
) -> (data: PageMask, zeroes: PageMask, packed: [UInt8], after: [UInt8]) {
    var data = PageMask.none
    var zeroes = PageMask.none
    var packed: [UInt8] = []
    var after = slice
    let density = Int.random(in: 1...128, using: &random)
    for page in 0..<128 where Int.random(in: 0..<128, using: &random) < density {
        let range = page * 4096..<(page + 1) * 4096
        if Int.random(in: 0..<4, using: &random) == 0 {
            zeroes.insert(page)
            after.replaceSubrange(range, with: repeatElement(0, count: 4096))
        } else {
            data.insert(page)
            let kind = Sample.allCases.randomElement(using: &random)!
            let bytes = kind.bytes(4096, seed: random.next())
            packed += bytes
            after.replaceSubrange(range, with: bytes)
        }
    }
    if (data | zeroes).isEmpty {
        zeroes.insert(5)
        after.replaceSubrange(5 * 4096..<6 * 4096, with: repeatElement(0, count: 4096))
    }
    return (data, zeroes, packed, after)
}

struct DeltaFormatTests {
    @Test(arguments: [1, 2, 3, 4] as [UInt64])
    func randomChangesAreAppliedAsMade(seed: UInt64) throws {
        var random = Random(seed: seed)
        var encoder = DeltaEncoder(id: .sample(seed), location: 1)
        var before: [[Int: [UInt8]]] = []
        var after: [[Int: [UInt8]]] = []
        for block in 0..<4 {
            encoder.begin(BlockIndex(UInt64(block) * 1000))
            before.append([:])
            after.append([:])
            var slice = Int.random(in: 0..<12, using: &random)
            while slice < 32 {
                let old = Sample.noise.slice(seed: random.next())
                let change = randomChange(of: old, &random)
                let inPlace = Bool.random(using: &random)
                (inPlace ? change.after : change.packed).withUnsafeBytes {
                    encoder.add(
                        SliceIndex(slice), data: change.data, zeroes: change.zeroes, pages: $0.baseAddress,
                        layout: inPlace ? .inPlace : .packed)
                }
                before[block][slice] = old
                after[block][slice] = change.after
                slice += Int.random(in: 1..<12, using: &random)
            }
        }
        let size = encoder.sizeBytes
        let (object, refs) = encoder.finish()
        #expect(object.count == size)
        #expect(refs.map(\.block) == (0..<4).map { BlockIndex($0 * 1000) })
        for (block, ref) in refs.map(\.ref).enumerated() {
            #expect(ref.offsetBytes > 0 && ref.location == 1)
            #expect(ref.touchedSlices == before[block].keys.reduce(0) { $0 | 1 << UInt32($1) })
            #expect(try applySegment(object, ref, to: before[block]) == after[block])
        }
        let index = try object.withUnsafeBytes { b in try DeltaIndex(decoding: b) }
        #expect(index.id == .sample(seed))
        #expect(index.segments.map(\.offsetBytes) == refs.map(\.ref.offsetBytes))
        #expect(index.segments.map(\.block) == refs.map(\.block))
    }

    @Test func pagesOfZeroesAreStoredAsSuch() {
        let zeroes = Sample.zeroes.slice(seed: 0)
        let patch = zeroes.withUnsafeBytes {
            encodePatch(
                SliceIndex(4), data: PageMask(pages: 0..<100), zeroes: PageMask(pages: 100..<128),
                pages: $0.baseAddress, layout: .packed)
        }
        #expect(patch.data.isEmpty && patch.zeroes.isAll && patch.storedBytes == 0)
        var encoder = DeltaEncoder(id: .sample(1), location: 0)
        encoder.begin(BlockIndex(0))
        encoder.add(patch)
        #expect(encoder.finish().refs[0].ref.zeroedSlices == 1 << 4)
    }

    @Test func aChangeOfOnePageIsSmall() throws {
        var encoder = DeltaEncoder(id: .sample(1), location: 0)
        encoder.begin(BlockIndex(9))
        let page = Sample.noise.bytes(4096, seed: 1)
        page.withUnsafeBytes {
            encoder.add(SliceIndex(31), data: PageMask(pages: 127..<128), zeroes: .none, pages: $0.baseAddress)
        }
        let (object, refs) = encoder.finish()
        #expect(object.count == 40 + 16 + 8 + 48 + 56 + 8 + 4096)
        let after = try applySegment(object, refs[0].ref, to: [31: Sample.text.slice(seed: 1)])[31]!
        #expect(Array(after.suffix(4096)) == page)
        #expect(after.dropLast(4096) == Sample.text.slice(seed: 1).dropLast(4096))
    }

    /// A small object with two segments of every kind of patch.
    private func small() -> (object: [UInt8], refs: [(block: BlockIndex, ref: DeltaRef)]) {
        var encoder = DeltaEncoder(id: .sample(3), location: 0)
        for block in [5, 6] as [UInt64] {
            encoder.begin(BlockIndex(block))
            let text = Sample.sparse.bytes(8192, seed: block)
            text.withUnsafeBytes {
                encoder.add(
                    SliceIndex(1), data: PageMask(pages: 3..<5), zeroes: PageMask(pages: 90..<99), pages: $0.baseAddress
                )
            }
            encoder.add(SliceIndex(2), data: .none, zeroes: .all, pages: nil)
        }
        return encoder.finish()
    }

    private func decodeAll(_ object: [UInt8], _ refs: [(block: BlockIndex, ref: DeltaRef)]) throws {
        _ = try object.withUnsafeBytes { b in try DeltaIndex(decoding: b) }
        for (_, ref) in refs { _ = try applySegment(object, ref, to: [:]) }
    }

    @Test func everyFlippedByteIsNoticed() throws {
        let (object, refs) = small()
        try decodeAll(object, refs)
        var damaged = object
        for i in object.indices {
            for bit: UInt8 in [0x01, 0x80, 0xFF] {
                damaged[i] = object[i] ^ bit
                #expect(throws: FormatError.self, "byte \(i) of \(object.count)") { try decodeAll(damaged, refs) }
            }
            damaged[i] = object[i]
        }
    }

    @Test func everyTruncationIsNoticed() {
        let (object, refs) = small()
        for count in 0..<object.count {
            #expect(throws: FormatError.self, "\(count) bytes of \(object.count)") {
                try decodeAll(Array(object[0..<count]), refs)
            }
        }
    }

    @Test func unknownVersionsAreSaidToBeThat() {
        let (object, refs) = small()
        for place in [8, Int(refs[0].ref.offsetBytes) + 8] {
            var other = object
            other[place] = 77
            let error = #expect(throws: FormatError.self) { try decodeAll(other, refs) }
            #expect(error?.kind == .unknownVersion)
        }
    }

    @Test func aSegmentThatDisagreesWithItsManifestIsRefused() {
        let (object, refs) = small()
        let changes: [(inout DeltaRef) -> Void] = [
            { $0.touchedSlices |= 1 }, { $0.zeroedSlices = 0 }, { $0.id = .sample(4) },
            { $0.lengthBytes += 1 }, { $0.lengthBytes -= 1 },
        ]
        for change in changes {
            var ref = refs[0].ref
            change(&ref)
            #expect(throws: FormatError.self) { _ = try applySegment(object, ref, to: [:]) }
        }
        // The other segment, where this one should be.
        let (first, second) = (refs[0].ref, refs[1].ref)
        var moved = object
        moved.replaceSubrange(
            Int(first.offsetBytes)..<Int(first.offsetBytes + first.lengthBytes),
            with: object[Int(second.offsetBytes)..<Int(second.offsetBytes + second.lengthBytes)])
        #expect(throws: FormatError.self) { _ = try applySegment(moved, first, to: [:]) }
    }

    @Test func recordsThatLieAreRefused() throws {
        let (object, refs) = small()
        let ref = refs[0].ref
        let segment = Array(object[Int(ref.offsetBytes)..<Int(ref.offsetBytes + ref.lengthBytes)])
        let good = try segment.withUnsafeBytes { b in try SegmentHeader(decoding: b, of: ref) }
        let lies: [(String, (inout SegmentHeader) -> Void)] = [
            ("masks overlap", { $0.patches[0].zeroes.insert(3) }),
            ("no pages", { $0.patches[1].zeroes = .none }),
            ("more data pages than stored", { $0.patches[0].codec = .raw }),
            (
                "data without bytes",
                {
                    $0.patches[1].data.insert(0); $0.patches[1].zeroes.remove(0)
                }
            ),
            ("out of order", { $0.patches.swapAt(0, 1) }),
            ("twice", { $0.patches[1].slice = SliceIndex(1) }),
            ("into the header", { $0.patches[0].offsetBytes -= 1 }),
            ("beyond the end", { $0.patches[0].lengthBytes += 1 }),
            ("length", { $0.segmentLengthBytes += 1 }),
        ]
        for (name, lie) in lies {
            var header = good
            lie(&header)
            let bytes = header.encoded() + segment[good.lengthBytes...]
            #expect(throws: FormatError.self, "\(name)") {
                try bytes.withUnsafeBytes { b in _ = try SegmentHeader(decoding: b) }
            }
        }
    }
}
