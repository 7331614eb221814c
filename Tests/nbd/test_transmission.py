"""The transmission phase, by the sections "Transmission", "Request types", "Structured reply types" and "Error values"."""
import os
import queue
import random
import struct
import threading
import time

from wire import *

AREA = 16 * MIB  # tests write below this


def cookies_are_opaque(t):
    client = t.serve()
    for cookie in (0, 1, (1 << 64) - 1, 0x0123456789ABCDEF, 0x256095136744_6698):
        client.request(READ, 0, 16, cookie=cookie)
        assert client.reply()[0] == cookie


def any_offset_and_length_reads_back_what_was_written(t):
    for structured in (False, True):
        client, rng = t.serve(structured), random.Random(7)
        for _ in range(60):
            offset, length = rng.randrange(AREA), rng.choice((1, 2, 511, 512, 513, 4095, 4097, 16385, 70000, 300001))
            data = rng.randbytes(length)
            client.write(offset, data)
            assert client.read(offset, length) == data


def a_write_changes_no_byte_beside_it(t):
    client = t.serve()
    client.write(0, b"\xaa" * 16384)
    client.write(4093, b"\x55" * 7)
    assert client.read(0, 16384) == b"\xaa" * 4093 + b"\x55" * 7 + b"\xaa" * (16384 - 4100)


def requests_of_32_MiB_work(t):
    for structured in (False, True):
        client = t.serve(structured)
        data = os.urandom(MIB) * 32
        client.write(512, data)
        assert client.read(512, LIMIT) == data
        assert client.read(512, LIMIT, DF if structured else 0) == data


def larger_reads_are_refused(t):
    client = t.serve()
    for length in (LIMIT + 1, 64 * MIB, 0xFFFFFFFF):
        assert client.error(READ, 0, length) == EINVAL
    client = t.serve(structured=True)
    for length in (LIMIT + 1, 0xFFFFFFFF):
        assert client.error(READ, 0, length) in (EINVAL, EOVERFLOW)
    client.alive()


