// A bucket on an S3 server. Requests are signed and digested here, carried by `HTTPTransport`, and their answers read
// by the rules of "Amazon S3 API reference".
//
// Always holds:
// - Every body sent carries its SHA-256 (signed) and MD5, so that a store never keeps damaged bytes.
// - A whole object that comes is as long as announced and, where its tag is an MD5, has that MD5. Parts of objects
//   are checked for position and length; their bytes carry checksums of the layers above.
// - No put with a condition is sent before the store has shown that it holds conditions (`S3Bucket+Check`).
// - An answer that does not say whether a put was done makes it `.unclear`.

public import Runtime
import Synchronization

/// A bucket (and prefix) on Amazon S3 or a server that speaks its protocol.
public final class S3Bucket: Bucket {
    public let name: String
    let address: S3Address
    let environment: any Environment
    private let transport: HTTPTransport
    private let keys: Mutex<Keys>
    /// Reads the keys anew, which may be replaced while the daemon runs.
    private let findCredentials: (@Sendable () throws(StoreError) -> Credentials)?
    private let region: String
    private let host: String
    /// `/bucket` where the bucket is not part of the host's name.
    private let root: String
    /// For digests of bodies: 30 ms for 16 MiB, too long for the curl thread and for callers.
    private let digesters: BlockingPool
    private let maxBodyBytes: Int
    /// What is known of the store's ways; set by the check.
    let ways = Mutex(Ways())

    struct Ways: Sendable {
        /// nil until the check was made.
        var tagForm: TagForm?
        /// Whether a tag that looks like an MD5 is one; nil until one was seen to be.
        var tagsAreMD5: Bool?
        var lacksMultiDelete = false
    }

    /// How the store wants a tag in If-Match.
    enum TagForm: Sendable { case quoted, bare }

    /// Opens a bucket; the keys come from the environment or the credentials file.
    ///
    /// - Parameter check: proves now that the store can be written and holds conditions. Otherwise that is done
    ///   before the first put that has a condition.
    /// - Throws: `.refused` without keys, or when the store cannot be used; `.unavailable` when it is not reached.
    public static func open(
        _ address: S3Address, environment: any Environment, check: Bool = true,
        settings: TransportSettings = TransportSettings()
    ) async throws(StoreError) -> S3Bucket {
        let find: @Sendable () throws(StoreError) -> Credentials = { () throws(StoreError) in try Credentials.find() }
        let credentials = try find()
        let region =
            address.region ?? environmentVariable("AWS_REGION") ?? environmentVariable("AWS_DEFAULT_REGION")
            ?? "us-east-1"
        let bucket = try S3Bucket(
            address, credentials, region: region, environment, settings, findCredentials: find)
        if check { _ = try await bucket.tagForm() }
        return bucket
    }

    init(
        _ address: S3Address, _ credentials: Credentials, region: String, _ environment: any Environment,
        _ settings: TransportSettings, findCredentials: (@Sendable () throws(StoreError) -> Credentials)? = nil
    ) throws(StoreError) {
        self.findCredentials = findCredentials
        self.address = address
        self.environment = environment
        let scheme: String
        if let endpoint = address.endpoint {
            scheme = endpoint.isSecure ? "https" : "http"
            host = endpoint.authority
            root = "/\(address.bucket)"
        } else {
            scheme = "https"
            // A name with dots would not match the server's certificate.
            let inHost = !address.bucket.contains(".")
            host = inHost ? "\(address.bucket).s3.\(region).amazonaws.com" : "s3.\(region).amazonaws.com"
            root = inHost ? "" : "/\(address.bucket)"
        }
        name = "s3://\(address.bucket)/\(address.prefix)" + (address.endpoint == nil ? "" : " at \(host)")
        if let file = address.certificateFile, !isReadable(file) {
            throw StoreError(.refused, "\(name): the certificates of ca=\(file) cannot be read")
        }
        keys = Mutex(Keys(credentials: credentials, signer: SigV4(credentials: credentials, region: region)))
        self.region = region
        let server = HTTPServer(
            root: "\(scheme)://\(host)", certificateFile: address.certificateFile,
            ignoresProxies: address.endpoint?.isLoopback ?? false)
        guard let transport = HTTPTransport(server: server, settings: settings) else {
            throw StoreError(.unavailable, "\(name): no memory for HTTP")
        }
        self.transport = transport
        digesters = BlockingPool(name: "mg-digest", threads: 2)
        try digesters.prepare()
        maxBodyBytes = settings.maxBodyBytes
    }

    // MARK: Bucket

