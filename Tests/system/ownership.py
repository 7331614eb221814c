"""The two daemons of ownership.sh."""
import threading
import urllib.request

from bed import *

PAGES = 24                       # all written with one stamp before each flush; spread over blocks
SPOTS = [i * (5 << 20) for i in range(PAGES)]
NAME = "shared"


class Writer(threading.Thread):
    """A client that stamps all spots and flushes, again and again, until its connection ends."""

    def __init__(self, daemon, tag, session):
        super().__init__(daemon=True)
        self.tag, self.count, self.why, self.halt, self.ended = tag, 0, None, False, None
        self.client = daemon.attach(f"{NAME}?session={session}", timeout=20)

    def run(self):
        try:
            while not self.halt:
                stamp = struct.pack("<II", self.tag, self.count + 1) * 512
                for spot in SPOTS:
                    self.client.send(WRITE, spot, data=stamp)
                while self.client.waiting:
                    for _, _, error, _ in self.client.replies():
                        if error:
                            raise Gone(f"error {error}")
                self.client.flush()
                self.count += 1
        except (Gone, Failed, OSError) as e:
            self.why = str(e) or type(e).__name__
        self.ended = time.monotonic()


class Watcher(threading.Thread):
    """Reads the disk's public record over and over: (generation, epoch, owner) in the order seen."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.halt = [], False

    def run(self):
        while not self.halt:
            d = show(NAME)
            now = (d["generation"], d["epoch"], d.get("owner"))
            if not self.seen or self.seen[-1] != now:
                self.seen.append(now)
            time.sleep(0.02)


class Prober(threading.Thread):
    """A client that reads one page and writes and flushes another, and remembers when each request went out and what came."""

    def __init__(self, daemon, export):
        super().__init__(daemon=True)
        self.client, self.seen, self.why, self.halt = daemon.attach(export, timeout=20), [], None, False
        self.client.socket.settimeout(20)

    def run(self):
        try:
            while not self.halt:
                sent = time.monotonic()
                page = bytes(self.client.read(0, 4096))
                self.client.write(1 << 20, b"p" * 4096)
                self.client.flush()
                self.seen.append((sent, page[:1]))
        except (Gone, Failed, OSError) as e:
            self.why = str(e) or type(e).__name__


def stopped_owner():
    """Row 13: an owner that is stopped, taken over and continued answers nothing that it was asked after the take-over."""
    create("stopped", 1 << 30, resume_window="0")
    a, b = Daemon("stop-a"), Daemon("stop-b")
    a.start()
    b.start()
    probers = [Prober(a, "stopped?session=one") for _ in range(4)]
    probers[0].client.write(0, b"1" * 4096)
    probers[0].client.flush()
    for p in probers:
        p.start()
    until("the first probes", 10, lambda: all(p.seen for p in probers))
    os.kill(a.pid, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        c = b.attach("stopped?session=two", timeout=30)
        took = time.monotonic() - begin
        expect(took >= 0.9, f"a server that did not answer for {took:.1f} s was robbed: owner-dead-after is 1 s")
        c.write(0, b"2" * 4096)
        c.flush()
        time.sleep(max(0, begin + 4 - time.monotonic()))
        taken = time.monotonic()
    finally:
        os.kill(a.pid, signal.SIGCONT)
    for p in probers:
        p.join(20)
        expect(not p.is_alive(), "a client of the robbed server is neither served nor told")
        late = [page for sent, page in p.seen if sent >= taken]
        expect(not late, f"{len(late)} reads and flushes were answered by a server that had lost the disk: {late[:3]}")
    expect(bytes(c.read(0, 1)) == b"2", "the new owner's write is gone")
    until("the robbed server's message", 10, lambda: "declared it dead" in open(a.log, errors="replace").read())
    c.disconnect()
    b.stop()
    a.stop()
    say(f"stopped for 4 s and continued: taken over after {took:.1f} s, nothing answered afterwards ({probers[0].why!r})")


def hanging_head():
    """Row 6: the head of one disk hangs. Nobody takes the others."""
    admin = os.environ["S3_ADMIN"]

    def ask(method, path, body=None):
        r = urllib.request.Request(admin + path, method=method, data=json.dumps(body).encode() if body else None)
        urllib.request.urlopen(r, timeout=10).read()

    create("hangs", 1 << 30)
    create("healthy", 1 << 30)
    a, b = Daemon("hang-a"), Daemon("hang-b")
    a.start()
    b.start()
    bad, good = a.attach("hangs"), Prober(a, "healthy")
    bad.write(0, b"x" * 4096)
    good.start()
    ask("POST", "/faults", {"do": "delay", "seconds": 20, "target": ".*/disks/hangs/head.*"})
    end = time.monotonic() + (6 if QUICK else 15)
    refused = 0
    while time.monotonic() < end:
        try:
            b.attach("healthy?session=thief", patient=False, timeout=20).cut()
            raise Failed("a server with one hanging head was robbed of another disk")
        except Refused:
            refused += 1
        count = len(good.seen)
        time.sleep(0.3)
        expect(len(good.seen) > count, "the healthy disk stands still")
    ask("DELETE", "/faults")
    good.halt = True
    good.join(10)
    expect(good.why is None, f"the healthy disk's client: {good.why}")
    say(f"one disk's head hung: {refused} attaches elsewhere refused, {len(good.seen)} probes of another disk answered")
    bad.cut()
    good.client.cut()
    a.kill()
    b.kill()


def main():
    stopped_owner()
    if "S3_ADMIN" in os.environ:
        hanging_head()
    create(NAME, 1 << 30, safe_points="flush", durability="scratch", resume_window="60s", density=16)  # every generation is looked at
    a, b = Daemon("a", commit="50ms"), Daemon("b", commit="50ms")
    a.start()
    b.start()
    watcher = Watcher()
    watcher.start()
    tag = 1
    w = Writer(a, tag, "a0")
    w.start()
    time.sleep(0.7)

    # 1: refused while the owner lives.
    for _ in range(3):
        try:
            b.attach(NAME, patient=False, timeout=20).cut()
            raise Failed("the second daemon let a client in while the first owns the disk")
        except Refused as e:
            expect(e.kind != 0x80000006, f"refused as unknown: {e}")
            text = e.text
        time.sleep(0.6)
    expect(w.why is None, f"the owner's client was disturbed: {w.why}")
    say(f"refused while the owner lives: {text!r}")
    b.stop()

    # 2: by force, back and forth, each time under load.
    owner, other, slowest = a, b, 0
    rounds = 4 if QUICK else 20
    for n in range(rounds):
        other.start("--takeover", "force")
        tag += 1
        before = show(NAME)
        nw = Writer(other, tag, f"s{tag}")
        taken = time.monotonic()
        nw.start()
        w.join(10)
        expect(not w.is_alive(), f"round {n}: the first daemon's client still writes 10 s after its disk was taken")
        slowest = max(slowest, w.ended - taken)
        if n == 0:   # later ones take by force themselves
            try:
                owner.attach(f"{NAME}?session=late", patient=False, timeout=20).cut()
                raise Failed("the loser lets clients in while the new owner lives")
            except (Refused, Gone):
                pass
        after = show(NAME)
        expect(after["epoch"] > before["epoch"], f"round {n}: the epoch did not grow by the takeover")
        time.sleep(0.5)
        expect(nw.is_alive() and nw.count, f"round {n}: the new owner's client was disturbed: {nw.why}")
        owner.stop()
        w, owner, other = nw, other, owner
    say(f"taken by force {rounds} times: the loser's client ended at most {slowest * 1000:.0f} ms after")

    # 3: the owner dies; the other takes over by itself.
    owner.kill()
    w.join(10)
    other.start()
    begin = time.monotonic()
    tag += 1
    nw = Writer(other, tag, f"s{tag}")
    nw.start()
    took = time.monotonic() - begin
    time.sleep(0.7)
    nw.halt = True
    nw.join(10)
    expect(nw.why is None, f"after the takeover of a dead owner's disk: {nw.why}")
    nw.client.disconnect()
    other.stop()
    watcher.halt = True
    watcher.join()
    say(f"a dead owner's disk was taken over in {took:.1f} s")

    # 4: what was published.
    epochs = {}
    for (g1, e1, _), (g2, e2, _) in zip(watcher.seen, watcher.seen[1:]):
        expect(e2 >= e1 and g2 >= g1, f"the head went back: generation {g1} epoch {e1}, then {g2} epoch {e2}")
    for g, e, o in watcher.seen:
        epochs.setdefault(g, set()).add(e)
    last = show(NAME)["generation"]
    first = max(1, watcher.seen[0][0])
    step = max(1, (last - first) // (25 if QUICK else 200))
    tags, checked = [], 0
    for g in [*range(first, last, step), last]:
        margined("disk", "export", f"{NAME}@{g}", f"{WORK}/g.img")
        with open(f"{WORK}/g.img", "rb") as f:
            stamps = set()
            for spot in SPOTS:
                f.seek(spot)
                stamps.add(f.read(4096))
        os.unlink(f"{WORK}/g.img")
        heads = {struct.unpack("<II", s[:8]) for s in stamps}
        expect(len(stamps) == 1, f"generation {g} mixes {len(stamps)} stamps: {sorted(heads)}")
        stamp = stamps.pop()
        expect(stamp == stamp[:8] * 512, f"generation {g}: a torn page")
        tags.append(struct.unpack("<II", stamp[:8]))
        checked += 1
    expect(tags == sorted(tags), f"writers come back after they lost the disk: {tags}")
    expect(tags[-1] == (tag, nw.count), f"the last generation holds {tags[-1]}, the last clean client wrote {(tag, nw.count)}")
    say(f"generations {first} to {last}: {checked} exported, each a whole safe point of one writer; {len(watcher.seen)} heads seen, none went back")


run_main(main)
