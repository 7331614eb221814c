"""The handshake, by the sections "Fixed newstyle negotiation", "Option types" and "Metadata querying"."""
import struct
import time

from wire import *

NOWHERE = b"no-such-export"


def greeting_offers_fixed_newstyle_and_no_zeroes(t):
    assert t.haggle().server_flags == 3


def unknown_client_flags_drop_the_connection(t):
    for bit in range(2, 32):
        t.haggle(flags=3 | 1 << bit).expect_closed()


def client_flags_may_leave_out_fixed_newstyle(t):
    for flags in (0, 1, 2, 3):
        client = t.haggle(flags)
        assert client.ask(INFO, go(t.export))[0] == ACK


def export_name_answers_size_flags_and_124_zeroes(t):
    size = t.serve().size
    client = t.haggle(flags=1)
    client.option(EXPORT_NAME, t.export)
    answered, flags = client.unpack(">QH")
    assert answered == size and flags & HAS_FLAGS
    assert client.recv(124) == bytes(124)
    client.alive()
    client.disconnect()


def export_name_with_no_zeroes_has_no_padding(t):
    client = t.haggle(flags=3)
    client.option(EXPORT_NAME, t.export)
    client.unpack(">QH")
    client.expect_silence()
    client.alive()


def export_name_of_no_export_hangs_up(t):
    client = t.haggle()
    client.option(EXPORT_NAME, NOWHERE)
    client.expect_closed()


def export_name_that_is_no_string_hangs_up(t):
    for name in (b"a\0b", b"\xff\xfe", b"a" * 4097, b"a" * 100_000):
        client = t.haggle()
        try:
            client.option(EXPORT_NAME, name)
        except Closed:
            continue  # before all of it was sent
        client.expect_closed()


def go_to_no_export_is_unknown_and_haggling_goes_on(t):
    client = t.haggle()
    for code in (INFO, GO):
        assert client.ask(code, go(NOWHERE)) == (UNKNOWN, [])
    client.go(t.export).alive()


def go_sends_no_padding_whatever_was_agreed(t):
    for flags in (1, 3):
        client = t.haggle(flags).go(t.export)
        client.expect_silence(0.05)
        client.alive()


def go_and_info_answer_alike(t):
    for infos in ((), (INFO_BLOCK_SIZE,), (INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE), (0, 3)):
        client = t.haggle().structure()
        result, told = client.ask(INFO, go(t.export, infos))
        assert result == ACK
        result, got = client.ask(GO, go(t.export, infos))
        assert result == ACK and sorted(told) == sorted(got)
        client.size, client.flags = struct.unpack(">QH", [d for _, d in got if d[:2] == b"\0\0"][0][2:])
        client.alive()


def info_does_not_enter_transmission(t):
    client = t.haggle()
    assert client.ask(INFO, go(t.export))[0] == ACK
    assert client.ask(LIST)[0] == ACK


def block_size_info_is_1_4096_and_32_MiB(t):
    result, replies = t.haggle().ask(INFO, go(t.export, (INFO_BLOCK_SIZE,)))
    sizes = [struct.unpack(">III", data[2:]) for _, data in replies if data[:2] == b"\0\3"]
    assert sizes == [(1, 4096, LIMIT)]


def name_and_description_come_when_asked(t):
    _, replies = t.haggle().ask(INFO, go(t.export, (INFO_NAME, INFO_DESCRIPTION)))
    kinds = sorted(struct.unpack(">H", data[:2])[0] for _, data in replies)
    assert kinds == [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION]
    for _, data in replies:
        if data[:2] != b"\0\0":
            assert b"\0" not in data[2:]
            data[2:].decode()


def unknown_information_requests_are_ignored(t):
    client = t.haggle()
    result, replies = client.ask(INFO, go(t.export, (4, 77, 0xFFFF)))
    assert result == ACK and len(replies) == 1
    client.go(t.export, (4, 77, 0xFFFF)).alive()


def go_with_wrong_lengths_is_invalid_and_stays_in_step(t):
    right = go(t.export or b"x", (3,))
    client = t.haggle()
    for cut in range(len(right)):
        assert client.ask(GO, right[:cut])[0] == INVALID, cut
    assert client.ask(GO, right + b"\0")[0] == INVALID
    assert client.ask(INFO, b"\xff\xff\xff\xff" + right[4:])[0] == INVALID
    assert client.ask(INFO, struct.pack(">I", len(t.export)) + t.export + b"\xff\xff\0\3")[0] == INVALID
    client.go(t.export).alive()


