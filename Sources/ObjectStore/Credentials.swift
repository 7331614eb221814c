// Where the keys come from: the usual variables of the AWS tools, then their file.

import Glibc

extension Credentials {
    /// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or else the profile AWS_PROFILE (`default`) of
    /// AWS_SHARED_CREDENTIALS_FILE (`~/.aws/credentials`).
    ///
    /// - Throws: `.refused` with what was looked for.
    static func find(_ variable: (String) -> String? = environmentVariable) throws(StoreError) -> Credentials {
        switch (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
        case (let access?, let secret?):
            return try Credentials(accessKey: access, secretKey: secret, sessionToken: variable("AWS_SESSION_TOKEN"))
                .checked()
        case (nil, nil): break
        default: throw StoreError(.refused, "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set; set both")
        }
        let profile = variable("AWS_PROFILE") ?? "default"
        guard let file = variable("AWS_SHARED_CREDENTIALS_FILE") ?? variable("HOME").map({ "\($0)/.aws/credentials" }),
            let text = smallFile(file)
        else {
            throw StoreError(
                .refused,
                "no keys for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make ~/.aws/credentials (AWS_SHARED_CREDENTIALS_FILE)"
            )
        }
        guard let credentials = parse(text, profile: profile) else {
            throw StoreError(
                .refused,
                "\(file): profile '\(profile)' (AWS_PROFILE) has no aws_access_key_id and aws_secret_access_key")
        }
        return try credentials.checked()
    }

    /// One profile of a credentials file, nil when it is not there or lacks a key.
    static func parse(_ text: String, profile: String) -> Credentials? {
        var isOurs = false
        var values: [String: String] = [:]
        for line in text.split(whereSeparator: { $0.isNewline }) {
            let line = trimmed(line)
            if line.isEmpty || line.hasPrefix("#") || line.hasPrefix(";") { continue }
            if line.hasPrefix("["), line.hasSuffix("]") {
                isOurs = trimmed(line.dropFirst().dropLast()) == profile
            } else if isOurs, let equals = line.firstIndex(of: "=") {
                values[trimmed(line[..<equals]).lowercased()] = String(trimmed(line[line.index(after: equals)...]))
            }
        }
        guard let access = values["aws_access_key_id"], let secret = values["aws_secret_access_key"] else { return nil }
        return Credentials(accessKey: access, secretKey: secret, sessionToken: values["aws_session_token"])
    }

    /// They become parts of headers: no space, no line end.
    private func checked() throws(StoreError) -> Credentials {
        for (name, value) in [
            ("access key", accessKey), ("secret key", secretKey), ("session token", sessionToken ?? "x"),
        ] {
            guard !value.isEmpty, value.utf8.allSatisfy({ (0x21...0x7e).contains($0) }) else {
                throw StoreError(.refused, "the \(name) for S3 is empty or has characters that no such key has")
            }
        }
        return self
    }
}

/// An environment variable, nil when unset or empty.
func environmentVariable(_ name: String) -> String? {
    guard let value = getenv(name), value.pointee != 0 else { return nil }
    return String(cString: value)
}

private func trimmed(_ text: Substring) -> Substring {
    var text = text
    while text.first?.isWhitespace == true { text.removeFirst() }
    while text.last?.isWhitespace == true { text.removeLast() }
    return text
}

/// The text of a file of up to 1 MiB, nil when it cannot be read.
private func smallFile(_ path: String) -> String? {
    let fd = open(path, O_RDONLY | O_CLOEXEC)
    guard fd >= 0 else { return nil }
    defer { close(fd) }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65_536)
    while bytes.count < 1 << 20 {
        let count = read(fd, &buffer, buffer.count)
        if count < 0 { return nil }
        if count == 0 { break }
        bytes += buffer[..<count]
    }
    return String(decoding: bytes, as: UTF8.self)
}
