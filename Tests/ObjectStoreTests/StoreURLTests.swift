import ObjectStore
import Testing

@Suite struct StoreURLTests {
    @Test func goodAddresses() throws {
        #expect(try StoreURL("file:///srv/a%20b") == .file(path: "/srv/a b"))
        guard case .s3(let plain) = try StoreURL("s3://my-bucket") else { return #expect(Bool(false)) }
        #expect(plain.bucket == "my-bucket" && plain.prefix == "" && plain.endpoint == nil && plain.region == nil)
        guard
            case .s3(let full) = try StoreURL(
                "s3://b.2x/some/prefix/?endpoint=https://Host:9000/&region=eu-1&ca=/etc/ca%2Bx.pem")
        else {
            return #expect(Bool(false))
        }
        #expect(full.prefix == "some/prefix/" && full.region == "eu-1" && full.certificateFile == "/etc/ca+x.pem")
        #expect(
            full.endpoint?.authority == "host:9000" && full.endpoint?.isSecure == true
                && full.endpoint?.isLoopback == false)
        func endpoint(_ text: String) throws -> S3Address.Endpoint? {
            guard case .s3(let address) = try StoreURL("s3://bucket/?endpoint=\(text)") else { return nil }
            return address.endpoint
        }
        #expect(try endpoint("http://h:80")?.authority == "h")
        #expect(try endpoint("https://h:443")?.authority == "h")
        #expect(try endpoint("http://h:443")?.authority == "h:443")
        #expect(try endpoint("http://[::1]:9000")?.isLoopback == true)
        #expect(try endpoint("http://127.0.0.1:1")?.isLoopback == true)
        #expect(try endpoint("http://localhost")?.isLoopback == true)
    }

    @Test(arguments: [
        "", "/srv/store", "http://x", "file://relative", "file:///a?x=1", "file:///a%2", "s3://", "s3://ab",
        "s3://b_b%", "s3://bucket//x",
        "s3://bucket/../x", "s3://bucket?", "s3://bucket?endpoint", "s3://bucket?endpoint=",
        "s3://bucket?endpoint=host:1",
        "s3://bucket?endpoint=ftp://h", "s3://bucket?endpoint=http://h/path", "s3://bucket?endpoint=http://h:0",
        "s3://bucket?endpoint=http://h:70000", "s3://bucket?endpoint=http://user@h",
        "s3://bucket?endpoint=http://h%0d%0ax:1",
        "s3://bucket?region=a&region=b", "s3://bucket?regoin=a", "s3://bucket?region=a%20b",
        "s3://bucket?ca=x&endpoint=http://h",
        "s3://bucket?secret=x",
    ])
    func badAddressesAreRefused(_ url: String) {
        #expect { try StoreURL(url) } throws: { ($0 as? StoreError)?.kind == .refused }
    }

    @Test func openingADirectory() async throws {
        try await withTemporaryDirectory { path in
            let counters = StoreCounters()
            let bucket = try await openBucket(
                url: "file://\(path)/store", environment: TestEnvironment(), counters: counters)
            _ = try await bucket.put("a", [1], if: .absent)
            #expect(counters.snapshot.put.started == 1)
            let again = try await openBucket(url: "file://\(path)/store", environment: TestEnvironment(), check: false)
            #expect(try await again.get("a", range: nil).bytes == [1])
            #expect(
                await kind {
                    _ = try await openBucket(url: "file://\(path)/none", environment: TestEnvironment(), check: false)
                } == .denied)
        }
    }
}
