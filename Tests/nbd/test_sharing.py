"""What clients share is shared fairly: a disk among the connections of one client, and memory, connections and handshakes
among all. Named after the rows of the table of faults that each was found in (row_16 and so on)."""
import os
import signal
import struct
import subprocess
import sys
import threading
import time

from test_peculiar import _own, _server
from test_sessions import _attach
from wire import *

_OTHER = "127.0.0.2"


def _join(t, name, **how):
    """A further connection in a thread of its own: (thread, its clients, the seconds it took)."""
    clients, took = [], []

    def join():
        began = time.monotonic()
        clients.append(t.serve(export=name, **how))
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=join)
    thread.start()
    return thread, clients, took


def row_16_a_write_that_trickles_is_waited_for(t):
    name = t.session(b"trickle-%d" % time.time_ns())
    first = _attach(t, name)
    data = os.urandom(64 << 10)
    whole = header(WRITE, 0, len(data), 0, 1) + data
    first.pending[1] = (WRITE, len(data))
    first.send(whole[:1000])
    thread, clients, _ = _join(t, name)
    for piece in range(30):
        time.sleep(0.1)
        first.send(whole[1000 + piece * 2000:1000 + (piece + 1) * 2000])
    first.send(whole[61_000:])
    assert first.reply()[1].error == 0
    thread.join()
    assert clients[0].read(0, len(data)) == data
    first.alive()


def row_16_replies_that_are_not_read_hold_nobody_up(t):
    name = t.session(b"unread-%d" % time.time_ns())
    first = _attach(t, name, receive_buffer=8192)
    cookies = [first.request(READ, n * MIB, 4 * MIB) for n in range(12)]
    last = first.request(WRITE, 0, 4096, 0, b"n" * 4096)
    time.sleep(0.5)
    thread, clients, took = _join(t, name)
    thread.join()
    assert took[0] < 2, "it took %.1f s" % took[0]
    assert clients[0].read(0, 4096) == b"n" * 4096, "what had arrived takes effect first"
    time.sleep(3)
    answered = {first.reply()[0] for _ in range(13)}
    assert answered == {*cookies, last}
    first.alive()


def row_16_a_silent_half_of_a_request_is_given_up_after_ten_seconds(t):
    name = t.session(b"silent-%d" % time.time_ns())
    first = _attach(t, name)
    first.send(header(WRITE, 0, 4096) + b"half")
    thread, clients, took = _join(t, name)
    thread.join()
    assert 9 < took[0] < 14, "%.1f s" % took[0]
    first.expect_closed()
    clients[0].alive()
row_16_a_silent_half_of_a_request_is_given_up_after_ten_seconds.is_slow = True


def _refusal(client, name):
    """Why an export can't be had."""
    client.option(GO, go(name))
    kind, data = client.option_reply(GO)
    assert kind == POLICY, "GO was answered %#x" % kind
    return data.decode()


def row_17_another_process_on_a_unix_socket_is_another_client(t):
    t.session(b"x")
    if t.is_tcp:
        t.skip()
    first = _attach(t, t.export)
    again = t.serve()
    again.alive()
    program = "import sys; sys.path.insert(0, %r); from wire import *; c = Client(%r).greet(); c.option(GO, go(%r)); " \
        "print(c.option_reply(GO)[0])" % (os.path.dirname(os.path.abspath(__file__)), t.address, t.export)
    answer = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert int(answer) == POLICY, answer
    first.alive()


def row_17_a_named_session_has_one_address_and_its_name_is_not_told(t):
    name = t.session(b"secret-%d" % time.time_ns())
    if not t.is_tcp:
        t.skip()
    first = _attach(t, name)
    t.serve(export=name).alive()
    why = _refusal(t.haggle(source=_OTHER), name)
    assert "session-addresses" in why, why
    why = _refusal(t.haggle(source=_OTHER), t.export)
    assert "secret" not in why and "127.0.0.1" in why, why
    first.alive()


def _state(server):
    """What the test server says of its connections: outstanding and held bytes of all, and what is free."""
    server.send_signal(signal.SIGUSR1)
    outstanding = held = 0
    while True:
        line = server.stdout.readline()
        if line.startswith("connections"):
            return outstanding, held, int(line.split()[3])
        outstanding += int(line.split("outstanding: ")[1].split(",")[0])
        held += int(line.split("heldBytes: ")[1].split(")")[0])


