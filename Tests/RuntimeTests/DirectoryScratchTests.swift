// Scratch files on a real directory: on the ring, on threads, and called from no loop.

import Glibc
import Testing

@testable import Runtime

@Suite struct DirectoryScratchTests {
    /// Where the calls are made.
    enum Place: String, CaseIterable, Sendable { case ring, threads, noLoop }

    private func at(_ place: Place, _ body: @escaping @Sendable () async throws -> Void) async throws {
        if place == .noLoop { return try await body() }
        let loop = try Loop(name: "test", ring: place == .ring)
        try loop.start()
        defer { loop.stop() }
        // A machine that refuses io_uring can't test it; it must say so.
        #expect(loop.usesRing == (place == .ring && loop.ringRefusal == nil))
        try await loop.task(body)
    }

    private static func noise(_ count: Int) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            arc4random_buf(buffer.baseAddress!, count)
            initialized = count
        }
    }

    @Test(arguments: Place.allCases) func whatIsWrittenIsReadAfterSyncAndReopening(_ place: Place) async throws {
        try await withFolder { folder in
            try await at(place) {
                let scratch = try DirectoryScratch(path: folder + "/a/b")
                let file = try scratch.open("disks/d1/journal", create: true)
                #expect(file.sizeBytes == 0)
                let small = Self.noise(5_000)
                let large = Self.noise(9 << 20)  // too long to be written inline
                try await file.write(small, at: 100)
                try await file.write(large, at: 5_100)
                #expect(file.sizeBytes == 5_100 + 9 << 20)
                try await file.sync()
                try await scratch.syncDirectory("disks/d1")

                let again = try scratch.open("disks/d1/journal", create: false)
                #expect(again.sizeBytes == file.sizeBytes)
                #expect(try await again.read(count: 5_000, at: 100) == small)
                #expect(try await again.read(count: 9 << 20, at: 5_100) == large)
                #expect(try await again.read(count: 100, at: 0) == [UInt8](repeating: 0, count: 100))
                try again.truncate(to: 200)
                #expect(again.sizeBytes == 200)
                #expect(try await again.read(count: 100, at: 100) == Array(small[..<100]))
                #expect(try await again.read(count: 0, at: 200) == [])
            }
        }
    }

    @Test(arguments: Place.allCases) func manyBuffersAreWrittenInOneCall(_ place: Place) async throws {
        try await withFolder { folder in
            try await at(place) {
                let file = try DirectoryScratch(path: folder).open("f", create: true)
                // 3,000 buffers: more than the kernel takes in one call. Of 10 to 2,000 bytes: inline, then not.
                for size in [10, 2_000] {
                    let bytes = Self.noise(3_000 * size)
                    let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 1)
                    memory.copyBytes(from: bytes)
                    let error = await withCheckedContinuation {
                        (continuation: CheckedContinuation<ScratchError?, Never>) in
                        let buffers = (0..<3_000).map {
                            // An empty one among them must change nothing.
                            UnsafeRawBufferPointer(rebasing: memory[$0 == 7 ? 0..<0 : $0 * size..<($0 + 1) * size])
                        }
                        let isInline = buffers.withUnsafeBufferPointer { buffers in
                            try! file.write(buffers, at: 0) { continuation.resume(returning: $0) }
                        }
                        #expect(isInline == (size == 10))
                        if isInline { continuation.resume(returning: nil) }
                    }
                    #expect(error == nil)
                    let expected = bytes[..<(7 * size)] + bytes[(8 * size)...]
                    #expect(try await file.read(count: expected.count, at: 0) == Array(expected))
                    memory.deallocate()
                }
            }
        }
    }

    @Test(arguments: Place.allCases) func aReadPastTheEndIsAnErrorThatNamesTheFile(_ place: Place) async throws {
        try await withFolder { folder in
            try await at(place) {
                let file = try DirectoryScratch(path: folder).open("some/name", create: true)
                try await file.write([1, 2, 3], at: 0)
                let error = await #expect(throws: ScratchError.self) { try await file.read(count: 4, at: 0) }
                #expect(error?.errno == ENODATA)
                #expect(error?.description.contains(folder + "/some/name") == true)
            }
        }
    }

    @Test(arguments: [Place.ring, .threads]) func completionsRunOnTheCallingLoopAfterTheCall(_ place: Place)
        async throws
    {
        try await withFolder { folder in
            try await at(place) {
                let file = try DirectoryScratch(path: folder).open("f", create: true)
                try await file.write(Self.noise(4_096), at: 0)
                let loop = try #require(Loop.current)
                let order = Shared<[String]>([])
                let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 4_096, alignment: 8)
                defer { memory.deallocate() }
                await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                    file.read(into: memory, at: 0) { error in
                        order.update { $0.append(error == nil && Loop.current === loop ? "done" : "wrong") }
                        continuation.resume()
                    }
                    order.update { $0.append("returned") }
                }
                #expect(order.value == ["returned", "done"])
            }
        }
    }

    /// Many more requests than the ring takes at once, over several files, all answered.
    @Test(arguments: Place.allCases) func moreRequestsThanTheRingHolds(_ place: Place) async throws {
        try await withFolder { folder in
            try await at(place) {
                let scratch = try DirectoryScratch(path: folder)
                let file = try scratch.open("f", create: true)
                let bytes = Self.noise(1_000 * 512)
                try await file.write(bytes, at: 0)
                let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 8)
                defer { memory.deallocate() }
                let left = Shared(1_000)
                await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                    for index in 0..<1_000 {
                        let part = UnsafeMutableRawBufferPointer(rebasing: memory[index * 512..<(index + 1) * 512])
                        file.read(into: part, at: UInt64(index * 512)) { error in
                            #expect(error == nil)
                            left.update { $0 -= 1 }
                            if left.value == 0 { continuation.resume() }
                        }
                    }
                }
                #expect(memory.elementsEqual(bytes))
            }
        }
    }

    @Test func errorsOfTheFileSystemNameTheFileAndTheAdvice() async throws {
        // /dev/full answers every write with ENOSPC; below it, the same code as for a full disk.
        let full = open("/dev/full", O_RDWR)
        let descriptor = FileDescriptor(owning: full)
        try await withLoop { loop in
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 512, alignment: 8)
            defer { memory.deallocate() }
            let buffers = [UnsafeRawBufferPointer(memory)]
            let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
                let operation = DiskOperation(.write, descriptor, path: "/scratch/x", buffers: buffers) {
                    continuation.resume(returning: $0)
                }
                loop.post { loop.disk.start(operation) }
            }
            #expect(error?.errno == ENOSPC)
            #expect(
                error?.description
                    == "write /scratch/x: No space left on device; free some space there, or use another --scratch")
        }
    }

    @Test(arguments: [Place.ring, .threads]) func aSyncWaitsForTheWritesBegunBeforeIt(_ place: Place) async throws {
        try await withFolder { folder in
            try await at(place) {
                let file = try DirectoryScratch(path: folder).open("f", create: true)
                let order = Shared<[String]>([])
                let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 32 << 20, alignment: 8)
                memory.initializeMemory(as: UInt8.self, repeating: 7)
                defer { memory.deallocate() }
                await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                    for name in ["w1", "w2"] {
                        let buffers = [UnsafeRawBufferPointer(memory)]
                        let isInline = buffers.withUnsafeBufferPointer {
                            try! file.write($0, at: name == "w1" ? 0 : 32 << 20) { _ in order.update { $0.append(name) }
                            }
                        }
                        #expect(!isInline)
                    }
                    file.sync { error in
                        order.update { $0.append(error == nil ? "sync" : "failed") }
                        continuation.resume()
                    }
                }
                #expect(order.value.last == "sync")
                #expect(Set(order.value) == ["w1", "w2", "sync"])
                #expect(file.sizeBytes == 64 << 20)
            }
        }
    }

    /// After a failed sync the kernel has dropped the data, and the next fdatasync succeeds: that must not be believed.
    @Test func afterAFailedSyncNoLaterOneSucceeds() async throws {
        try await withFolder { folder in
            let path = folder + "/f"
            let number = open(path, O_RDWR | O_CREAT, 0o600)
            let root = try ScratchRoot(directory: FileDescriptor(owning: open(folder, O_RDONLY)), path: folder)
            let file = try DirectoryFile(FileDescriptor(owning: number), path: path, root: root)
            try await file.write([1], at: 0)
            try await file.sync()
            // A pipe under the file's number can't be synced.
            let spare = dup(number)
            var ends: [Int32] = [0, 0]
            #expect(pipe(&ends) == 0)
            #expect(dup2(ends[1], number) == number)
            let first = await #expect(throws: ScratchError.self) { try await file.sync() }
            #expect(first?.errno == EINVAL)
            #expect(dup2(spare, number) == number)
            let second = await #expect(throws: ScratchError.self) { try await file.sync() }
            #expect(second?.errno == EINVAL)
            for fd in [spare, ends[0], ends[1]] { close(fd) }
        }
    }

    @Test func namesAreListedRenamedAndRemoved() async throws {
        try await withFolder { folder in
            let scratch = try DirectoryScratch(path: folder)
            #expect(try scratch.list("blocks") == [])
            for name in ["c", "a", "b"] { _ = try scratch.open("blocks/\(name)", create: true) }
            #expect(try scratch.list("blocks") == ["a", "b", "c"])
            #expect(try scratch.list("") == ["blocks"])
            let kept = try scratch.open("blocks/a", create: false)
            try await kept.write([9], at: 0)
            try scratch.remove("blocks/a")
            try scratch.remove("blocks/a")
            #expect(try await kept.read(count: 1, at: 0) == [9])
            try scratch.rename("blocks/b", to: "blocks/c")
            #expect(try scratch.list("blocks") == ["c"])
            #expect(throws: ScratchError.self) { try scratch.open("blocks/a", create: false) }
            #expect(throws: ScratchError.self) { try scratch.rename("blocks/a", to: "blocks/d") }
            try scratch.remove("blocks/c")
            try scratch.remove("blocks")
            #expect(try scratch.list("") == [])
            #expect(try scratch.freeBytes() > 0)
        }
    }

    @Test func pathsThatLeadOutsideAreNone() {
        for path in ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a/."] {
            #expect(!ScratchPath.isValid(path))
        }
        for path in ["a", "a/b", "a.b/..c", "a b/c-d_e"] { #expect(ScratchPath.isValid(path)) }
    }

    @Test func anOverlongPathAndAFileAsDirectoryAreErrors() throws {
        let file = "/proc/self/status"
        #expect(throws: ScratchError.self) { try DirectoryScratch(path: file) }
        let error = #expect(throws: ScratchError.self) { try DirectoryScratch(path: "/proc/none/x") }
        #expect(error?.description.contains("/proc/none") == true)
    }

    @Test func aSecondLockOfTheDirectoryFailsAndNamesTheHolder() async throws {
        try await withFolder { folder in
            do {
                let first = try DirectoryScratch(path: folder)
                try first.lockExclusively()
                let second = try DirectoryScratch(path: folder)
                let error = #expect(throws: ScratchError.self) { try second.lockExclusively() }
                #expect(
                    error?.description
                        == "scratch directory \(folder) is in use by another margined (pid \(getpid()));"
                        + " stop it or use another --scratch")
                #expect(try first.list("") == [])
            }
            try await lockSoon(DirectoryScratch(path: folder))
        }
    }

    /// A process that another test spawns has a copy of every descriptor until it becomes its program.
    private func lockSoon(_ scratch: DirectoryScratch) async throws {
        for _ in 0..<200 {
            do { return try scratch.lockExclusively() } catch { try await Task.sleep(nanoseconds: 10_000_000) }
        }
        try scratch.lockExclusively()
    }

    /// Another process holds the lock, then dies by SIGKILL.
    @Test func aLockEndsWithItsProcess() async throws {
        try await withFolder { folder in
            let scratch = try DirectoryScratch(path: folder)
            // flock(1) waits for the lock and becomes the program, which then holds it.
            var pid: pid_t = 0
            let arguments = ["flock", "--no-fork", folder + "/lock", "sleep", "100"]
            var pointers = arguments.map { strdup($0) } + [nil]
            defer { pointers.forEach { free($0) } }
            try #require(posix_spawnp(&pid, "flock", nil, nil, &pointers, environ) == 0)
            defer {
                kill(pid, SIGKILL)
                waitpid(pid, nil, 0)
            }
            var error: ScratchError?
            for _ in 0..<200 where error == nil {
                do throws(ScratchError) {
                    try DirectoryScratch(path: folder).lockExclusively()  // the other one has not taken it yet
                    usleep(10_000)
                } catch let caught { error = caught }
            }
            #expect(error?.errno == EWOULDBLOCK)
            let text = open(folder + "/lock", O_WRONLY | O_TRUNC)
            #expect(write(text, "4711\n", 5) == 5)
            close(text)
            let named = #expect(throws: ScratchError.self) { try scratch.lockExclusively() }
            #expect(named?.description.contains("is in use by another margined (pid 4711)") == true)
            kill(pid, SIGKILL)
            waitpid(pid, nil, 0)
            try await lockSoon(scratch)
        }
    }

    /// Freeing the pages and blocks of a large file takes the kernel long: nobody waits for it, and a loop least of all.
    @Test func theLastCloseOfARemovedFileIsNotWaitedFor() async throws {
        try await withFolder { folder in
            let clock = ContinuousClock()
            let bytes = [UInt8](repeating: 1, count: 1 << 20)
            func fill(_ scratch: DirectoryScratch) async throws -> any ScratchFile {
                let file = try scratch.open("f", create: true)
                for number in 0..<256 { try await file.write(bytes, at: UInt64(number) << 20) }
                try scratch.remove("f")
                return file
            }
            let scratch = try DirectoryScratch(path: folder)
            // The best of some tries: what else the machine does is not the matter.
            var tries: [(longest: Duration, spared: Duration)] = []
            while tries.count < 3, tries.last.map({ $0.longest >= $0.spared / 5 }) ?? true {
                var longest = Duration.zero
                var spared = Duration.zero
                for _ in 0..<5 {
                    var file: (any ScratchFile)? = try await fill(scratch)
                    longest = max(longest, clock.measure { file = nil })
                    #expect(file == nil)
                    let raw = open(folder + "/g", O_RDWR | O_CREAT, 0o600)
                    for number in 0..<256 {
                        #expect(pwrite(raw, bytes, bytes.count, off_t(number) << 20) == bytes.count)
                    }
                    unlink(folder + "/g")
                    spared += clock.measure { _ = close(raw) }
                }
                tries.append((longest, spared))
            }
            #expect(tries.contains { $0.longest < $0.spared / 5 }, "waited for a close: \(tries)")
        }
    }
}
