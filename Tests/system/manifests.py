"""The measurements of manifests.sh.

The large disk is made by writing its manifest pages and its head as Docs/Format.md says. All entries name block objects of their
own that do not exist, but for the first of every page, which names one that does.
"""
import ctypes

from bed import *

xxhash = ctypes.CDLL("libxxhash.so.0")
xxhash.XXH3_64bits.restype = ctypes.c_uint64
xxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
BLOCK, SLOTS = 16 << 20, 512
ROOT = STORE.removeprefix("file://")


def checksum(data):
    return struct.pack("<Q", xxhash.XXH3_64bits(data, len(data)))


def get(key):
    with open(f"{ROOT}/{key}", "rb") as f:
        return f.read()


def put(key, data):
    os.makedirs(os.path.dirname(f"{ROOT}/{key}"), exist_ok=True)
    with open(f"{ROOT}/{key}", "wb") as f:
        f.write(data)


def head(disk):
    return json.loads(get(f"disks/{disk}/head"))


def put_head(disk, value):
    rest = json.dumps({k: v for k, v in value.items() if k not in ("margarine", "format", "checksum")}, separators=(",", ":")).encode()[1:]
    sum = struct.unpack("<Q", checksum(rest))[0]
    put(f"disks/{disk}/head", b'{"margarine":"head","format":%d,"checksum":"%016x",' % (value["format"], sum) + rest)


def put_page(level, index, count, objects, body, used, stored):
    id = os.urandom(16)
    high, low = struct.unpack(">QQ", id)
    data = struct.pack("<8sIIQQQBBHI", b"MGPAGE\0\0", 1, 48 + len(body) + 8, high, low, index, level, 0, count, objects) + body
    data += checksum(data)
    put("manifests/" + id.hex(), data)
    return struct.pack("<BBIQQQQ", 0, 0, len(data), high, low, used, stored), {
        "id": id.hex(), "location": 0, "lengthBytes": len(data), "usedBlocks": used, "storedBytes": stored}


