import Glibc
import Testing

@testable import Runtime

/// Row 37: a system that has no thread to give.
@Suite struct ThreadTests {
    @Test("row 37: a loop without a thread is an error, and may be tried again")
    func aLoopThatGetsNoThread() async throws {
        let loop = try Loop(name: "r37-loop")
        await Threads.refusing("r37-loop") {
            let error = #expect(throws: ScratchError.self) { try loop.start() }
            #expect(error?.errno == EAGAIN && error?.description.contains("pids") == true)
        }
        try loop.start()
        #expect(await loop.call { true })
        loop.stop()
    }

    @Test("row 37: a pool without a thread lets its caller do the work") func aPoolThatGetsNoThread() async throws {
        let pool = WorkerPool(name: "r37-pool", threads: 2)
        let ran = Shared<[UInt]>([])
        let here = UInt(pthread_self())
        await Threads.refusing("r37-pool") {
            #expect(throws: ScratchError.self) { try pool.prepare() }
            pool.run { ran.update { $0.append(UInt(pthread_self())) } }
        }
        #expect(ran.value == [here])
        try pool.prepare()
        pool.run { ran.update { $0.append(UInt(pthread_self())) } }
        pool.stop()
        #expect(ran.value.count == 2 && ran.value[1] != here)
    }

    @Test("row 37: scratch files are read, written and synced without a thread for them")
    func aScratchDirectoryThatGetsNoThread() async throws {
        try await withFolder { folder in
            try await Threads.refusing("scratch") {
                let scratch = try DirectoryScratch(path: folder + "/s")
                let file = try scratch.open("a", create: true)
                // Too long to be written inline.
                let bytes = [UInt8](repeating: 7, count: 2 << 20)
                try await file.write(bytes, at: 0)
                try await file.sync()
                try await scratch.syncDirectory("")
                #expect(try await file.read(count: bytes.count, at: 0) == bytes)
            }
        }
    }

    @Test("row 37: a thread that nobody waits for") func detached() async {
        await Threads.refusing("r37-detached") {
            #expect(!startDetachedThread(name: "r37-detached") {})
        }
        await withCheckedContinuation { continuation in
            let isStarted = startDetachedThread(name: "r37-other") { continuation.resume() }
            #expect(isStarted)
        }
    }
}
