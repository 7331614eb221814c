import Glibc
import Runtime
import Synchronization
import Testing

@testable import Margarine

/// A pipe whose read end is read when the test wants it to be.
private final class Pipe {
    let readEnd: Int32
    let writeEnd: Int32
    init() throws {
        var ends: [Int32] = [-1, -1]
        try #require(pipe(&ends) == 0)
        readEnd = ends[0]
        writeEnd = ends[1]
    }
    deinit {
        close(readEnd)
        close(writeEnd)
    }

    /// Everything that comes until nothing came for `quietMs`.
    func readAll(quietMs: Int32 = 300) -> String {
        var bytes: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 65_536)
        while true {
            var ready = pollfd(fd: readEnd, events: Int16(POLLIN), revents: 0)
            guard poll(&ready, 1, quietMs) == 1 else { break }
            let count = read(readEnd, &buffer, buffer.count)
            if count <= 0 { break }
            bytes += buffer[..<count]
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}

/// One at a time: some of them have the system refuse threads.
@Suite(.serialized) struct LineWriterTests {
    @Test("row 34: a reader that never reads holds up nobody, and what was lost is told")
    func nobodyReads() throws {
        let pipe = try Pipe()
        let writer = LineWriter(descriptor: pipe.writeEnd, limitBytes: 100_000)
        let line = String(repeating: "x", count: 99)
        let began = ContinuousClock.now
        // Ten times what the pipe (64 KiB) and the ring take.
        for _ in 0..<20_000 { writer.add(line) }
        writer.flush(timeoutMs: 50)
        #expect(ContinuousClock.now - began < .seconds(5))
        var text = ""
        var lines: [Substring] { text.split(separator: "\n") }
        var kept: Int { lines.count { $0 == line } }
        var lost: Int {
            let told = lines.filter { $0.hasPrefix("... ") && $0.contains("lost here") }
            return told.reduce(0) { $0 + (Int($1.split(separator: " ")[1]) ?? 0) }
        }
        // The writer's thread may get its turn late.
        func read(until isThere: () -> Bool) {
            for _ in 0..<100 where !isThere() { text += pipe.readAll() }
        }
        read { kept + lost == 20_000 }
        writer.add("last")
        read { lines.last == "last" }
        #expect(kept >= 1000 && kept < 20_000)
        #expect(kept + lost == 20_000, "each line was written or is counted")
        #expect(lines.last == "last")
        withExtendedLifetime(pipe) {}
    }

    @Test("row 34: everything is written before the end, in its order") func inOrder() throws {
        let pipe = try Pipe()
        let writer = LineWriter(descriptor: pipe.writeEnd)
        let reader = Mutex("")
        let done = startDetachedThread(name: "reader") { [readEnd = pipe.readEnd] in
            var buffer = [UInt8](repeating: 0, count: 4096)
            while true {
                let count = read(readEnd, &buffer, buffer.count)
                if count <= 0 { return }
                let text = String(decoding: buffer[..<count], as: UTF8.self)
                reader.withLock { $0 += text }
                if text.contains("end\n") { return }
            }
        }
        #expect(done)
        for number in 0..<5000 { writer.add("\(number)") }
        writer.add("end")
        writer.flush(timeoutMs: 20_000)
        for _ in 0..<2000 where !reader.withLock({ $0.hasSuffix("end\n") }) { usleep(1000) }
        #expect(reader.withLock { $0 } == (0..<5000).map { "\($0)\n" }.joined() + "end\n")
    }

    @Test("row 34: the end waits for a reader that is late") func lateReader() throws {
        let pipe = try Pipe()
        let writer = LineWriter(descriptor: pipe.writeEnd)
        let line = String(repeating: "x", count: 99)
        // More than the pipe takes.
        for _ in 0..<2000 { writer.add(line) }
        let began = Mutex(false)
        let ended = Mutex(false)
        let starts = startDetachedThread(name: "reader") { [readEnd = pipe.readEnd] in
            usleep(200_000)
            began.withLock { $0 = true }
            var buffer = [UInt8](repeating: 0, count: 65_536)
            var left = 2000 * 100
            while left > 0 {
                let count = read(readEnd, &buffer, buffer.count)
                if count <= 0 { break }
                left -= count
            }
            ended.withLock { $0 = left == 0 }
        }
        #expect(starts)
        writer.flush(timeoutMs: 20_000)
        #expect(began.withLock { $0 })
        for _ in 0..<5000 where !ended.withLock({ $0 }) { usleep(1000) }
        #expect(ended.withLock { $0 })
        withExtendedLifetime(pipe) {}
    }

    @Test("row 37: without a thread for the log, what its reader takes is written") func withoutAThread() async throws {
        let pipe = try Pipe()
        await Threads.refusing("log") {
            let writer = LineWriter(descriptor: pipe.writeEnd, limitBytes: 200_000)
            for _ in 0..<2000 { writer.add(String(repeating: "y", count: 99)) }
            writer.flush(timeoutMs: 50)
        }
        let count = pipe.readAll().split(separator: "\n").count
        #expect(count > 100)
    }

    /// Only a line that found room tried for a thread again, and without one there was no room any more.
    @Test("row 37: the log's thread is made as soon as there is one, also when no room is left") func threadLater()
        async throws
    {
        let pipe = try Pipe()
        let writer = LineWriter(descriptor: pipe.writeEnd, limitBytes: 10_000)
        let line = String(repeating: "w", count: 99)
        await Threads.refusing("log") {
            for _ in 0..<2000 { writer.add(line) }
        }
        writer.add(line)
        var text = ""
        for _ in 0..<100 where !text.contains("lost here") { text += pipe.readAll() }
        let lines = text.split(separator: "\n")
        let lost = lines.first { $0.contains("lost here") }.flatMap { Int($0.split(separator: " ")[1]) } ?? 0
        #expect(lines.count { $0 == line } + lost == 2001)
    }

    @Test("row 37: the log's thread is made before any other can be missing") func threadInTime() async throws {
        let pipe = try Pipe()
        let writer = LineWriter(descriptor: pipe.writeEnd)
        #expect(writer.prepare())
        await Threads.refusing("log") {
            #expect(!LineWriter(descriptor: pipe.writeEnd).prepare())
            // What a pipe does not take at once is lost without a thread.
            for _ in 0..<2000 { writer.add(String(repeating: "z", count: 99)) }
            let first = pipe.readAll()
            writer.flush(timeoutMs: 5_000)
            #expect((first + pipe.readAll()).split(separator: "\n").count == 2000)
        }
    }
}
