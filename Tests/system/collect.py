"""The measurements of collect.sh. The store is made by Docs/Format.md alone; blocks are a few bytes long, for neither a collection
nor a check without --data reads them."""
import ctypes

from bed import *

COUNT = 100_000 if QUICK else 1_000_000
ROOT = STORE.removeprefix("file://")
DAY = 86400
OLD = time.time() - 3 * DAY
LENGTH = 32          # of a block object
LIMIT_S, LIMIT_MIB = 300, 200

xxhash = ctypes.CDLL("libxxhash.so.0")
xxhash.XXH3_64bits.restype = ctypes.c_uint64
xxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
rng = random.Random(SEED)


def checksum(data):
    return xxhash.XXH3_64bits(data, len(data))


def put(key, data, at=OLD):
    fd = os.open(f"{ROOT}/{key}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, data)
    os.utime(fd, (at, at))
    os.close(fd)


def control(key, kind, format, members):
    rest = json.dumps(members, separators=(",", ":"))[1:].encode()
    data = b'{"margarine":"%s","format":%d,"checksum":"%016x",' % (kind.encode(), format, checksum(rest)) + rest
    with open(f"{ROOT}/{key}", "wb") as f:
        f.write(data)


def new_id():
    return rng.getrandbits(64), rng.getrandbits(64)


def name(id):
    return "%016x%016x" % id


def page(id, index, level, slots, objects, body):
    """Stores a page; returns its reference."""
    data = struct.pack("<8sIIQQQBBHI", b"MGPAGE\0\0", 1, 48 + len(body) + 8, *id, index, level, 0, slots, objects) + body
    data += struct.pack("<Q", checksum(data))
    put("manifests/" + name(id), data)
    return len(data)


def leaf(index, blocks):
    """A leaf whose first slots are these blocks."""
    id = new_id()
    body = b"".join(struct.pack("<QQB", *b, 0) for b in blocks)
    body += b"".join(struct.pack("<HBHII", slot, 0x80, slot, LENGTH, 1) for slot in range(len(blocks)))
    return {"id": id, "length": page(id, index, 0, len(blocks), len(blocks), body), "used": len(blocks)}


def inner(level, index, children):
    id = new_id()
    body = b"".join(struct.pack("<HBBIQQQQ", slot, 0, 0, c["length"], *c["id"], c["used"], c["used"] * LENGTH) for slot, c in enumerate(children))
    return {"id": id, "length": page(id, index, level, len(children), 0, body), "used": sum(c["used"] for c in children)}


def tree(leaves):
    """The root over leaves, and its depth, of a disk that needs three levels."""
    middle = [inner(1, i, leaves[i * 512:(i + 1) * 512]) for i in range((len(leaves) + 511) // 512)]
    return inner(2, 0, middle)


def record(disk, generation, root):
    return {"diskID": disk, "generation": generation, "epoch": 0, "sizeBytes": 512 * 512 * 5 << 24, "kind": "flush",
            "committedAtMs": 1, "journalSequence": 0, "usedBlocks": root["used"], "storedBytes": root["used"] * LENGTH, "newBytes": 0,
            "depth": 3, "root": {"id": name(root["id"]), "location": 0, "lengthBytes": root["length"], "usedBlocks": root["used"],
                                 "storedBytes": root["used"] * LENGTH}}


def measure(*arguments):
    """Runs margined; its standard output as JSON, seconds, and MiB of memory at its most."""
    took, mib, out = measured(*arguments, "--json")
    answer = json.loads(out)
    say(f"margined {' '.join(arguments)}: {took:.1f} s, at most {mib:.0f} MiB", json.dumps(answer.get("phaseMs", {}), sort_keys=True))
    expect(took < LIMIT_S, f"it took more than {LIMIT_S} s")
    expect(mib < LIMIT_MIB, f"it took more than {LIMIT_MIB} MiB")
    return answer


def main():
    begin = time.monotonic()
    margined("disk", "create", "first", "--size", "1G")
    os.makedirs(f"{ROOT}/blocks")
    os.makedirs(f"{ROOT}/manifests")
    named, garbage, young = COUNT * 8 // 10, COUNT * 2 // 10 - 1000, 1000
    blocks = [new_id() for _ in range(named + garbage + young)]
    for i, id in enumerate(blocks):
        put("blocks/" + name(id), b"b" * LENGTH, OLD if i < named + garbage else time.time())
    # Two generations of one disk that share all leaves but the first, which have blocks of their own.
    own = COUNT // 100
    leaves = [leaf(i, blocks[own + i * 512:min(own + (i + 1) * 512, named)]) for i in range((named - own + 511) // 512)]
    old = tree(leaves)
    changed = [leaf(i, blocks[i * 500:min((i + 1) * 500, own)]) for i in range(own // 500)]
    current = tree(changed + leaves[len(changed):])
    # And a fork of the older one.
    for disk, generation, root in (("big", 2, current), ("fork", 1, old)):
        id = name(new_id())
        os.makedirs(f"{ROOT}/disks/{disk}/generations")
        control(f"disks/{disk}/head", "head", 2, {
            "diskID": id, "name": disk, "sizeBytes": 512 * 512 * 5 << 24,
            "options": {"safePoints": "auto", "durability": "scratch", "resumeWindowMs": 0, "historyDensity": 2}, "generation": generation,
            "epoch": 0, "lostSessions": [], "createdAtMs": 1, "deleted": False, "record": record(id, generation, root), "nonce": name(new_id()),
            "pinned": [1], "readOnly": False})
        if generation == 2:
            control(f"disks/{disk}/generations/{1:020d}", "generation", 2, record(id, 1, old))
    pages = set(os.listdir(f"{ROOT}/manifests"))
    lost = [leaf(i, blocks[named + i:named + i + 100]) for i in range(COUNT // 1000)]
    say(f"{len(blocks)} block objects and {len(pages) + len(lost)} manifest pages made in {time.monotonic() - begin:.0f} s")

    expected = {name(b) for b in blocks[:named] + blocks[named + garbage:]}
    if QUICK:
        dry = measure("gc", "--dry-run")
        expect(dry["blocks"]["deleted"] == garbage and len(os.listdir(f"{ROOT}/blocks")) == len(blocks), "the dry run's count, or what is left after it")
        expect(not os.path.exists(f"{ROOT}/collection"), "a dry run has written something")
    # One that is stopped while it lists is gone on with.
    scratch = f"{WORK}/gc"
    p = subprocess.Popen([MARGINED, "gc", "--scratch", scratch, "--store", STORE], stderr=subprocess.DEVNULL)
    until("the listing", 60, lambda: os.path.exists(f"{ROOT}/collection") and b'"phase":"listing"' in open(f"{ROOT}/collection", "rb").read())
    p.send_signal(signal.SIGTERM)
    expect(p.wait(60) != 0 and os.path.exists(f"{scratch}/gc/round"), "a collection that was stopped while it listed has kept nothing")
    expect(len(os.listdir(f"{ROOT}/blocks")) == len(blocks), "a collection has deleted something before it had listed everything")
    listed = os.path.getsize(f"{scratch}/gc/blocks.found")
    summary = measure("gc", "--scratch", scratch)
    say(f"the first run was stopped with {listed >> 10} KiB listed, the second one went on")
    expect(not os.listdir(f"{scratch}/gc"), "a completed collection has left something on scratch")
    left = set(os.listdir(f"{ROOT}/blocks"))
    expect(not expected - left, f"{len(expected - left)} blocks are gone that are in use or young")
    expect(not left - expected, f"{len(left - expected)} blocks are left that are garbage")
    expect(set(os.listdir(f"{ROOT}/manifests")) == pages, "not exactly the garbage of the manifest pages is gone")
    counts = summary["blocks"]
    expect((counts["scanned"], counts["deleted"], counts["young"], counts["kept"]) == (len(blocks), garbage, young, named), f"counted {counts}")
    expect(summary["pages"]["deleted"] == len(lost) and counts["deletedBytes"] == garbage * LENGTH, f"counted {summary}")
    report = measure("check")
    expect((report["blocks"], report["pages"], report["counts"]) == (named, len(pages), {}), f"checked {report}")
    say(f"exactly {garbage} blocks and {len(lost)} pages of garbage are gone; {named} blocks in use and {young} young ones are there")


run_main(main)
