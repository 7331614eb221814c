// Figures for Docs/Decisions, on demand, in a release build:
//
//     MARGARINE_MEASURE=1 swift test -c release -Xswiftc -enable-testing --filter Measurements

import Foundation
import Glibc
import Synchronization
import Testing

@testable import BlockCache

private let isWanted = ProcessInfo.processInfo.environment["MARGARINE_MEASURE"] != nil

@Suite(.enabled(if: isWanted), .serialized) struct Measurements {
    private func seconds(_ body: () -> Void) -> Double {
        let clock = ContinuousClock()
        let time = clock.measure(body).components
        return Double(time.seconds) + Double(time.attoseconds) / 1e18
    }

    /// A hit of 4 KiB: what `tryCopy` costs beyond the copy, alone and with two threads on the same slices.
    @Test func hits() async {
        // Twice the slices, so that no shard is full.
        let frames = 512
        let cache = SliceCache(budgetBytes: UInt64(frames * Geometry.sliceBytes))
        var entries: [BlockEntry] = []
        for n in 0..<UInt64(8) {
            entries.append(
                BlockEntry(base: BaseRef(id: .sample(n), location: 0, lengthBytes: 1, nonzeroSlices: .max), deltas: []))
            for slice in 0..<32 {
                cache.insert(entries[Int(n)].key(SliceIndex(slice))!) {
                    $0.initializeMemory(as: UInt8.self, repeating: 7, count: Geometry.sliceBytes)
                }
            }
        }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { buffer.deallocate() }
        let rounds = 4_000_000
        let plain = UnsafeMutableRawPointer.allocate(byteCount: 128 << 20, alignment: 4096)
        defer { plain.deallocate() }
        plain.initializeMemory(as: UInt8.self, repeating: 7, count: 128 << 20)
        for (name, pages) in [("one page", 1), ("1 MiB", 256), ("128 MiB", 32768)] {
            var random = Random(seed: 1)
            // Places first, so that only reading is measured.
            let places = (0..<65536).map { _ in Int.random(in: 0..<pages, using: &random) }
            let copy = seconds {
                for i in 0..<rounds {
                    let place = places[i & 65535]
                    memcpy(buffer, plain + place * 4096, 4096)
                }
            }
            var missed = 0
            let hit = seconds {
                for i in 0..<rounds {
                    let place = places[i & 65535]
                    let key = SliceKey(
                        id: .sample(UInt64(place >> 12)), offsetBytes: 0, slice: SliceIndex(place >> 7 & 31))
                    if !cache.tryCopy(key, offset: (place & 127) * 4096, count: 4096, into: buffer) { missed += 1 }
                }
            }
            #expect(missed == 0)
            print(
                String(
                    format: "tryCopy 4 KiB within %@: %.0f ns, of it the copy alone %.0f ns", name,
                    hit / Double(rounds) * 1e9, copy / Double(rounds) * 1e9))
        }
        let loader = seconds {
            for i in 0..<rounds {
                let slice = SliceIndex(i & 31)
                let entry = entries[i & 7]
                if let key = entry.key(slice) { _ = cache.tryCopy(key, offset: 0, count: 4096, into: buffer) }
            }
        }
        print(String(format: "with the entry's key, 256 slices: %.0f ns", loader / Double(rounds) * 1e9))
        await withTaskGroup(of: Double.self) { group in
            for _ in 0..<2 {
                group.addTask {
                    let mine = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
                    defer { mine.deallocate() }
                    let key = SliceKey(id: .sample(0), offsetBytes: 0, slice: SliceIndex(0))
                    return self.seconds {
                        for _ in 0..<rounds { _ = cache.tryCopy(key, offset: 0, count: 4096, into: mine) }
                    }
                }
            }
            for await time in group {
                print(String(format: "two threads on one slice: %.0f ns", time / Double(rounds) * 1e9))
            }
        }
        let misses = seconds {
            for i in 0..<rounds {
                let key = SliceKey(id: .sample(99), offsetBytes: UInt32(i), slice: SliceIndex(0))
                _ = cache.tryCopy(key, offset: 0, count: 4096, into: buffer)
            }
        }
        print(String(format: "a miss: %.0f ns", misses / Double(rounds) * 1e9))
    }

    /// Packing and unpacking file data: a tar of /usr/bin and /usr/share, or what MARGARINE_SAMPLE names.
    @Test func codec() throws {
        var data: [UInt8] = []
        if let path = ProcessInfo.processInfo.environment["MARGARINE_SAMPLE"] {
            data = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path), options: .alwaysMapped).prefix(256 << 20))
        } else {
            for folder in ["/usr/bin", "/usr/share/doc", "/usr/include", "/usr/lib/x86_64-linux-gnu"] {
                for name in try FileManager.default.contentsOfDirectory(atPath: folder).sorted()
                where data.count < 256 << 20 {
                    let url = URL(fileURLWithPath: folder + "/" + name)
                    if let bytes = try? Data(contentsOf: url), bytes.count < 8 << 20 { data += bytes }
                }
            }
        }
        data.removeLast(data.count % Geometry.sliceBytes)
        let slices = data.count / Geometry.sliceBytes
        let mb = Double(data.count) / 1e6
        var encoded: [EncodedSlice] = []
        encoded.reserveCapacity(slices)
        data.withUnsafeBytes { data in
            let pack = seconds {
                for i in 0..<slices { encoded.append(encodeSlice(data.baseAddress! + i * Geometry.sliceBytes)) }
            }
            let stored = encoded.reduce(0) { $0 + $1.stored.count }
            print(
                String(
                    format: "%d slices, encode %.0f MB/s, stored %.3f, raw %d, zero %d", slices, mb / pack,
                    Double(stored) / Double(data.count), encoded.count { $0.codec == .raw },
                    encoded.count { $0.codec == .zero }))
            let frame = UnsafeMutableRawPointer.allocate(byteCount: Geometry.sliceBytes, alignment: 4096)
            defer { frame.deallocate() }
            var bad = 0
            let unpack = seconds {
                for slice in encoded {
                    let ok = slice.stored.withUnsafeBytes {
                        checksum($0) == slice.checksum || slice.codec == .zero
                            ? Codec.unpack(
                                slice.codec, $0,
                                into: UnsafeMutableRawBufferPointer(start: frame, count: Geometry.sliceBytes)) : false
                    }
                    if !ok { bad += 1 }
                }
            }
            #expect(bad == 0)
            print(String(format: "decode with checksum %.0f MB/s", mb / unpack))
            let sum = seconds {
                for i in 0..<slices {
                    if checksum(data.part(i * Geometry.sliceBytes..<(i + 1) * Geometry.sliceBytes)) == 1 { bad += 1 }
                }
            }
            print(String(format: "checksum alone %.1f GB/s", mb / sum / 1000))
            // One page at a time, as a commit of scattered writes packs them.
            var pageBytes = 0
            let pages = min(data.count / 4096, 20_000)
            let delta = seconds {
                for i in 0..<pages {
                    let patch = encodePatch(
                        SliceIndex(0), data: PageMask(pages: 0..<1), zeroes: .none, pages: data.baseAddress! + i * 4096,
                        layout: .packed)
                    pageBytes += patch.storedBytes
                }
            }
            print(
                String(
                    format: "patches of one page: %.0f MB/s, stored %.3f", Double(pages) * 4096 / 1e6 / delta,
                    Double(pageBytes) / Double(pages * 4096)))
        }
        let zero = [UInt8](repeating: 0, count: Geometry.sliceBytes)
        var ok = true
        let zeroes = seconds { for _ in 0..<2000 { zero.withUnsafeBytes { ok = isZero($0) && ok } } }
        print(String(format: "zero detection %.1f GB/s", 2000 * Double(Geometry.sliceBytes) / zeroes / 1e9))
        #expect(ok)
    }

    /// Share of visits that find their slice, for several loads, with 1024 frames; a visit is a run of page reads.
    @Test func eviction() {
        for (name, trace) in Traces.all(frames: 1024) {
            let lru = Traces.lru(trace, frames: 1024)
            let ours = Traces.real(trace, SliceCache(budgetBytes: UInt64(1024 * Geometry.sliceBytes)))
            let everyHit = Traces.real(trace, SliceCache(budgetBytes: UInt64(1024 * Geometry.sliceBytes), usePeriod: 0))
            print(
                String(
                    format: "%-44@ LRU %5.1f%%  S3-FIFO, every hit a use %5.1f%%  S3-FIFO %5.1f%%", name as NSString,
                    lru * 100, everyHit * 100, ours * 100))
        }
    }
}

