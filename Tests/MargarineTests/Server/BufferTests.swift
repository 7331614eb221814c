import Glibc
import Testing

@testable import Margarine

@Suite struct BufferPoolTests {
    @Test func givesPageAlignedBuffersOfEachSize() {
        var pool = BufferPool(limitBytes: 1 << 20)
        for bytes in [1, 4096, 4097, 65_536, 131_072, 1_000_000, 32 << 20] {
            let buffer = pool.must(bytes)
            #expect(UInt(bitPattern: buffer) & 4095 == 0)
            memset(buffer, 0xaa, bytes)
            pool.give(buffer, bytes: bytes)
        }
    }

    @Test("also: a buffer that the system refuses is none, and the pool goes on") func withoutMemory() {
        var pool = BufferPool(limitBytes: 1 << 20, mapsAtMostBytes: 1 << 20)
        let refused = pool.take((1 << 20) + 1)
        #expect(refused == nil)
        let buffer = pool.take(1 << 20)
        #expect(buffer != nil)
        if let buffer { pool.give(buffer, bytes: 1 << 20) }
        let largest = pool.take(32 << 20)
        #expect(largest == nil)
    }

    @Test func keepsWhatFitsItsBoundAndNoMore() {
        var pool = BufferPool(limitBytes: 1 << 20)
        let small = pool.must(5000)
        let large = pool.must(2 << 20)
        pool.give(small, bytes: 5000)
        pool.give(large, bytes: 2 << 20)
        var free = pool.freeBytes
        #expect(free == 8192)
        let again = pool.must(8192)
        #expect(again == small)
        free = pool.freeBytes
        #expect(free == 0)
        pool.give(small, bytes: 8192)
    }

    @Test func trimFreesWhatWasNotNeededSinceTheLastTrim() {
        var pool = BufferPool(limitBytes: 1 << 20)
        let buffers = (0..<4).map { _ in pool.must(4096) }
        for buffer in buffers { pool.give(buffer, bytes: 4096) }
        var isMore = pool.trim()
        var free = pool.freeBytes
        #expect(isMore && free == 4 * 4096, "used since the beginning")
        let again = pool.must(4096)
        pool.give(again, bytes: 4096)
        isMore = pool.trim()
        free = pool.freeBytes
        #expect(isMore && free == 4096, "one was in use meanwhile")
        isMore = pool.trim()
        free = pool.freeBytes
        #expect(!isMore && free == 0)
    }
}

@Suite struct SendQueueTests {
    /// Takes up to `count` bytes off the queue, as a socket would.
    private func take(_ count: Int, _ queue: inout SendQueue, _ pool: inout BufferPool) -> [UInt8] {
        var bytes: [UInt8] = []
        withUnsafeTemporaryAllocation(of: iovec.self, capacity: 3) { vectors in
            let (filled, _) = queue.fill(vectors)
            for vector in vectors[..<filled] where bytes.count < count {
                let part = UnsafeRawBufferPointer(
                    start: vector.iov_base, count: min(vector.iov_len, count - bytes.count))
                bytes.append(contentsOf: part)
            }
        }
        _ = queue.advance(bytes.count, &pool)
        return bytes
    }

    private func put(_ bytes: [UInt8], _ queue: inout SendQueue, _ pool: inout BufferPool) {
        let room = queue.reserve(bytes.count, &pool)
        bytes.withUnsafeBytes { room.copyMemory(from: $0.baseAddress!, byteCount: bytes.count) }
        queue.commit(bytes.count)
    }

    @Test func bytesLeaveInTheOrderInWhichTheyCame() {
        var random = SystemRandomNumberGenerator()
        for _ in 0..<50 {
            var pool = BufferPool(limitBytes: 1 << 20)
            var queue = SendQueue()
            var expected: [UInt8] = []
            var sent: [UInt8] = []
            var next: UInt8 = 0
            for _ in 0..<200 {
                let count = Int.random(in: 1...9000, using: &random)
                let bytes = (0..<count).map { _ in
                    next &+= 1
                    return next
                }
                expected += bytes
                if Bool.random(using: &random) {
                    put(bytes, &queue, &pool)
                } else {
                    let buffer = pool.must(count)
                    bytes.withUnsafeBytes { buffer.copyMemory(from: $0.baseAddress!, byteCount: count) }
                    queue.append(buffer, count, owned: buffer, bufferBytes: count)
                }
                if Int.random(in: 0..<4, using: &random) == 0 {
                    sent += take(Int.random(in: 1...50_000, using: &random), &queue, &pool)
                }
            }
            while !queue.isEmpty { sent += take(.max, &queue, &pool) }
            #expect(sent == expected)
            _ = queue.clear(&pool)
        }
    }

    @Test func neighboursInAPackBufferAreOneSegment() {
        var pool = BufferPool(limitBytes: 1 << 20)
        var queue = SendQueue()
        for _ in 0..<100 { put([1, 2, 3], &queue, &pool) }
        withUnsafeTemporaryAllocation(of: iovec.self, capacity: 8) { vectors in
            let (count, bytes) = queue.fill(vectors)
            #expect(count == 1 && bytes == 300)
        }
        _ = queue.clear(&pool)
    }

    @Test func anEmptyQueueHasGivenBackEveryBuffer() {
        var pool = BufferPool(limitBytes: 1 << 20)
        var queue = SendQueue()
        put(Array(repeating: 1, count: 60_000), &queue, &pool)
        put(Array(repeating: 2, count: 60_000), &queue, &pool)
        let owned = pool.must(100_000)
        memset(owned, 3, 100_000)
        queue.append(owned, 100_000, owned: owned, bufferBytes: 100_000)
        var returned = queue.advance(70_000, &pool)
        #expect(returned == SendQueue.packBytes)
        returned += queue.advance(150_000, &pool)
        #expect(returned == 2 * SendQueue.packBytes + 100_000)
        let free = pool.freeBytes
        #expect(free == 2 * SendQueue.packBytes + 131_072)
    }
}

extension BufferPool {
    /// A buffer, where there is memory.
    mutating func must(_ bytes: Int) -> UnsafeMutableRawPointer { take(bytes).unsafelyUnwrapped }
}