    public func get(_ key: String, range: Range<UInt64>?) async throws(StoreError) -> StoredObject {
        try checkKey(key)
        guard let asked = range else { return try await getWhole(key) }
        // Servers count in 64 bits with a sign.
        let range = asked.clamped(to: 0..<UInt64(Int64.max))
        if range.isEmpty { return try await head(key) }
        let header = ("range", "bytes=\(range.lowerBound)-\(range.upperBound - 1)")
        let response = try await send(
            "GET", key, headers: [header], expectedBytes: Int(min(UInt64(range.count), UInt64(maxBodyBytes))))
        switch response.status {
        case 206:
            let tag = try tag(of: response, key)
            guard let part = ContentRange(response.headers["content-range"] ?? ""), part.first == range.lowerBound,
                part.last < part.total, part.last == min(range.upperBound, part.total) - 1,
                response.body.count == Int(part.last - part.first + 1)
            else { throw StoreError(.corrupt, "\(name): of '\(key)' came another part than was asked for") }
            return StoredObject(bytes: response.body, etag: tag, totalLengthBytes: part.total)
        case 416:
            let object = try await head(key)
            guard object.totalLengthBytes <= range.lowerBound else {
                throw StoreError(
                    .unavailable,
                    "\(name): '\(key)' is \(object.totalLengthBytes) bytes long, but byte \(range.lowerBound) was refused"
                )
            }
            return object
        case 200:
            // A server that knows no ranges.
            let whole = try await checkedWhole(response, key)
            let part = range.within(UInt64(whole.bytes.count))
            return StoredObject(
                bytes: Array(whole.bytes[Int(part.lowerBound)..<Int(part.upperBound)]), etag: whole.etag,
                totalLengthBytes: whole.totalLengthBytes)
        default: throw failure(response, "get", key)
        }
    }

    public func put(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError) -> ETag {
        try checkKey(key)
        switch condition {
        case .none: return try await put(key, bytes, header: nil)
        case .absent:
            _ = try await tagForm()
            return try await put(key, bytes, header: ("if-none-match", "*"))
        case .matches(let tag):
            // A tag of another store, which would not even be a valid header, is no tag of an object here.
            guard Self.isTag(tag.value) else { throw conditionFailed(name, key, condition) }
            return try await put(key, bytes, header: ("if-match", try await tagForm().header(tag)))
        }
    }

    public func delete(_ keys: [String]) async throws(StoreError) {
        for key in keys { try checkKey(key) }
        if keys.count == 1 { return try await deleteOne(keys[0]) }
        var rest = keys[...]
        while !rest.isEmpty {
            let some = rest.prefix(1000)
            rest = rest.dropFirst(1000)
            if ways.withLock({ $0.lacksMultiDelete }) {
                for key in some { try await deleteOne(key) }
            } else {
                try await deleteMany(some)
            }
        }
    }

    // MARK: Single requests

    private func getWhole(_ key: String) async throws(StoreError) -> StoredObject {
        let response = try await send("GET", key)
        guard response.status == 200 else { throw failure(response, "get", key) }
        return try await checkedWhole(response, key)
    }

    private func checkedWhole(_ response: HTTPResponse, _ key: String) async throws(StoreError) -> StoredObject {
        let tag = try tag(of: response, key)
        let body = response.body
        // libcurl has held the body against these; without them its end would be a guess.
        let length = response.headers["content-length"].flatMap { Int($0) }
        guard length == body.count || length == nil && response.headers["transfer-encoding"] != nil else {
            throw StoreError(.corrupt, "\(name): '\(key)' came without its length")
        }
        if let expected = md5(tag, response) {
            let actual = try await digesters.run { () throws(StoreError) in Digest.hex(Digest.md5(body)) }
            guard tagHolds(expected, actual) else {
                throw StoreError(.corrupt, "\(name): the bytes of '\(key)' do not have the MD5 that the store names")
            }
        }
        return StoredObject(bytes: body, etag: tag, totalLengthBytes: UInt64(body.count))
    }

    /// No bytes, but tag and length.
    private func head(_ key: String) async throws(StoreError) -> StoredObject {
        let response = try await send("HEAD", key)
        guard response.status == 200 else { throw failure(response, "look at", key) }
        guard let length = response.headers["content-length"].flatMap({ UInt64($0) }) else {
            throw StoreError(.corrupt, "\(name): the store does not say how long '\(key)' is")
        }
        return StoredObject(bytes: [], etag: try tag(of: response, key), totalLengthBytes: length)
    }

