// Replays the corpus through the functions that the fuzzer calls: what was found once stays fixed.

import CLinux
import Foundation
import Glibc
import Synchronization
import Testing

/// The corpus in the tree.
private let corpus = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .appendingPathComponent("corpus")

/// Targets keep nothing between inputs, but they share memory: one at a time.
@Suite(.serialized) struct CorpusTests {
    @Test(arguments: FuzzTarget.all.map(\.name))
    func everyInputPasses(_ name: String) throws {
        let target = try #require(FuzzTarget.all.first { $0.name == name })
        let folder = corpus.appendingPathComponent(name)
        let files = try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
        try #require(!files.isEmpty, "no corpus of \(name)")
        for file in files.sorted(by: { $0.path < $1.path }) {
            let bytes = [UInt8](try Data(contentsOf: file))
            #expect(bytes.count <= target.maxInputBytes)
            for length in Set([bytes.count, bytes.count / 2, max(0, bytes.count - 1)]) {
                let found = onSmallStack { bytes[..<length].withFence { finding(of: target, $0) } }
                if let found { Issue.record("\(name)/\(file.lastPathComponent), \(length) bytes: \(found)") }
            }
        }
    }

    @Test func theCorpusIsSmall() throws {
        let files = try FileManager.default.subpathsOfDirectory(atPath: corpus.path)
        let names = Set(files.compactMap { $0.split(separator: "/").first.map(String.init) })
        #expect(names == Set(FuzzTarget.all.map(\.name)))
        let bytes = try files.reduce(0) {
            let path = corpus.appendingPathComponent($1).path
            return $0 + (try FileManager.default.attributesOfItem(atPath: path)[.size] as? Int ?? 0)
        }
        #expect(bytes <= 160 << 10)
    }
}

private func finding(of target: FuzzTarget, _ bytes: UnsafeRawBufferPointer) -> String? {
    do {
        try target.run(bytes)
        return nil
    } catch { return "\(error)" }
}

extension ArraySlice<UInt8> {
    /// A copy that ends where memory ends: one byte read behind it is a crash.
    fileprivate func withFence<R>(_ body: (UnsafeRawBufferPointer) -> R) -> R {
        let length = (count + 4095) & ~4095
        let flags = MAP_PRIVATE | MAP_ANONYMOUS
        guard let pages = mmap(nil, length + 4096, PROT_READ | PROT_WRITE, flags, -1, 0), pages != MAP_FAILED else {
            fatalError("no memory for \(count) bytes")
        }
        defer { munmap(pages, length + 4096) }
        mprotect(pages + length, 4096, PROT_NONE)
        let bytes = UnsafeMutableRawBufferPointer(start: pages + length - count, count: count)
        bytes.copyBytes(from: self)
        return body(UnsafeRawBufferPointer(bytes))
    }
}

/// Runs on a thread with the stack of a loop's, where foreign bytes are decoded in the daemon.
private func onSmallStack(_ body: () -> String?) -> String? {
    withoutActuallyEscaping(body) { body in
        final class Call {
            let body: () -> String?
            var result: String?
            init(_ body: @escaping () -> String?) { self.body = body }
        }
        let call = Call(body)
        var thread: UInt = 0
        let error = mg_thread_start(
            { argument in
                let call = Unmanaged<Call>.fromOpaque(argument!).takeUnretainedValue()
                call.result = call.body()
                return nil
            }, Unmanaged.passUnretained(call).toOpaque(), 256 << 10, "replay", &thread)
        precondition(error == 0)
        _ = mg_thread_join(thread)
        return call.result
    }
}