def names_that_are_no_strings_are_invalid(t):
    client = t.haggle().structure()
    for name in (b"a\0b", b"\xc3\x28", b"a" * 4097):
        for code in (INFO, GO):
            assert client.ask(code, go(name))[0] == INVALID
        for code in (LIST_META, SET_META):
            assert client.ask(code, meta(name, [ALLOCATION]))[0] == INVALID
    client.go(t.export).alive()


def unknown_options_are_unsupported_and_their_data_skipped(t):
    client = t.haggle()
    for code in (0, 4, 11, 12, 99, 0xFFFFFFFF):
        for length in (0, 1, 16, 1000, 65536, 65537, MIB):
            # Data that look like an option must not be taken for one.
            data = (IHAVEOPT + struct.pack(">II", ABORT, 0)) * (length // 16 + 1)
            assert client.ask(code, data[:length]) == (UNSUP, [])
    client.go(t.export).alive()


def starttls_is_refused_and_never_required(t):
    client = t.haggle()
    assert client.ask(STARTTLS)[0] in (UNSUP, POLICY)
    assert client.ask(STARTTLS, b"data")[0] in (UNSUP, POLICY, INVALID)
    for code, data in ((LIST, b""), (INFO, go(NOWHERE)), (GO, go(NOWHERE))):
        assert client.ask(code, data)[0] != TLS_REQD
    client.go(t.export).alive()


def list_names_exports_then_acks(t):
    result, replies = t.haggle().ask(LIST)
    assert result == ACK
    for kind, data in replies:
        assert kind == SERVER
        length, = struct.unpack(">I", data[:4])
        assert 4 + length <= len(data)
        assert t.haggle().ask(INFO, go(data[4:4 + length]))[0] == ACK


def list_with_data_is_invalid(t):
    client = t.haggle()
    assert client.ask(LIST, b"x")[0] == INVALID
    assert client.ask(LIST)[0] == ACK


def abort_is_acknowledged_then_closed(t):
    for data in (b"", b"ignored"):
        client = t.haggle()
        assert client.ask(ABORT, data) == (ACK, [])
        client.expect_closed()


def abort_without_waiting_for_the_reply(t):
    client = t.haggle()
    client.option(ABORT)
    client.close()


def structured_reply_may_be_asked_for_again(t):
    client = t.haggle()
    assert client.ask(STRUCTURED_REPLY, b"x")[0] == INVALID
    client.structure()
    assert client.ask(STRUCTURED_REPLY)[0] in (ACK, INVALID)
    client.go(t.export).alive()


def df_is_offered_only_with_structured_replies(t):
    assert t.serve().flags & SEND_DF == 0
    assert t.serve(structured=True).flags & SEND_DF


def fast_zero_is_offered_only_with_write_zeroes(t):
    flags = t.serve().flags
    assert not flags & SEND_FAST_ZERO or flags & SEND_ZEROES
    for bit in (SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZEROES, MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO):
        assert flags & bit


def meta_context_needs_structured_replies(t):
    client = t.haggle()
    assert client.ask(SET_META, meta(t.export, [ALLOCATION]))[0] == INVALID
    client.structure().select(t.export)
    assert client.context is not None


def set_meta_context_selects_by_full_name_only(t):
    client = t.haggle().structure()
    for queries in ([], [b"base:"], [b"base:else"], [b"x-other:allocation"], [b"qemu:dirty-bitmap:a", b"y:"]):
        assert client.ask(SET_META, meta(t.export, queries)) == (ACK, []), queries
    result, replies = client.ask(SET_META, meta(t.export, [b"x-a:b", ALLOCATION, b"base:", ALLOCATION]))
    assert result == ACK and [(k, d[4:]) for k, d in replies] == [(META, ALLOCATION)]


def list_meta_context_knows_the_wildcard(t):
    client = t.haggle().structure()
    for queries in ([], [b"base:"], [ALLOCATION], [b"x-a:", b"base:"]):
        result, replies = client.ask(LIST_META, meta(t.export, queries))
        assert result == ACK and [d[4:] for _, d in replies] == [ALLOCATION], queries
    for queries in ([b"base:else"], [b"x-other:"]):
        assert client.ask(LIST_META, meta(t.export, queries)) == (ACK, [])


def meta_context_of_no_export_is_an_error(t):
    client = t.haggle().structure()
    for code in (LIST_META, SET_META):
        assert client.ask(code, meta(NOWHERE, [ALLOCATION]))[0] == UNKNOWN


def meta_context_with_wrong_lengths_is_invalid_and_stays_in_step(t):
    client = t.haggle().structure()
    right = meta(t.export or b"x", [ALLOCATION])
    for code in (LIST_META, SET_META):
        for cut in range(len(right)):
            assert client.ask(code, right[:cut])[0] == INVALID, cut
        assert client.ask(code, right + b"x")[0] == INVALID
        assert client.ask(code, meta(t.export, [])[:-4] + b"\xff\xff\xff\xff")[0] == INVALID
    client.go(t.export).alive()


def each_set_meta_context_replaces_the_last(t):
    for last in (meta(t.export, []), meta(t.export, [b"base:"]), meta(NOWHERE, [ALLOCATION])):
        client = t.haggle().structure().select(t.export)
        client.ask(SET_META, last)
        client.go(t.export)
        assert client.error(STATUS, 0, 4096) == EINVAL
        client.alive()


def list_meta_context_selects_nothing(t):
    client = t.haggle().structure()
    client.ask(LIST_META, meta(t.export, [ALLOCATION]))
    assert client.go(t.export).error(STATUS, 0, 4096) == EINVAL


def option_without_magic_hangs_up(t):
    for index in range(8):
        client = t.haggle()
        magic = bytearray(IHAVEOPT)
        magic[index] ^= 1
        client.send(bytes(magic) + struct.pack(">II", LIST, 0))
        client.expect_closed()


def too_long_option_is_an_error_and_stays_in_step(t):
    client = t.haggle()
    for code in (LIST, INFO, GO, SET_META):
        assert client.ask(code, bytes(MIB))[0] in (TOO_BIG, INVALID)
    client.go(t.export).alive()


def option_of_4_GiB_ends_the_connection(t):
    for code in (EXPORT_NAME, GO, SET_META, 99):
        client = t.haggle()
        client.option(code, b"", length=0xFFFFFFFF)
        try:
            for _ in range(64):
                client.send(bytes(MIB))
            assert False, "the server took 64 MiB of one option"
        except Closed:
            pass


def options_without_end_are_cut_off(t):
    client = t.haggle()
    try:
        for _ in range(100_000):
            client.ask(99)
        assert False, "100,000 options were answered"
    except Closed:
        pass


def handshake_byte_by_byte(t):
    client = t.connect()
    client.recv(18)
    said = struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", STRUCTURED_REPLY, 0)
    for byte in said:
        client.send(bytes([byte]))
        time.sleep(0.001)
    assert client.option_replies(STRUCTURED_REPLY) == (ACK, [])
    client.structured = True
    body = go(t.export, (3,))
    for byte in IHAVEOPT + struct.pack(">II", GO, len(body)) + body:
        client.send(bytes([byte]))
        time.sleep(0.001)
    assert client.option_replies(GO)[0] == ACK
    client.alive()


def requests_sent_along_with_go_are_served(t):
    client = t.haggle()
    body = go(t.export)
    client.send(IHAVEOPT + struct.pack(">II", GO, len(body)) + body + header(READ, 0, 4096, 0, 7) + header(READ, 0, 1, 0, 8))
    assert client.option_replies(GO)[0] == ACK
    client.pending = {7: (READ, 4096), 8: (READ, 1)}
    assert {client.reply()[0], client.reply()[0]} == {7, 8}


def slow_handshake_is_cut_off(t):
    seconds = t.options.handshake_timeout
    if not seconds:
        t.skip()
    silent, trickling = t.connect(), t.haggle()
    silent.sock.settimeout(seconds * 3)
    began = time.monotonic()
    try:
        while time.monotonic() - began < seconds * 3:
            trickling.send(b"I")
            trickling.sock.settimeout(0.2)
            try:
                if trickling.sock.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            break
    except (Closed, ConnectionError):
        pass
    assert time.monotonic() - began < seconds * 2, "a client that sends a byte now and then was not cut off"
    silent.recv(18)
    silent.expect_closed()
