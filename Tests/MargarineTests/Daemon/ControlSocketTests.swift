import Foundation
import Glibc
import Margarine
import Runtime
import Synchronization
import Testing

/// A directory that goes with the test.
private final class Folder {
    let path: String
    init() {
        var template = Array("/tmp/margarine-test.XXXXXX".utf8CString)
        path = mkdtemp(&template).map { String(cString: $0) } ?? "/nonexistent"
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
}

/// Runs what blocks on a thread of its own: the answers that it waits for need the pool that tests run on.
private func blocking<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await withCheckedThrowingContinuation { continuation in
        Thread.detachNewThread { continuation.resume(with: Result(catching: body)) }
    }
}

private func ask(_ path: String, _ command: String) async throws -> ControlAnswer {
    try await blocking { try ControlClient(path: path).ask(ControlRequest(command: command)) }
}

@Suite(.serialized) struct ControlSocketTests {
    private let folder = Folder()
    private var path: String { folder.path + "/control.sock" }

    private func report() -> StatusReport {
        var report = StatusReport(
            daemon: DaemonStatus(pid: 7, uptimeMs: 1234, scratch: "/scratch", addresses: ["unix:/a"]),
            store: StoreStatus(name: "file:///x"),
            memoryCache: CacheStatus(), scratchCache: CacheStatus(),
            sessions: [SessionStatus(address: "unix:pid 8", export: "d?session=1", session: "1", connections: 2)],
            disks: [
                DiskStatus(
                    name: "d", sizeBytes: 1 << 30, epoch: 3, safePoints: "auto", durability: "store",
                    committedGeneration: 9)
            ])
        report.memoryCache.hits = 3
        report.memoryCache.misses = 1
        return report
    }

    @Test func aStatusComesThroughWhole() async throws {
        let sent = report()
        let socket = try ControlSocket(path: path) { request in
            request.command == "status"
                ? ControlAnswer(status: sent) : ControlAnswer(error: "unknown \(request.command)")
        }
        defer { socket.close() }
        let path = path
        let answers = try await blocking {
            let client = try ControlClient(path: path)
            let first = try client.ask(ControlRequest(command: "status"))
            // The connection stays good after an error.
            #expect(throws: DaemonError.self) { try client.ask(ControlRequest(command: "bogus")) }
            return [first, try client.ask(ControlRequest(command: "status"))]
        }
        #expect(answers.map(\.status) == [sent, sent])
        #expect(sent.memoryCache.hitPercent == 75)
    }

    @Test func onlyItsUserMayOpenIt() throws {
        let socket = try ControlSocket(path: path) { _ in ControlAnswer() }
        defer { socket.close() }
        var found = stat()
        #expect(stat(path, &found) == 0)
        #expect(found.st_mode & 0o777 == 0o600)
    }

