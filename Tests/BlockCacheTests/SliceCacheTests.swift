import Synchronization
import Testing

@testable import BlockCache

private func key(_ n: Int) -> SliceKey {
    SliceKey(id: .sample(UInt64(n / 32)), offsetBytes: UInt32(n % 3), slice: SliceIndex(n % 32))
}

/// Fills a frame so that every page says which key it belongs to.
private func fill(_ n: Int) -> (UnsafeMutableRawPointer) -> Void {
    { frame in
        for page in 0..<128 { (frame + page * 4096).storeBytes(of: UInt64(n * 128 + page), as: UInt64.self) }
    }
}

extension SliceCache {
    /// The number found at the start of a page of the slice, nil when it is not here.
    fileprivate func number(_ n: Int, page: Int = 0) -> UInt64? {
        var word: UInt64 = 0
        let found = withUnsafeMutableBytes(of: &word) {
            tryCopy(key(n), offset: page * 4096, count: 8, into: $0.baseAddress!)
        }
        return found ? word : nil
    }
}

private func hasSlot(_ cache: SliceCache) -> Bool {
    if cache.trySlot(key(500)) != nil { return true }
    return false
}

private func budget(_ frames: Int) -> UInt64 { UInt64(frames * Geometry.sliceBytes) }

struct SliceCacheTests {
    @Test func aFrameIsACacheLine() { #expect(MemoryLayout<Frame>.stride == 64) }

    @Test func whatIsInsertedIsFound() {
        let cache = SliceCache(budgetBytes: budget(8))
        #expect(cache.number(1) == nil)
        #expect(cache.insert(key(1), fill: fill(1)))
        #expect(!cache.insert(key(1)) { _ in Issue.record("filled twice") })
        #expect(cache.number(1, page: 127) == 128 + 127)
        #expect(cache.number(33) == nil)
        let snapshot = cache.snapshot
        #expect(snapshot.hits == 1 && snapshot.misses == 2 && snapshot.insertions == 1)
        #expect(snapshot.heldBytes == budget(1) && snapshot.budgetBytes == budget(8))
    }

    @Test func keysThatDifferInOneFieldAreDifferent() {
        let cache = SliceCache(budgetBytes: budget(64))
        let base = SliceKey(id: ObjectID(high: 1, low: 2), offsetBytes: 3, slice: SliceIndex(4))
        var others = [base, base, base, base]
        others[0].id.high = 9
        others[1].id.low = 9
        others[2].offsetBytes = 9
        others[3].slice = SliceIndex(9)
        cache.insert(base) { _ in }
        for other in others { #expect(!cache.contains(other)) }
        for other in others { #expect(cache.insert(other) { _ in }) }
        #expect(cache.snapshot.heldBytes == budget(5))
    }

    /// The cache against a dictionary: what is found is right, the budget holds, nothing is found that was not put in.
    @Test(arguments: [1, 2, 3, 10, 64, 200])
    func manyKeysThroughFewFrames(frames: Int) {
        let cache = SliceCache(budgetBytes: budget(frames))
        var random = Random(seed: UInt64(frames))
        var inserted = Set<Int>()
        for _ in 0..<6000 {
            let n = Int.random(in: 0..<frames * 3 + 2, using: &random)
            if let found = cache.number(n, page: 5) {
                #expect(found == UInt64(n * 128 + 5) && inserted.contains(n))
            } else {
                #expect(cache.insert(key(n)) { ($0 + 5 * 4096).storeBytes(of: UInt64(n * 128 + 5), as: UInt64.self) })
                inserted.insert(n)
            }
        }
        let snapshot = cache.snapshot
        #expect(snapshot.hits + snapshot.misses == 6000)
        #expect(snapshot.heldBytes <= snapshot.budgetBytes)
        #expect(snapshot.insertions - snapshot.evictions == snapshot.heldBytes / UInt64(Geometry.sliceBytes))
        #expect(snapshot.overflows == 0)
    }

    @Test func aPinnedSliceStays() {
        let cache = SliceCache(budgetBytes: budget(4))
        cache.insert(key(0), fill: fill(0))
        let pin = cache.pin(key(0))!
        for n in 1..<50 { cache.insert(key(n), fill: fill(n)) }
        #expect(cache.number(0) == 0)
        #expect(pin.pointer.load(as: UInt64.self) == 0)
        #expect(pin.pointer.load(fromByteOffset: 4096, as: UInt64.self) == 1)
        let second = pin.again()
        _ = consume pin
        for n in 50..<99 { cache.insert(key(n), fill: fill(n)) }
        #expect(cache.number(0) == 0)
        _ = consume second
        cache.trim(to: 0)
        #expect(cache.number(0) == nil)
    }

    @Test func whenAllFramesArePinnedABoundedNumberOfPrivateBuffersServes() {
        let cache = SliceCache(budgetBytes: budget(2))
        let limit = SliceCache.maxOverflowFrames
        /// Pins in a chain, as arrays cannot hold them.
        final class Chain {
            let pin: PinnedSlice
            let next: Chain?
            init(_ pin: consuming PinnedSlice, _ next: Chain?) {
                self.pin = pin
                self.next = next
            }
        }
        var chain: Chain?
        for n in 0..<limit + 2 {
            guard let slot = cache.trySlot(key(n)) else { return #expect(Bool(false), "no buffer for \(n)") }
            fill(n)(slot.pointer)
            let pin = slot.publish()
            #expect(pin.pointer.load(as: UInt64.self) == UInt64(n * 128))
            chain = Chain(pin, chain)
        }
        #expect(!hasSlot(cache))
        #expect(cache.snapshot.overflows == UInt64(limit) && cache.snapshot.overflowBytes == budget(limit))
        // Private buffers are found by nobody.
        #expect(cache.number(0) != nil && cache.number(1) != nil && cache.number(2) == nil)
        _ = chain
        chain = nil
        #expect(cache.snapshot.overflowBytes == 0)
        #expect(hasSlot(cache))
    }

    @Test func aLoadWaitsForAFrameAndGetsIt() async {
        let cache = SliceCache(budgetBytes: budget(1))
        final class Holder: Sendable {
            let pins = Mutex<[Int: Box]>([:])
            final class Box: Sendable {
                let pin: PinnedSlice
                init(_ pin: consuming PinnedSlice) { self.pin = pin }
            }
        }
        let holder = Holder()
        for n in 0...SliceCache.maxOverflowFrames {
            let box = Holder.Box(cache.trySlot(key(n))!.publish())
            holder.pins.withLock { $0[n] = box }
        }
        await withTaskGroup(of: UInt32.self) { group in
            for n in 0..<8 {
                group.addTask {
                    let slot = await cache.slot(key(1000 + n))
                    slot.pointer.storeBytes(of: UInt32(n), as: UInt32.self)
                    let pin = slot.publish()
                    await Task.yield()
                    return pin.pointer.load(as: UInt32.self)
                }
            }
            while cache.snapshot.waits < 8 { await Task.yield() }
            // One frame goes back; all eight pass through it, one after the other.
            _ = holder.pins.withLock { $0.removeValue(forKey: 3) }
            var seen: [UInt32] = []
            for await n in group { seen.append(n) }
            #expect(seen.sorted() == Array(0..<8))
        }
    }

    @Test func anAbandonedSlotLeavesNothing() {
        let cache = SliceCache(budgetBytes: budget(1))
        do {
            let slot = cache.trySlot(key(1))!
            fill(1)(slot.pointer)
        }
        #expect(cache.number(1) == nil)
        #expect(cache.insert(key(2), fill: fill(2)))
        #expect(cache.snapshot.overflows == 0)
    }

    @Test func theSecondLoadOfASliceGetsTheFirst() {
        let cache = SliceCache(budgetBytes: budget(4))
        let one = cache.trySlot(key(1))!
        let two = cache.trySlot(key(1))!
        fill(1)(one.pointer)
        fill(1)(two.pointer)
        let first = one.publish()
        let second = two.publish()
        #expect(first.pointer == second.pointer)
        #expect(cache.snapshot.heldBytes == budget(1))
    }

    @Test func zeroesArePinnedWithoutAFrame() {
        let cache = SliceCache(budgetBytes: budget(1))
        let zero = cache.zeroSlice
        let again = zero.again()
        #expect(isZero(UnsafeRawBufferPointer(start: again.pointer, count: Geometry.sliceBytes)))
        #expect(cache.snapshot.heldBytes == 0)
    }

    @Test func trimGivesMemoryBack() throws {
        let cache = SliceCache(budgetBytes: budget(64))
        for n in 0..<64 {
            cache.insert(key(n)) { $0.initializeMemory(as: UInt8.self, repeating: 7, count: Geometry.sliceBytes) }
        }
        let pin = cache.pin(key(9))!
        cache.trim(to: budget(10))
        #expect(cache.snapshot.heldBytes == budget(10))
        cache.trim(to: 0)
        #expect(cache.snapshot.heldBytes == budget(1))
        #expect(pin.pointer.load(as: UInt8.self) == 7)
        for n in 0..<64 { cache.insert(key(n), fill: fill(n)) }
        #expect(cache.number(63) == UInt64(63 * 128))
        #expect(cache.number(9) == 0x0707_0707_0707_0707)
    }

    /// A working set in regular use, and a scan of far more than the cache, read page by page.
    @Test func aScanDoesNotPushOutWhatIsUsed() {
        let cache = SliceCache(budgetBytes: budget(60))
        var hits = 0
        var reads = 0
        var scan = 10_000
        for round in 0..<100 {
            for n in 0..<40 {
                if round > 2 { reads += 1 }
                if cache.number(n) != nil { hits += round > 2 ? 1 : 0 } else { cache.insert(key(n), fill: fill(n)) }
                cache.insert(key(scan), fill: fill(scan))
                for page in 0..<128 { #expect(cache.number(scan, page: page) != nil) }
                scan += 1
            }
        }
        // A cache by last use would hit never: 79 other slices come between two uses.
        #expect(Double(hits) / Double(reads) > 0.95)
    }

    @Test func manyThreadsSeeOnlyWholeSlices() async {
        let cache = SliceCache(budgetBytes: budget(24))
        await withTaskGroup(of: Void.self) { group in
            for task in 0..<4 {
                group.addTask {
                    var random = Random(seed: UInt64(task))
                    for round in 0..<3000 {
                        let n = Int.random(in: 0..<60, using: &random)
                        let page = Int.random(in: 0..<128, using: &random)
                        if let found = cache.number(n, page: page) {
                            #expect(found == UInt64(n * 128 + page))
                        } else {
                            let slot = await cache.slot(key(n))
                            fill(n)(slot.pointer)
                            let pin = slot.publish()
                            if round % 3 == 0 { await Task.yield() }
                            let word = pin.pointer.load(fromByteOffset: page * 4096, as: UInt64.self)
                            #expect(word == UInt64(n * 128 + page))
                        }
                        if round % 500 == 0 { cache.trim(to: budget(8)) }
                    }
                }
            }
        }
        #expect(cache.snapshot.overflowBytes == 0)
    }
}
