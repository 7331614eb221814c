import Glibc
import Synchronization

@testable import ObjectStore

/// `Tests/servers/s3check.py` as a child process; it ends with this one.
final class CheckingServer: Sendable {
    let endpoint: String
    let admin: String
    let address: S3Address
    private let stdinPipe: Int32
    private let pid: pid_t

    static let credentials = Credentials(accessKey: "margarinetest", secretKey: "margarinesecret0123456789")

    init(_ arguments: String..., certificateFile: String? = nil) throws {
        let script = #filePath.split(separator: "/").dropLast(2).map { "/\($0)" }.joined() + "/servers/s3check.py"
        let words = ["python3", script, "--until-stdin-closes"] + arguments
        var toChild: [Int32] = [0, 0]
        var fromChild: [Int32] = [0, 0]
        guard pipe(&toChild) == 0, pipe(&fromChild) == 0 else { throw StoreError(.refused, "pipe: errno \(errno)") }
        for fd in [toChild[1], fromChild[0]] { _ = mgSetCloseOnExec(fd) }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_adddup2(&actions, toChild[0], 0)
        posix_spawn_file_actions_adddup2(&actions, fromChild[1], 1)
        for fd in toChild + fromChild { posix_spawn_file_actions_addclose(&actions, fd) }
        var argv: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
        defer { for word in argv { free(word) } }
        var child = pid_t()
        let failed = posix_spawnp(&child, "python3", &actions, nil, &argv, environ)
        close(toChild[0])
        close(fromChild[1])
        guard failed == 0 else { throw StoreError(.refused, "python3 cannot be started: \(failed)") }
        pid = child
        stdinPipe = toChild[1]
        var line: [UInt8] = []
        var byte: UInt8 = 0
        while read(fromChild[0], &byte, 1) == 1, byte != 10 { line.append(byte) }
        close(fromChild[0])
        let parts = String(decoding: line, as: UTF8.self).split(separator: " ")
        guard parts.count == 4, parts[0] == "ready" else {
            throw StoreError(.refused, "s3check.py did not start: \(parts)")
        }
        endpoint = String(parts[1])
        admin = String(parts[3])
        let ca = certificateFile.map { "&ca=\($0)" } ?? ""
        guard case .s3(let address) = try StoreURL("s3://margarine/some/store?endpoint=\(endpoint)\(ca)") else {
            fatalError()
        }
        self.address = address
    }

    deinit {
        close(stdinPipe)
        var status: Int32 = 0
        waitpid(pid, &status, 0)
    }

    func bucket(
        _ settings: TransportSettings = TransportSettings(), credentials: Credentials = CheckingServer.credentials,
        region: String = "us-east-1",
        check: Bool = true
    ) async throws -> S3Bucket {
        let bucket = try S3Bucket(address, credentials, region: region, TestEnvironment(), settings)
        if check { _ = try await bucket.tagForm() }
        return bucket
    }

    // MARK: The admin port

    func fault(_ rule: String) throws { _ = try ask("POST", "/faults", rule) }
    func clearFaults() throws { _ = try ask("DELETE", "/faults") }
    func outage(_ mode: String) throws { _ = try ask("POST", "/outage", "{\"mode\": \"\(mode)\"}") }
    /// Requests as `[method, target, status, condition]` in JSON, the latest last.
    func log() throws -> String { try ask("GET", "/log") }
    func stat(_ name: String) throws -> Int {
        let text = try ask("GET", "/stats")
        guard let range = text.firstRange(of: "\"\(name)\": ") else { return 0 }
        return Int(text[range.upperBound...].prefix { $0.isNumber }) ?? 0
    }

    private func ask(_ method: String, _ path: String, _ body: String = "") throws -> String {
        let port = UInt16(admin.split(separator: ":").last!)!
        let fd = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(fd) }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        let connected = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(fd, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
            }
        }
        guard connected == 0 else { throw StoreError(.unavailable, "admin port: errno \(errno)") }
        let request =
            "\(method) \(path) HTTP/1.1\r\nHost: admin\r\nConnection: close\r\nContent-Length: \(body.utf8.count)\r\n\r\n\(body)"
        let sent = Array(request.utf8)
        guard write(fd, sent, sent.count) == sent.count else {
            throw StoreError(.unavailable, "admin port: errno \(errno)")
        }
        var answer: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 65_536)
        while true {
            let count = read(fd, &buffer, buffer.count)
            if count <= 0 { break }
            answer += buffer[..<count]
        }
        let text = String(decoding: answer, as: UTF8.self)
        guard text.hasPrefix("HTTP/1.1 200"), let end = text.firstRange(of: "\r\n\r\n") else {
            throw StoreError(.refused, "admin port: \(text)")
        }
        return String(text[end.upperBound...])
    }
}

/// posix_spawn in another test must not hand our pipe's end on, or the server would outlive us.
private func mgSetCloseOnExec(_ fd: Int32) -> Int32 { fcntl(fd, F_SETFD, FD_CLOEXEC) }
