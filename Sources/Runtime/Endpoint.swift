// Where a server listens: a TCP address or the path of a unix socket.

/// An address as people write it: `host:port`, `[::1]:port`, `:port` (every address), `unix:/path` or `/path`.
public enum Endpoint: Sendable, Hashable, CustomStringConvertible {
    /// An empty host is every address of this machine; port 0 lets the kernel choose.
    case tcp(host: String, port: UInt16)
    case unix(path: String)

    /// nil where `text` is no address.
    public init?(_ text: String) {
        if text.hasPrefix("/") {
            self = .unix(path: text)
        } else if text.hasPrefix("unix:") {
            self = .unix(path: String(text.dropFirst(5)))
        } else {
            guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[text.index(after: colon)...]) else {
                return nil
            }
            var host = text[..<colon]
            if host.hasPrefix("["), host.hasSuffix("]") {
                host = host.dropFirst().dropLast()
            } else if host.contains(":") {
                return nil  // an IPv6 address needs its brackets: where would its port begin?
            }
            self = .tcp(host: String(host), port: port)
        }
        if case .unix(let path) = self, path.isEmpty || path.utf8.count > Endpoint.longestPath { return nil }
    }

    /// Bytes of a unix socket's path (sockaddr_un less its terminating zero).
    public static let longestPath = 107

    public var description: String {
        switch self {
        case .tcp(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        case .unix(let path): "unix:\(path)"
        }
    }
}