def a_larger_write_is_read_over_and_refused(t):
    client = t.serve()
    # The payload looks like requests; taking it for such would answer them.
    payload = (header(READ, 0, 16, 0, 5) * (LIMIT // 28 + 2))[:LIMIT + 1]
    assert client.error(WRITE, 0, LIMIT + 1, payload=payload) == EINVAL
    client.alive()


def a_write_of_4_GiB_ends_the_connection(t):
    client = t.serve()
    client.send(header(WRITE, 0, 0xFFFFFFFF))
    try:
        for _ in range(256):
            client.send(bytes(MIB))
        assert False, "the server took 256 MiB of one write"
    except Closed:
        pass


def past_the_end(t):
    for structured in (False, True):
        client = t.serve(structured, context=structured)
        size = client.size
        for offset, length in ((size, 1), (size - 1, 2), (size + 1, 1), (size - 4096, 4097), ((1 << 64) - 1, 1),
                               ((1 << 64) - 4096, 8192), (1 << 63, 4096)):
            assert client.error(READ, offset, length) == EINVAL
            assert client.error(TRIM, offset, length) == EINVAL
            assert client.error(CACHE, offset, length) == EINVAL
            assert client.error(ZEROES, offset, length) == ENOSPC
            assert client.error(WRITE, offset, length, payload=bytes(length)) == ENOSPC
            if structured:
                assert client.error(STATUS, offset, length) == EINVAL
        assert client.error(READ, size - 1, 1) == 0
        client.alive()


def the_last_byte_can_be_written(t):
    client = t.serve()
    client.write(client.size - 1, b"\x42")
    assert client.read(client.size - 1, 1) == b"\x42"


def the_payload_of_a_refused_write_is_read_over(t):
    client = t.serve()
    payload = header(READ, 0, 16, 0, 5) * 10
    for flags in (NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x8000):
        assert client.error(WRITE, 0, len(payload), flags, payload) == EINVAL
    assert client.error(WRITE, client.size, len(payload), 0, payload) == ENOSPC
    client.alive()


def unknown_commands_are_invalid_and_have_no_payload(t):
    for structured in (False, True):
        client = t.serve(structured)
        for command in (8, 9, 77, 0xFFFF):
            assert client.error(command, 0, 4096) == EINVAL
            assert client.error(command, client.size, 0xFFFFFFFF, 0xFFFF) == EINVAL
        client.alive()


def unknown_flags_are_invalid(t):
    client = t.serve(structured=True, context=True)
    known = {READ: DF, WRITE: 0, FLUSH: 0, TRIM: 0, CACHE: 0, ZEROES: NO_HOLE | FAST_ZERO, STATUS: REQ_ONE}
    for command, flags in known.items():
        length = 0 if command == FLUSH else 4096
        for bit in range(1, 16):
            error = client.error(command, 0, length, 1 << bit, bytes(length) if command == WRITE else b"")
            assert flags & 1 << bit or error == EINVAL, (command, bit, error)


def df_needs_structured_replies(t):
    assert t.serve().error(READ, 0, 512, DF) == EINVAL


def fua_is_accepted_on_every_command(t):
    for structured in (False, True):
        client = t.serve(structured, context=structured)
        for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES) + ((STATUS,) if structured else ()):
            length = 0 if command == FLUSH else 8192
            payload = bytes(length) if command == WRITE else b""
            assert client.error(command, 0, length, FUA, payload) == 0, command
        client.send(header(DISC, 0, 0, FUA))
        client.expect_closed()


def fua_writes_read_back(t):
    client, data = t.serve(), os.urandom(10_001)
    client.write(333, data, FUA)
    assert client.read(333, len(data)) == data


def requests_of_no_bytes_do_not_end_the_connection(t):
    for structured in (False, True):
        client = t.serve(structured, context=structured)
        for command in (READ, WRITE, TRIM, CACHE, ZEROES, STATUS):
            client.error(command, 0, 0)
            client.error(command, client.size, 0)
        client.alive()


def flush_with_a_range_does_not_end_the_connection(t):
    client = t.serve()
    for offset, length in ((0, 1), (1, 0), (1 << 63, 0xFFFFFFFF)):
        assert client.error(FLUSH, offset, length) == EINVAL
    assert client.error(FLUSH) == 0


def simple_mode_uses_no_structured_reply(t):
    client = t.serve()
    for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS, 99):
        length = 0 if command == FLUSH else 512
        assert not client.do(command, 0, length, 0, bytes(length) if command == WRITE else b"").structured
        assert not client.do(command, 1 << 62, 512, 0x4000, bytes(512) if command == WRITE else b"").structured


def read_is_never_answered_simply_in_structured_mode(t):
    # `reply` refuses a simple one.
    client = t.serve(structured=True)
    for offset, length, flags in ((0, 512, 0), (client.size, 512, 0), (0, 512, 0x8000), (0, LIMIT + 1, 0), (0, 0, 0)):
        assert client.do(READ, offset, length, flags).structured


def chunks_of_a_read_cover_it_once(t):
    client = t.serve(structured=True)
    assert client.error(ZEROES, 0, 8 * MIB) == 0
    client.write(MIB + 5, b"x" * 100_000)
    client.write(3 * MIB, b"y")
    for offset, length in ((0, 8 * MIB), (1, 4 * MIB), (MIB - 1, 131_072), (77, 65_536), (0, 65_536), (2 * MIB, MIB + 1)):
        reply = client.do(READ, offset, length)
        assert reply.error == 0 and reply.start == offset
        model = bytearray(8 * MIB)
        model[MIB + 5:MIB + 100_005] = b"x" * 100_000
        model[3 * MIB] = ord("y")
        assert reply.data == bytes(model[offset:offset + length])


