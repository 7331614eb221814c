// What a disk of 16 TiB with a million used blocks costs, in requests, against one of 1 GiB with ten: the way down its tree,
// and nothing else.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

struct ManifestScaleTests {
    /// Calls on the store of each piece of work.
    struct Costs {
        var attach: UInt64 = 0
        var commit: UInt64 = 0
        var fork: UInt64 = 0
        var diff: UInt64 = 0
        var send: UInt64 = 0
    }

    /// A disk whose first blocks are used: all name the same object, but for the manifest they are blocks like any.
    static func measure(sizeBytes: UInt64, blocks: UInt64) async throws -> (depth: Int, Costs) {
        let test = TestStore()
        let catalog = try await CatalogTests.open(test)
        let environment = test.environment
        let bytes = [UInt8](repeating: 7, count: Geometry.sliceBytes)
        func store() async throws -> BaseRef {
            var encoder = BaseEncoder(id: environment.objectID(), location: 0)
            bytes.withUnsafeBytes { encoder.add(from: $0.baseAddress!, at: SliceIndex(5)) }
            let (object, ref) = encoder.finish()
            _ = try await test.faulty.put(ref.id.blockKey, object, if: .none)
            return ref
        }
        func advance(to manifest: Manifest) async throws {
            let found = try await catalog.load("disk")
            let outcome = try await found.heads.update(found.head, found.etag) { head in
                head.advance(
                    to: GenerationRecord(
                        diskID: head.diskID, generation: head.generation + 1, epoch: head.epoch, kind: .flush,
                        committedAtMs: 1, journalSequence: 0, newBytes: 0, manifest: manifest))
            }
            guard case .done = outcome else { throw CatalogError(.conflict, "not won") }
        }

        _ = try await catalog.create("disk", sizeBytes: sizeBytes)
        var edit = GradualEdit(
            ManifestEdit(.empty(sizeBytes: sizeBytes, cache: ManifestCache(catalog.store.locations))),
            to: catalog.store.locations, environment: environment)
        let ref = try await store()
        let calls = test.puts
        for block in 0..<blocks {
            try await edit.set(BlockIndex(block), BlockEntry(base: ref, deltas: []))
        }
        let full = try await edit.finish()
        #expect(full.usedBlocks == blocks && full.storedBytes == blocks * UInt64(ref.lengthBytes))
        // What is written now and then is the pages on the way to the last block.
        let leaves = (blocks + 511) / 512
        let writes = blocks / UInt64(GradualEdit.blocksPerWrite) + 1
        #expect(test.puts - calls <= leaves + 4 * writes)
        try await advance(to: full)

        var costs = Costs()
        func count(_ body: () async throws -> Void) async throws -> UInt64 {
            let before = test.puts + test.gets
            try await body()
            return test.puts + test.gets - before
        }
        costs.attach = try await count {
            let view = try await catalog.view("disk")
            let entry = try await view.manifest.find(BlockIndex(blocks - 1))
            #expect(entry?.base == ref)
        }
        let other = try await store()
        costs.commit = try await count {
            var edit = ManifestEdit(try await catalog.view("disk").manifest)
            edit.set(BlockIndex(blocks / 2), BlockEntry(base: other, deltas: []))
            try await advance(to: try await test.write(edit))
        }
        costs.fork = try await count { _ = try await catalog.fork("disk", as: "fork") }
        #expect(try await catalog.show("fork").blocks == blocks)
        costs.diff = try await count {
            let ranges = catalog.diff(
                from: try await catalog.view("disk", generation: 1), to: try await catalog.view("fork"))
            let start = blocks / 2 * UInt64(Geometry.blockBytes) + 5 * UInt64(Geometry.sliceBytes)
            #expect(
                try await ranges.next()
                    == ChangedRange(bytes: start..<start + UInt64(Geometry.sliceBytes), kind: .data))
            #expect(try await ranges.next() == nil)
        }
        let stream = TestStream()
        costs.send = try await count { try await catalog.send("disk", from: 1, to: { stream.write($0) }) }
        #expect(stream.bytes.count < 10_000)
        return (full.depth, costs)
    }

    @Test func aMillionBlocksCostNoMoreThanTenButForTheDepth() async throws {
        let (low, few) = try await Self.measure(sizeBytes: 1 << 30, blocks: 10)
        let (high, many) = try await Self.measure(sizeBytes: 1 << 44, blocks: 1_000_000)
        #expect(low == 1 && high == 3)
        let deeper = UInt64(high - low)
        // The head, and one way down.
        #expect(few.attach == 2 && many.attach == few.attach + deeper)
        // One way down, and up again.
        #expect(many.commit == few.commit + 2 * deeper)
        #expect(many.fork == few.fork)
        // Both ways down.
        #expect(many.diff == few.diff + 2 * deeper)
        #expect(many.send == few.send + 2 * deeper)
        #expect(many.commit <= 12 && many.diff <= 12 && many.fork <= 8 && many.send <= 12)
    }
}
