// What the tests of this target share.

import Glibc
import Runtime
import Synchronization
import Testing

/// A loop for one test, stopped at its end.
func withLoop(_ body: (Loop) async throws -> Void) async throws {
    let loop = try Loop(name: "test")
    try loop.start()
    defer { loop.stop() }
    try await body(loop)
}

/// A folder for one test, removed at its end.
func withFolder(_ body: (String) async throws -> Void) async throws {
    var template = Array("/tmp/margarine-runtime-XXXXXX".utf8CString)
    let path = try #require(mkdtemp(&template).map { String(cString: $0) })
    defer { removeTree(path) }
    try await body(path)
}

private func removeTree(_ path: String) {
    if let folder = opendir(path) {
        while let entry = readdir(folder) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                String(cString: UnsafeRawPointer($0).assumingMemoryBound(to: CChar.self))
            }
            if name != "." && name != ".." { removeTree(path + "/" + name) }
        }
        closedir(folder)
        rmdir(path)
    } else {
        unlink(path)
    }
}

/// A value that several threads may set and read.
final class Shared<Value: Sendable>: Sendable {
    private let storage: Mutex<Value>
    init(_ value: Value) { storage = Mutex(value) }
    var value: Value { storage.withLock { $0 } }
    func update(_ change: @Sendable (inout Value) -> Void) { storage.withLock { change(&$0) } }
}

extension Loop {
    /// The result of `work`, run on this loop.
    func call<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        await withCheckedContinuation { continuation in
            post { continuation.resume(returning: work()) }
        }
    }

    /// The result of a task that runs on this loop.
    func task<T: Sendable>(_ work: @escaping @Sendable () async throws -> T) async throws -> T {
        try await Task(executorPreference: self) { try await work() }.value
    }
}

func monotonicNs() -> UInt64 {
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    return UInt64(now.tv_sec) * 1_000_000_000 + UInt64(now.tv_nsec)
}
