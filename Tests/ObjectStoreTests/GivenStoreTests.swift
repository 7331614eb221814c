import Glibc
import Synchronization
import Testing

@testable import ObjectStore

/// A store that runs already: the file that MARGARINE_TEST_S3 names tells where (`Tests/servers/ceph.sh` writes one).
struct GivenStore {
    var values: [String: String]
    var folder: String

    static let shared: GivenStore? = {
        guard let path = environmentVariable("MARGARINE_TEST_S3"), let file = fopen(path, "r") else { return nil }
        defer { fclose(file) }
        var values: [String: String] = [:]
        var line: UnsafeMutablePointer<CChar>?
        var capacity = 0
        while getline(&line, &capacity, file) > 0 {
            let text = String(cString: line!).filter { !$0.isNewline && $0 != "'" }
            let parts = text.split(separator: "=", maxSplits: 1)
            if parts.count == 2 { values[String(parts[0])] = String(parts[1]) }
        }
        free(line)
        return GivenStore(values: values, folder: String(path[..<(path.lastIndex(of: "/") ?? path.startIndex)]))
    }()

    /// - Parameter gateway: "" or "2".
    func bucket(_ gateway: String = "", prefix: String = "tests", secret: String? = nil, check: Bool = true)
        async throws -> S3Bucket
    {
        guard
            case .s3(let address) = try StoreURL(
                "s3://\(values["S3_BUCKET"]!)/\(prefix)?endpoint=\(values["S3_ENDPOINT\(gateway)"] ?? values["S3_ENDPOINT"]!)"
            )
        else { fatalError() }
        let credentials = Credentials(
            accessKey: values["AWS_ACCESS_KEY_ID"]!, secretKey: secret ?? values["AWS_SECRET_ACCESS_KEY"]!)
        let bucket = try S3Bucket(
            address, credentials, region: values["AWS_REGION"] ?? "us-east-1", TestEnvironment(), TransportSettings())
        if check { _ = try await bucket.tagForm() }
        return bucket
    }

    /// `ceph.sh VERB folder NAME`, where the store was started by it.
    func ceph(_ verb: String, _ name: String = "") -> Bool {
        let script = #filePath.split(separator: "/").dropLast(2).map { "/\($0)" }.joined() + "/servers/ceph.sh"
        return system("'\(script)' \(verb) '\(folder)' \(name) >/dev/null") == 0
    }
    var isCeph: Bool { access(folder + "/ceph.conf", F_OK) == 0 }
}

