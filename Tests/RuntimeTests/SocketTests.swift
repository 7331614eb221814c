// Sockets over loopback and unix paths.

import Glibc
import Runtime
import Testing

@Suite struct SocketTests {
    /// The connection that `connect` made, at its other end.
    private func accept(_ listener: FileDescriptor) throws -> FileDescriptor {
        for _ in 0..<1_000 {
            if case .connection(let descriptor) = Sockets.accept(listener) { return descriptor }
            usleep(1_000)
        }
        throw SocketError(errno: ETIMEDOUT, description: "nobody connected")
    }

    private func receive(_ descriptor: FileDescriptor, _ count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        for _ in 0..<1_000 {
            if case .bytes(let received) = bytes.withUnsafeMutableBytes({ Sockets.receive(descriptor.raw, into: $0) }) {
                return Array(bytes.prefix(received))
            }
            usleep(1_000)
        }
        return []
    }

    @Test(arguments: ["127.0.0.1", "localhost"]) func bytesGoBothWaysOverTCP(_ host: String) throws {
        let listener = try #require(try Sockets.listen(.tcp(host: host, port: 0)).first)
        guard case .wouldBlock = Sockets.accept(listener) else {
            return #expect(Bool(false), "nobody has connected yet")
        }
        let port = try #require(Sockets.localPort(listener))
        #expect(port != 0)
        // The first listener is of the first address, as is the client's.
        let client = try Sockets.connect(.tcp(host: host, port: port))
        let server = try accept(listener)
        #expect(Sockets.connectError(client) == 0)
        Sockets.tune(server)
        for option in [TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT] {
            var value: Int32 = 0
            var length = socklen_t(4)
            #expect(getsockopt(server.raw, Int32(IPPROTO_TCP), option, &value, &length) == 0)
            let expected: [Int32: Int32] = [
                TCP_NODELAY: 1, TCP_KEEPIDLE: 10, TCP_KEEPINTVL: 5, TCP_KEEPCNT: 3, TCP_USER_TIMEOUT: 25_000,
            ]
            #expect(value == expected[option])
        }
        let clientPort = try #require(Sockets.localPort(client))
        #expect(["127.0.0.1:\(clientPort)", "[::1]:\(clientPort)"].contains(Peer(server).name))
        #expect(["127.0.0.1", "::1"].contains(Peer(server).host))
        for fd in [listener.raw, server.raw, client.raw] {
            #expect(fcntl(fd, F_GETFD) & FD_CLOEXEC != 0)
            #expect(fcntl(fd, F_GETFL) & O_NONBLOCK != 0)
        }

        var one: [UInt8] = [1, 2, 3]
        var two: [UInt8] = [4, 5]
        one.withUnsafeMutableBytes { one in
            two.withUnsafeMutableBytes { two in
                var vectors = [
                    iovec(iov_base: one.baseAddress, iov_len: one.count),
                    iovec(iov_base: two.baseAddress, iov_len: two.count),
                ]
                #expect(vectors.withUnsafeMutableBufferPointer { Sockets.send(client.raw, $0) } == .bytes(5))
            }
        }
        #expect(receive(server, 100) == [1, 2, 3, 4, 5])
        #expect([7].withUnsafeBytes { Sockets.send(server.raw, $0) } == .bytes(8))
        #expect(receive(client, 100) == [7, 0, 0, 0, 0, 0, 0, 0])

        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        defer { memory.deallocate() }
        #expect(Sockets.receive(server.raw, into: memory) == .wouldBlock)
        // A peer that does not read makes us wait, after some bytes.
        var result = IOResult.bytes(1)
        for _ in 0..<10_000 where result != .wouldBlock {
            result = Sockets.send(server.raw, UnsafeRawBufferPointer(memory))
        }
        #expect(result == .wouldBlock)

        Sockets.shutdownSending(client.raw)
        usleep(10_000)
        #expect(Sockets.receive(server.raw, into: memory) == .closed)
        client.close()
        usleep(10_000)
        // A reset by the closed peer, and no SIGPIPE.
        var broken: [IOResult] = []
        for _ in 0..<3 { broken.append(Sockets.send(server.raw, UnsafeRawBufferPointer(memory))) }
        #expect(broken.last == .failed(EPIPE) || broken.last == .failed(ECONNRESET))
    }

