import Glibc
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
            await kind { _ = try await store.bucket(secret: "wrong", check: false).get("x", range: nil) } == .refused)
    }

    /// Every put that was acknowledged is there, and every swap counted, though the gateway dies again and again.
    @Test(.enabled(if: GivenStore.shared?.isCeph == true, "not started by ceph.sh")) func aGatewayThatDiesLosesNothing()
        async throws
    {
        let policy = RetryPolicy(firstPauseMs: 50, longestPauseMs: 500, deadlineMs: 60_000)
        let bucket = RetryingBucket(try await store.bucket("2"), environment: TestEnvironment(), policy: policy)
        let prefix = "dying/\(UInt32.random(in: 0 ... .max))/"
        _ = try await bucket.put(prefix + "counter", [0, 0], if: .absent)
        let killer = Task {
            var kills = 0
            while !Task.isCancelled {
                try? await Task.sleep(nanoseconds: 700_000_000)
                guard store.ceph("kill", "rgw2"), store.ceph("start") else { break }
                kills += 1
            }
            return kills
        }
        let won = try await withThrowingTaskGroup(of: Int.self) { group in
            for writer in 0..<4 {
                group.addTask {
                    try await DirectoryBucketTests.count(bucket, prefix + "counter", writer: UInt8(writer), times: 150)
                }
                group.addTask {
                    for number in 0..<60 {
                        let bytes = randomBytes(100_000, seed: UInt64(writer * 1000 + number))
                        _ = try await bucket.put("\(prefix)\(writer)/\(number)", bytes, if: .absent)
                    }
                    return 0
                }
            }
            return try await group.reduce(0, +)
        }
        killer.cancel()
        let kills = await killer.value
        #expect(kills >= 1)
        let bytes = try await bucket.get(prefix + "counter", range: nil).bytes
        #expect(Int(bytes[0]) << 8 | Int(bytes[1]) == won)
        for writer in 0..<4 {
            for number in 0..<60 {
                let object = try await bucket.get("\(prefix)\(writer)/\(number)", range: nil)
                #expect(object.bytes == randomBytes(100_000, seed: UInt64(writer * 1000 + number)))
            }
        }
        print("gateway killed \(kills) times, \(won) swaps won")
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