    /// - Parameter header: the condition.
    func put(_ key: String, _ bytes: [UInt8], header: (String, String)?) async throws(StoreError) -> ETag {
        let (sha256, md5) = try await digesters.run { () throws(StoreError) in (Digest.sha256(bytes), Digest.md5(bytes))
        }
        let request = self.request(
            "PUT", key, headers: [("content-md5", Digest.base64(md5))] + (header.map { [$0] } ?? []), body: bytes,
            sha256: sha256,
            sendsOnce: header != nil)
        let response: HTTPResponse
        switch await transport.perform(request) {
        case .success(let answer): response = answer
        case .failure(let error):
            if error.isMaybeDone {
                throw StoreError(.unclear, "\(name): no answer to put '\(key)': \(error.text)")
            }
            throw failure(error, "put", key)
        }
        await rereadKeys(after: response)
        switch response.status {
        case 200...299:
            guard let tag = Self.tag(response.headers["etag"]) else {
                throw StoreError(.refused, "\(name): the store gives no ETag, so Margarine cannot use it")
            }
            if let expected = self.md5(tag, response), !tagHolds(expected, Digest.hex(md5)) {
                throw StoreError(.unclear, "\(name): the store names another MD5 for '\(key)' than its bytes have")
            }
            return tag
        case 409 where header != nil, 412 where header != nil:
            throw conditionFailed(name, key, header?.0 == "if-match" ? .matches(ETag("")) : .absent)
        case 404 where header?.0 == "if-match" && errorCode(response) != "NoSuchBucket":
            throw conditionFailed(name, key, .matches(ETag("")))
        default:
            var error = failure(response, "put", key)
            // A store that knows no conditions will never learn.
            if header != nil, [405, 501].contains(response.status) { error.kind = .refused }
            // It may have been done, in part or by a server behind the one that answered.
            if error.kind == .unavailable, response.status >= 500 || response.status == 409 { error.kind = .unclear }
            throw error
        }
    }

    private func deleteOne(_ key: String) async throws(StoreError) {
        let response = try await send("DELETE", key)
        switch response.status {
        case 200...299: return
        case 404 where errorCode(response) != "NoSuchBucket": return
        default: throw failure(response, "delete", key)
        }
    }

    private func deleteMany(_ keys: ArraySlice<String>) async throws(StoreError) {
        // Keys have no character that XML would want escaped.
        let objects = keys.map { "<Object><Key>\(address.prefix)\($0)</Key></Object>" }.joined()
        let body = Array(
            "<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet>\(objects)</Delete>".utf8)
        let response = try await send(
            "POST", nil, query: [("delete", "")],
            headers: [("content-md5", Digest.base64(Digest.md5(body))), ("content-type", "application/xml")], body: body
        )
        if [405, 501].contains(response.status) || response.status == 400 && errorCode(response) == "NotImplemented" {
            ways.withLock { $0.lacksMultiDelete = true }
            for key in keys { try await deleteOne(key) }
            return
        }
        guard response.status == 200 else { throw failure(response, "delete", "\(keys.first ?? "") and others") }
        guard let result = XMLElement.parse(response.body), result.name == "DeleteResult" else {
            throw StoreError(.unavailable, "\(name): the answer to a delete of \(keys.count) keys is not understood")
        }
        let errors = result.all("Error").filter {
            !["NoSuchKey", "NoSuchVersion"].contains($0.child("Code")?.text ?? "")
        }
        if let first = errors.first {
            let code = first.child("Code")?.text ?? "?"
            let isPassing = ["InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted"]
                .contains(code)
            let text = "\(code) \(first.child("Message")?.text ?? "")"
            throw StoreError(
                isPassing ? .unavailable : .denied,
                "\(name): \(errors.count) of \(keys.count) keys were not deleted, first '\(oneLine(first.child("Key")?.text ?? "?"))': \(oneLine(text))",
                cause: oneLine(code))
        }
    }

    // MARK: Requests

    /// Sends a request that may be repeated and returns the answer, whatever it says.
    func send(
        _ method: String, _ key: String?, query: [(String, String)] = [], headers: [(String, String)] = [],
        body: [UInt8] = [],
        expectedBytes: Int = 16 << 20
    ) async throws(StoreError) -> HTTPResponse {
        var request = self.request(
            method, key, query: query, headers: headers, body: body, sha256: body.isEmpty ? nil : Digest.sha256(body))
        request.expectedBytes = method == "GET" && key != nil ? expectedBytes : 0
        switch await transport.perform(request) {
        case .success(let response):
            await rereadKeys(after: response)
            return response
        case .failure(let error): throw failure(error, method.lowercased(), key ?? "")
        }
    }

