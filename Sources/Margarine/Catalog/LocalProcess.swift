// This process as its heartbeat names it, and whether another one of this machine still runs. Reads /proc; not for use
// in a simulator, which passes its own `ProcessProbe`.

import Glibc
package import Runtime

package enum LocalProcess {
    /// The heartbeat of this process, to be written now and with a new `timeMs` ever after.
    package static func record(
        id: String, addresses: [String], environment: any Environment, freshForMs: Int64 = ServerRecord.freshMs,
        reading: [String] = []
    ) -> ServerRecord {
        ServerRecord(
            id: id, host: hostName(), bootID: bootID(), pid: getpid(), pidNamespace: pidNamespace(),
            startTicks: startTicks(of: getpid()) ?? 0, addresses: addresses, timeMs: environment.wallMs,
            freshForMs: freshForMs, reading: reading)
    }

    /// Whether the process of a heartbeat runs, as far as this machine can tell.
    package static func state(_ server: ServerRecord) -> ProcessState {
        guard !server.bootID.isEmpty, !server.pidNamespace.isEmpty, server.pid > 0, server.bootID == bootID(),
            server.pidNamespace == pidNamespace()
        else { return .outOfSight }
        if kill(server.pid, 0) != 0 && errno == ESRCH { return .gone }
        guard let ticks = startTicks(of: server.pid) else { return .outOfSight }
        return ticks == server.startTicks ? .running : .gone
    }

    package static func hostName() -> String {
        var buffer = [CChar](repeating: 0, count: 256)
        return gethostname(&buffer, buffer.count - 1) == 0 ? text(buffer) : "unknown"
    }

    private static func bootID() -> String { String(read("/proc/sys/kernel/random/boot_id").prefix { $0 != "\n" }) }

    private static func pidNamespace() -> String {
        var buffer = [CChar](repeating: 0, count: 256)
        return readlink("/proc/self/ns/pid", &buffer, buffer.count - 1) > 0 ? text(buffer) : ""
    }

    /// Field 22 of /proc/PID/stat (proc(5)); the name before it may hold blanks and brackets. A zombie counts as gone.
    static func startTicks(of pid: Int32) -> UInt64? {
        let stat = read("/proc/\(pid)/stat")
        guard let end = stat.lastIndex(of: ")") else { return nil }
        let fields = stat[end...].split(separator: " ")
        guard fields.count > 20, let ticks = UInt64(fields[20]) else { return nil }
        return fields[1] == "Z" || fields[1] == "X" ? 0 : ticks
    }

    private static func text(_ buffer: [CChar]) -> String {
        String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// The first 4 KiB of a file of /proc; empty when it cannot be read.
    private static func read(_ path: String) -> String {
        let fd = Glibc.open(path, O_RDONLY | O_CLOEXEC)
        if fd < 0 { return "" }
        defer { close(fd) }
        var buffer = [UInt8](repeating: 0, count: 4096)
        let count = Glibc.read(fd, &buffer, buffer.count)
        return count > 0 ? String(decoding: buffer[..<count], as: UTF8.self) : ""
    }
}
