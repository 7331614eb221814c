// What a scratch directory says of its server: the id it has in heads and heartbeats. Whoever has the directory is the
// server; a new directory is a new server.

internal import BlockCache
internal import Glibc
internal import Runtime

enum ServerFiles {
    /// The server's identity; made where the directory has none.
    static func identity(in directory: String, environment: any Environment) throws(DaemonError) -> ServerIdentity {
        let path = directory + "/server-id"
        let id: String
        var status = stat()
        if stat(path, &status) == 0 || errno != ENOENT {
            guard let found = read(path), ObjectID(found) != nil else {
                throw DaemonError(
                    "'\(path)' can't be read, or does not hold a server id: restore it, or use an empty scratch directory (and lose what only this one's journals hold)"
                )
            }
            id = found
        } else {
            id = ObjectID(high: environment.randomBits(), low: environment.randomBits()).description
            try write(id, to: path)
        }
        // Where the kernel does not say, no two starts are the same: every crash counts as a loss of power.
        let unknown = "unknown-\(environment.randomBits())-\(environment.wallMs)"
        return ServerIdentity(id: id, host: LocalProcess.hostName(), bootID: bootID() ?? unknown)
    }

    /// Of this start of the machine; nil where /proc does not say.
    static func bootID() -> String? { read("/proc/sys/kernel/random/boot_id") }

    /// Memory of this process that is in RAM, in bytes.
    static func residentBytes() -> UInt64 {
        guard let text = read("/proc/self/statm"),
            let pages = text.split(separator: " ").dropFirst().first.flatMap({ UInt64($0) })
        else { return 0 }
        return pages * UInt64(sysconf(Int32(_SC_PAGESIZE)))
    }

    private static func read(_ path: String) -> String? {
        let file = open(path, O_RDONLY | O_CLOEXEC)
        if file < 0 { return nil }
        defer { close(file) }
        var buffer = [UInt8](repeating: 0, count: 256)
        let count = Glibc.read(file, &buffer, buffer.count)
        if count <= 0 { return nil }
        return String(decoding: buffer[..<count].prefix { $0 != 10 }, as: UTF8.self)
    }

    /// Replaces a file, durably.
    private static func write(_ text: String, to path: String) throws(DaemonError) {
        let temporary = path + ".new"
        let file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard file >= 0 else { throw DaemonError("cannot write '\(path)': \(errnoText())") }
        let bytes = Array((text + "\n").utf8)
        let written = Glibc.write(file, bytes, bytes.count) == bytes.count && fsync(file) == 0
        close(file)
        guard written, rename(temporary, path) == 0 else { throw DaemonError("cannot write '\(path)': \(errnoText())") }
    }
}