def df_gives_one_chunk_with_zeroes_in_it(t):
    client = t.serve(structured=True)
    assert client.error(ZEROES, 0, 4 * MIB) == 0
    client.write(MIB, b"data")
    for offset, length in ((0, 65_536), (0, 2 * MIB), (3, 4 * MIB - 3)):
        reply = client.do(READ, offset, length, DF)
        assert reply.error == 0 and len(reply.chunks) == 1
        # "If the area being read contains both data and a hole, the server MUST use NBD_REPLY_TYPE_OFFSET_DATA".
        assert reply.chunks[0][2] == "data" or not any(reply.data)


def write_zeroes_reads_as_zeroes(t):
    client = t.serve()
    for flags in (0, NO_HOLE, FUA, NO_HOLE | FUA):
        for offset, length in ((4096, 8192), (5, 3), (4095, 70_001), (MIB - 1, 2 * MIB)):
            client.write(0, b"\xee" * (4 * MIB))
            assert client.error(ZEROES, offset, length, flags) == 0
            data = client.read(0, 4 * MIB)
            assert data == b"\xee" * offset + bytes(length) + b"\xee" * (4 * MIB - offset - length)


def fast_zero_either_zeroes_or_changes_nothing(t):
    client = t.serve()
    for flags in (FAST_ZERO, FAST_ZERO | NO_HOLE):
        client.write(0, b"\xdd" * 65_536)
        error = client.error(ZEROES, 0, 65_536, flags)
        assert error in (0, ENOTSUP)
        assert client.read(0, 65_536) == (b"\xdd" * 65_536 if error else bytes(65_536))


def commands_without_payload_take_any_length(t):
    client = t.serve(structured=True, context=True)
    length = min(client.size, 0xFFFFF000)
    for command in (CACHE, TRIM, ZEROES, STATUS):
        assert client.error(command, 0, length) == 0
    assert client.read(0, 4096) == bytes(4096)


def trim_then_write_reads_back(t):
    client = t.serve()
    client.write(0, b"a" * MIB)
    assert client.error(TRIM, 0, MIB) == 0
    client.write(4096, b"b" * 4096)
    assert client.read(4096, 4096) == b"b" * 4096


def trim_touches_nothing_beside_it(t):
    client = t.serve()
    client.write(0, b"k" * (2 * MIB))
    assert client.error(TRIM, 300_001, 1_000_001) == 0
    data = client.read(0, 2 * MIB)
    assert data[:300_001] == b"k" * 300_001 and data[1_300_002:] == b"k" * (2 * MIB - 1_300_002)


def block_status_needs_a_context(t):
    assert t.serve().error(STATUS, 0, 4096) == EINVAL
    assert t.serve(structured=True).error(STATUS, 0, 4096) == EINVAL


def context_of_another_export_does_not_count(t):
    client = t.haggle().structure()
    others = [n for n in t.names if n != t.export and n != b"mem"]
    if not others:
        t.skip()
    client.select(others[0]).go(t.export)
    assert client.error(STATUS, 0, 4096) == EINVAL
    client.alive()


def block_status_tells_data_from_holes(t):
    client = t.serve(context=True)
    assert client.error(ZEROES, 0, 8 * MIB) == 0
    client.write(2 * MIB, os.urandom(MIB))
    for offset, length in ((0, 8 * MIB), (2 * MIB - 512, 1024), (3 * MIB - 1, 2), (12345, 6 * MIB)):
        extents = client.do(STATUS, offset, length).extents
        # "the sum of the length fields of the first N-1 extents MUST be less than the requested length"
        assert sum(e for e, _ in extents[:-1]) < length
        at = offset
        for size, flags in extents:
            end = min(at + size, offset + length)
            if flags & 2 and end > at:
                assert not any(client.read(at, end - at))
            if at < 3 * MIB and end > 2 * MIB:
                assert not flags & 3, "data called a hole or zeroes"
            at += size
        assert at > offset


