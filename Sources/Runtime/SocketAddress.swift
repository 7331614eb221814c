// A kernel socket address of any family.

import Glibc

struct SocketAddress {
    private var storage = sockaddr_storage()
    private var length: socklen_t = 0

    /// What getsockname or getpeername fills in; nil where it fails.
    init?(_ fill: (UnsafeMutablePointer<sockaddr>, UnsafeMutablePointer<socklen_t>) -> Int32) {
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let result = withUnsafeMutablePointer(to: &storage) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { fill($0, &length) }
        }
        guard result == 0 else { return nil }
        self.length = length
    }

    init(unixPath path: String) throws(SocketError) {
        let bytes = Array(path.utf8)
        guard !bytes.isEmpty, bytes.count <= Endpoint.longestPath, !bytes.contains(0) else {
            throw SocketError(
                errno: ENAMETOOLONG,
                description: "unix:\(path): a socket path has 1 to \(Endpoint.longestPath) bytes; use a shorter one")
        }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
        withUnsafeMutableBytes(of: &storage) { target in
            withUnsafeBytes(of: &address) { target.copyMemory(from: $0) }
        }
        length = socklen_t(MemoryLayout<sockaddr_un>.size)
    }

    private init(_ pointer: UnsafePointer<sockaddr>, _ length: socklen_t) {
        withUnsafeMutableBytes(of: &storage) {
            $0.copyMemory(from: UnsafeRawBufferPointer(start: pointer, count: Int(length)))
        }
        self.length = length
    }

    /// The addresses of a host; with `passive` and no host, those that stand for every address. Never empty.
    static func resolve(host: String, port: UInt16, passive: Bool) throws(SocketError) -> [SocketAddress] {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0)
        var first: UnsafeMutablePointer<addrinfo>?
        let error = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &first)
        defer { if let first { freeaddrinfo(first) } }
        var found: [SocketAddress] = []
        var next = error == 0 ? first : nil
        while let info = next?.pointee {
            if let address = info.ai_addr { found.append(SocketAddress(address, info.ai_addrlen)) }
            next = info.ai_next
        }
        guard !found.isEmpty else {
            throw SocketError(
                errno: EADDRNOTAVAIL,
                description: "host \(host) has no address: \(String(cString: gai_strerror(error)))")
        }
        return found
    }

    var family: Int32 { Int32(storage.ss_family) }

    func withPointer<R>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> R) -> R {
        withUnsafePointer(to: storage) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, length) }
        }
    }

    /// The numeric IP address, without port; nil on a unix socket.
    var host: String? {
        guard family == AF_INET || family == AF_INET6 else { return nil }
        return withUnsafeTemporaryAllocation(of: CChar.self, capacity: Int(NI_MAXHOST)) { text in
            let error = withPointer {
                getnameinfo($0, $1, text.baseAddress, socklen_t(text.count), nil, 0, Int32(NI_NUMERICHOST))
            }
            return error == 0 ? String(cString: text.baseAddress!) : nil
        }
    }

    /// nil on a unix socket.
    var port: UInt16? {
        guard family == AF_INET || family == AF_INET6 else { return nil }
        return withPortPlace { UInt16(bigEndian: $0.loadUnaligned(as: UInt16.self)) }
    }

    func withPort(_ port: UInt16) -> SocketAddress {
        var changed = self
        withUnsafeMutableBytes(of: &changed.storage) {
            $0.storeBytes(of: port.bigEndian, toByteOffset: SocketAddress.portOffset, as: UInt16.self)
        }
        return changed
    }

    /// The same in sockaddr_in and sockaddr_in6.
    private static let portOffset = 2
    private func withPortPlace<R>(_ body: (UnsafeRawBufferPointer) -> R) -> R {
        withUnsafeBytes(of: storage) { body(UnsafeRawBufferPointer(rebasing: $0[SocketAddress.portOffset..<4])) }
    }
}
