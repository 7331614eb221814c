"""Clients that break the protocol, vanish, or try to use the server up. After each test the runner sees whether the
next client is served."""
import os
import random
import struct
import threading
import time

from wire import *


def _handshake(t):
    """What a well-behaved client says up to its first request."""
    body = go(t.export, (INFO_BLOCK_SIZE,))
    return struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", STRUCTURED_REPLY, 0) + IHAVEOPT + struct.pack(
        ">II", GO, len(body)) + body


class _Witness:
    """Another client, at work all the time: its reads must go on, and be right."""

    def __init__(self, t):
        self.client = t.serve()
        self.data = os.urandom(4096)
        self.client.write(60 * MIB, self.data)
        self.stop, self.failure, self.count, self.slowest = False, None, 0, 0.0
        self.thread = threading.Thread(target=self.work)

    def work(self):
        try:
            while not self.stop:
                began = time.monotonic()
                assert self.client.read(60 * MIB, 4096) == self.data
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.count += 1
                time.sleep(0.001)
        except Exception as error:
            self.failure = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        self.thread.join()
        if self.failure:
            raise self.failure
        assert self.count > 0


def wrong_request_magic_hangs_up_and_disturbs_nobody(t):
    with _Witness(t):
        for index in range(4):
            client = t.serve()
            wrong = bytearray(header(READ, 0, 512))
            wrong[index] ^= 0x10
            client.send(bytes(wrong))
            client.expect_closed()


def extended_headers_are_not_understood(t):
    client = t.serve(structured=True)
    client.send(struct.pack(">IHHQQQ", 0x21E41C71, 0, READ, 1, 0, 512))
    client.expect_closed()


def handshake_cut_at_any_byte(t):
    said = _handshake(t)
    with _Witness(t):
        for cut in range(len(said)):
            client = t.connect()
            client.recv(18)
            client.send(said[:cut])
            client.close()


def handshake_reset_at_any_byte(t):
    if not t.is_tcp:
        t.skip()
    said = _handshake(t)
    with _Witness(t):
        for cut in range(len(said) + 1):
            client = t.connect()
            client.send(said[:cut])
            client.reset()


def request_cut_at_any_byte(t):
    said = header(WRITE, 0, 100) + b"w" * 100
    with _Witness(t):
        for cut in range(len(said)):
            client = t.serve()
            client.send(said[:cut])
            client.close()


def a_cut_write_changes_nothing(t):
    client = t.serve()
    client.write(0, b"old!" * 25_000)
    for cut in (1, 50_000, 99_999):
        other = t.serve()
        other.send(header(WRITE, 0, 100_000) + (b"new!" * 25_000)[:cut])
        other.close()
    time.sleep(0.05)
    assert client.read(0, 100_000) == b"old!" * 25_000


def request_reset_at_any_byte(t):
    if not t.is_tcp:
        t.skip()
    said = header(WRITE, 0, 100) + b"w" * 100
    with _Witness(t):
        for cut in range(len(said) + 1):
            client = t.serve()
            client.send(said[:cut])
            client.reset()


def reset_in_the_middle_of_replies(t):
    rng = random.Random(1)
    with _Witness(t):
        for _ in range(40):
            client = t.serve(structured=rng.random() < 0.5)
            client.send(b"".join(header(READ, 0, rng.choice((1, 4096, MIB, 8 * MIB)), 0, n) for n in range(20)))
            if rng.random() < 0.7:
                client.sock.recv(rng.choice((1, 16, 5000, 200_000)))
            client.reset() if t.is_tcp else client.close()


def half_closed_connections_end(t):
    client = t.serve()
    client.sock.shutdown(1)
    client.expect_closed()


def disconnect_without_reading_replies(t):
    with _Witness(t):
        for _ in range(20):
            client = t.serve()
            client.send(b"".join(header(READ, 0, 65_536, 0, n) for n in range(10)) + header(DISC))
            client.close()


def garbage_of_any_kind(t):
    rng = random.Random(int(os.environ.get("NBD_SEED", "2")))
    with _Witness(t):
        for turn in range(150):
            try:
                kind = turn % 5
                if kind == 0:
                    client = t.connect()
                    client.send(rng.randbytes(rng.randrange(1, 3000)))
                elif kind == 1:
                    client = t.haggle()
                    client.send(rng.randbytes(rng.randrange(1, 3000)))
                elif kind == 2:
                    client = t.haggle()
                    for _ in range(20):
                        client.option(rng.randrange(12), rng.randbytes(rng.randrange(64)))
                elif kind == 3:
                    client = t.serve()
                    client.send(rng.randbytes(rng.randrange(1, 3000)))
                else:
                    # Right headers, wild fields. No writes: they would change what the witness reads.
                    client = t.serve(structured=True, context=True)
                    for _ in range(50):
                        command = rng.choice((READ, FLUSH, CACHE, STATUS, 8, 9, rng.randrange(10, 65536)))
                        client.send(header(command, rng.choice((0, rng.getrandbits(64))), rng.getrandbits(rng.randrange(1, 33)),
                                           rng.choice((0, rng.getrandbits(16))), rng.getrandbits(64)))
                client.sock.settimeout(0.05)
                client.sock.recv(100)
            except (Closed, TimeoutError, ConnectionError):
                pass
            client.close()


def connections_that_come_and_go(t):
    with _Witness(t):
        for _ in range(500):
            t.connect().close()
            t.close_idle() if hasattr(t, "close_idle") else None