@Suite(.serialized, .enabled(if: GivenStore.shared != nil, "MARGARINE_TEST_S3 names no store")) struct GivenStoreTests {
    let store = GivenStore.shared!

    @Test func keepsTheContract() async throws {
        let bucket = try await store.bucket()
        print("tags are sent \(try await bucket.tagForm())")
        try await BucketContract(RetryingBucket(bucket, environment: TestEnvironment())).runAll()
        try await BucketContract(bucket).oneOfManyWritersWins()
        try await BucketContract(bucket).swapsCountExactly()
        #expect(try await allKeys(bucket, prefix: "probe").isEmpty)
    }

    @Test func swapsThroughTwoGatewaysAreExact() async throws {
        let buckets = [try await store.bucket(), try await store.bucket("2")]
        let key = "gateways/\(UInt32.random(in: 0 ... .max))"
        _ = try await buckets[0].put(key, [0, 0], if: .absent)
        let won = try await withThrowingTaskGroup(of: Int.self) { group in
            for writer in 0..<8 {
                group.addTask {
                    try await DirectoryBucketTests.count(buckets[writer % 2], key, writer: UInt8(writer), times: 25)
                }
            }
            return try await group.reduce(0, +)
        }
        let bytes = try await buckets[1].get(key, range: nil).bytes
        #expect(Int(bytes[0]) << 8 | Int(bytes[1]) == won)
        print("\(won) of 200 swaps won")
    }

    @Test func wrongKeysAreRefused() async throws {
        let text = await errorText {
            _ = try await store.bucket(secret: "wrong", check: false).put("x", [1], if: .none)
        }
        #expect(text.contains("secret key is wrong"), "\(text)")
        #expect(
            await kind { _ = try await store.bucket(secret: "wrong", check: false).get("x", range: nil) } == .denied)
    }

    /// Every put that was acknowledged is there, and every swap told right, though the gateway dies again and again. The
    /// one that may count beyond those that were won is a swap whose answer was lost and that another writer has
    /// replaced before it could be read back: told as lost, as `swap` says.
    @Test(.enabled(if: GivenStore.shared?.isCeph == true, "not started by ceph.sh")) func aGatewayThatDiesLosesNothing()
        async throws
    {
        let policy = RetryPolicy(firstPauseMs: 50, longestPauseMs: 500, deadlineMs: 60_000)
        let witness = UnclearPuts(try await store.bucket("2"))
        let bucket = RetryingBucket(witness, environment: TestEnvironment(), policy: policy)
        let prefix = "dying/\(UInt32.random(in: 0 ... .max))/"
        _ = try await bucket.put(prefix + "swaps", [], if: .absent)
        let killer = Task {
            var kills = 0
            while !Task.isCancelled {
                try? await Task.sleep(nanoseconds: 700_000_000)
                guard store.ceph("kill", "rgw2"), store.ceph("start") else { break }
                kills += 1
            }
            return kills
        }
        let won = try await withThrowingTaskGroup(of: Set<[UInt8]>.self) { group in
            for writer in 0..<4 {
                group.addTask { try await Self.append(bucket, prefix + "swaps", times: 150) }
                group.addTask {
                    for number in 0..<60 {
                        let bytes = randomBytes(100_000, seed: UInt64(writer * 1000 + number))
                        _ = try await bucket.put("\(prefix)\(writer)/\(number)", bytes, if: .absent)
                    }
                    return []
                }
            }
            return try await group.reduce(into: Set<[UInt8]>()) { $0.formUnion($1) }
        }
        killer.cancel()
        let kills = await killer.value
        #expect(kills >= 1)
        let bytes = try await bucket.get(prefix + "swaps", range: nil).bytes
        let swapped = stride(from: 0, to: bytes.count, by: 8).map { Array(bytes[$0..<$0 + 8]) }
        #expect(Set(swapped).count == swapped.count, "a swap took effect twice")
        #expect(won.isSubset(of: swapped), "a swap that was won is not there")
        let unclear = Set(witness.bodies.map { Array($0.suffix(8)) })
        #expect(Set(swapped).subtracting(won).isSubset(of: unclear), "a swap that was plainly refused is there")
        for writer in 0..<4 {
            for number in 0..<60 {
                let object = try await bucket.get("\(prefix)\(writer)/\(number)", range: nil)
                #expect(object.bytes == randomBytes(100_000, seed: UInt64(writer * 1000 + number)))
            }
        }
        print("gateway killed \(kills) times, \(won.count) swaps won, \(swapped.count - won.count) more took effect")
    }

    /// Appends a new name of 8 bytes to the object under `key` so many times, and gives those whose swap was won.
    private static func append(_ bucket: any Bucket, _ key: String, times: Int) async throws -> Set<[UInt8]> {
        var won: Set<[UInt8]> = []
        for _ in 0..<times {
            let current = try await bucket.get(key, range: nil)
            let name = randomBytes(8)
            if case .won = try await bucket.swap(key, current.bytes + name, if: .matches(current.etag)) {
                won.insert(name)
            }
        }
        return won
    }

    @Test func speed() async throws {
        let bucket = try await store.bucket()
        let bytes = randomBytes(16 << 20)
        let clock = ContinuousClock()
        let put = try await clock.measure { _ = try await bucket.put("big", bytes, if: .none) }
        let get = try await clock.measure { try #require(await bucket.get("big", range: nil).bytes == bytes) }
        let small = try await clock.measure { for _ in 0..<100 { _ = try await bucket.get("big", range: 4096..<8192) } }
        print("16 MiB put in \(put), got in \(get); 4 KiB ranges \(small / 100) each")
        try await bucket.delete(["big"])
    }
}

/// Passes every call on, and keeps the bodies of the puts whose answer was unclear.
private final class UnclearPuts: Bucket {
    private let next: any Bucket
    private let kept = Mutex<[[UInt8]]>([])
    var name: String { next.name }
    var bodies: [[UInt8]] { kept.withLock { $0 } }

    init(_ next: any Bucket) { self.next = next }

    func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        do throws(StoreError) {
            return try await next.put(key, bytes, if: condition)
        } catch {
            if error.kind == .unclear { kept.withLock { $0.append(bytes) } }
            throw error
        }
    }

    func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try await next.get(key, range: range)
    }
    func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try await next.list(prefix: prefix, after: after, folders: folders, limit: limit)
    }
    func delete(_ keys: [String]) async throws(StoreError) { try await next.delete(keys) }
}
