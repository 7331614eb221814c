// AWS Signature Version 4 in the Authorization header, the payload's SHA-256 always included. Source: "Signature
// Calculations for the Authorization Header: Transferring Payload in a Single Chunk", Amazon S3 API reference.

import Glibc
import Synchronization

/// The keys that requests are signed with.
struct Credentials: Sendable, Equatable {
    var accessKey: String
    var secretKey: String
    /// Of temporary keys.
    var sessionToken: String?
}

/// Signs the requests of one account to one region.
final class SigV4: Sendable {
    private struct DayKey {
        var day: String
        var key: [UInt8]
    }
    let credentials: Credentials
    let region: String
    private let dayKey = Mutex<DayKey?>(nil)

    init(credentials: Credentials, region: String) {
        self.credentials = credentials
        self.region = region
    }

    /// The headers that make the request a signed one; the caller sends these and no other `x-amz-` header.
    ///
    /// - Parameters:
    ///   - path: as sent, percent-encoded.
    ///   - query: not encoded, in any order.
    ///   - headers: those to sign besides x-amz-date and x-amz-content-sha256, names in lower case; with `host`.
    ///   - payloadHash: SHA-256 of the body in hexadecimal.
    func headers(
        method: String, path: String, query: [(String, String)], headers: [(String, String)], payloadHash: String,
        wallMs: Int64
    ) -> [(String, String)] {
        let time = Self.timestamp(wallMs)
        let day = String(time.prefix(8))
        var all = headers
        all.append(("x-amz-date", time))
        all.append(("x-amz-content-sha256", payloadHash))
        if let token = credentials.sessionToken { all.append(("x-amz-security-token", token)) }
        all.sort { $0.0 < $1.0 }
        let names = all.map { $0.0 }.joined(separator: ";")
        let lines = all.map { "\($0.0):\($0.1)\n" }.joined()
        let canonical = "\(method)\n\(path)\n\(Self.canonicalQuery(query))\n\(lines)\n\(names)\n\(payloadHash)"
        let scope = "\(day)/\(region)/s3/aws4_request"
        let toSign = "AWS4-HMAC-SHA256\n\(time)\n\(scope)\n\(Digest.hex(Digest.sha256(Array(canonical.utf8))))"
        let signature = Digest.hex(Digest.hmacSHA256(key: key(for: day), toSign))
        all.append(
            (
                "authorization",
                "AWS4-HMAC-SHA256 Credential=\(credentials.accessKey)/\(scope), SignedHeaders=\(names), Signature=\(signature)"
            ))
        return all
    }

    private func key(for day: String) -> [UInt8] {
        dayKey.withLock { cached in
            if let cached, cached.day == day { return cached.key }
            var key = Array("AWS4\(credentials.secretKey)".utf8)
            for part in [day, region, "s3", "aws4_request"] { key = Digest.hmacSHA256(key: key, part) }
            cached = DayKey(day: day, key: key)
            return key
        }
    }

    /// Sorted and strictly encoded, as it is signed and as it is sent.
    static func canonicalQuery(_ query: [(String, String)]) -> String {
        query.map { (percentEncoded($0.0), percentEncoded($0.1)) }
            .sorted { $0.0 == $1.0 ? $0.1 < $1.1 : $0.0 < $1.0 }
            .map { "\($0.0)=\($0.1)" }.joined(separator: "&")
    }

    /// Everything but the unreserved characters of RFC 3986 as `%XX`; `/` too unless `keepSlash`.
    static func percentEncoded(_ text: String, keepSlash: Bool = false) -> String {
        let digits = Array("0123456789ABCDEF".utf8)
        var encoded: [UInt8] = []
        for byte in text.utf8 {
            switch byte {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."), UInt8(ascii: "_"),
                UInt8(ascii: "~"):
                encoded.append(byte)
            case UInt8(ascii: "/") where keepSlash: encoded.append(byte)
            default: encoded += [UInt8(ascii: "%"), digits[Int(byte >> 4)], digits[Int(byte & 15)]]
            }
        }
        return String(decoding: encoded, as: UTF8.self)
    }

    /// `20130524T000000Z`
    static func timestamp(_ wallMs: Int64) -> String {
        var seconds = time_t(wallMs / 1000)
        var parts = tm()
        gmtime_r(&seconds, &parts)
        func digits(_ number: Int32, _ width: Int) -> String {
            let text = String(number)
            return String(repeating: "0", count: max(0, width - text.count)) + text
        }
        return digits(parts.tm_year + 1900, 4) + digits(parts.tm_mon + 1, 2) + digits(parts.tm_mday, 2) + "T"
            + digits(parts.tm_hour, 2) + digits(parts.tm_min, 2) + digits(parts.tm_sec, 2) + "Z"
    }
}