def silent_handshakes_do_not_keep_others_out(t):
    silent = [t.connect() for _ in range(300)]
    began = time.monotonic()
    client = t.serve()
    client.alive()
    assert time.monotonic() - began < 2
    assert len(silent) == 300


def half_handshakes_do_not_keep_others_out(t):
    for _ in range(300):
        client = t.connect()
        try:
            client.send(_handshake(t)[:30])
        except Closed:
            pass
    client = t.serve()
    client.alive()


def unfinished_writes_of_32_MiB_take_no_memory(t):
    before = t.memory()
    with _Witness(t) as witness:
        clients = []
        for _ in range(t.crowd(64)):
            client = t.serve()
            client.send(header(WRITE, 0, LIMIT) + b"z" * 28)
            clients.append(client)
        time.sleep(0.3)
        grown = t.memory() - before
        assert grown < 64 * MIB, "%d MiB for 64 writes that did not come" % (grown // MIB)
        # A large request of somebody else is served meanwhile.
        other = t.serve()
        assert len(other.read(0, LIMIT)) == LIMIT
    assert witness.slowest < 2


def half_sent_writes_of_32_MiB_are_bounded(t):
    before = t.memory()
    with _Witness(t) as witness:
        clients = []
        for _ in range(t.crowd(64)):
            client = t.serve()
            client.sock.settimeout(0.2)
            try:
                client.sock.sendall(header(WRITE, 0, LIMIT))
                for _ in range(16):
                    client.sock.sendall(bytes([7]) * MIB)
            except TimeoutError:
                pass  # the server has stopped reading: that is the point
            clients.append(client)
        grown = t.memory() - before
        assert grown < 800 * MIB, "%d MiB held for half-sent writes" % (grown // MIB)
    assert witness.slowest < 2
half_sent_writes_of_32_MiB_are_bounded.is_slow = True


def replies_nobody_reads_are_bounded(t):
    before = t.memory()
    with _Witness(t) as witness:
        clients = []
        for _ in range(t.crowd(16)):
            client = t.serve()
            client.sock.settimeout(0.2)
            try:
                for _ in range(200):
                    client.sock.sendall(b"".join(header(READ, 0, MIB, 0, n) for n in range(100)))
            except TimeoutError:
                pass
            clients.append(client)
        time.sleep(0.3)
        grown = t.memory() - before
        assert grown < 700 * MIB, "%d MiB held for 16 clients that do not read" % (grown // MIB)
    assert witness.slowest < 2


def a_client_that_reads_late_gets_every_reply(t):
    client = t.serve(structured=True, receive_buffer=8192)
    data = os.urandom(MIB)
    client.write(0, data)
    wanted = {}

    def ask():
        for number in range(2000):
            offset, length = number * 97 % (MIB - 70_000), 1 + number * 31 % 70_000
            cookie = number + 1 << 32
            wanted[cookie] = (offset, length)
            client.pending[cookie] = (READ, length)
            client.send(header(READ, offset, length, 0, cookie))

    sender = threading.Thread(target=ask)
    sender.start()
    time.sleep(0.5)
    for _ in range(2000):
        cookie, reply = client.reply()
        offset, length = wanted.pop(cookie)
        assert reply.data == data[offset:offset + length]
    sender.join()


def writes_sent_without_reading_replies_all_arrive(t):
    client = t.serve(receive_buffer=4096)
    count = 4000
    said = b"".join(header(WRITE, n * 512, 512, 0, n + 1) + struct.pack(">Q", n) * 64 for n in range(count))
    sender = threading.Thread(target=client.send, args=(said,))
    sender.start()
    time.sleep(0.3)
    client.pending = {n + 1: (WRITE, 512) for n in range(count)}
    for _ in range(count):
        assert client.reply()[1].error == 0
    sender.join()
    for n in range(0, count, 97):
        assert client.read(n * 512, 512) == struct.pack(">Q", n) * 64


def a_bulk_client_does_not_starve_a_small_one(t):
    stop = []

    def bulk():
        client = t.serve()
        try:
            while not stop:
                cookies = [client.request(READ, 0, 4 * MIB) for _ in range(8)]
                for _ in cookies:
                    client.reply()
        except Closed:
            pass

    threads = [threading.Thread(target=bulk) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        small, began = t.serve(), time.monotonic()
        for _ in range(300):
            small.alive()
        assert time.monotonic() - began < 15
    finally:
        stop.append(True)
        for thread in threads:
            thread.join()


def idle_connections_cost_less_than_64_KiB(t):
    t.serve().alive()
    before, count = t.memory(), 500
    clients = []
    for _ in range(count):
        client = t.serve()
        client.write(0, b"used once" * 1000)
        client.read(0, 100_000)
        clients.append(client)
    time.sleep(0.2)
    each = (t.memory() - before) / count
    assert each < 64 << 10, "%d KiB each" % (each / 1024)
    for client in clients:
        client.alive()


def memory_comes_back_when_clients_leave(t):
    if not t.pid:
        t.skip()
    client = t.serve()
    cookies = [client.request(READ, 0, LIMIT) for _ in range(2)]
    for _ in cookies:
        client.reply()
    client.disconnect()
    before = t.memory()
    for _ in range(5):
        clients = [t.serve() for _ in range(8)]
        for client in clients:
            client.sock.settimeout(0.1)
            try:
                client.request(READ, 0, 8 * MIB)
                client.send(header(WRITE, 0, LIMIT) + bytes(4 * MIB))
            except TimeoutError:
                pass
        for client in clients:
            client.reset() if t.is_tcp else client.close()
    time.sleep(0.3)
    assert t.memory() - before < 80 * MIB
