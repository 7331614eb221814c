import Glibc
import Runtime
import Synchronization
import Testing

@testable import ObjectStore

@Suite(.serialized) struct S3BucketTests {
    @Test func keepsTheContract() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        try await BucketContract(bucket).runAll()
        try await BucketContract(RetryingBucket(bucket, environment: TestEnvironment())).runAll()
        #expect(try await allKeys(bucket, prefix: "probe").isEmpty)
    }

    @Test(arguments: [
        ["unquoted"], ["unquoted", "race500"], ["conflict409"], ["no-multi-delete", "no-range"], ["random-etag"],
        ["chunked"],
        ["empty-pages", "encoded-slashes"],
    ])
    func keepsTheContractOnStoresOfTheWild(_ quirks: [String]) async throws {
        let server =
            quirks.count == 2
            ? try CheckingServer("--quirk", quirks[0], "--quirk", quirks[1]) : try CheckingServer("--quirk", quirks[0])
        // Without the check at open: the first conditional put makes it.
        let bucket = try await server.bucket(check: false)
        // Where a lost condition looks like a failing server, reading back tells.
        let settled: any Bucket =
            quirks.contains("race500") ? RetryingBucket(bucket, environment: TestEnvironment()) : bucket
        try await BucketContract(settled).runAll()
    }

    @Test func objectsInFilesOutliveTheServer() async throws {
        try await withTemporaryDirectory { path in
            let bytes = randomBytes(100_000)
            var tag = ETag("")
            do {
                let server = try CheckingServer("--dir", path)
                tag = try await server.bucket().put("a/b", bytes, if: .absent)
            }
            let server = try CheckingServer("--dir", path)
            let object = try await server.bucket().get("a/b", range: nil)
            #expect(object.bytes == bytes && object.etag == tag)
            try await BucketContract(try await server.bucket()).runAll()
        }
    }

    // MARK: Opening

    @Test(arguments: [
        ("ignore-none-match", "ignores If-None-Match"), ("ignore-match", "ignores If-Match"),
        ("no-conditions-501", "lacks what Margarine needs"),
    ])
    func storesWithoutConditionsAreRefused(_ quirk: String, _ text: String) async throws {
        let server = try CheckingServer("--quirk", quirk)
        let bucket = try await server.bucket(check: false)
        #expect(await kind { _ = try await server.bucket() } == .refused)
        let error = await errorText { _ = try await server.bucket() }
        #expect(error.contains(text) && !error.contains("\n"), "\(error)")
        // Nor does a conditional put get through by the back door.
        #expect(await kind { _ = try await bucket.put("head", [1], if: .absent) } == .refused)
        #expect(await kind { _ = try await bucket.put("head", [1], if: .matches(ETag("x"))) } == .refused)
        // Reading and plain puts need no conditions. And no scratch key is left.
        _ = try await bucket.put("a", [1], if: .none)
        #expect(try await bucket.get("a", range: nil).bytes == [1])
        #expect(try await allKeys(bucket) == ["a"])
    }

    @Test func theCheckSurvivesPassingFaults() async throws {
        let server = try CheckingServer("--quirk", "unquoted")
        try server.fault(
            #"[{"do": "status", "code": 503, "method": "PUT", "count": 1}, {"do": "drop-response", "method": "PUT", "after": 2, "count": 1}, {"do": "error-after-effect", "method": "PUT", "after": 5, "count": 1}]"#
        )
        let bucket = try await server.bucket()
        #expect(try await bucket.tagForm() == .bare)
        try server.clearFaults()
        // Known from now on in this process.
        let requests = try server.stat("requests")
        _ = try await server.bucket()
        #expect(try server.stat("requests") == requests)
        try await BucketContract(bucket).conditionsHold()
    }

    @Test func errorsSayWhatToDo() async throws {
        let server = try CheckingServer()
        func failed(_ bucket: S3Bucket, _ words: String...) async {
            #expect(await kind { _ = try await bucket.put("x", [1], if: .absent) } == .denied)
            let text = await errorText { _ = try await bucket.put("x", [1], if: .none) }
            for word in words { #expect(text.contains(word), "\(text)") }
            #expect(!text.contains("\n") && !text.contains("secret0123"))
        }
        await failed(
            try await server.bucket(
                credentials: Credentials(accessKey: "margarinetest", secretKey: "wrong"), check: false),
            "SignatureDoesNotMatch", "secret key is wrong")
        await failed(
            try await server.bucket(credentials: Credentials(accessKey: "nobody", secretKey: "x"), check: false),
            "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID")
        await failed(
            try await server.bucket(region: "eu-west-9", check: false), "AuthorizationHeaderMalformed",
            "region=us-east-1")
        var address = server.address
        address.bucket = "missing"
        let missing = try S3Bucket(
            address, CheckingServer.credentials, region: "us-east-1", TestEnvironment(), TransportSettings())
        await failed(missing, "NoSuchBucket", "make the bucket first")
        #expect(await kind { _ = try await missing.get("x", range: nil) } == .denied)
        #expect(await kind { _ = try await missing.list(prefix: "", after: nil, folders: false, limit: 1) } == .denied)
        #expect(await kind { try await missing.delete(["x"]) } == .denied)
        let late = try S3Bucket(
            server.address, CheckingServer.credentials, region: "us-east-1", LateEnvironment(), TransportSettings())
        await failed(late, "RequestTimeTooSkewed", "clocks differ", "set this machine's clock")
    }

    @Test(
        "row 5: whatever the store's reason for a no is, it is an outage; a missing object is not",
        arguments: [
            (403, "AccessDenied"), (400, "ExpiredToken"), (403, "RequestTimeTooSkewed"), (403, "InvalidAccessKeyId"),
            (403, "SignatureDoesNotMatch"), (401, "Unauthorized"), (400, "InvalidToken"), (404, "NoSuchBucket"),
            (301, "PermanentRedirect"), (402, "QuotaExceeded"),
        ])
    func refusalsAreOutages(_ status: Int, _ code: String) async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        _ = try await bucket.put("a", [1], if: .none)
        try server.fault("{\"do\": \"status\", \"code\": \(status), \"error\": \"\(code)\"}")
        for call in [
            { _ = try await bucket.get("a", range: nil) }, { _ = try await bucket.get("a", range: 0..<1) },
            { _ = try await bucket.put("b", [1], if: .none) }, { _ = try await bucket.put("b", [1], if: .absent) },
            { _ = try await bucket.list(prefix: "", after: nil, folders: false, limit: 1) },
            { try await bucket.delete(["a"]) },
        ] as [() async throws -> Void] {
            do {
                try await call()
                Issue.record("\(code) was taken for a success")
            } catch let error as StoreError {
                #expect(error.isOutage && error.kind == .denied, "\(error)")
                #expect(error.cause == code)
            }
        }
        try server.clearFaults()
        #expect(try await bucket.get("a", range: nil).bytes == [1])
        #expect(await kind { _ = try await bucket.get("b", range: nil) } == .notFound)
    }

    @Test("row 5: new keys in the credentials file are taken when the store refuses the old ones")
    func keysAreReadAgain() async throws {
        let server = try CheckingServer()
        let bucket = try S3Bucket(
            server.address, Credentials(accessKey: "margarinetest", secretKey: "expired"), region: "us-east-1",
            TestEnvironment(), TransportSettings(),
            findCredentials: { () throws(StoreError) in CheckingServer.credentials })
        // The answer to this one makes it look.
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .denied)
        _ = try await bucket.put("a", [1], if: .none)
        #expect(try await bucket.get("a", range: nil).bytes == [1])
    }

    @Test("row 37: without a thread for HTTP a request fails, and the next one tries again") func noThread()
        async throws
    {
        let server = try CheckingServer()
        let bucket = try await server.bucket(check: false)
        await Threads.refusing("mg-curl") {
            let text = await errorText { _ = try await bucket.get("a", range: nil) }
            #expect(text.contains("no thread"), "\(text)")
            #expect(await kind { _ = try await bucket.get("a", range: nil) } == .unavailable)
        }
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .notFound)
    }

    @Test func sessionTokensAreSent() async throws {
        let server = try CheckingServer("--token", "some+token/=")
        var credentials = CheckingServer.credentials
        credentials.sessionToken = "some+token/="
        try await BucketContract(try await server.bucket(credentials: credentials)).conditionsHold()
        #expect(await kind { _ = try await server.bucket(check: false).get("a", range: nil) } == .denied)
    }

    @Test func byItsURL() async throws {
        let server = try CheckingServer()
        setenv("AWS_ACCESS_KEY_ID", CheckingServer.credentials.accessKey, 1)
        setenv("AWS_SECRET_ACCESS_KEY", CheckingServer.credentials.secretKey, 1)
        setenv("http_proxy", "http://127.0.0.1:9", 1)  // Nothing listens there: loopback must not go through it.
        defer { unsetenv("http_proxy") }
        let counters = StoreCounters()
        let url = "s3://margarine/pre/fix?endpoint=\(server.endpoint)&region=us-east-1"
        let bucket = try await openBucket(url: url, environment: TestEnvironment(), counters: counters)
        _ = try await bucket.put("a/b", [1], if: .absent)
        #expect(try await bucket.list(prefix: "", after: nil, folders: true, limit: 10).folders == ["a/"])
        #expect(try server.log().contains("/margarine/pre/fix/a/b"))
        #expect(counters.snapshot.put.started == 1)
        let reader = try await openBucket(url: url, environment: TestEnvironment(), check: false)
        #expect(try await reader.get("a/b", range: nil).bytes == [1])
    }

    @Test func amazonIsAddressedByHost() throws {
        func request(_ url: String) throws -> HTTPRequest? {
            guard case .s3(let address) = try StoreURL(url) else { return nil }
            let bucket = try S3Bucket(
                address, CheckingServer.credentials, region: "eu-north-1", TestEnvironment(), TransportSettings())
            return bucket.request("GET", "a/b", query: [("x", "y/z")])
        }
        func host(_ request: HTTPRequest?) -> String? { request?.headers.first { $0.0 == "host" }?.1 }
        let plain = try request("s3://bucket/pre/fix")
        #expect(host(plain) == "bucket.s3.eu-north-1.amazonaws.com" && plain?.target == "/pre/fix/a/b?x=y%2Fz")
        // Such a name does not match the certificate of *.s3.eu-north-1.amazonaws.com.
        let dotted = try request("s3://bucket.with.dots")
        #expect(host(dotted) == "s3.eu-north-1.amazonaws.com" && dotted?.target == "/bucket.with.dots/a/b?x=y%2Fz")
        let other = try request("s3://bucket?endpoint=https://s3.example.org:443")
        #expect(host(other) == "s3.example.org" && other?.target == "/bucket/a/b?x=y%2Fz")
    }

    @Test func unreachableIsUnavailable() async throws {
        var settings = TransportSettings()
        settings.connectTimeoutMs = 300
        guard case .s3(let closed) = try StoreURL("s3://margarine?endpoint=http://127.0.0.1:9") else { return }
        let bucket = try S3Bucket(closed, CheckingServer.credentials, region: "r", TestEnvironment(), settings)
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .unavailable)
        #expect(await kind { _ = try await bucket.put("a", [1], header: ("if-none-match", "*")) } == .unavailable)
        #expect(await kind { _ = try await bucket.put("a", [1], if: .absent) } == .unavailable)
    }

    @Test func tlsWithItsOwnAuthority() async throws {
        try await withTemporaryDirectory { path in
            for command in [
                "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-ca -keyout ca.key -out ca.pem",
                "openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
                "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem",
            ] {
                let line = "cd '\(path)' && printf 'subjectAltName=DNS:localhost' >ext && \(command) >/dev/null 2>&1"
                try #require(system(line) == 0)
            }
            let server = try CheckingServer(
                "--cert", path + "/server.pem", "--key", path + "/server.key", certificateFile: path + "/ca.pem")
            #expect(server.endpoint.hasPrefix("https://localhost:"))
            let bucket = try await server.bucket()
            try await BucketContract(bucket).runAll()
            let bytes = randomBytes(8 << 20)
            _ = try await bucket.put("big", bytes, if: .absent)
            #expect(try await bucket.get("big", range: nil).bytes == bytes)
            var distrusting = server.address
            distrusting.certificateFile = nil
            let other = try S3Bucket(
                distrusting, CheckingServer.credentials, region: "us-east-1", TestEnvironment(), TransportSettings())
            let text = await errorText { _ = try await other.get("big", range: nil) }
            #expect(text.lowercased().contains("certificate"))
            #expect(await kind { _ = try await other.get("big", range: nil) } == .denied)
            distrusting.certificateFile = path + "/none.pem"
            #expect {
                try S3Bucket(
                    distrusting, CheckingServer.credentials, region: "r", TestEnvironment(), TransportSettings())
            } throws: {
                "\($0)".contains("none.pem")
            }
        }
    }

    // MARK: Connections

    @Test func connectionsAreKeptAndBounded() async throws {
        let server = try CheckingServer()
        var settings = TransportSettings()
        settings.connections = 4
        let bucket = try await server.bucket(settings)
        for number in 0..<50 { _ = try await bucket.put("seq/\(number)", [1], if: .none) }
        #expect(try server.stat("connections") == 1)
        try await withThrowingTaskGroup(of: Void.self) { group in
            for number in 0..<200 {
                group.addTask {
                    _ = try await bucket.put("par/\(number)", randomBytes(1000), if: .none)
                    #expect(try await bucket.get("par/\(number)", range: nil).bytes.count == 1000)
                }
            }
            try await group.waitForAll()
        }
        #expect(try server.stat("connections") <= 4)
    }

    @Test func transfersRunInParallel() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        try server.fault(#"{"do": "delay", "seconds": 0.5, "method": "GET"}"#)
        let started = ContinuousClock.now
        await withTaskGroup(of: Void.self) { group in
            for number in 0..<16 {
                group.addTask { _ = await kind { _ = try await bucket.get("none/\(number)", range: nil) } }
            }
        }
        #expect(ContinuousClock.now - started < .seconds(3))
    }

    @Test func cancelledCallsEndAtOnce() async throws {
        let server = try CheckingServer()
        var settings = TransportSettings()
        settings.connections = 1
        let bucket = try await server.bucket(settings)
        try server.fault(#"{"do": "hang", "count": 1}"#)
        let started = ContinuousClock.now
        let tasks = [0, 1].map { number in
            Task { await kind { _ = try await bucket.put("c\(number)", [1], header: ("if-none-match", "*")) } }
        }
        try await Task.sleep(nanoseconds: 300_000_000)
        for task in tasks { task.cancel() }
        // One was on its way, one waited for the connection; which is which is open.
        let kinds = [await tasks[0].value, await tasks[1].value]
        #expect(kinds.contains(.unclear) && kinds.contains(.refused), "\(kinds)")
        #expect(ContinuousClock.now - started < .seconds(5))
        try server.clearFaults()
        _ = try await bucket.put("after", [1], if: .none)
    }

    // MARK: Faults

    @Test func lostAnswersAreUnclearAndSentOnce() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        let retrying = RetryingBucket(bucket, environment: TestEnvironment())
        var count = 0
        for fault in ["drop-response", "error-after-effect"] {
            for body in [[UInt8](repeating: 1, count: 10), randomBytes(300_000)] {
                count += 1
                try server.fault("{\"do\": \"\(fault)\", \"method\": \"PUT\", \"count\": 1}")
                #expect(await kind { _ = try await bucket.put("lost\(count)", body, if: .absent) } == .unclear)
                let sent = try server.log().split(separator: "/lost\(count)\"").count - 1
                // libcurl would silently send it again on a new connection, and the second answer would be "412".
                #expect(sent == 1, "\(fault)")
                let object = try await bucket.get("lost\(count)", range: nil)
                #expect(object.bytes == body)

                try server.fault("{\"do\": \"\(fault)\", \"method\": \"PUT\", \"count\": 1}")
                let tag = try await retrying.put("retried\(count)", body, if: .absent)
                try server.fault("{\"do\": \"\(fault)\", \"method\": \"PUT\", \"count\": 1}")
                let next = try await retrying.put("retried\(count)", body + [9], if: .matches(tag))
                #expect(try await bucket.get("retried\(count)", range: nil).etag == next)
                try server.fault("{\"do\": \"\(fault)\", \"method\": \"PUT\", \"count\": 1}")
                guard case .won = try await bucket.swap("retried\(count)", body + [10], if: .matches(next)) else {
                    return #expect(Bool(false))
                }
            }
        }
    }

    @Test func deadKeptConnectionsAreReplaced() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        _ = try await bucket.put("a", [1], if: .none)
        try server.fault(#"{"do": "reset", "method": "GET", "count": 1}"#)
        // A read may be repeated by libcurl itself, or fail as unavailable; never anything else.
        let result = await kind { _ = try await bucket.get("a", range: nil) }
        #expect(result == nil || result == .unavailable)
        #expect(try await RetryingBucket(bucket, environment: TestEnvironment()).get("a", range: nil).bytes == [1])
    }

    @Test func silenceEndsByTheTimeLimit() async throws {
        let server = try CheckingServer()
        var settings = TransportSettings()
        settings.stallTimeoutSeconds = 1
        let bucket = try await server.bucket(settings)
        try server.fault(#"{"do": "hang"}"#)
        let started = ContinuousClock.now
        async let reading = kind { _ = try await bucket.get("a", range: nil) }
        async let writing = kind { _ = try await bucket.put("a", [1], if: .absent) }
        async let plain = kind { _ = try await bucket.put("b", [1], if: .none) }
        async let removing = kind { try await bucket.delete(["a"]) }
        #expect(await reading == .unavailable)
        #expect(await writing == .unclear)
        #expect(await plain == .unclear)
        #expect(await removing == .unavailable)
        #expect(ContinuousClock.now - started < .seconds(5))
        try server.clearFaults()

        var total = TransportSettings()
        total.totalTimeoutMs = 700
        let impatient = try await server.bucket(total)
        _ = try await impatient.put("slow", randomBytes(100_000), if: .none)
        try server.fault(#"{"do": "slow", "rate": 200}"#)
        #expect(await kind { _ = try await impatient.get("slow", range: 0..<1000) } == .unavailable)
    }

    @Test func damagedBodiesAreNeverGivenOut() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        let bytes = randomBytes(200_000)
        _ = try await bucket.put("a", bytes, if: .none)
        try server.fault(#"{"do": "corrupt", "method": "GET", "count": 1}"#)
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .corrupt)
        try server.fault(#"{"do": "truncate", "method": "GET", "count": 1}"#)
        #expect(await kind { _ = try await bucket.get("a", range: nil) } == .unavailable)
        try server.fault(#"{"do": "truncate", "method": "GET", "count": 1}"#)
        #expect(await kind { _ = try await bucket.get("a", range: 10..<100_000) } == .unavailable)
        let retrying = RetryingBucket(bucket, environment: TestEnvironment())
        try server.fault(
            #"[{"do": "corrupt", "method": "GET", "count": 2}, {"do": "truncate", "method": "GET", "count": 2}]"#)
        #expect(try await retrying.get("a", range: nil).bytes == bytes)
    }

    @Test func overloadIsRepeatedAndOutagesAreOutlived() async throws {
        let server = try CheckingServer()
        let policy = RetryPolicy(firstPauseMs: 20, longestPauseMs: 200, deadlineMs: 20_000)
        let bucket = RetryingBucket(try await server.bucket(), environment: TestEnvironment(), policy: policy)
        for code in [500, 502, 503, 504, 429] {
            try server.fault("{\"do\": \"status\", \"code\": \(code), \"error\": \"Busy\", \"count\": 6}")
            _ = try await bucket.put("k\(code)", [1], if: .absent)
            #expect(try await bucket.get("k\(code)", range: nil).bytes == [1])
            try await bucket.delete(["k\(code)"])
            try server.clearFaults()
        }
        for mode in ["reset", "503"] {
            try server.outage(mode)
            async let written = bucket.put("during-\(mode)", [1], if: .absent)
            async let read = kind { _ = try await bucket.list(prefix: "", after: nil, folders: false, limit: 9) }
            try await Task.sleep(nanoseconds: 500_000_000)
            try server.outage("off")
            _ = try await written
            #expect(await read == nil)
            #expect(try await bucket.get("during-\(mode)", range: nil).bytes == [1])
        }
    }

    @Test func clientErrorsAreNotRepeatedWithoutNeed() async throws {
        let server = try CheckingServer()
        let plain = try await server.bucket()
        let bucket = RetryingBucket(plain, environment: TestEnvironment())
        for (code, error) in [
            (403, "AccessDenied"), (400, "InvalidRequest"), (405, "MethodNotAllowed"), (301, "PermanentRedirect"),
        ] {
            try server.fault("{\"do\": \"status\", \"code\": \(code), \"error\": \"\(error)\"}")
            let before = try server.stat("requests")
            #expect(await kind { _ = try await bucket.get("a", range: nil) } == .denied)
            // A store that knows no conditions will never learn.
            let expected = code == 405 ? StoreError.Kind.refused : .denied
            #expect(await kind { _ = try await bucket.put("a", [1], if: .absent) } == expected)
            #expect(
                await errorText { _ = try await bucket.list(prefix: "", after: nil, folders: false, limit: 1) }
                    .contains(error))
            #expect(try server.stat("requests") == before + 3)
            try server.clearFaults()
        }
        // Damaged on the way there: the store kept nothing, so it is sent again.
        try server.fault(#"{"do": "status", "code": 400, "error": "BadDigest", "count": 2, "method": "PUT"}"#)
        _ = try await bucket.put("digest", [1], if: .absent)
        try server.fault(#"{"do": "status", "code": 400, "error": "RequestTimeout", "count": 2, "method": "PUT"}"#)
        _ = try await bucket.put("timeout", [1], if: .absent)
    }

    @Test func deletesReportEachKey() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        for number in 0..<5 { _ = try await bucket.put("d/\(number)", [1], if: .none) }
        try server.fault(
            #"{"do": "status", "method": "DELETE-ONE", "target": "d/3$", "error": "AccessDenied", "count": 1}"#)
        let keys = (0..<5).map { "d/\($0)" }
        let text = await errorText { try await bucket.delete(keys) }
        #expect(text.contains("1 of 5") && text.contains("d/3") && text.contains("AccessDenied"))
        #expect(try await allKeys(bucket, prefix: "d/") == ["d/3"])
        try server.fault(
            #"{"do": "status", "method": "DELETE-ONE", "target": "d/3$", "error": "InternalError", "count": 1}"#)
        #expect(await kind { try await bucket.delete(keys) } == .unavailable)
        try server.fault(
            #"{"do": "status", "method": "DELETE-ONE", "target": "d/3$", "error": "SlowDown", "count": 2}"#)
        try await RetryingBucket(bucket, environment: TestEnvironment()).delete(keys)
        #expect(try await allKeys(bucket, prefix: "d/").isEmpty)
    }

    @Test func manyKeysAreListedAndDeleted() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        let keys = (0..<2300).map { "many/\(String($0 + 10_000))" }
        try await withThrowingTaskGroup(of: Void.self) { group in
            for part in 0..<8 {
                group.addTask {
                    for number in stride(from: part, to: keys.count, by: 8) {
                        _ = try await bucket.put(keys[number], [], if: .none)
                    }
                }
            }
            try await group.waitForAll()
        }
        #expect(try await allKeys(bucket, prefix: "many/") == keys)
        try await bucket.delete(keys)
        #expect(try await allKeys(bucket, prefix: "many/").isEmpty)
    }

    // MARK: Hostile answers

    @Test func hostileAnswersToReads() async throws {
        let server = try CheckingServer()
        var settings = TransportSettings()
        settings.maxBodyBytes = 100_000
        settings.stallTimeoutSeconds = 1
        let bucket = try await server.bucket(settings)
        func answer(
            _ code: Int, _ headers: String, _ body: String, _ expected: StoreError.Kind, _ range: Range<UInt64>? = nil
        ) async throws {
            try server.fault(
                #"{"do": "answer", "code": \#(code), "headers": {\#(headers)}, "body": "\#(body)", "count": 1}"#)
            let got = await kind { _ = try await bucket.get("x", range: range) }
            #expect(got == expected, "\(code) \(headers) \(body)")
            try server.clearFaults()
        }
        try await answer(200, "", "abc", .corrupt)  // No ETag.
        try await answer(200, #""ETag": "\"a\\\"b\"""#, "abc", .corrupt)
        try await answer(200, #""ETag": "\"900150983cd24fb0d6963f7d28e17f73\"""#, "abd", .corrupt)
        try await answer(200, #""ETag": "x", "Content-Length": "50""#, "abc", .unavailable)
        try await answer(200, #""ETag": "x", "Content-Length": "-5""#, "abc", .unavailable)
        try await answer(200, #""ETag": "x", "Content-Length": "99999999999999999999""#, "abc", .unavailable)
        try await answer(200, #""ETag": "x""#, String(repeating: "y", count: 100_001), .corrupt)
        try await answer(206, #""ETag": "x""#, "abc", .denied)  // A part of what was asked for whole.
        try await answer(206, #""ETag": "x""#, "abc", .corrupt, 0..<3)
        try await answer(206, #""ETag": "x", "Content-Range": "bytes 1-3/10""#, "abc", .corrupt, 0..<3)
        try await answer(206, #""ETag": "x", "Content-Range": "bytes 0-1/10""#, "ab", .corrupt, 0..<3)
        try await answer(206, #""ETag": "x", "Content-Range": "bytes 0-2/10""#, "ab", .corrupt, 0..<3)
        try await answer(206, #""ETag": "x", "Content-Range": "bytes 0-2/2""#, "abc", .corrupt, 0..<3)
        try await answer(
            206, #""ETag": "x", "Content-Range": "bytes 0-18446744073709551615/18446744073709551615""#, "abc", .corrupt,
            0..<3)
        try await answer(206, #""ETag": "x", "Content-Range": "bytes */10""#, "abc", .corrupt, 0..<3)
        try await answer(302, #""Location": "http://127.0.0.1:9/""#, "", .denied)
        try await answer(404, "", "<Error><Code>", .notFound)
        try await answer(500, "", "<html>oops", .unavailable)
        try await answer(777, "", "", .denied)
        try await answer(403, "", String(repeating: "z", count: 200_000), .denied)
        // It is still a good server otherwise.
        _ = try await bucket.put("x", [1], if: .absent)
        #expect(try await bucket.get("x", range: 0..<5).bytes == [1])
    }

    @Test func hostileAnswersToListings() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        func answer(_ inside: String, _ name: String = "ListBucketResult") async throws -> StoreError.Kind? {
            try server.fault(#"{"do": "answer", "body": "<\#(name)>\#(inside)</\#(name)>", "count": 1}"#)
            defer { try? server.clearFaults() }
            return await kind { _ = try await bucket.list(prefix: "p/", after: "p/c", folders: true, limit: 10) }
        }
        let end = "<IsTruncated>false</IsTruncated>"
        func entry(_ key: String) -> String {
            "<Contents><Key>\(key)</Key><LastModified>2024-02-29T23:59:59.5Z</LastModified><Size>1</Size></Contents>"
        }
        #expect(try await answer(end) == nil)
        #expect(try await answer(entry("some/store/p/d") + entry("some/store/p/e") + end) == nil)
        #expect(try await answer(end, "Other") == .corrupt)
        #expect(try await answer("<Contents><Key>some/store/p/d</Key><Size>1</Size></Contents>" + end) == .corrupt)
        #expect(try await answer("") == .corrupt)
        #expect(try await answer("<x>") == .corrupt)
        #expect(try await answer(entry("other/p/d") + end) == .corrupt)
        #expect(try await answer(entry("some/store/q/d") + end) == .corrupt)
        #expect(try await answer(entry("some/store/p/c") + end) == .corrupt)
        #expect(try await answer(entry("some/store/p/e") + entry("some/store/p/d") + end) == .corrupt)
        #expect(try await answer(entry("some/store/p/e") + entry("some/store/p/e") + end) == .corrupt)
        #expect(try await answer("<Contents><Key>some/store/p/d</Key><Size>-1</Size></Contents>" + end) == .corrupt)
        #expect(try await answer("<Contents><Size>1</Size></Contents>" + end) == .corrupt)
        #expect(try await answer("<EncodingType>url</EncodingType>" + entry("some/store/p/%4") + end) == .corrupt)
        #expect(try await answer("<CommonPrefixes><Prefix>some/store/p/d</Prefix></CommonPrefixes>" + end) == .corrupt)
        #expect(try await answer("<IsTruncated>true</IsTruncated>") == .corrupt)
        // Keys that are none of Margarine's are passed over.
        try server.fault(
            #"{"do": "answer", "body": "<ListBucketResult>\#(entry("some/store/p/"))\#(entry("some/store/p/ä b"))\#(entry("some/store/p/z"))\#(end)</ListBucketResult>", "count": 1}"#
        )
        #expect(
            try await bucket.list(prefix: "p/", after: nil, folders: false, limit: 10).items.map { $0.key } == ["p/z"])
    }

    @Test func hostileAnswersToWrites() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        func put(_ answer: String, _ condition: PutCondition = .absent) async throws -> StoreError.Kind? {
            try server.fault("{\"do\": \"answer\", \(answer), \"count\": 1}")
            defer { try? server.clearFaults() }
            return await kind { _ = try await bucket.put("w", [1], if: condition) }
        }
        #expect(try await put(#""code": 200"#) == .refused)
        #expect(try await put(#""code": 200, "headers": {"ETag": "\"00000000000000000000000000000000\""}"#) == .unclear)
        #expect(try await put(#""code": 412, "body": "junk""#) == .conditionFailed)
        #expect(try await put(#""code": 412"#, .none) == .denied)
        #expect(try await put(#""code": 409"#, .none) == .unclear)
        #expect(try await put(#""code": 404"#, .matches(ETag("x"))) == .conditionFailed)
        #expect(try await put(#""code": 404"#) == .denied)
        #expect(try await put(#""code": 500"#) == .unclear)
        #expect(
            await kind { _ = try await bucket.put("w", [1], if: .matches(ETag("x\r\nevil: 1"))) } == .conditionFailed)
        try server.fault(#"{"do": "answer", "code": 200, "body": "<DeleteResult><Err", "method": "POST", "count": 1}"#)
        #expect(await kind { try await bucket.delete(["a", "b"]) } == .unavailable)
    }

    // MARK: Speed

    @Test func bigObjectsMoveFast() async throws {
        let server = try CheckingServer()
        let bucket = try await server.bucket()
        let bytes = randomBytes(16 << 20)
        _ = try await bucket.put("big", bytes, if: .none)
        /// MiB/s, and CPU time of ours for each object in ms: the first depends on what else the machine does.
        func rate(_ count: Int, _ work: @Sendable @escaping (Int) async throws -> Void) async throws -> (Int, Int) {
            let started = ContinuousClock.now
            let cpuMs = Self.cpuMs()
            try await withThrowingTaskGroup(of: Void.self) { group in
                for number in 0..<count { group.addTask { try await work(number) } }
                try await group.waitForAll()
            }
            let seconds = Double((ContinuousClock.now - started) / .microseconds(1)) / 1e6
            return (Int(Double(count * 16) / seconds), (Self.cpuMs() - cpuMs) / count)
        }
        let put = try await rate(8) { _ = try await bucket.put("big/\($0)", bytes, if: .none) }
        let whole = try await rate(8) { _ in
            try #require(await bucket.get("big", range: nil).bytes.count == bytes.count)
        }
        let part = try await rate(8) { _ in
            try #require(await bucket.get("big", range: 0..<(16 << 20)).bytes.count == bytes.count)
        }
        // The server's own digests left out: what our side can do, its digests included.
        let tag = Digest.hex(Digest.md5(bytes))
        try server.fault(#"{"do": "answer", "method": "PUT", "headers": {"ETag": "\"\#(tag)\""}}"#)
        let alone = try await rate(8) { _ = try await bucket.put("big/\($0)", bytes, if: .none) }
        print(
            "16 MiB objects, (MiB/s, CPU ms): put \(put) (without the server's digests \(alone)), get \(whole), ranged get \(part)"
        )
        #expect(put.0 > 5 && whole.0 > 5 && part.0 > 5)
    }

    private static func cpuMs() -> Int {
        var usage = rusage()
        getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
        return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000 + Int(
            usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1000
    }
}

/// An hour behind.
private final class LateEnvironment: Environment {
    private let real = TestEnvironment()
    var nowNs: UInt64 { real.nowNs }
    var wallMs: Int64 { real.wallMs - 3_600_000 }
    func randomBits() -> UInt64 { real.randomBits() }
    func sleep(ns: UInt64) async { await real.sleep(ns: ns) }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}
