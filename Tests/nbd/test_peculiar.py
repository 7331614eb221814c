"""What only a device shows that is slow, broken or gone: on exports of the test server alone."""
import os
import resource
import signal
import struct
import subprocess
import sys
import time

from wire import *


def a_slow_request_does_not_block_the_others(t):
    client = t.serve(export=t.special(b"slow"))
    slow = client.request(READ, client.size // 2, 4096)
    quick = [client.request(READ, 0, 4096) for _ in range(10)]
    order = [client.reply()[0] for _ in range(11)]
    assert order == quick + [slow]


def requests_of_a_late_device_are_answered(t):
    client, data = t.serve(True, True, t.special(b"lazy")), os.urandom(3 * MIB)
    client.write(77, data)
    assert client.read(77, len(data)) == data
    assert client.read(77, 100) == data[:100]
    assert client.error(TRIM, 0, 4096) == 0
    assert client.do(STATUS, 0, MIB).extents


def writes_are_acknowledged_when_journaled(t):
    client = t.serve(export=t.special(b"journal"))
    wanted = {client.request(WRITE, n * 4096, 4096, 0, bytes([n]) * 4096) for n in range(100)}
    assert {client.reply()[0] for _ in range(100)} == wanted
    assert all(client.read(n * 4096, 4096) == bytes([n]) * 4096 for n in range(100))


def disconnect_waits_for_the_journal(t):
    client = t.serve(export=t.special(b"journal"))
    cookie = client.request(WRITE, 0, 4096, 0, b"j" * 4096)
    client.send(header(DISC))
    assert client.reply()[0] == cookie
    client.expect_closed()


def an_error_of_the_device_is_told_and_the_connection_goes_on(t):
    for structured in (False, True):
        client = t.serve(structured, context=structured, export=t.special(b"broken"))
        for command in (READ, WRITE, TRIM, ZEROES, CACHE) + ((STATUS,) if structured else ()):
            payload = bytes(70_000) if command == WRITE else b""
            assert client.error(command, client.size // 2, 70_000, 0, payload) == EIO
        client.alive()


def a_device_can_end_a_connection(t):
    client = t.serve(export=t.special(b"kicks"))
    other = t.serve(export=b"kicks")
    client.send(header(WRITE, 0, 512) + bytes(512) + header(WRITE, client.size // 2, 512) + bytes(512))
    client.expect_closed()
    other.alive()


def a_device_that_refuses_to_be_joined_is_a_policy_error(t):
    client = t.haggle()
    assert client.ask(GO, go(t.special(b"lapsed")))[0] == POLICY
    client.go(t.export).alive()
    client = t.haggle()
    client.option(EXPORT_NAME, b"lapsed")
    client.expect_closed()


def a_device_can_end_a_connection_that_joins(t):
    name = t.special(b"hostile")
    for _ in range(20):
        client = t.haggle()
        client.option(GO, go(name))
        client.expect_closed()


def options_wait_while_an_export_is_attached(t):
    client = t.serve(export=t.special(b"late"))
    client.alive()
    # The client goes away meanwhile.
    client = t.haggle()
    client.option(GO, go(b"late"))
    client.close()
    time.sleep(0.3)


def an_export_of_16_EiB_attaches_at_once(t):
    name = t.special(b"huge")
    began = time.monotonic()
    client = t.serve(True, True, name)
    assert client.size == (1 << 64) - 4096 and time.monotonic() - began < 1
    assert client.read(client.size - 4096, 4096) == bytes(4096)
    assert client.error(READ, client.size - 1, 2) == EINVAL
    assert client.error(WRITE, client.size - 1, 2, 0, b"xx") == ENOSPC
    assert client.error(READ, (1 << 64) - 1, 1) == EINVAL
    assert client.error(ZEROES, client.size - 0xFFFFFFFF, 0xFFFFFFFF) == 0
    assert sum(n for n, _ in client.do(STATUS, client.size - 0xFFFFFFFF, 0xFFFFFFFF).extents) == 0xFFFFFFFF


def an_export_of_odd_size_serves_its_last_byte(t):
    client = t.serve(export=t.special(b"odd"))
    assert client.size == MIB + 1
    client.write(MIB - 10, b"last bytes!")
    assert client.read(MIB, 1) == b"!"
    assert client.error(READ, MIB, 2) == EINVAL


def a_client_may_leave_with_requests_that_never_end(t):
    name = t.special(b"stuck")
    for _ in range(20):
        client = t.serve(export=name)
        for _ in range(5):
            client.request(READ, client.size // 2, 65_536)
        client.alive()
        client.reset() if t.is_tcp else client.close()
    t.serve(export=name).alive()


def _server(*flags):
    """A server of its own, for a test that ends it or starves it."""
    options = sys.argv[sys.argv.index("--server") + 1:][:1]
    server = subprocess.Popen(options + ["--listen", "127.0.0.1:0", *flags], stdout=subprocess.PIPE, text=True)
    host, port = server.stdout.readline().split()[1].rsplit(":", 1)
    return server, (host, int(port))


def _own(t):
    t.special(b"stuck")
    if "--server" not in sys.argv:
        t.skip()


def a_draining_server_finishes_what_is_in_flight(t):
    _own(t)
    server, address = _server()
    try:
        busy, idle, haggling = (Client(address).greet() for _ in range(3))
        busy.go(b"slow")
        idle.go(b"mem").alive()
        slow = busy.request(READ, busy.size // 2, 4096)
        time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        idle.expect_closed()
        busy.request(READ, 0, 4096)
        assert haggling.ask(LIST)[0] == SHUTDOWN
        haggling.option(EXPORT_NAME, b"mem")
        haggling.expect_closed()
        # What came later has no answer, which is no error either: the client asks again where it attaches next.
        cookie, reply = busy.reply()
        assert cookie == slow and reply.error == 0
        busy.expect_closed()
        busy.close()
        assert server.wait(5) == 0
        try:
            Client(address)
            assert False, "a connection was accepted"
        except ConnectionRefusedError:
            pass
    finally:
        server.kill()
        server.wait()


def a_draining_server_does_not_wait_for_ever(t):
    _own(t)
    server, address = _server()
    try:
        client = Client(address).greet().go(b"stuck")
        client.request(READ, client.size // 2, 4096)
        time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        server.wait(15)
    finally:
        server.kill()
        server.wait()


def a_request_without_memory_fails_alone(t):
    _own(t)
    server, address = _server("--limit", "mapsAtMostBytes=%d" % (1 * MIB))
    try:
        for structured in (False, True):
            client = Client(address).greet()
            if structured:
                client.structure()
            client.go(b"mem")
            client.write(0, b"a" * MIB)
            for _ in range(20):
                # ENOMEM, and the stream stays whole: whatever came of the payload is read over.
                assert client.error(READ, 0, 2 * MIB) == 12
                assert client.error(WRITE, 0, 2 * MIB, payload=b"b" * (2 * MIB)) == 12
            assert client.read(0, MIB) == b"a" * MIB
            client.write(0, b"c" * MIB)
            client.disconnect()
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def a_server_without_descriptors_says_so_once(t):
    """And waits for some without using the CPU."""
    _own(t)
    options = sys.argv[sys.argv.index("--server") + 1:][:1]
    server = subprocess.Popen(
        options + ["--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    host, port = server.stdout.readline().split()[1].rsplit(":", 1)
    address = (host, int(port))

    def used():
        with open("/proc/%d/stat" % server.pid) as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    try:
        for _ in range(3):
            crowd = [Client(address) for _ in range(100)]
            before = used()
            time.sleep(1)
            assert used() - before < 0.3, "%.2f s of CPU" % (used() - before)
            for client in crowd:
                client.close()
            for _ in range(100):
                try:
                    client = Client(address).greet().go(b"mem")
                    break
                except (Closed, OSError):
                    time.sleep(0.05)
            client.alive()
            client.disconnect()
        server.terminate()
        lines = [line for line in server.stderr.read().splitlines() if "cannot accept" in line]
        assert len(lines) == 1, lines
    finally:
        server.kill()
        server.wait()


def stalled_clients_are_cut_when_others_wait_for_memory(t):
    _own(t)
    server, address = _server("--limit", "budgetBytes=%d" % (64 * MIB), "--limit", "stallSeconds=2")
    try:
        stalled = []
        for _ in range(12):
            client = Client(address).greet().go(b"mem")
            client.sock.settimeout(0.3)
            try:
                client.sock.sendall(header(WRITE, 0, LIMIT) + bytes(24 * MIB))
            except TimeoutError:
                pass
            stalled.append(client)
        assert resident(server.pid) < 400 * MIB
        # Small requests need nobody's memory; large ones come once the stalled are cut, whose turns they share.
        honest = Client(address, source="127.0.0.2", timeout=15).greet().go(b"mem")
        began = time.monotonic()
        honest.alive()
        honest.write(0, b"q" * 65_536)
        assert time.monotonic() - began < 1
        honest.write(0, b"h" * LIMIT)
        assert honest.read(0, LIMIT) == b"h" * LIMIT
        assert time.monotonic() - began < 15
    finally:
        server.kill()
        server.wait()


def large_requests_take_turns_when_memory_is_short(t):
    _own(t)
    import threading
    server, address = _server("--limit", "budgetBytes=%d" % (64 * MIB), "--limit", "stallSeconds=20")
    failures = []

    def work(number):
        try:
            client = Client(address).greet().go(b"lazy")
            for turn in range(3):
                data = struct.pack(">II", number, turn) * (LIMIT // 8)
                client.write(number * LIMIT, data)
                assert client.read(number * LIMIT, LIMIT) == data
            client.disconnect()
        except Exception as error:
            failures.append(error)

    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        assert not any(thread.is_alive() for thread in threads)
    finally:
        server.kill()
        server.wait()


def no_more_connections_than_allowed(t):
    _own(t)
    server, address = _server("--limit", "connections=10")
    try:
        clients = [Client(address).greet().go(b"mem") for _ in range(10)]
        Client(address).expect_closed()
        clients[0].disconnect()
        time.sleep(0.1)
        Client(address).greet().go(b"mem").alive()
        for client in clients[1:]:
            client.alive()
    finally:
        server.kill()
        server.wait()
