import Foundation
import Glibc
import ObjectStore
import Runtime
import Synchronization
import Testing

/// The real clock; randomness from a seed.
final class TestEnvironment: Environment {
    private let seed: Mutex<UInt64>
    init(seed: UInt64 = .random(in: 0 ... .max)) { self.seed = Mutex(seed) }
    var nowNs: UInt64 { Self.read(CLOCK_MONOTONIC) }
    var wallMs: Int64 { Int64(Self.read(CLOCK_REALTIME) / 1_000_000) }
    func randomBits() -> UInt64 { seed.withLock { splitMix(&$0) } }
    func sleep(ns: UInt64) async { try? await Task.sleep(nanoseconds: ns) }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
    private static func read(_ clock: clockid_t) -> UInt64 {
        var time = timespec()
        clock_gettime(clock, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

/// A clock that goes on only when somebody sleeps, and at once.
final class SkippingEnvironment: Environment {
    private struct State {
        var nowNs: UInt64 = 1_000_000_000
        var seed: UInt64 = 1
        var pausesNs: [UInt64] = []
    }
    private let state = Mutex(State())
    var nowNs: UInt64 { state.withLock { $0.nowNs } }
    var wallMs: Int64 { Int64(nowNs / 1_000_000) }
    var pausesMs: [UInt64] { state.withLock { $0.pausesNs.map { $0 / 1_000_000 } } }
    func randomBits() -> UInt64 { state.withLock { splitMix(&$0.seed) } }
    func sleep(ns: UInt64) async {
        state.withLock {
            $0.nowNs += ns
            $0.pausesNs.append(ns)
        }
    }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}

/// How many times longer to wait than usual: what a sanitizer makes slow is not broken.
let patience = Int(ProcessInfo.processInfo.environment["MARGARINE_PATIENCE"] ?? "") ?? 1

func splitMix(_ state: inout UInt64) -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
    return z ^ (z >> 31)
}

func randomBytes(_ count: Int, seed: UInt64 = .random(in: 0 ... .max)) -> [UInt8] {
    var state = seed
    return [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
        var index = 0
        while index < count {
            var word = splitMix(&state)
            for _ in 0..<min(8, count - index) {
                buffer[index] = UInt8(truncatingIfNeeded: word)
                word >>= 8
                index += 1
            }
        }
        initialized = count
    }
}

/// Runs `body` with a new directory and removes it afterwards.
func withTemporaryDirectory<T>(_ body: (String) async throws -> T) async throws -> T {
    let path = try makeTemporaryDirectory()
    defer { removeTree(path) }
    return try await body(path)
}

func makeTemporaryDirectory() throws -> String {
    let parent = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
    var template = Array("\(parent)/mg-store-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw StoreError(.refused, "mkdtemp: errno \(errno)") }
    return template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
}

func removeTree(_ path: String) {
    guard let directory = opendir(path) else {
        unlink(path)
        return
    }
    while let entry = readdir(directory) {
        let name = withUnsafePointer(to: &entry.pointee.d_name) {
            $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        }
        if name == "." || name == ".." { continue }
        if entry.pointee.d_type == UInt8(DT_DIR) { removeTree("\(path)/\(name)") } else { unlink("\(path)/\(name)") }
    }
    closedir(directory)
    rmdir(path)
}

/// The kind of the error that `body` throws, nil when it throws none.
func kind(_ body: () async throws -> Void) async -> StoreError.Kind? {
    do {
        try await body()
        return nil
    } catch {
        return (error as? StoreError)?.kind
    }
}

func errorText(_ body: () async throws -> Void) async -> String {
    do {
        try await body()
        return ""
    } catch { return "\(error)" }
}

/// All keys below a prefix, page by page.
func allKeys(_ bucket: any Bucket, prefix: String = "", limit: Int = 1000) async throws -> [String] {
    var keys: [String] = []
    var after: String?
    repeat {
        let page = try await bucket.list(prefix: prefix, after: after, folders: false, limit: limit)
        keys += page.items.map { $0.key }
        after = page.next
    } while after != nil
    return keys
}
