"""Thousands of commits to one disk, each one's checksum kept beside, by a model that knows nothing of how disks are stored.

1. `disk history` names what the rule says, by a list that is kept forward commit by commit, and stays within its bound.
2. Each kept generation, exported, has its checksum.
3. Collection, with objects made old enough: records of exactly the kept generations stay, all of them still have their checksums, and
   nothing is left that none of them needs.
4. The disk goes back to each of them, and has its checksum.
5. `send` and `receive` of one after the other into another store: each has its checksum there.
"""
import hashlib
import os
import random
import subprocess
import time

from bed import *

COMMITS = 400 if QUICK else 10_000
SIZE = 20 << 20  # two blocks
ROOT = STORE.removeprefix("file://")
PAGES = SIZE // 4096


def kept(n, density, pinned):
    """What is kept of 1 to n, walking forward: what falls out of its window is dropped for good."""
    alive = []
    for now in range(1, n + 1):
        alive.append(now)
        out = []
        for s in alive:
            ones = 0
            while s >> ones & 1:
                ones += 1
            if s == now or s in pinned or now - s < 2**ones * 2**density:
                out.append(s)
        alive = out
    return alive


def checksum(name, store=None):
    image = f"{WORK}/image"
    margined("disk", "export", name, image, store=store)
    with open(image, "rb") as f:
        sum = hashlib.sha256(f.read()).hexdigest()
    os.unlink(image)
    return sum


def history(name, store=None):
    return json.loads(margined("disk", "history", name, "--json", store=store))


def age(days=3):
    """Makes everything in the store so much older."""
    old = time.time() - days * 86400
    for folder, _, files in os.walk(ROOT):
        for f in files:
            if f not in ("collection", "clock") and "/." not in folder:
                path = os.path.join(folder, f)
                os.utime(path, (old, min(old, os.stat(path).st_mtime)))


def main():
    rng = random.Random(SEED)
    create("work", SIZE, durability="store")
    daemon = Daemon(commit="10ms")
    daemon.start()
    client = daemon.attach("work")
    model, sums = bytearray(SIZE), {}
    began = time.monotonic()
    for n in range(1, COMMITS + 1):
        for _ in range(rng.randrange(1, 4)):
            page = rng.randrange(PAGES - 4)
            data = content(rng, 4096 * rng.randrange(1, 4))
            if rng.random() < 0.1:
                client.ask(TRIM, page * 4096, len(data))
                model[page * 4096:page * 4096 + len(data)] = bytes(len(data))
            else:
                client.write(page * 4096, data)
                model[page * 4096:page * 4096 + len(data)] = data
        client.flush()
        sums[n] = hashlib.sha256(model).hexdigest()
    took = time.monotonic() - began
    client.disconnect()
    daemon.stop()
    last = show("work")["generation"]
    expect(last == COMMITS, f"{COMMITS} flushes made {last} generations")

    # 1
    there = [g["generation"] for g in history("work")]
    wanted = kept(COMMITS, 2, {1})
    expect(there == wanted, f"history has {there}, the rule says {wanted}")
    expect(len(there) <= 2 * COMMITS.bit_length() + 1, f"{len(there)} generations are kept")
    say(f"{COMMITS} commits in {took:.0f} s; kept: {' '.join(map(str, there))}")
    # 2
    for g in there:
        expect(checksum(f"work@{g}") == sums[g], f"generation {g} has another checksum")
    left = next(g for g in range(2, COMMITS) if g not in there)
    for what in (["export", f"work@{left}", f"{WORK}/x"], ["fork", f"work@{left}", "x"], ["rollback", "work", str(left)], ["pin", "work", str(left)]):
        r = margined("disk", *what, check=False)
        expect(r.returncode == 1 and "has left its history" in r.stderr, f"disk {what[0]} of generation {left}: status {r.returncode}, {r.stderr}")

    # 3
    first = json.loads(margined("gc", "--json"))
    expect(first["generations"]["retired"] == COMMITS - len(there) and first["blocks"]["deleted"] == 0, f"the first collection: {first}")
    expect(json.loads(margined("gc", "--json"))["generations"]["removed"] == 0, "what was retired a moment ago was removed")
    age()
    second = json.loads(margined("gc", "--json", timeout=900))
    records = sorted(int(f) for f in os.listdir(f"{ROOT}/disks/work/generations"))
    # The current one's record is in the head, and not under its key yet.
    expect(records == [g for g in there if g != last], f"after the collection there are records of {records}")
    for g in there:
        expect(checksum(f"work@{g}") == sums[g], f"after the collection generation {g} has another checksum")
    age()
    third = json.loads(margined("gc", "--json"))
    expect(third["blocks"]["deleted"] + third["pages"]["deleted"] == 0, f"a third collection still found something: {third}")
    report = margined("check", "--data", check=False)
    expect(report.returncode == 0, f"check: {report.stdout}{report.stderr}")
    say(f"collected: {second['generations']['removed']} generations, {second['blocks']['deleted']} blocks, {second['pages']['deleted']} pages in "
        f"{second['durationMs']} ms; {second['blocks']['kept']} blocks and {second['pages']['kept']} pages kept")

    # 4
    for g in there:
        margined("disk", "pin", "work", str(g))
    order = there[:]
    rng.shuffle(order)
    for i, g in enumerate(order):
        margined("disk", "rollback", "work", str(g))
        now = show("work")
        expect(now["generation"] == COMMITS + i + 1 and now["origin"] == f"work@{g}", f"the roll-back to {g} made {now['generation']}, {now['origin']}")
        expect(checksum("work") == sums[g], f"gone back to {g}, the disk has another checksum")
    say(f"gone back to each of {len(order)} generations")

    # 5
    other = f"file://{WORK}/other"
    before = None
    for g in there:
        command = ["disk", "send", f"work@{g}"] + (["--from", str(before)] if before else [])
        send = subprocess.Popen([MARGINED, *command, "--store", STORE], stdout=subprocess.PIPE)
        receive = subprocess.run([MARGINED, "disk", "receive", "copy", "--store", other], stdin=send.stdout, capture_output=True, text=True, timeout=120)
        expect(send.wait() == 0 and receive.returncode == 0, f"send and receive of {g}: {receive.stderr}")
        expect(checksum("copy", other) == sums[g], f"received, generation {g} has another checksum")
        before = g
    expect([g["origin"] for g in history("copy", other)][-1] == f"work@{there[-1]}", "the copy does not say what it is of")
    say(f"sent and received {len(there)} generations, bit for bit")


run_main(main)