    @Test func aSecondDaemonIsRefusedAndADeadOnesSocketReplaced() async throws {
        let first = try ControlSocket(path: path) { _ in ControlAnswer() }
        #expect(throws: DaemonError.self) { try ControlSocket(path: path) { _ in ControlAnswer() } }
        first.close()
        #expect(throws: DaemonError.self) { try ControlClient(path: path) }
        // What a killed daemon leaves: a socket file without a listener.
        let fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
        let bound = withUnsafePointer(to: address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        close(fd)
        #expect(bound == 0)
        let second = try ControlSocket(path: path) { _ in ControlAnswer() }
        defer { second.close() }
        #expect(try await ask(path, "x") == ControlAnswer())
    }

    @Test("row 36: a control socket that another daemon has put in its place is left alone")
    func anothersSocketIsLeftAlone() async throws {
        let first = try ControlSocket(path: path) { _ in ControlAnswer(error: "first") }
        unlink(path)
        let second = try ControlSocket(path: path) { _ in ControlAnswer() }
        defer { second.close() }
        first.close()
        #expect(try await ask(path, "x") == ControlAnswer())
    }

    @Test("row 37: a control socket without a thread is an error, and leaves no file")
    func withoutAThread() async throws {
        await Threads.refusing("control") {
            let error = #expect(throws: DaemonError.self) { try ControlSocket(path: path) { _ in ControlAnswer() } }
            #expect(error?.description.contains("threads") == true)
        }
        #expect(access(path, F_OK) != 0)
    }

    @Test("row 37: a connection that gets no thread is hung up on, and counts no longer", .timeLimit(.minutes(1)))
    func withoutAThreadForAConnection() async throws {
        let socket = try ControlSocket(path: path) { _ in ControlAnswer() }
        defer { socket.close() }
        let path = path
        await Threads.refusing("control") {
            for _ in 0..<20 { await #expect(throws: DaemonError.self) { try await ask(path, "x") } }
        }
        #expect(try await ask(path, "x") == ControlAnswer())
    }

    @Test func aFileInItsPlaceIsLeftAlone() throws {
        try "precious".write(toFile: path, atomically: false, encoding: .utf8)
        #expect(throws: DaemonError.self) { try ControlSocket(path: path) { _ in ControlAnswer() } }
        #expect(try String(contentsOfFile: path, encoding: .utf8) == "precious")
    }

    @Test func rubbishIsAnsweredAndTooLongALineEndsTheConnection() async throws {
        let socket = try ControlSocket(path: path) { _ in ControlAnswer() }
        defer { socket.close() }
        let path = path
        #expect(try await blocking { try exchange("rubbish\n", path) }.contains("not a request"))
        #expect(try await blocking { try exchange(String(repeating: "x", count: 200_000), path) } == "")
        #expect(try await ask(path, "x") == ControlAnswer())
    }
}

/// Sends `text`, then reads until a line end or the end of the connection.
private func exchange(_ text: String, _ path: String) throws -> String {
    let fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    defer { close(fd) }
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
    let connected = withUnsafePointer(to: address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
            connect(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
        }
    }
    #expect(connected == 0)
    let bytes = Array(text.utf8)
    var sent = 0
    while sent < bytes.count {
        let count = bytes[sent...].withUnsafeBytes { send(fd, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
        if count <= 0 { break }
        sent += count
    }
    var answer: [UInt8] = []
    var byte: UInt8 = 0
    while recv(fd, &byte, 1, 0) == 1, byte != 10 { answer.append(byte) }
    return String(decoding: answer, as: UTF8.self)
}

struct ScratchLockTests {
    @Test func oneHolderAtATime() throws {
        let folder = Folder()
        let path = folder.path + "/a/b"
        var first: ScratchLock? = try ScratchLock(directory: path)
        #expect(throws: DaemonError.self) { try ScratchLock(directory: path) }
        do { _ = try ScratchLock(directory: path) } catch {
            #expect(error.description.contains("pid \(getpid())") && error.description.contains("--scratch"))
        }
        _ = first
        first = nil
        _ = try ScratchLock(directory: path)
    }

    @Test func aPathThatCannotBeIsTold() {
        #expect(throws: DaemonError.self) { try ScratchLock(directory: "/proc/nope/scratch") }
    }
}

/// Found by Thread Sanitizer's tests: what failed after it had opened a descriptor closed it twice, and between the two it could be
/// somebody else's, a journal's for one.
struct DescriptorTests {
    private final class Seen: Sendable {
        let isDone = Atomic(false)
        let robbed = Atomic(0)
    }

    @Test func whatFailsClosesItsDescriptorOnce() async throws {
        let folder = Folder()
        let path = folder.path
        let held = try ScratchLock(directory: path + "/scratch")
        let seen = Seen()
        await withTaskGroup(of: Void.self) { group in
            group.addTask {
                for _ in 0..<20_000 {
                    _ = try? ControlClient(path: path + "/nobody")
                    _ = try? ScratchLock(directory: path + "/scratch")
                }
                seen.isDone.store(true, ordering: .releasing)
            }
            group.addTask {
                while !seen.isDone.load(ordering: .acquiring) {
                    let own = (0..<8).map { _ in dup(0) }
                    sched_yield()
                    for fd in own where fd >= 0 && close(fd) != 0 { seen.robbed.add(1, ordering: .relaxed) }
                }
            }
        }
        #expect(seen.robbed.load(ordering: .relaxed) == 0)
        withExtendedLifetime(held) {}
    }
}