/// Loads on a cache, as numbers of slices visited.
enum Traces {
    static func all(frames: Int) -> [(String, [Int])] {
        var random = Random(seed: 42)
        let zipf = Zipf(count: frames * 8, exponent: 0.9)
        let steps = frames * 100
        let popular = (0..<steps).map { _ in zipf.next(&random) }
        var scan = 1 << 24
        func fresh() -> Int {
            scan += 1
            return scan
        }
        let mixed = popular.flatMap { [$0, fresh()] }
        let burst = popular.enumerated().flatMap { i, n in
            i % (frames * 4) == 0 ? (0..<frames * 2).map { _ in fresh() } + [n] : [n]
        }
        let loop = (0..<steps).map { $0 % (frames * 5 / 4) }
        let moving = (0..<steps).map { i in i / 8 + Int.random(in: 0..<frames * 3 / 4, using: &random) }
        let boots = (0..<40).flatMap { _ in (0..<frames / 2).map { $0 } + (0..<frames).map { _ in fresh() } }
        return [
            ("popular slices (zipf 0.9)", popular), ("the same, every second visit a scan", mixed),
            ("the same, now and then a scan of 2 caches", burst), ("a loop of 1.25 caches", loop),
            ("a working set of 0.75 caches that moves", moving), ("half a cache, a scan of a whole, again", boots),
        ]
    }

