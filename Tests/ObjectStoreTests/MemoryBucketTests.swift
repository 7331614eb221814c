import ObjectStore
import Testing

@Suite struct MemoryBucketTests {
    @Test func keepsTheContract() async throws {
        try await BucketContract(MemoryBucket()).runAll()
    }

    @Test func equalBytesGetAnotherTag() async throws {
        let bucket = MemoryBucket()
        let first = try await bucket.put("a", [1], if: .none)
        #expect(try await bucket.put("a", [1], if: .none) != first)
        #expect(bucket.contents == ["a": [1]])
    }
}
