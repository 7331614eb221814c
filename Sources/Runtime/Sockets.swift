// Stream sockets: listening, accepting, receiving, sending. Every descriptor is non-blocking and close-on-exec.
//
// Setting up throws, with a message for people. The hot path (accept, receive, send) returns what happened and never
// throws; EINTR is handled here.

import CLinux
public import Glibc

/// What came of receiving or sending.
public enum IOResult: Sendable, Equatable {
    case bytes(Int)
    /// Nothing now: wait for `ready`.
    case wouldBlock
    /// receive: the peer has closed its side.
    case closed
    /// Broken, with the errno.
    case failed(Int32)
}

/// What came of accepting.
public enum AcceptResult: Sendable {
    case connection(FileDescriptor)
    case wouldBlock
    /// With the errno. Of those, EMFILE, ENFILE, ENOBUFS and ENOMEM last: pause before the next try.
    case failed(Int32)
}

public enum Sockets {
    private static let flags =
        Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue)

    // MARK: Setting up

    /// Listening sockets for `endpoint`, one for each of the addresses it stands for (with the same port).
    ///
    /// A unix socket gets `mode` (less the umask). One left behind by a dead process is replaced; one on which somebody
    /// listens is an error, and so is another kind of file.
    public static func listen(_ endpoint: Endpoint, backlog: Int32 = 1024, mode: mode_t = 0o600) throws(SocketError)
        -> [FileDescriptor]
    {
        switch endpoint {
        case .tcp(let host, let port): return try listenTCP(host, port, endpoint, backlog)
        case .unix(let path): return [try listen(unix: path, backlog: backlog, mode: mode).socket]
        }
    }

    private static func listenTCP(_ host: String, _ port: UInt16, _ endpoint: Endpoint, _ backlog: Int32)
        throws(SocketError)
        -> [FileDescriptor]
    {
        var listeners: [FileDescriptor] = []
        var failure: SocketError?
        for address in try SocketAddress.resolve(host: host, port: port, passive: true) {
            // With port 0, the first address chooses for the others.
            let address = address.withPort(listeners.first.flatMap { localPort($0) } ?? port)
            let fd = socket(address.family, flags, 0)
            if fd < 0 {
                failure = SocketError(errno, "socket", "\(endpoint)")  // IPv6 may be switched off
                continue
            }
            let descriptor = FileDescriptor(owning: fd)
            set(fd, SOL_SOCKET, SO_REUSEADDR, 1)
            if address.family == AF_INET6 { set(fd, Int32(IPPROTO_IPV6), IPV6_V6ONLY, 1) }
            guard address.withPointer({ bind(fd, $0, $1) }) == 0 else {
                if errno == EADDRNOTAVAIL, host.isEmpty || host == "localhost" {
                    failure = SocketError(errno, "bind", "\(endpoint)")
                    continue
                }
                throw SocketError(errno, "bind", "\(endpoint)")
            }
            guard Glibc.listen(fd, backlog) == 0 else { throw SocketError(errno, "listen", "\(endpoint)") }
            listeners.append(descriptor)
        }
        if listeners.isEmpty, let failure { throw failure }
        return listeners
    }

    /// A listening unix socket, and its file, which is to be removed before the socket is closed.
    public static func listen(unix path: String, backlog: Int32 = 1024, mode: mode_t = 0o600) throws(SocketError)
        -> (socket: FileDescriptor, file: SocketFile)
    {
        let endpoint = Endpoint.unix(path: path)
        let address = try SocketAddress(unixPath: path)
        let fd = socket(AF_UNIX, flags, 0)
        guard fd >= 0 else { throw SocketError(errno, "socket", "\(endpoint)") }
        let descriptor = FileDescriptor(owning: fd)
        _ = fchmod(fd, mode)  // before bind, so that nobody can connect in between
        // Till it listens: before that, another process would take it for a dead one's.
        let lock = FolderLock(of: path)
        defer { withExtendedLifetime(lock) {} }
        var result = address.withPointer { bind(fd, $0, $1) }
        if result < 0, errno == EADDRINUSE {
            try removeStale(path, address, endpoint)
            result = address.withPointer { bind(fd, $0, $1) }
        }
        guard result == 0 else { throw SocketError(errno, "bind", "\(endpoint)") }
        guard let file = SocketFile(path) else { throw SocketError(ENOENT, "bind", "\(endpoint)") }
        guard Glibc.listen(fd, backlog) == 0 else { throw SocketError(errno, "listen", "\(endpoint)") }
        return (descriptor, file)
    }

    /// Removes a socket on which nobody listens.
    private static func removeStale(_ path: String, _ address: SocketAddress, _ endpoint: Endpoint) throws(SocketError)
    {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else {
            throw SocketError(
                errno: EADDRINUSE, description: "bind \(endpoint): the path exists and is no socket; remove it")
        }
        let probe = socket(AF_UNIX, flags, 0)
        guard probe >= 0 else { throw SocketError(errno, "socket", "\(endpoint)") }
        defer { close(probe) }
        let connected = address.withPointer { Glibc.connect(probe, $0, $1) }
        guard connected < 0, errno == ECONNREFUSED else {
            throw SocketError(
                errno: EADDRINUSE,
                description: "bind \(endpoint): another process listens there; stop it or use another path")
        }
        unlink(path)
    }

    /// A socket that is connected or, with TCP, being connected: watch it for `.writable`, then ask `connectError`.
    /// With several addresses for a host, the first.
    public static func connect(_ endpoint: Endpoint) throws(SocketError) -> FileDescriptor {
        let address: SocketAddress
        switch endpoint {
        case .tcp(let host, let port):
            address = try SocketAddress.resolve(host: host, port: port, passive: false)[0]
        case .unix(let path): address = try SocketAddress(unixPath: path)
        }
        let fd = socket(address.family, flags, 0)
        guard fd >= 0 else { throw SocketError(errno, "socket", "\(endpoint)") }
        let descriptor = FileDescriptor(owning: fd)
        if address.withPointer({ Glibc.connect(fd, $0, $1) }) < 0, errno != EINPROGRESS, errno != EINTR {
            throw SocketError(errno, "connect", "\(endpoint)")
        }
        return descriptor
    }

    /// The errno of a connection that could not be made; 0 where it stands.
    public static func connectError(_ descriptor: FileDescriptor) -> Int32 {
        var error: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        return getsockopt(descriptor.raw, SOL_SOCKET, SO_ERROR, &error, &length) < 0 ? errno : error
    }

    /// For blocking clients (the control socket's): reads and writes then wait.
    public static func setBlocking(_ descriptor: FileDescriptor, _ isBlocking: Bool) {
        let flags = fcntl(descriptor.raw, F_GETFL)
        _ = fcntl(descriptor.raw, F_SETFL, isBlocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK)
    }

    // MARK: Options and addresses

    /// What a served TCP connection wants: no delay of small replies, a dead peer noticed within `deadAfterMs` (by
    /// keepalive when idle, by TCP_USER_TIMEOUT when data is unacknowledged). Nothing on a unix socket.
    public static func tune(_ descriptor: FileDescriptor, deadAfterMs: Int32 = 25_000) {
        let fd = descriptor.raw
        let tcp = Int32(IPPROTO_TCP)
        guard set(fd, tcp, TCP_NODELAY, 1) else { return }
        set(fd, SOL_SOCKET, SO_KEEPALIVE, 1)
        set(fd, tcp, TCP_KEEPIDLE, 10)
        set(fd, tcp, TCP_KEEPINTVL, 5)
        set(fd, tcp, TCP_KEEPCNT, 3)
        set(fd, tcp, TCP_USER_TIMEOUT, deadAfterMs)
    }

    @discardableResult
    private static func set(_ fd: Int32, _ level: Int32, _ option: Int32, _ value: Int32) -> Bool {
        var value = value
        return setsockopt(fd, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) == 0
    }

    /// The last `count` bytes of those that have arrived and were not read, or as many as there are. nil: there are too many to
    /// look at. Copies them all.
    public static func peekEnd(_ fd: Int32, _ count: Int) -> [UInt8]? {
        let arrived = arrivedBytes(fd)
        if arrived > 16 << 20 { return nil }
        let room = UnsafeMutableRawBufferPointer.allocate(byteCount: max(arrived, 1), alignment: 16)
        defer { room.deallocate() }
        let peeked = recv(fd, room.baseAddress, arrived, Int32(MSG_PEEK) | Int32(MSG_DONTWAIT))
        return Array(room[..<max(0, peeked)].suffix(count))
    }

    /// The TCP port that a socket is bound to; nil on a unix socket.
    public static func localPort(_ descriptor: FileDescriptor) -> UInt16? {
        SocketAddress { getsockname(descriptor.raw, $0, $1) }?.port
    }

    // MARK: Hot path

    /// The next waiting connection.
    public static func accept(_ listener: FileDescriptor) -> AcceptResult {
        let fd = mg_accept(listener.raw)
        if fd >= 0 { return .connection(FileDescriptor(owning: fd)) }
        return fd == -EAGAIN ? .wouldBlock : .failed(-fd)
    }

    /// What has arrived, as much as `buffer` (not empty) takes.
    public static func receive(_ fd: Int32, into buffer: UnsafeMutableRawBufferPointer) -> IOResult {
        while true {
            let count = recv(fd, buffer.baseAddress, buffer.count, 0)
            if count > 0 { return .bytes(count) }
            if count == 0 { return .closed }
            if errno == EINTR { continue }
            return errno == EAGAIN ? .wouldBlock : .failed(errno)
        }
    }

    /// Sends from the vectors (at most 1024), as much as the socket takes; a broken connection raises no SIGPIPE. With
    /// `more`, the kernel may wait for a following send before it sends a last, short packet.
    public static func send(_ fd: Int32, _ vectors: UnsafeMutableBufferPointer<iovec>, more: Bool = false) -> IOResult {
        var message = msghdr()
        message.msg_iov = vectors.baseAddress
        message.msg_iovlen = min(vectors.count, 1024)
        let flags = Int32(MSG_NOSIGNAL) | (more ? Int32(MSG_MORE) : 0)
        while true {
            let count = sendmsg(fd, &message, flags)
            if count >= 0 { return .bytes(count) }
            if errno == EINTR { continue }
            return errno == EAGAIN ? .wouldBlock : .failed(errno)
        }
    }

    /// Sends one buffer, as much as the socket takes.
    public static func send(_ fd: Int32, _ buffer: UnsafeRawBufferPointer, more: Bool = false) -> IOResult {
        let flags = Int32(MSG_NOSIGNAL) | (more ? Int32(MSG_MORE) : 0)
        while true {
            let count = Glibc.send(fd, buffer.baseAddress, buffer.count, flags)
            if count >= 0 { return .bytes(count) }
            if errno == EINTR { continue }
            return errno == EAGAIN ? .wouldBlock : .failed(errno)
        }
    }

    /// Bytes that have arrived and were not received.
    public static func arrivedBytes(_ fd: Int32) -> Int {
        var count: Int32 = 0
        let result = ioctl(fd, UInt(FIONREAD), &count)
        precondition(result == 0, "FIONREAD: \(errnoText(errno))")
        return Int(count)
    }

    /// Says that nothing more will be sent; the peer's receive ends.
    public static func shutdownSending(_ fd: Int32) { _ = shutdown(fd, Int32(SHUT_WR)) }
}
