"""A store in use, and collected all the while.

Writers keep a model of their disks and hold every read against it. Whoever looks after the disks forks them (the current and older
generations), goes back, pins, deletes, and sends; each fork's bytes are known by checksum and looked at again and again. Two
collectors begin round after round with a short grace period. At the end every disk is as it must be, `check --data` finds nothing, and no object
is left that nothing names.
"""
import hashlib
import os
import random
import subprocess
import threading
import time

from bed import *

SECONDS = int(os.environ.get("LIFE_SECONDS", "25" if QUICK else "3600"))
GRACE = 8 if QUICK else 60
SIZE = 40 << 20
PAGES = SIZE // 4096
failures = []
over = threading.Event()
counts = {}
lock = threading.Lock()


def count(what, n=1):
    with lock:
        counts[what] = counts.get(what, 0) + n


def guarded(work, *arguments):
    def run():
        try:
            work(*arguments)
        except BaseException as e:
            import traceback

            failures.append(f"{work.__name__}: {e!r} {traceback.format_exc()[-400:]}")
            over.set()

    t = threading.Thread(target=run)
    t.start()
    return t


def checksum(name):
    """Of a disk's or generation's bytes; nil when it is not there any more."""
    image = f"{WORK}/image-{threading.get_ident()}"
    r = margined("disk", "export", name, image, check=False)
    if r.returncode:
        expect("has left" in r.stderr or "no disk" in r.stderr or "no generation" in r.stderr, f"export of {name}: {r.stderr}")
        return None
    with open(image, "rb") as f:
        sum = hashlib.sha256(f.read()).hexdigest()
    os.unlink(image)
    return sum


class Writer:
    def __init__(self, daemon, name, seed):
        self.daemon, self.name, self.rng, self.model = daemon, name, random.Random(seed), bytearray(SIZE)
        create(name, SIZE, durability="store" if seed % 2 else "scratch")

    def run(self):
        client = self.daemon.attach(self.name)
        while not over.is_set():
            for _ in range(self.rng.randrange(1, 30)):
                page, n = self.rng.randrange(PAGES - 16), self.rng.randrange(1, 16)
                at = page * 4096
                kind = self.rng.random()
                if kind < 0.6:
                    data = content(self.rng, n * 4096)
                    client.write(at, data)
                    self.model[at:at + len(data)] = data
                elif kind < 0.7:
                    client.ask(TRIM, at, n * 4096)
                    self.model[at:at + n * 4096] = bytes(n * 4096)
                else:
                    expect(client.read(at, n * 4096) == self.model[at:at + n * 4096], f"{self.name} shows other bytes at {at}")
            client.flush()
            count("flushes")
            time.sleep(self.rng.random() * 0.2)
        expect(client.read(0, SIZE) == self.model, f"{self.name} is not as it was written")
        client.disconnect()


class Owner:
    """Forks, and what becomes of them."""

    def __init__(self, names, seed):
        self.names, self.rng, self.forks, self.number = names, random.Random(seed), {}, 0

    def run(self):
        while not over.is_set():
            act = self.rng.random()
            if act < 0.4 and len(self.forks) < 12:
                self.fork()
            elif act < 0.6 and self.forks:
                name = self.rng.choice(sorted(self.forks))
                if self.rng.random() < 0.5:
                    sums = self.forks[name]
                    g = self.rng.choice(sorted(sums))
                    r = margined("disk", "rollback", name, str(g), check=False)
                    expect(r.returncode == 0 or "has left" in r.stderr, r.stderr)
                    if r.returncode == 0:
                        sums[show(name)["generation"]] = sums[g]
                        count("roll-backs")
                else:
                    margined("disk", "delete", name)
                    del self.forks[name]
                    count("deletions")
            elif act < 0.75:
                name = self.rng.choice(self.names)
                gs = json.loads(margined("disk", "history", name, "--json"))
                if gs:
                    g = self.rng.choice(gs)
                    r = margined("disk", "unpin" if g["pinned"] else "pin", name, str(g["generation"]), check=False)
                    expect(r.returncode == 0 or "has left" in r.stderr or "not pinned" in r.stderr, r.stderr)
                    if r.returncode == 0 and not g["pinned"]:
                        expect(checksum(f"{name}@{g['generation']}") is not None, f"generation {g['generation']} of {name} is pinned and gone")
                        count("pins")
            elif self.forks:
                self.look(self.rng.choice(sorted(self.forks)))
            time.sleep(self.rng.random() * 0.3)

    def fork(self):
        source = self.rng.choice(self.names + sorted(self.forks))
        gs = [g["generation"] for g in json.loads(margined("disk", "history", source, "--json"))]
        if not gs:
            return
        g = self.rng.choice(gs)
        sum = checksum(f"{source}@{g}")
        if sum is None:
            return
        self.number += 1
        name = f"fork{self.number % 20}"
        if name in self.forks:
            return
        r = margined("disk", "fork", f"{source}@{g}", name, check=False)
        if r.returncode:
            expect("has left" in r.stderr, r.stderr)
            return
        self.forks[name] = {show(name)["generation"]: sum}
        count("forks")

    def look(self, name):
        now = show(name)["generation"]
        expect(checksum(name) == self.forks[name][now], f"{name} is another one than it was forked from")
        count("looks")


def collect(daemon, n):
    while not over.is_set():
        r = margined("gc", "--json", check=False, timeout=600)
        expect(r.returncode == 0 or "is collecting" in r.stderr or "has taken over" in r.stderr, f"gc: {r.stderr}")
        if r.returncode == 0:
            s = json.loads(r.stdout)
            count("collections")
            count("deleted", s["blocks"]["deleted"] + s["pages"]["deleted"])
            count("generations removed", s["generations"]["removed"])
        time.sleep(0.5)


def main():
    margined("gc", "--grace", f"{GRACE}s", "--allow-short-grace")
    daemon = Daemon(commit="200ms")
    names = [f"disk{n}" for n in range(3)]
    writers = [Writer(daemon, name, SEED + n) for n, name in enumerate(names)]
    daemon.start()
    owner = Owner(names, SEED)
    threads = [guarded(w.run) for w in writers] + [guarded(owner.run)] + [guarded(collect, daemon, n) for n in range(2)]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not over.is_set():
        time.sleep(0.5)
    over.set()
    for t in threads:
        t.join()
    expect(not failures, "; ".join(failures))
    daemon.stop()

    for w in writers:
        expect(checksum(w.name) == hashlib.sha256(w.model).hexdigest(), f"{w.name} is not as it was written")
    for name in sorted(owner.forks):
        owner.look(name)
    for _ in range(4):  # retired, removed, and then the objects
        time.sleep(GRACE + 1.5)
        last = json.loads(margined("gc", "--json", timeout=600))
    expect(last["blocks"]["deleted"] + last["pages"]["deleted"] + last["generations"]["removed"] == 0, f"there was still garbage: {last}")
    r = margined("check", "--data", "--json", check=False, timeout=600)
    expect(r.returncode == 0 and not json.loads(r.stdout)["problems"], f"check: {r.stdout} {r.stderr}")
    for w in writers:
        expect(checksum(w.name) == hashlib.sha256(w.model).hexdigest(), f"{w.name} has changed")
    for name in sorted(owner.forks):
        owner.look(name)
    say(f"{SECONDS} s: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) + f"; {last['blocks']['kept']} blocks and {last['pages']['kept']} pages left, no garbage")


run_main(main)
