// The address of a store, as people write it. Checked here once and completely.

/// Where a store is: `file:///path` or `s3://bucket/prefix?endpoint=http://host:port&region=R&ca=FILE`.
public enum StoreURL: Sendable, Equatable {
    case file(path: String)
    case s3(S3Address)

    /// - Throws: `.refused` with what is wrong and how it should look.
    public init(_ url: String) throws(StoreError) {
        func wrong(_ what: String) -> StoreError {
            StoreError(
                .refused,
                "store '\(url)': \(what); write file:///path or s3://bucket/prefix?endpoint=http://host:port&region=R")
        }
        if url.hasPrefix("file://") {
            let rest = url.dropFirst("file://".count)
            guard !rest.contains("?") else { throw wrong("a directory takes no parameters") }
            guard rest.hasPrefix("/") else { throw wrong("the path must be absolute") }
            guard let path = percentDecoded(rest), !path.utf8.contains(0) else { throw wrong("a bad % in the path") }
            self = .file(path: path)
        } else if url.hasPrefix("s3://") {
            let rest = url.dropFirst("s3://".count)
            let parts = rest.split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
            let place = parts[0].split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
            var address = S3Address(bucket: String(place[0]), prefix: "")
            guard S3Address.isValidBucket(address.bucket) else {
                throw wrong("'\(address.bucket)' cannot be the name of a bucket")
            }
            if place.count == 2 {
                var prefix = place[1]
                while prefix.hasSuffix("/") { prefix.removeLast() }
                guard prefix.isEmpty || isValidKey(prefix), prefix.utf8.count <= 200 else {
                    throw wrong("a prefix is made of A-Z a-z 0-9 . _ - /, up to 200 of them")
                }
                address.prefix = prefix.isEmpty ? "" : prefix + "/"
            }
            var seen: Set<String> = []
            for parameter in parts.count == 2 ? parts[1].split(separator: "&", omittingEmptySubsequences: false) : [] {
                let pair = parameter.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                let name = String(pair[0])
                guard pair.count == 2, let value = percentDecoded(pair[1]), !value.isEmpty else {
                    throw wrong("'\(parameter)' has no value")
                }
                guard seen.insert(name).inserted else { throw wrong("'\(name)' is given twice") }
                switch name {
                case "endpoint":
                    guard let endpoint = S3Address.Endpoint(value) else {
                        throw wrong("'\(value)' is no endpoint like http://host:port or https://host")
                    }
                    address.endpoint = endpoint
                case "region":
                    guard isValidKey(value), !value.contains("/") else { throw wrong("'\(value)' cannot be a region") }
                    address.region = value
                case "ca": address.certificateFile = value
                default: throw wrong("'\(name)' is unknown (known are endpoint, region, ca)")
                }
            }
            if address.certificateFile != nil, address.endpoint?.isSecure == false {
                throw wrong("ca is for an https endpoint")
            }
            self = .s3(address)
        } else {
            throw wrong("neither file:// nor s3://")
        }
    }
}

/// A bucket on an S3 server.
public struct S3Address: Sendable, Equatable {
    /// A server's root, without a path.
    public struct Endpoint: Sendable, Equatable {
        public var isSecure: Bool
        /// As it stands in the Host header: without the port where that is the scheme's own.
        public var authority: String
        public var isLoopback: Bool

        init?(_ text: String) {
            let rest: Substring
            if text.hasPrefix("http://") {
                isSecure = false
                rest = text.dropFirst(7)
            } else if text.hasPrefix("https://") {
                isSecure = true
                rest = text.dropFirst(8)
            } else {
                return nil
            }
            var authority = rest.lowercased()
            if authority.hasSuffix("/") { authority.removeLast() }
            guard !authority.isEmpty else { return nil }
            var host = authority[...]
            var port: Substring?
            if authority.hasPrefix("[") {
                guard let bracket = authority.firstIndex(of: "]") else { return nil }
                host = authority[...bracket]
                let tail = authority[authority.index(after: bracket)...]
                guard tail.isEmpty || tail.hasPrefix(":") else { return nil }
                if !tail.isEmpty { port = tail.dropFirst() }
                guard host.dropFirst().dropLast().utf8.allSatisfy({ $0 == 0x3a || $0 == 0x2e || isHexDigit($0) }) else {
                    return nil
                }
            } else {
                if let colon = authority.lastIndex(of: ":") {
                    host = authority[..<colon]
                    port = authority[authority.index(after: colon)...]
                }
                guard !host.isEmpty, isValidKey(host), !host.contains("/") else { return nil }
            }
            if let port {
                guard let number = UInt16(port), number > 0 else { return nil }
                authority = number == (isSecure ? 443 : 80) ? String(host) : "\(host):\(number)"
            }
            self.authority = authority
            isLoopback = host == "localhost" || host == "[::1]" || host.hasPrefix("127.")
        }
    }

    public var bucket: String
    /// Empty, or ending with `/`.
    public var prefix: String
    /// nil: Amazon's.
    public var endpoint: Endpoint?
    /// nil: what the environment says, or us-east-1.
    public var region: String?
    /// Certificates of the authorities to trust instead of the system's, in PEM.
    public var certificateFile: String?

    static func isValidBucket(_ name: String) -> Bool {
        (3...63).contains(name.utf8.count) && isValidKey(name) && !name.contains("/")
    }
}

/// The text with every `%XX` replaced by its byte, or nil when that is malformed.
func percentDecoded(_ text: some StringProtocol, plusIsSpace: Bool = false) -> String? {
    var bytes: [UInt8] = []
    var rest = text.utf8[...]
    while let byte = rest.popFirst() {
        if byte == UInt8(ascii: "%") {
            guard let high = rest.popFirst().flatMap(hexValue), let low = rest.popFirst().flatMap(hexValue) else {
                return nil
            }
            bytes.append(high << 4 | low)
        } else {
            bytes.append(plusIsSpace && byte == UInt8(ascii: "+") ? UInt8(ascii: " ") : byte)
        }
    }
    return String(validating: bytes, as: UTF8.self)
}

func hexValue(_ digit: UInt8) -> UInt8? {
    switch digit {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): digit - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): digit - UInt8(ascii: "A") + 10
    default: nil
    }
}

func isHexDigit(_ digit: UInt8) -> Bool { hexValue(digit) != nil }