def req_one_gives_one_extent_within_the_request(t):
    client = t.serve(context=True)
    assert client.error(ZEROES, 0, 8 * MIB) == 0
    client.write(MIB, b"x" * 4096)
    for offset, length in ((0, 8 * MIB), (0, 1), (MIB, 4096), (MIB + 1, 8000), (3, 512)):
        extents = client.do(STATUS, offset, length, REQ_ONE).extents
        assert len(extents) == 1 and extents[0][0] <= length


def disconnect_finishes_what_is_outstanding_then_closes(t):
    client = t.serve()
    data = os.urandom(MIB)
    wanted = {client.request(WRITE, index * MIB, MIB, 0, data) for index in range(8)}
    wanted |= {client.request(READ, 8 * MIB, 65_536) for _ in range(8)}
    client.send(header(DISC))
    got = {client.reply()[0] for _ in wanted}
    assert got == wanted
    client.expect_closed()
    again = t.serve()
    assert all(again.read(index * MIB, MIB) == data for index in range(8))


def disconnect_has_no_reply(t):
    client = t.serve(structured=True)
    client.send(header(DISC, 0, 0, 0, 5))
    client.expect_closed()


def nothing_after_disconnect_is_served(t):
    client = t.serve()
    client.write(0, b"before")
    client.send(header(DISC) + header(WRITE, 0, 5, 0, 9) + b"after")
    client.expect_closed()
    assert t.serve().read(0, 6) == b"before"


def many_requests_at_once_are_each_answered_once(t):
    client, rng = t.serve(structured=True), random.Random(3)
    client.write(0, bytes(range(256)) * 4096)
    wanted = {}
    said = []
    for _ in range(3000):
        offset, length = rng.randrange(MIB - 20_000), rng.randrange(1, 20_000)
        cookie = client.cookie()
        client.pending[cookie] = (READ, length)
        wanted[cookie] = (offset, length)
        said.append(header(READ, offset, length, 0, cookie))
    sender = threading.Thread(target=client.send, args=(b"".join(said),))
    sender.start()
    model = bytes(range(256)) * 4096
    while wanted:
        cookie, reply = client.reply()
        offset, length = wanted.pop(cookie)
        assert reply.data == model[offset:offset + length]
    sender.join()


def requests_cut_anywhere_by_the_network_are_whole(t):
    client, rng = t.serve(), random.Random(5)
    said, wanted = [], {}
    for index in range(40):
        data = rng.randbytes(rng.choice((1, 100, 4096, 9000)))
        cookie = client.cookie()
        client.pending[cookie] = (WRITE, len(data))
        wanted[cookie] = (index * 10_000, data)
        said.append(header(WRITE, index * 10_000, len(data), 0, cookie) + data)
    stream = b"".join(said)
    at = 0
    while at < len(stream):
        step = rng.choice((1, 3, 27, 28, 29, 1000, 4124))
        client.send(stream[at:at + step])
        at += step
    for _ in range(len(wanted)):
        cookie, reply = client.reply()
        assert reply.error == 0
    for offset, data in wanted.values():
        assert client.read(offset, len(data)) == data


