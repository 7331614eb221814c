// Layers, ranges and journal records against plain models.

import BlockCache
@testable import Margarine
import Runtime
import Testing

@Suite struct LayerTests {
    @Test func rangesAreAsASet() {
        var random = SeededRandom(1)
        var ranges = SliceRanges()
        var model = Set<UInt64>()
        for _ in 0..<2000 {
            let start = UInt64.random(in: 0..<300, using: &random)
            let end = start + UInt64.random(in: 0..<12, using: &random)
            ranges.insert(start..<end)
            model.formUnion(start..<end)
            if model.count > 250 {
                ranges = SliceRanges()
                model = []
            }
            let probe = UInt64.random(in: 0..<320, using: &random)
            #expect(ranges.contains(probe) == model.contains(probe))
            #expect(
                ranges.covers(start..<max(end, start + 1)) == (start..<max(end, start + 1)).allSatisfy(model.contains))
        }
        for (a, b) in zip(ranges.ranges, ranges.ranges.dropFirst()) { #expect(a.upperBound < b.lowerBound) }
    }

    @Test func layersAndMergesAreAsADictionary() {
        var random = SeededRandom(2)
        let pages = DirtyPages(arena: FrameArena(budgetBytes: 1 << 20))
        var layers = [Layer(pages: pages), Layer(pages: pages)]
        var models: [[UInt64: UInt32?]] = [[:], [:]]
        var sum: UInt32 = 0
        for step in 0..<6000 {
            let which = Int.random(in: 0..<2, using: &random)
            let page = UInt64.random(in: 0..<1500, using: &random)
            switch Int.random(in: 0..<10, using: &random) {
            case 0..<7:
                sum += 1
                let slot = pages.recover(at: JournalLocation(segment: 1, offset: 0), sum: sum)
                layers[which].put(slot, page: Int(page % 128), of: page / 128)
                models[which][page] = .some(sum)
            case 7, 8:
                let end = page + UInt64.random(in: 1..<400, using: &random)
                layers[which].zero(pages: page..<end)
                for p in page..<end { models[which][p] = .some(nil) }
            default:
                guard step % 50 == 0 else { continue }
                layers[0].merge(layers[1])
                models[0].merge(models[1]) { $1 }
                layers[1] = Layer(pages: pages)
                models[1] = [:]
            }
        }
        for which in 0..<2 {
            var data = 0
            for page in 0..<UInt64(2000) {
                switch (layers[which].page(Int(page % 128), of: page / 128), models[which][page]) {
                case (.untouched, nil), (.zero, .some(nil)): break
                case (.data(let slot), .some(let expected?)):
                    data += 1
                    #expect(pages[slot].sum == expected)
                case (let found, let expected):
                    Issue.record("page \(page): \(found) instead of \(String(describing: expected))")
                }
            }
            #expect(layers[which].dataPages == data)
        }
        layers = []
        #expect(pages.count == 0)
    }

    @Test("row 7: a layer costs bytes per page, all of them counted, and given back")
    func aLayerCostsBytesPerPage() {
        var random = SeededRandom(7)
        let arena = FrameArena(budgetBytes: 64 << 20)
        let pages = DirtyPages(arena: arena)
        let trimmed = Layer(pages: pages)
        for _ in 0..<100_000 {
            let page = UInt64.random(in: 0..<1 << 40, using: &random)
            trimmed.zero(pages: page..<page + 1)
        }
        #expect(trimmed.overheadBytes < 100_000 * 24)
        #expect(arena.overheadBytes == trimmed.overheadBytes && pages.overheadBytes == trimmed.overheadBytes)

        let written = Layer(pages: pages)
        for page in 0..<UInt64(20_000) {
            // Single pages far apart, and slices that fill.
            let at = page % 2 == 0 ? page : UInt64.random(in: 0..<1 << 40, using: &random)
            let slot = pages.recover(at: JournalLocation(segment: 1, offset: 0), sum: 0)
            written.put(slot, page: Int(at % 128), of: at / 128)
        }
        // A slot takes 20 bytes.
        #expect(written.overheadBytes < 20_000 * 24)
        #expect(pages.overheadBytes < trimmed.overheadBytes + written.overheadBytes + 20_000 * 24)
        trimmed.merge(written)
        #expect(written.overheadBytes == 0 && written.dataPages == 0)
        #expect(pages.overheadBytes >= trimmed.overheadBytes + 20_000 * 20)

        var steps = 0
        while !trimmed.drop(atMost: 10_000) { steps += 1 }
        #expect(steps > 5)
        #expect(trimmed.overheadBytes == 0 && pages.overheadBytes == 0 && arena.overheadBytes == 0 && pages.count == 0)
    }

