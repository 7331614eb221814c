// Who is at the other end of a stream socket: what tells one client from another, and whom a limit is counted against.

import CLinux
import Glibc
import Synchronization

/// The other end of a connected socket.
public struct Peer: Sendable, Hashable {
    /// For people: `127.0.0.1:40112`, `[::1]:40112`, `unix:pid 812`.
    public var name: String
    /// Differs wherever the client does, as far as the kernel can tell: the IP address; on a unix socket the process, by its
    /// number and the time of its start.
    public var host: String
    /// Limits count by this: the IPv4 address, the network of 64 bits of an IPv6 address; on a unix socket the process.
    public var group: String
    /// Connections of equal `host` are one process.
    public var isProcess: Bool

    public init(_ descriptor: FileDescriptor) {
        guard let address = SocketAddress({ getpeername(descriptor.raw, $0, $1) }) else {
            self.init(name: "unknown", host: "unknown", group: "unknown", isProcess: false)
            return
        }
        guard let host = address.host, let port = address.port else {
            self.init(process: descriptor)
            return
        }
        self.init(
            name: Endpoint.tcp(host: host, port: port).description, host: host, group: Peer.network(host),
            isProcess: false)
    }

    init(name: String, host: String, group: String, isProcess: Bool) {
        self.name = name
        self.host = host
        self.group = group
        self.isProcess = isProcess
    }

    private static let unseen = Atomic<UInt64>(0)

    private init(process descriptor: FileDescriptor) {
        var uid: UInt32 = 0
        let pid = mg_peer_process(descriptor.raw, &uid)
        guard pid > 0 else {
            // In a PID namespace beside ours: two of them cannot be told to be one client, so they are not.
            let number = Peer.unseen.add(1, ordering: .relaxed).newValue
            let user = "unix:uid \(uid)"
            self.init(name: user, host: "unix:unseen \(number)", group: user, isProcess: false)
            return
        }
        // A process that has ended already has no start any more: it is nobody that a later connection could be.
        let host = "unix:pid \(pid)" + (Peer.startTicks(pid).map { "@\($0)" } ?? "")
        self.init(name: "unix:pid \(pid)", host: host, group: host, isProcess: true)
    }

    /// Whoever has one address of a network of 64 bits mostly has all of them.
    public static func network(_ host: String) -> String {
        var address = in6_addr()
        guard host.contains(":"), inet_pton(AF_INET6, String(host.prefix { $0 != "%" }), &address) == 1 else {
            return host
        }
        let bytes = withUnsafeBytes(of: &address) { Array($0.prefix(8)) }
        return bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined() + "::/64"
    }

    /// When a process began, in ticks since the boot; nil where it is gone or hidden.
    private static func startTicks(_ pid: Int32) -> UInt64? {
        let fd = open("/proc/\(pid)/stat", O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { return nil }
        defer { close(fd) }
        return withUnsafeTemporaryAllocation(byteCount: 1024, alignment: 1) { room -> UInt64? in
            let count = read(fd, room.baseAddress, room.count)
            guard count > 0 else { return nil }
            // The name stands in parentheses and may hold any character; the 22nd field is the 20th behind it.
            let text = String(decoding: room[..<count], as: UTF8.self)
            guard let end = text.lastIndex(of: ")") else { return nil }
            let fields = text[text.index(after: end)...].split(separator: " ")
            return fields.count > 19 ? UInt64(fields[19]) : nil
        }
    }
}