    static func real(_ trace: [Int], _ cache: SliceCache) -> Double {
        var hits = 0
        var byte: UInt8 = 0
        for n in trace {
            let key = SliceKey(id: .sample(UInt64(n)), offsetBytes: 0, slice: SliceIndex(0))
            if cache.tryCopy(key, offset: 0, count: 1, into: &byte) { hits += 1 } else { cache.insert(key) { _ in } }
            for _ in 0..<8 { _ = cache.tryCopy(key, offset: 0, count: 1, into: &byte) }
        }
        return Double(hits) / Double(trace.count)
    }

    static func lru(_ trace: [Int], frames: Int) -> Double {
        var lastUse: [Int: Int] = [:]
        var order: [(slice: Int, at: Int)] = []
        var head = 0
        var hits = 0
        for (at, n) in trace.enumerated() {
            if lastUse.updateValue(at, forKey: n) != nil { hits += 1 }
            order.append((n, at))
            while lastUse.count > frames {
                let (old, time) = order[head]
                head += 1
                if lastUse[old] == time { lastUse[old] = nil }
            }
        }
        return Double(hits) / Double(trace.count)
    }

    struct Zipf {
        private var sums: [Double] = []
        init(count: Int, exponent: Double) {
            var sum = 0.0
            for i in 1...count {
                sum += pow(Double(i), -exponent)
                sums.append(sum)
            }
        }
        func next(_ random: inout Random) -> Int {
            let x = Double.random(in: 0..<sums[sums.count - 1], using: &random)
            var (low, high) = (0, sums.count - 1)
            while low < high {
                let mid = (low + high) / 2
                if sums[mid] <= x { low = mid + 1 } else { high = mid }
            }
            return low
        }
    }
}

struct EvictionTests {
    /// The reason for S3-FIFO, in small: never much worse than eviction by last use, much better beside scans.
    @Test func comparesWellWithLastUse() {
        let frames = 200
        var better = 0
        for (name, trace) in Traces.all(frames: frames) {
            let lru = Traces.lru(trace, frames: frames)
            let ours = Traces.real(trace, SliceCache(budgetBytes: UInt64(frames * Geometry.sliceBytes)))
            #expect(ours > lru - 0.1, "\(name)")
            if ours > lru + 0.05 { better += 1 }
        }
        #expect(better >= 3)
    }
}