def row_29_requests_without_data_are_counted_until_they_end(t):
    _own(t)
    server, address = _server("--limit", "budgetBytes=%d" % (64 * MIB))
    try:
        _, _, whole = _state(server)
        for command, least in ((STATUS, 8192 * 16), (CACHE, 2048), (FLUSH, 0)):
            clients = []
            for _ in range(10):
                client = Client(address).greet().structure().select(b"stuck").go(b"stuck")
                half = client.size // 2
                client.sock.settimeout(0.3)
                try:
                    client.send(b"".join(header(command, half, half if command != FLUSH else 0, 0, n) for n in range(3000)))
                except TimeoutError:
                    pass
                clients.append(client)
            time.sleep(0.3)
            outstanding, held, free = _state(server)
            if command != FLUSH:
                assert outstanding <= 10 * 1024
                assert outstanding > 0 and held >= outstanding * least, (outstanding, held)
                assert free >= 0, free
            honest = Client(address).greet().go(b"mem")
            honest.alive()
            honest.disconnect()
            for client in clients:
                client.reset()
            for _ in range(50):
                time.sleep(0.05)
                outstanding, held, free = _state(server)
                if (outstanding, held, free) == (0, 0, whole):
                    break
            assert (outstanding, held, free) == (0, 0, whole), (outstanding, held, free)
    finally:
        server.kill()
        server.wait()


def row_31_slow_readers_wait_for_themselves(t):
    """20 clients take 24 KB/s each of large replies. The others' memory was in their buffers."""
    _own(t)
    server, address = _server("--limit", "budgetBytes=%d" % (128 * MIB))
    stop = threading.Event()
    slow = []

    def trickle():
        while not stop.wait(0.1):
            for client in slow:
                try:
                    client.sock.recv(2400)
                except OSError:
                    pass

    try:
        for _ in range(20):
            client = Client(address, receive_buffer=8192).greet().go(b"mem")
            for n in range(4):
                client.send(header(READ, n * 8 * MIB, 8 * MIB, 0, n))
            client.sock.settimeout(0)
            slow.append(client)
        thread = threading.Thread(target=trickle)
        thread.start()
        time.sleep(0.5)
        for source in (None, _OTHER):
            began = time.monotonic()
            honest = Client(address, source=source).greet().go(b"journal")
            assert len(honest.read(0, MIB)) == MIB
            honest.write(0, b"w" * (4 * MIB))
            assert time.monotonic() - began < 2, "%.1f s" % (time.monotonic() - began)
    finally:
        stop.set()
        server.kill()
        server.wait()


def row_31_slow_writers_wait_for_themselves(t):
    _own(t)
    server, address = _server("--limit", "budgetBytes=%d" % (128 * MIB))
    try:
        slow = []
        for _ in range(20):
            client = Client(address).greet().go(b"mem")
            client.sock.settimeout(0.1)
            try:
                client.send(header(WRITE, 0, LIMIT) + bytes(16 * MIB))
            except TimeoutError:
                pass
            slow.append(client)
        began = time.monotonic()
        honest = Client(address, source=_OTHER).greet().go(b"journal")
        assert len(honest.read(0, MIB)) == MIB
        honest.write(0, b"w" * (4 * MIB))
        assert time.monotonic() - began < 2, "%.1f s" % (time.monotonic() - began)
    finally:
        server.kill()
        server.wait()


def row_32_who_opens_connections_in_a_loop_closes_his_own(t):
    """Handshakes of 20 ms a round trip beside a client that does nothing but connect. So few may wait that it always is the
    honest one's turn to go, were it by age alone."""
    _own(t)
    server, address = _server("--limit", "handshakes=8")
    stop = threading.Event()

    def flood():
        crowd = []
        while not stop.is_set():
            try:
                crowd.append(Client(address, source=_OTHER))
            except OSError:
                pass
            if len(crowd) > 300:
                crowd.pop(0).close()
        for client in crowd:
            client.close()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        time.sleep(0.5)
        served = 0
        for _ in range(20):
            try:
                client = Client(address)
                client.recv(18)
                time.sleep(0.02)
                client.send(struct.pack(">I", 3))
                time.sleep(0.02)
                client.structure()
                time.sleep(0.02)
                client.go(b"mem").alive()
                client.close()
                served += 1
            except (Closed, ConnectionError):
                pass
        assert served == 20, "%d of 20" % served
    finally:
        stop.set()
        thread.join()
        server.kill()
        server.wait()


def row_32_one_address_leaves_connections_for_others(t):
    _own(t)
    server, address = _server("--limit", "connections=20")
    try:
        clients = [Client(address, source=_OTHER).greet().go(b"mem") for _ in range(20)]
        Client(address, source=_OTHER).expect_closed()
        Client(address).greet().go(b"mem").alive()
        clients[0].disconnect()
        time.sleep(0.1)
        Client(address, source=_OTHER).greet().go(b"mem").alive()
    finally:
        server.kill()
        server.wait()
