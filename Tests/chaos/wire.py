"""What the clients of the chaos run need of NBD: the handshake, a relay that reconnects, and the netlink of nbd.ko.

The relay stands between a client that gives up when its connection is lost (nbdfuse) and the server. It does what nbd.ko
does: a lost connection is made again under the same session, and what had no reply is sent again, in the order it came.

    wire.py relay SOCKET HOST PORT EXPORT SECONDS   serves SOCKET; gives up when refused, or after SECONDS without a server
"""
import os
import socket
import struct
import sys
import threading
import time

REPLY_MAGIC, IHAVEOPT = 0x3E889045565A9, b"IHAVEOPT"
READ, WRITE, DISC = 0, 1, 2


class Refused(Exception):
    """The server says that this export is not to be had."""


def exactly(s, n):
    out = bytearray()
    while len(out) < n:
        piece = s.recv(n - len(out))
        if not piece:
            raise ConnectionError("closed")
        out += piece
    return bytes(out)


def connect(host, port, export, timeout=10):
    """A connection in its transmission phase: (socket, size, flags)."""
    s = socket.create_connection((host, port), timeout=timeout)
    try:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A server whose reset was lost is found out by keep-alive: who only waits for replies sends nothing that it could refuse.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 5)):
            s.setsockopt(socket.IPPROTO_TCP, option, value)
        magic, option, flags = struct.unpack(">8s8sH", exactly(s, 18))
        if magic != b"NBDMAGIC" or option != IHAVEOPT:
            raise ConnectionError("not an NBD server")
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + b"\0\0"
        s.sendall(struct.pack(">I", flags & 3) + IHAVEOPT + struct.pack(">II", 7, len(data)) + data)
        size = transmission = None
        while True:
            _, _, kind, length = struct.unpack(">QIII", exactly(s, 20))
            body = exactly(s, length)
            if kind == 1:
                s.settimeout(None)
                return s, size, transmission
            if kind >> 31:
                # A server that shuts down, or cannot have the disk just now, may be asked again.
                text = body.decode(errors="replace")
                raise (ConnectionError if kind in (0x80000004, 0x80000007) else Refused)(f"{kind:#x} {text}")
            if kind == 3 and body[:2] == b"\0\0":
                size, transmission = struct.unpack(">QH", body[2:12])
    except BaseException:
        s.close()
        raise


def connect_again(host, port, export, seconds, over=lambda: False):
    """Tries until the server is there; None when it refuses, or is not there in time, or when it is over."""
    end = time.monotonic() + seconds
    patience = min(end, time.monotonic() + 5)
    while True:
        try:
            return connect(host, port, export)
        except Refused as e:
            # The owner before may still count as alive for a moment; a disk that went back stays refused.
            if "can't go on" in str(e) or time.monotonic() > patience:
                print(f"refused: {e}", flush=True)
                return None
        except OSError:
            pass
        if over() or time.monotonic() > end:
            print("no server", flush=True)
            return None
        time.sleep(0.03)


class Relay:
    """One connection of the client, and as many as it takes, one after another, to the server."""

    def __init__(self, client, host, port, export, seconds):
        self.client, self.where, self.seconds = client, (host, port, export), seconds
        self.lock = threading.Lock()
        self.waiting = {}          # cookie: the request's bytes, in the order they came
        self.server, self.turn = None, 0

    def serve(self):
        up = connect_again(*self.where, self.seconds)
        if up is None:
            return self.client.close()
        self.server, size, flags = up
        try:
            self._answer_handshake(size, flags)
        except OSError:
            self.server.close()
            return self.client.close()
        threading.Thread(target=self._replies, args=(self.server, 0), daemon=True).start()
        try:
            while True:
                header = exactly(self.client, 28)
                _, _, command, cookie, _, length = struct.unpack(">IHHQQI", header)
                whole = header + (exactly(self.client, length) if command == WRITE else b"")
                with self.lock:
                    if command != DISC:
                        self.waiting[cookie] = whole
                    try:
                        self.server.sendall(whole)
                    except OSError:
                        pass      # the other thread sees the end as well, and sends it again
                if command == DISC:
                    return
        except OSError:
            pass                  # the client is gone, and not by DISC: neither is it to the server
        finally:
            if not self.waiting:
                time.sleep(0.01)
            for s in (self.client, self.server):
                try:
                    s.close()
                except OSError:
                    pass

    def _answer_handshake(self, size, flags):
        c = self.client
        c.sendall(b"NBDMAGIC" + IHAVEOPT + struct.pack(">H", 3))
        exactly(c, 4)
        while True:
            _, option, length = struct.unpack(">8sII", exactly(c, 16))
            exactly(c, length)

            def reply(kind, body=b""):
                c.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(body)) + body)

            if option in (6, 7):
                reply(3, struct.pack(">HQH", 0, size, flags))
                reply(1)
                if option == 7:
                    return
            elif option == 2:
                reply(1)
                raise ConnectionError("aborted")
            else:
                reply(0x80000001)

    def _replies(self, server, turn):
        while True:
            try:
                head = exactly(server, 16)
                _, error, cookie = struct.unpack(">IIQ", head)
                with self.lock:
                    request = self.waiting[cookie]
                command, length = struct.unpack_from(">H", request, 6)[0], struct.unpack_from(">I", request, 24)[0]
                whole = head + (exactly(server, length) if command == READ and not error else b"")
            except OSError:
                server = self._again(server)
                if server is None:
                    try:
                        self.client.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass
                    return
                continue
            with self.lock:
                del self.waiting[cookie]
            try:
                self.client.sendall(whole)
            except OSError:
                return

    def _again(self, old):
        """The server's connection is lost: another one, with all that had no reply."""
        old.close()
        while True:
            up = connect_again(*self.where, self.seconds)
            if up is None:
                return None
            with self.lock:
                self.server = up[0]
                try:
                    for request in self.waiting.values():
                        self.server.sendall(request)
                    return self.server
                except OSError:
                    self.server.close()


