"""An NBD client made of bytes: it can say anything, right or wrong, and checks every byte that comes back.

Names and numbers are those of the protocol document (NetworkBlockDevice/nbd, doc/proto.md)."""
import os
import socket
import struct

NBDMAGIC, IHAVEOPT, REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
REQUEST, SIMPLE, STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR = 1 << 31
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG = (ERR + n for n in (1, 2, 3, 4, 5, 6, 7, 9))
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_ZEROES, SEND_DF, MULTI_CONN, _, SEND_CACHE, \
    SEND_FAST_ZERO = (1 << n for n in range(12))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 12, 22, 28, 75, 95
ALLOCATION = b"base:allocation"
MIB = 1 << 20
LIMIT = 32 * MIB


class Closed(Exception):
    """The server closed the connection."""


class Reply:
    """What a request was answered: error 0 and its data, or an error."""

    def __init__(self):
        self.error, self.data, self.chunks, self.extents, self.structured = 0, None, [], None, False


class Client:
    """One connection. Nothing is sent that a test did not ask for."""

    def __init__(self, address, receive_buffer=None, timeout=20, source=None):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(timeout)
        if source:
            self.sock.bind((source, 0))
        self.sock.connect(address)
        if family == socket.AF_INET:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.structured, self.context, self.size, self.flags, self.cookies = False, None, None, None, 0
        self.pending = {}

    # Bytes

    def send(self, data):
        try:
            self.sock.sendall(data)
        except (ConnectionError, BrokenPipeError) as error:
            raise Closed(str(error))

    def recv(self, count):
        parts, left = [], count
        while left:
            try:
                part = self.sock.recv(min(left, 1 << 20))
            except ConnectionError as error:
                raise Closed(str(error))
            if not part:
                raise Closed("end of stream, %d of %d bytes missing" % (left, count))
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def unpack(self, form):
        return struct.unpack(form, self.recv(struct.calcsize(form)))

    def close(self):
        self.sock.close()

    def reset(self):
        """Closes with a reset instead of an orderly end (TCP)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def expect_closed(self):
        """Nothing more comes but the end."""
        try:
            data = self.sock.recv(4096)
        except ConnectionError:
            return
        assert data == b"", "the server sent %r instead of closing" % data[:64]

    def expect_silence(self, seconds=0.15):
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(4096)
            assert False, "unasked bytes %r" % data[:64] if data else "the server hung up"
        except TimeoutError:
            pass
        finally:
            self.sock.settimeout(20)

    # Handshake

    def greet(self, flags=3):
        magic, option, server = self.unpack(">8s8sH")
        assert (magic, option) == (NBDMAGIC, IHAVEOPT), (magic, option)
        self.server_flags = server
        self.send(struct.pack(">I", flags))
        return self

    def option(self, code, data=b"", length=None):
        self.send(IHAVEOPT + struct.pack(">II", code, len(data) if length is None else length) + data)

    def option_reply(self, code):
        magic, option, kind, length = self.unpack(">QIII")
        assert magic == REPLY, hex(magic)
        assert option == code, "a reply to option %d, not to %d" % (option, code)
        return kind, self.recv(length)

    def option_replies(self, code):
        """All replies up to the final one; its type, and (type, data) of those before."""
        replies = []
        while True:
            kind, data = self.option_reply(code)
            if kind == ACK:
                assert data == b""
                return ACK, replies
            if kind & ERR:
                data.decode()
                return kind, replies
            replies.append((kind, data))

    def ask(self, code, data=b"", length=None):
        self.option(code, data, length)
        return self.option_replies(code)

    def structure(self):
        assert self.ask(STRUCTURED_REPLY) == (ACK, [])
        self.structured = True
        return self

    def select(self, export, queries=(ALLOCATION,)):
        result, replies = self.ask(SET_META, meta(export, queries))
        assert result == ACK, hex(result)
        for kind, data in replies:
            assert kind == META and data[4:] == ALLOCATION
            self.context, = struct.unpack(">I", data[:4])
        return self

    def go(self, export, infos=()):
        result, replies = self.ask(GO, go(export, infos))
        assert result == ACK, "GO was answered %#x" % result
        for kind, data in replies:
            assert kind == REP_INFO
            if data[:2] == b"\0\0":
                assert len(data) == 12
                self.size, self.flags = struct.unpack(">QH", data[2:])
        assert self.size is not None, "GO without NBD_INFO_EXPORT"
        assert self.flags & HAS_FLAGS
        return self

    # Transmission

    def cookie(self):
        self.cookies += 1
        return self.cookies * 0x9E3779B97F4A7C15 & (1 << 64) - 1

    def request(self, command, offset=0, length=0, flags=0, payload=b"", cookie=None):
        """Sends a request without waiting for its reply; gives its cookie."""
        cookie = self.cookie() if cookie is None else cookie
        self.send(header(command, offset, length, flags, cookie) + payload)
        self.pending[cookie] = (command, length)
        return cookie

    def reply(self):
        """The next complete reply and its cookie; structured chunks of one reply are put together."""
        partial = self.__dict__.setdefault("partial", {})
        while True:
            magic, = self.unpack(">I")
            if magic == SIMPLE:
                error, cookie = self.unpack(">IQ")
                command, length = self.known(cookie)
                assert not (self.structured and command == READ), "a simple reply to READ in structured mode"
                reply = Reply()
                reply.error = error
                if command == READ and error == 0:
                    reply.data = self.recv(length)
                del self.pending[cookie]
                return cookie, reply
            assert magic == STRUCTURED, "reply magic %#x" % magic
            assert self.structured, "a structured reply that was not agreed on"
            flags, kind, cookie, length = self.unpack(">HHQI")
            assert flags & ~1 == 0
            command, wanted = self.known(cookie)
            body = self.recv(length)
            reply = partial.setdefault(cookie, Reply())
            reply.structured = True
            self.chunk(reply, kind, body, command, wanted)
            if kind == 0:
                assert flags & 1
            if flags & 1:
                del partial[cookie]
                del self.pending[cookie]
                if command == READ and reply.error == 0:
                    reply.data = self.assemble(reply, wanted)
                if command == STATUS and reply.error == 0:
                    assert reply.extents is not None
                return cookie, reply

    def known(self, cookie):
        assert cookie in self.pending, "a reply with unknown cookie %#x" % cookie
        return self.pending[cookie]

    def chunk(self, reply, kind, body, command, wanted):
        if kind == 0:
            assert body == b""
        elif kind == 1:
            assert command == READ and len(body) >= 9
            reply.chunks.append((struct.unpack(">Q", body[:8])[0], body[8:], "data"))
        elif kind == 2:
            assert command == READ and len(body) == 12
            offset, size = struct.unpack(">QI", body)
            assert size > 0
            reply.chunks.append((offset, bytes(size), "hole"))
        elif kind == 5:
            assert command == STATUS and len(body) >= 12 and (len(body) - 4) % 8 == 0
            context, = struct.unpack(">I", body[:4])
            assert context == self.context, "context %d" % context
            assert reply.extents is None, "two status chunks for one context"
            reply.extents = [struct.unpack(">II", body[at:at + 8]) for at in range(4, len(body), 8)]
            assert all(length > 0 for length, _ in reply.extents)
        else:
            assert kind & 0x8000, "unknown chunk type %d" % kind
            error, size = struct.unpack(">IH", body[:6])
            assert error != 0 and 6 + size <= len(body) and size <= 4096
            body[6:6 + size].decode()
            reply.error = error

    def assemble(self, reply, length):
        """The chunks, in the order of their offsets, cover the range once."""
        data, at = [], None
        for offset, part, _ in sorted(reply.chunks):
            assert at is None or offset == at, "chunks overlap or leave a gap"
            data.append(part)
            at = offset + len(part)
        data = b"".join(data)
        assert len(data) == length, "%d bytes for a read of %d" % (len(data), length)
        reply.start = min((c[0] for c in reply.chunks), default=None)
        return data

    def do(self, command, offset=0, length=0, flags=0, payload=b""):
        """One request and its reply, alone on the connection."""
        cookie = self.request(command, offset, length, flags, payload)
        answered, reply = self.reply()
        assert answered == cookie
        return reply

    def read(self, offset, length, flags=0):
        reply = self.do(READ, offset, length, flags)
        assert reply.error == 0, "read: error %d" % reply.error
        return reply.data

    def write(self, offset, data, flags=0):
        reply = self.do(WRITE, offset, len(data), flags, data)
        assert reply.error == 0, "write: error %d" % reply.error

    def error(self, command, offset=0, length=0, flags=0, payload=b""):
        return self.do(command, offset, length, flags, payload).error

    def alive(self):
        """The connection is in step: a read works."""
        assert len(self.read(0, 512)) == 512

    def disconnect(self):
        self.send(header(DISC, 0, 0, 0, 0))
        self.expect_closed()
        self.close()


def header(command, offset=0, length=0, flags=0, cookie=1, magic=REQUEST):
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


def go(export, infos=()):
    return struct.pack(">I", len(export)) + export + struct.pack(">H", len(infos)) + b"".join(
        struct.pack(">H", i) for i in infos)


def meta(export, queries):
    return struct.pack(">I", len(export)) + export + struct.pack(">I", len(queries)) + b"".join(
        struct.pack(">I", len(q)) + q for q in queries)


def resident(pid):
    """Bytes of memory that a process has."""
    with open("/proc/%d/statm" % pid) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