def a_random_history_agrees_with_a_model(t):
    """Any mix of reads, writes, zeroes and trims, 16 at a time and never overlapping while in flight."""
    seed = int(os.environ.get("NBD_SEED", "11"))
    rng, size = random.Random(seed), 4 * MIB
    client = t.serve(structured=seed % 2 == 1)
    assert client.error(ZEROES, 0, size) == 0
    # A server may stop reading while its replies are not read: who sends must not be who receives.
    sending = queue.Queue()
    sender = threading.Thread(target=lambda: [client.send(part) for part in iter(sending.get, None)], daemon=True)
    sender.start()
    model, unknown, flying = bytearray(size), set(), {}
    for step in range(1500):
        while len(flying) >= 16 or (step == 1499 and flying):
            cookie, reply = client.reply()
            command, offset, length, data = flying.pop(cookie)
            assert reply.error == 0, "seed %d: error %d" % (seed, reply.error)
            if command == READ:
                assert reply.data == data, "seed %d: read at %d of %d" % (seed, offset, length)
        length = rng.choice((1, 17, 512, 4096, 5000, 65_536, 131_072, 200_001))
        offset = rng.randrange(size - length)
        if any(offset < o + n and o < offset + length for _, o, n, _ in flying.values()):
            continue
        command = rng.choice((READ, READ, WRITE, WRITE, ZEROES))
        data = rng.randbytes(length) if command == WRITE else bytes(length)
        if command == READ:
            data = bytes(model[offset:offset + length])
        else:
            model[offset:offset + length] = data
        flags = rng.choice((0, 0, 0, FUA)) if command != READ else 0
        cookie = client.cookie()
        client.pending[cookie] = (command, length)
        sending.put(header(command, offset, length, flags, cookie) + (data if command == WRITE else b""))
        flying[cookie] = (command, offset, length, data)
    for _ in list(flying):
        assert client.reply()[1].error == 0
    sending.put(None)
    sender.join()
    assert client.read(0, size) == bytes(model), "seed %d" % seed


def a_replied_write_is_seen_by_all_connections(t):
    first, second = t.serve(), t.serve(structured=True)
    for turn in range(200):
        data = struct.pack(">Q", turn) * 100
        first.write(turn * 801, data)
        assert second.read(turn * 801, len(data)) == data
        first, second = (first, second) if turn % 2 else (first, second)
    assert first.error(FLUSH) == 0


def a_busy_connection_goes_on_when_another_begins(t):
    busy, stop, failures, block = t.serve(), [], [], os.urandom(65_536)
    window = threading.Semaphore(16)

    def send():
        number = 0
        while not stop:
            window.acquire()
            busy.pending[number] = (WRITE, len(block))
            busy.send(header(WRITE, number % 64 * len(block), len(block), FUA, number) + block)
            number += 1
        busy.pending[number] = (READ, 1)
        # Before it is sent: its reply may come, and be the last one, at once.
        stop.append(number)
        busy.send(header(READ, 0, 1, 0, number))

    def receive():
        try:
            while not (len(stop) > 1 and not busy.pending):
                assert busy.reply()[1].error == 0
                window.release()
        except Exception as error:
            failures.append(error)
            window.release()

    threads = [threading.Thread(target=work, daemon=True) for work in (send, receive)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(0.1)
        began = time.monotonic()
        other = t.serve()
        other.alive()
        assert time.monotonic() - began < 1.5, time.monotonic() - began
        other.disconnect()
    stop.append(True)
    for thread in threads:
        thread.join(20)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


def neighbouring_small_writes_lose_nothing(t):
    """Writers of interleaved bytes of the same pages, on connections of their own."""
    count, span = 4, 8192
    clients = [t.serve() for _ in range(count)]
    clients[0].write(0, bytes(span))
    failures = []

    def work(number):
        try:
            client = clients[number]
            for offset in range(number, span, count * 7):
                client.write(offset, bytes([number + 1]))
        except Exception as error:  # told by the test, not lost with the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    model = bytearray(span)
    for number in range(count):
        for offset in range(number, span, count * 7):
            model[offset] = number + 1
    assert clients[0].read(0, span) == bytes(model)


def a_read_only_export_says_so_and_refuses_writes(t):
    name = t.readonly()
    for structured in (False, True):
        client = t.serve(structured, export=name)
        assert client.flags & READ_ONLY
        before = client.read(0, 4096)
        assert client.error(WRITE, 0, 280, 0, header(READ, 0, 16, 0, 5) * 10) == EPERM
        assert client.error(WRITE, 0, 4096, FUA, b"x" * 4096) == EPERM
        assert client.error(TRIM, 0, 4096) == EPERM
        assert client.error(ZEROES, 0, 4096) == EPERM
        assert client.error(FLUSH) == 0
        assert client.read(0, 4096) == before