def relay(path, host, port, export, seconds):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=Relay(client, host, port, export, seconds).serve, daemon=True).start()


# ---- nbd.ko by generic netlink: what nbd-client 3.24 does not offer is to hand a new connection to a live device

CONNECT, DISCONNECT, RECONFIGURE = 1, 2, 3                                     # linux/nbd-netlink.h
A_INDEX, A_SIZE, A_BLOCK, A_TIMEOUT, A_SERVER_FLAGS, A_CLIENT_FLAGS, A_SOCKETS, A_DEAD = range(1, 9)


class Netlink:
    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
        self.socket.bind((0, 0))
        # CTRL_CMD_GETFAMILY with the name; the family's number is attribute 1 of the answer.
        answer = self._call(0x10, 3, 1, self._attribute(2, b"nbd\0"))
        at, self.family = 20, None
        while at < len(answer):
            length, kind = struct.unpack_from("=HH", answer, at)
            if kind == 1:
                self.family = struct.unpack_from("=H", answer, at + 4)[0]
            at += (length + 3) & ~3

    @staticmethod
    def _attribute(kind, data):
        return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)

    def _call(self, family, command, version, body):
        self.socket.send(struct.pack("=IHHIIBBH", 20 + len(body), family, 5, 1, 0, command, version, 0) + body)
        found = b""
        while True:
            data, at = self.socket.recv(65536), 0
            while at < len(data):
                length, kind = struct.unpack_from("=IH", data, at)
                if kind == 2:                                                   # NLMSG_ERROR, also for 0
                    error = struct.unpack_from("=i", data, at + 16)[0]
                    if error:
                        raise OSError(-error, f"nbd netlink command {command}: {os.strerror(-error)}")
                    return found
                found = data[at:at + length]
                at += (length + 3) & ~3

    def _sockets(self, sockets):
        items = b"".join(self._attribute(0x8001, self._attribute(1, struct.pack("=I", s.fileno()))) for s in sockets)
        return self._attribute(0x8000 | A_SOCKETS, items)

    def connect(self, index, sockets, size, flags, timeout, dead):
        """`timeout`: after so many seconds a request is sent again; `dead`: so long a device waits for a new connection."""
        u64 = lambda kind, value: self._attribute(kind, struct.pack("=Q", value))
        self._call(self.family, CONNECT, 1, self._attribute(A_INDEX, struct.pack("=I", index)) + u64(A_SIZE, size) + u64(A_BLOCK, PAGE)
                   + u64(A_SERVER_FLAGS, flags) + u64(A_TIMEOUT, timeout) + u64(A_DEAD, dead) + self._sockets(sockets))

    def replace(self, index, sockets):
        self._call(self.family, RECONFIGURE, 1, self._attribute(A_INDEX, struct.pack("=I", index)) + self._sockets(sockets))

    def disconnect(self, index):
        self._call(self.family, DISCONNECT, 1, self._attribute(A_INDEX, struct.pack("=I", index)))


PAGE = 4096

if __name__ == "__main__":
    if len(sys.argv) != 7 or sys.argv[1] != "relay":
        sys.exit("usage: wire.py relay SOCKET HOST PORT EXPORT SECONDS")
    relay(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5], float(sys.argv[6]))