    /// What requests are signed with.
    private struct Keys: Sendable {
        var credentials: Credentials
        var signer: SigV4
        var readAtNs: UInt64 = 0
    }
    private static let rereadPauseNs: UInt64 = 2_000_000_000

    /// After an answer that may mean that the keys are no longer good: takes those that are in the file now.
    private func rereadKeys(after response: HTTPResponse) async {
        guard [400, 401, 403].contains(response.status), let findCredentials else { return }
        let now = environment.nowNs
        let isDue = keys.withLock { keys in
            guard now &- keys.readAtNs >= Self.rereadPauseNs else { return false }
            keys.readAtNs = now
            return true
        }
        guard isDue, let found = try? await digesters.run({ () throws(StoreError) in try findCredentials() }) else {
            return
        }
        keys.withLock { keys in
            guard found != keys.credentials else { return }
            keys.credentials = found
            keys.signer = SigV4(credentials: found, region: region)
        }
    }

    func request(
        _ method: String, _ key: String?, query: [(String, String)] = [], headers: [(String, String)] = [],
        body: [UInt8] = [],
        sha256: [UInt8]? = nil, sendsOnce: Bool = false
    ) -> HTTPRequest {
        let place = key.map { "\(root)/\(address.prefix)\($0)" } ?? (root.isEmpty ? "/" : root)
        let path = SigV4.percentEncoded(place, keepSlash: true)
        let signed = keys.withLock { $0.signer }.headers(
            method: method, path: path, query: query, headers: headers + [("host", host)],
            payloadHash: sha256.map(Digest.hex) ?? emptySHA256, wallMs: environment.wallMs)
        return HTTPRequest(
            method: method, target: query.isEmpty ? path : "\(path)?\(SigV4.canonicalQuery(query))", headers: signed,
            body: body,
            sendsOnce: sendsOnce)
    }

    // MARK: Tags

    /// The tag without its quotes, nil when it is none that could stand in a header.
    private static func tag(_ header: String?) -> ETag? {
        guard var text = header?[...] else { return nil }
        if text.hasPrefix("W/") { text = text.dropFirst(2) }
        if text.count >= 2, text.hasPrefix("\""), text.hasSuffix("\"") { text = text.dropFirst().dropLast() }
        return isTag(text) ? ETag(String(text)) : nil
    }

    private static func isTag(_ text: some StringProtocol) -> Bool {
        !text.isEmpty && text.utf8.count <= 256 && text.utf8.allSatisfy { (0x21...0x7e).contains($0) && $0 != 0x22 }
    }

    private func tag(of response: HTTPResponse, _ key: String) throws(StoreError) -> ETag {
        guard let tag = Self.tag(response.headers["etag"]) else {
            throw StoreError(.corrupt, "\(name): '\(key)' came without an ETag")
        }
        return tag
    }

    /// The MD5 that a tag names, where it is one: not of what was uploaded in parts or encrypted with keys of a customer.
    private func md5(_ tag: ETag, _ response: HTTPResponse) -> String? {
        guard tag.value.utf8.count == 32, tag.value.utf8.allSatisfy(isHexDigit),
            ways.withLock({ $0.tagsAreMD5 != false }),
            response.headers["x-amz-server-side-encryption"] ?? "AES256" == "AES256",
            response.headers["x-amz-server-side-encryption-customer-algorithm"] == nil
        else { return nil }
        return tag.value.lowercased()
    }

    /// Whether an MD5 is the one that a tag names. Until this store's tags are known to be MD5s, another one shows
    /// nothing: some stores give random tags that look the same.
    private func tagHolds(_ named: String, _ actual: String) -> Bool {
        ways.withLock { ways in
            if named == actual { ways.tagsAreMD5 = true }
            return named == actual || ways.tagsAreMD5 != true
        }
    }
}

extension S3Bucket.TagForm {
    func header(_ tag: ETag) -> String {
        switch self {
        case .quoted: "\"\(tag.value)\""
        case .bare: tag.value
        }
    }
}

/// `bytes 0-9/5000`
struct ContentRange: Equatable {
    var first: UInt64
    var last: UInt64
    var total: UInt64

    init?(_ header: String) {
        guard header.hasPrefix("bytes ") else { return nil }
        let parts = header.dropFirst(6).split(whereSeparator: { $0 == "-" || $0 == "/" })
        guard parts.count == 3, let first = UInt64(parts[0]), let last = UInt64(parts[1]), let total = UInt64(parts[2]),
            first <= last
        else { return nil }
        (self.first, self.last, self.total) = (first, last, total)
    }
}

private let emptySHA256 = Digest.hex(Digest.sha256([]))
