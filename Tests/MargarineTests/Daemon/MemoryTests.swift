import Foundation
import Glibc
import Runtime
import Synchronization
import Testing

@testable import Margarine

/// A tree of /proc and /sys as a kernel shows it.
private final class Tree {
    let root: String
    init(_ files: [String: String]) throws {
        var template = Array("/tmp/margarine-memory.XXXXXX".utf8CString)
        root = try #require(mkdtemp(&template).map { String(cString: $0) })
        for (path, text) in files {
            let full = root + path
            try FileManager.default.createDirectory(
                atPath: String(full[..<full.lastIndex(of: "/")!]), withIntermediateDirectories: true)
            try (text + "\n").write(toFile: full, atomically: false, encoding: .utf8)
        }
    }
    deinit { try? FileManager.default.removeItem(atPath: root) }
}

private let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
private let meminfo = "MemTotal:       16384000 kB\nMemFree: 1 kB"

@Suite struct MemoryTests {
    @Test("row 22: the least limit of the groups above counts, in version 2") func version2() throws {
        let tree = try Tree([
            "/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/system.slice/margined.service",
            "/proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + unified,
            "/sys/fs/cgroup/system.slice/memory.max": "1073741824",
            "/sys/fs/cgroup/system.slice/memory.high": "max",
            "/sys/fs/cgroup/system.slice/margined.service/memory.max": "max",
            "/sys/fs/cgroup/system.slice/margined.service/memory.high": "2147483648",
        ])
        #expect(MemoryLimit.find(root: tree.root) == MemoryLimit(bytes: 1 << 30, source: "cgroup /system.slice"))
    }

    @Test("row 22: memory.high counts as memory.max does") func high() throws {
        let tree = try Tree([
            "/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/a", "/proc/self/mountinfo": unified,
            "/sys/fs/cgroup/a/memory.max": "536870912", "/sys/fs/cgroup/a/memory.high": "268435456",
        ])
        #expect(MemoryLimit.find(root: tree.root) == MemoryLimit(bytes: 256 << 20, source: "cgroup /a"))
    }

    @Test("row 22: limits of version 1, in a container that sees its own group as the root") func version1() throws {
        let mounts =
            "14 12 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
            + "15 12 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids"
        let files = [
            "/proc/meminfo": meminfo, "/proc/self/mountinfo": mounts,
            "/proc/self/cgroup": "5:pids:/docker/abc\n4:memory:/docker/abc\n0::/",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456",
        ]
        let limited = try Tree(files)
        #expect(MemoryLimit.find(root: limited.root) == MemoryLimit(bytes: 256 << 20, source: "cgroup /"))
        var nested = files
        nested["/proc/self/cgroup"] = "4:memory:/docker/abc/own\n0::/"
        nested["/sys/fs/cgroup/memory/own/memory.limit_in_bytes"] = "134217728"
        let inner = try Tree(nested)
        #expect(MemoryLimit.find(root: inner.root) == MemoryLimit(bytes: 128 << 20, source: "cgroup /own"))
        var unlimited = files
        unlimited["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712"
        let free = try Tree(unlimited)
        #expect(MemoryLimit.find(root: free.root).source == "this machine")
        // Their folders go with them.
        withExtendedLifetime((limited, inner, free)) {}
    }

    @Test("row 22: without cgroups the machine's memory is the limit, and nothing that can be read is none")
    func theMachine() throws {
        let tree = try Tree(["/proc/meminfo": meminfo])
        #expect(MemoryLimit.find(root: tree.root) == MemoryLimit(bytes: 16_384_000 << 10, source: "this machine"))
        #expect(MemoryLimit.find(root: "/nonexistent").bytes == .max)
        // What this machine says must be something.
        #expect(MemoryLimit.find().bytes > 64 << 20 && MemoryLimit.find().bytes < 1 << 50)
    }

    @Test(
        "row 22: defaults fit the memory, from 256 MiB on",
        arguments: [256, 300, 384, 512, 777, 1024, 2048, 4096, 1 << 20] as [UInt64])
    func defaultsFit(_ mebibytes: UInt64) throws {
        let limit = MemoryLimit(bytes: mebibytes << 20, source: "x")
        let settings = Settings().fitted(to: limit)
        #expect(settings.memoryInUseBytes(limit) <= limit.bytes / 8 * 7)
        #expect(settings.memoryWarning(limit) == nil)
        #expect(settings.dirtyMemoryBytes >= Settings.dirtyBytesPerLoop)
        if mebibytes >= 4096 {
            #expect(settings.memoryCacheBytes == 512 << 20 && settings.dirtyMemoryBytes == 512 << 20)
            #expect(settings.uploads == 4 && MemoryBudgets(limit).requestBytes == 512 << 20)
        }
        // They are what the keys themselves would take.
        var copy = Settings()
        for name in ["memory-cache", "dirty-memory", "uploads"] {
            let key = try #require(SettingKey.named(name))
            try key.set(.text(key.text(settings)), &copy)
        }
        #expect(copy == settings)
    }

    @Test("row 22: what is configured stays, and a warning says when it is too much") func configured() {
        let limit = MemoryLimit(bytes: 256 << 20, source: "cgroup /a")
        var settings = Settings()
        settings.memoryCacheBytes = 512 << 20
        let fitted = settings.fitted(to: limit)
        #expect(fitted.memoryCacheBytes == 512 << 20 && fitted.dirtyMemoryBytes == 40 << 20 && fitted.uploads == 1)
        let warning = fitted.memoryWarning(limit)
        #expect(
            warning?.contains("memory-cache (512M)") == true && warning?.contains("cgroup /a allows 256 MiB") == true)
    }
}