    @Test func trimsThatFillASliceBecomeARange() {
        let pages = DirtyPages(arena: FrameArena(budgetBytes: 1 << 20))
        let layer = Layer(pages: pages)
        for page in UInt64(0)..<128 * 64 { layer.zero(pages: page..<page + 1) }
        #expect(layer.zeroed.ranges == [0..<64])
        #expect(layer.nextTouched(atOrAfter: 0) == nil)
        #expect(layer.nextBlock(atOrAfter: 0) == nil)
        layer.zero(pages: 128 * 64..<128 * 64 + 5)
        #expect(layer.nextBlock(atOrAfter: 0) == 2)
    }

    @Test func theTablesAreWalkedInOrder() {
        var random = SeededRandom(3)
        let pages = DirtyPages(arena: FrameArena(budgetBytes: 1 << 20))
        let layer = Layer(pages: pages)
        var model: [UInt64: PageMask] = [:]
        for round in 0..<6_000 {
            let number = UInt64.random(in: 0..<4_000, using: &random)
            if round % 500 == 499 {
                let end = number + UInt64.random(in: 1..<900, using: &random)
                layer.zero(slices: number..<end)
                for n in number..<end { model[n] = .all }
                continue
            }
            let page = Int.random(in: 0..<128, using: &random)
            layer.zero(PageMask(pages: page..<page + 1), of: number)
            model[number, default: .none].insert(page)
        }
        for number in UInt64(0)..<5_000 {
            #expect(layer.masks(of: number).touched == model[number] ?? .none)
        }
        var seen: [UInt64] = []
        layer.forEachTouched(in: 0..<5_000) { number, _ in seen.append(number) }
        #expect(seen == model.keys.sorted())
        // A block is passed over only where nothing was touched, or all of it is zeroes.
        let per = UInt64(Geometry.slicesPerBlock)
        var blocks: [UInt64] = []
        var next = layer.nextBlock(atOrAfter: 0)
        while let block = next {
            blocks.append(block)
            next = layer.nextBlock(atOrAfter: block + 1)
        }
        for block in UInt64(0)..<200 {
            let slices = block * per..<(block + 1) * per
            let isTouched = slices.contains { model[$0] != nil }
            let isZero = layer.zeroed.covers(slices)
            #expect(blocks.contains(block) == (isTouched && !isZero))
        }
    }

    @Test func everyDamagedJournalHeaderIsRefused() {
        let disk = ObjectID(high: 3, low: 4)
        var bytes = [UInt8](repeating: 0, count: 64 + 12)
        let record = JournalFormat.Record(
            kind: .write, sequence: 9, a: 77, b: 3, synced: 4, extraBytes: 12, dataBytes: 3 * 4096)
        bytes.withUnsafeMutableBytes { JournalFormat.putRecordHeader($0.baseAddress!, record, of: disk) }
        #expect(bytes.withUnsafeBytes { JournalFormat.record($0.baseAddress!, available: 76, of: disk) } == record)
        for length in 0..<76 {
            #expect(bytes.withUnsafeBytes { JournalFormat.record($0.baseAddress!, available: length, of: disk) } == nil)
        }
        for at in bytes.indices {
            for bit in 0..<8 {
                bytes[at] ^= 1 << UInt8(bit)
                #expect(
                    bytes.withUnsafeBytes { JournalFormat.record($0.baseAddress!, available: 76, of: disk) } == nil,
                    "byte \(at)")
                bytes[at] ^= 1 << UInt8(bit)
            }
        }
    }

    @Test func sequenceNumbersThatCannotBeAreRefused() {
        let disk = ObjectID(high: 3, low: 4)
        for (sequence, isRecord) in [((1 << 62) - 1, true), (1 << 62, false), (UInt64.max, false)] {
            var bytes = [UInt8](repeating: 0, count: 64)
            let record = JournalFormat.Record(
                kind: .rollBack, sequence: sequence, a: 0, b: 0, synced: 0, extraBytes: 0, dataBytes: 0)
            bytes.withUnsafeMutableBytes { JournalFormat.putRecordHeader($0.baseAddress!, record, of: disk) }
            let found = bytes.withUnsafeBytes { JournalFormat.record($0.baseAddress!, available: 64, of: disk) }
            #expect((found != nil) == isRecord, "\(sequence)")
        }
    }

    @Test func aJournalWhoseSyncedPartIsDamagedIsRefused() async throws {
        let bed = try DiskBed(settings: { $0.commitIntervalMs = 600_000 })
        try await bed.create()
        let client = try await bed.attach()
        for i in 0..<10 {
            try await client.write(pattern(4096, UInt64(i)), at: UInt64(i) * 4096)
            try await client.flush()
        }
        bed.kill()
        let folder = try #require(try bed.scratch.list("journal").first)
        let path = "journal/\(folder)/" + (try #require(try bed.scratch.list("journal/\(folder)").first))
        // In the third record of many that say they follow a sync.
        bed.scratch.flipBit(path, at: 64 + 3 * (64 + 4 + 4096 + 64))
        let next = try DiskBed(store: bed.store, scratch: bed.scratch)
        await next.manager.recover()
        await #expect(throws: AttachError.self) { try await next.attach() }
    }
}