    @Test func aTakenPortIsAnErrorThatNamesIt() throws {
        let listener = try Sockets.listen(.tcp(host: "127.0.0.1", port: 0))[0]
        let port = try #require(Sockets.localPort(listener))
        let error = #expect(throws: SocketError.self) { try Sockets.listen(.tcp(host: "127.0.0.1", port: port)) }
        #expect(error?.errno == EADDRINUSE)
        #expect(error?.description == "bind 127.0.0.1:\(port): Address already in use")
        #expect(throws: SocketError.self) { try Sockets.listen(.tcp(host: "no.such.host.invalid", port: 0)) }
        // 192.0.2.0/24 is nobody's address.
        #expect(throws: SocketError.self) { try Sockets.listen(.tcp(host: "192.0.2.7", port: 0)) }
    }

    @Test func anEmptyHostIsEveryAddressWithOnePort() throws {
        let listeners = try Sockets.listen(.tcp(host: "", port: 0))
        let ports = Set(listeners.map { Sockets.localPort($0) })
        #expect(ports.count == 1)
        let client = try Sockets.connect(.tcp(host: "127.0.0.1", port: try #require(ports.first ?? nil)))
        usleep(10_000)
        #expect(Sockets.connectError(client) == 0)
        withExtendedLifetime(listeners) {}
    }

    @Test func nobodyListeningIsToldByTheConnection() async throws {
        let port = try #require(Sockets.localPort(try Sockets.listen(.tcp(host: "127.0.0.1", port: 0))[0]))
        let refused: Int32
        do throws(SocketError) {
            let client = try Sockets.connect(.tcp(host: "127.0.0.1", port: port))
            usleep(10_000)
            refused = Sockets.connectError(client)
        } catch { refused = error.errno }
        #expect(refused == ECONNREFUSED)
        #expect(throws: SocketError.self) { try Sockets.connect(.unix(path: "/nonexistent/socket")) }
    }

    @Test func limitsCountByAddressOrNetwork() {
        #expect(Peer.network("192.0.2.7") == "192.0.2.7")
        #expect(Peer.network("2001:db8:1:2:3:4:5:6") == Peer.network("2001:db8:1:2::9"))
        #expect(Peer.network("2001:db8:1:2::9") != Peer.network("2001:db8:1:3::9"))
        #expect(Peer.network("fe80::1%eth0") == "fe80000000000000::/64")
    }

    @Test func unixSocketsAreReplacedOnlyWhenStale() async throws {
        try await withFolder { folder in
            let endpoint = Endpoint.unix(path: folder + "/s")
            var listener: FileDescriptor? = try Sockets.listen(endpoint)[0]
            var status = stat()
            #expect(stat(folder + "/s", &status) == 0 && status.st_mode & 0o777 == 0o600)
            let client = try Sockets.connect(endpoint)
            let server = try accept(listener!)
            #expect(Peer(server).name == "unix:pid \(getpid())")
            let peer = Peer(server)
            #expect(peer.host.hasPrefix("unix:pid \(getpid())@") && peer.isProcess && peer.group == peer.host)
            #expect(Sockets.localPort(server) == nil)
            Sockets.tune(server)
            #expect([1, 2].withUnsafeBytes { Sockets.send(client.raw, $0) } == .bytes(16))
            #expect(receive(server, 100).count == 16)

            let busy = #expect(throws: SocketError.self) { try Sockets.listen(endpoint) }
            #expect(busy?.description.contains("another process listens there") == true)
            listener = nil
            listener = try Sockets.listen(endpoint)[0]
            _ = try Sockets.connect(endpoint)
            _ = try accept(listener!)

            close(open(folder + "/file", O_CREAT | O_WRONLY, 0o600))
            let file = #expect(throws: SocketError.self) { try Sockets.listen(.unix(path: folder + "/file")) }
            #expect(file?.description.contains("no socket") == true)
            #expect(access(folder + "/file", F_OK) == 0)
            #expect(throws: SocketError.self) { try Sockets.listen(.unix(path: String(repeating: "x", count: 108))) }
        }
    }

    @Test("row 36: only one's own unix socket is removed, also when its number is given out again")
    func aSocketFileOfAnotherIsLeftAlone() async throws {
        try await withFolder { folder in
            let path = folder + "/s"
            let (first, file) = try Sockets.listen(unix: path)
            // Somebody took the path: the name goes, and another socket has it.
            unlink(path)
            let (second, own) = try Sockets.listen(unix: path)
            file.remove()
            _ = try Sockets.connect(.unix(path: path))
            first.close()
            own.remove()
            #expect(access(path, F_OK) != 0)
            second.close()
        }
    }

    @Test("row 36: of many that find a dead socket one takes its path, and nobody takes a living one's")
    func aRaceForADeadSocket() async throws {
        try await withFolder { folder in
            for round in 0..<30 {
                let path = folder + "/\(round)"
                try Sockets.listen(.unix(path: path))[0].close()
                let winners = await withTaskGroup(of: (FileDescriptor, SocketFile)?.self) { group in
                    for _ in 0..<8 { group.addTask { try? Sockets.listen(unix: path) } }
                    var winners: [(FileDescriptor, SocketFile)] = []
                    for await one in group { if let one { winners.append(one) } }
                    return winners
                }
                #expect(winners.count == 1)
                let client = try Sockets.connect(.unix(path: path))
                _ = try accept(winners[0].0)
                client.close()
            }
        }
    }

    @Test("row 36: a path is taken and given up only under the lock of its folder")
    func pathsAreTakenUnderALock() async throws {
        try await withFolder { folder in
            let path = folder + "/s"
            func whileLocked(_ body: @escaping @Sendable () throws -> Void) async throws {
                let lock = open(folder, O_RDONLY | O_DIRECTORY)
                #expect(flock(lock, LOCK_EX) == 0)
                let isDone = Shared(false)
                let started = startDetachedThread(name: "r36") {
                    try? body()
                    isDone.update { $0 = true }
                }
                #expect(started)
                // Not a task's sleep, which many tests beside this one may stretch past the time that a lock is waited for.
                usleep(300_000)
                #expect(!isDone.value)
                close(lock)
                for _ in 0..<500 where !isDone.value { try await Task.sleep(for: .milliseconds(10)) }
                #expect(isDone.value)
            }
            let bound = Shared<(FileDescriptor, SocketFile)?>(nil)
            try await whileLocked {
                let made = try Sockets.listen(unix: path)
                bound.update { $0 = (made.socket, made.file) }
            }
            let (socket, file) = try #require(bound.value)
            try await whileLocked { file.remove() }
            #expect(access(path, F_OK) != 0)
            socket.close()
        }
    }

    @Test func addressesAreReadAsPeopleWriteThem() {
        #expect(Endpoint("127.0.0.1:10809") == .tcp(host: "127.0.0.1", port: 10809))
        #expect(Endpoint(":10809") == .tcp(host: "", port: 10809))
        #expect(Endpoint("[::1]:5") == .tcp(host: "::1", port: 5))
        #expect(Endpoint("unix:/run/x.sock") == .unix(path: "/run/x.sock"))
        #expect(Endpoint("/run/x.sock") == .unix(path: "/run/x.sock"))
        #expect(Endpoint("/" + String(repeating: "x", count: 106)) != nil)
        for bad in [
            "", "host", "host:", "host:65536", "host:-1", "::1:5", "unix:", "/" + String(repeating: "x", count: 107),
        ] {
            #expect(Endpoint(bad) == nil, "\(bad)")
        }
        #expect("\(Endpoint.tcp(host: "::1", port: 5))" == "[::1]:5")
    }

    @Test func aDescriptorIsClosedOnce() throws {
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        let first = FileDescriptor(owning: ends[0])
        _ = FileDescriptor(owning: ends[1])  // closed here
        #expect(fcntl(ends[1], F_GETFD) == -1)
        first.close()
        #expect(first.raw == -1)
        // The number goes to somebody else, whom a second close must not hit.
        let other = open("/dev/null", O_RDONLY)
        first.close()
        #expect(fcntl(other, F_GETFD) >= 0)
        close(other)
    }
}