def fill(disk, size, blocks):
    """Makes the first `blocks` blocks of a disk that was never written used ones."""
    real = head("seed")["record"]["root"]["id"]
    page = get("manifests/" + real)
    real_object = page[48:65]
    real_entry = struct.unpack_from("<HBHII", page, 65)
    length, mask = real_entry[3], real_entry[4]
    fake = 5_000_000
    rows = []
    for index in range((blocks + SLOTS - 1) // SLOTS):
        n = min(SLOTS, blocks - index * SLOTS)
        ids = os.urandom(16 * n)
        table = real_object + b"".join(ids[16 * i:16 * i + 16] + b"\0" for i in range(1, n))
        entries = b"".join(struct.pack("<HBHII", i, 0x80, i, fake if i else length, 0xFFFFFFFF if i else mask) for i in range(n))
        rows.append(put_page(0, index, n, n, table + entries, n, (n - 1) * fake + length))
    level, depth = 0, next(d for d in range(1, 6) if SLOTS**d * BLOCK >= size)
    while level < depth - 1:
        level += 1
        above = []
        for index in range((len(rows) + SLOTS - 1) // SLOTS):
            children = rows[index * SLOTS:(index + 1) * SLOTS]
            body = b"".join(struct.pack("<H", slot) + row for slot, (row, _) in enumerate(children))
            above.append(put_page(level, index, len(children), 0, body, sum(r["usedBlocks"] for _, r in children), sum(r["storedBytes"] for _, r in children)))
        rows = above
    expect(len(rows) == 1, "a manifest with one top")
    value, root = head(disk), rows[0][1]
    value["generation"] = value["generation"] + 1
    value["record"] = {
        "diskID": value["diskID"], "generation": value["generation"], "epoch": value["epoch"], "sizeBytes": size, "kind": "imported",
        "committedAtMs": value["createdAtMs"], "journalSequence": 0, "usedBlocks": root["usedBlocks"], "storedBytes": root["storedBytes"],
        "newBytes": 0, "depth": depth, "root": root}
    put_head(disk, value)
    return depth


def calls(daemon):
    store = daemon.status()["store"]
    return store["requests"], store["readBytes"] + store["writtenBytes"]


def serve(disk, blocks):
    """Requests, KiB and milliseconds of attaching with a first read, and of a commit; the daemon's peak MiB."""
    daemon = Daemon(disk, settings=["heartbeat-interval=60s", "owner-dead-after=200s"])
    daemon.start()
    result = []
    before, begin = calls(daemon), time.monotonic()
    client = daemon.attach(disk)
    # The first block of the last page.
    place = (blocks - 1) // SLOTS * SLOTS * BLOCK
    expect(bytes(client.read(place, 4)) == b"seed", f"{disk}: the bytes of its last page")
    took, now = time.monotonic() - begin, calls(daemon)
    result.append((now[0] - before[0], (now[1] - before[1]) / 1024, took * 1000))
    generation = show(disk)["generation"]
    before, begin = calls(daemon), time.monotonic()
    client.write(place + 8192, b"\x42" * 4096)
    client.flush()   # with durability store, the reply is the commit's
    took, now = time.monotonic() - begin, calls(daemon)
    expect(show(disk)["generation"] == generation + 1, f"{disk}: one commit")
    result.append((now[0] - before[0], (now[1] - before[1]) / 1024, took * 1000))
    with open(f"/proc/{daemon.pid}/status") as f:
        peak = next(int(l.split()[1]) for l in f if l.startswith("VmHWM")) / 1024
    client.disconnect()
    daemon.stop()
    return (*result, peak)


def main():
    with open(f"{WORK}/seed.img", "wb") as f:
        f.write(b"seed" * 1000)
        f.truncate(BLOCK)
    margined("disk", "import", f"{WORK}/seed.img", "seed")
    table = []
    for disk, size, blocks in (("small", 1 << 30, 10), ("large", 16 << 40, 1_000_000)):
        create(disk, size, durability="store")
        begin = time.monotonic()
        depth = fill(disk, size, blocks)
        made = time.monotonic() - begin
        expect(show(disk)["blocks"] == blocks, f"{disk} has {show(disk)['blocks']} blocks")
        attach, commit, peak = serve(disk, blocks)
        say(f"{disk} ({size >> 30} GiB, {blocks} used blocks, {depth} levels; made in {made:.1f} s): attach and first read {attach[0]} requests, {attach[1]:.0f} KiB, {attach[2]:.0f} ms, "
            f"commit of one page {commit[0]} requests, {commit[1]:.0f} KiB, {commit[2]:.0f} ms, the daemon's peak {peak:.0f} MiB")
        commands = []
        for name, arguments in (("diff", ["diff", f"{disk}@1", disk, "--json"]), ("fork", ["fork", disk, disk + "-fork"]), ("send --from", ["send", disk, "--from", "1"])):
            seconds, mib, out = min(measured("disk", *arguments) for _ in range(1 if name == "fork" else 3))
            ms = seconds * 1000
            commands.append((ms, mib))
            say(f"{disk}: {name}: {ms:.0f} ms, peak {mib:.0f} MiB")
            if name == "diff":
                place = (blocks - 1) // SLOTS * SLOTS * BLOCK
                expect(json.loads(out)["ranges"] == [{"offset": place, "length": 512 << 10, "kind": "data"}], f"{disk}: what changed: {out[:300]}")
            if name == "send --from":
                expect(len(out) < 100_000, f"{disk}: a stream of {len(out)} bytes for one page")
        expect(show(disk + "-fork")["blocks"] == blocks, "the fork has another number of blocks")
        table.append((depth, attach, commit, peak, commands))
    # All of it changed: a million blocks pass by.
    create("empty", 16 << 40)
    seconds, mib, out = measured("disk", "diff", "empty", "large", "--json")
    say(f"empty to large: diff: {seconds * 1000:.0f} ms, peak {mib:.0f} MiB")
    expect(json.loads(out)["dataBytes"] > 998_000 * BLOCK, "the difference of an empty disk and a full one")
    (d0, a0, c0, p0, m0), (d1, a1, c1, p1, m1) = table
    expect(mib < m0[0][1] + 32, f"comparing a million blocks takes {mib:.0f} MiB")
    # Attaching goes two ways down the tree, to where a super block would be and to what is read; a commit writes one way up again.
    # A page has less than 32 KiB here.
    deeper = d1 - d0
    expect(a1[0] <= a0[0] + 2 * deeper, f"attaching the large disk takes {a1[0]} requests, the small one {a0[0]}")
    expect(c1[0] <= c0[0] + deeper, f"committing to the large disk takes {c1[0]} requests, to the small one {c0[0]}")
    expect(a1[1] <= a0[1] + 32 * d1 and c1[1] <= c0[1] + 32 * d1, "the large disk takes more than its pages")
    expect(p1 < p0 + 16, f"the daemon's peak is {p1:.0f} MiB with the large disk, {p0:.0f} with the small one")
    for (ms0, mib0), (ms1, mib1) in zip(m0, m1):
        expect(mib1 < mib0 + 16, f"a command on the large disk takes {mib1:.0f} MiB, on the small one {mib0:.0f}")
        expect(ms1 < 3 * ms0 + 200, f"a command on the large disk takes {ms1:.0f} ms, on the small one {ms0:.0f}")


run_main(main)
