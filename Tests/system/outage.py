"""The outages of outage.sh."""
import shutil

from bed import *
from gate import before_store

MIB = 1 << 20
NAME = "out"
SPAN = 256 * MIB      # written over and over
COLD = 512 * MIB      # written once, and only in the store later


late = []             # told at the end, so that the rest is looked at as well


class Stamps:
    """The load: aligned pieces of 64 KiB, each holding its place and a counter; up to `depth` in flight."""

    PIECE = 64 << 10

    def __init__(self, rng):
        self.rng, self.counts, self.flight, self.acknowledged = rng, {}, {}, 0

    @classmethod
    def bytes(cls, place, count):
        return struct.pack("<QQ", place, count) * (cls.PIECE // 16)

    def send(self, client):
        place = self.rng.randrange(SPAN // self.PIECE)
        if place in self.flight:
            return
        count = self.counts.get(place, 0) + 1
        self.flight[place] = count
        client.send(WRITE, place * self.PIECE, data=self.bytes(place, count), tag=place)

    def take(self, client, block):
        n = 0
        for _, place, error, _ in client.replies(block):
            if place is None:
                expect(error == 0, f"FLUSH failed with error {error}")
                continue
            expect(error == 0, f"a write failed with error {error} during the outage")
            self.counts[place] = self.flight.pop(place)
            self.acknowledged += 1
            n += 1
        return n

    def check(self, client, what):
        """Every piece is its last acknowledged version, or the one in flight."""
        for at in range(0, SPAN, 8 * MIB):
            data = bytes(client.read(at, 8 * MIB))
            for i in range(0, len(data), self.PIECE):
                place, piece = (at + i) // self.PIECE, data[i:i + self.PIECE]
                count = self.counts.get(place, 0)
                good = [self.bytes(place, count) if count else bytes(self.PIECE)]
                if place in self.flight:
                    good.append(self.bytes(place, self.flight[place]))
                if piece in good:
                    continue
                found = struct.unpack("<QQ", piece[:16])
                expect(place in self.flight and all(a in (g1, g2) for a, g1, g2 in zip(piece, *good)),
                       f"{what}: piece {place} should be version {count}, but begins with {found}")


def drive(load, client, seconds, depth=16):
    """Writes for that long; (acknowledged, longest time without a reply)."""
    end, last, longest, n = time.monotonic() + seconds, time.monotonic(), 0, 0

    while time.monotonic() < end:
        while len(client.waiting) < depth:
            load.send(client)
            if load.rng.random() < 0.02:
                client.send(FLUSH)
        got = load.take(client, block=False)
        now = time.monotonic()
        if got:
            last, n = now, n + got
        else:
            time.sleep(0.002)
        longest = max(longest, now - last)
    return n, longest


def settle(load, client, timeout):
    """Waits for every reply."""
    client.socket.settimeout(timeout)
    while client.waiting:
        load.take(client, block=True)


def outage(gate, daemon, rng, mode, seconds):
    """One outage under load; then everything must be in the store by itself."""
    load = outage.load
    client = daemon.attach(f"{NAME}?session=w")
    # Of the same session, and there before: a later one would make the daemon ask what the first still holds.
    reader = daemon.attach(f"{NAME}?session=w")
    n0, _ = drive(load, client, 1.5)
    before = show(NAME)["generation"]
    gate.mode = mode
    n1, longest = drive(load, client, seconds)
    status = daemon.disk_status(NAME)
    hot = next(p for p, c in load.counts.items() if p not in load.flight)
    begin = time.monotonic()
    piece = bytes(reader.read(hot * load.PIECE, load.PIECE))
    expect(piece == load.bytes(hot, load.counts[hot]), "a piece written before reads otherwise during the outage")
    expect(time.monotonic() - begin < 2, "what the journal holds is read slowly during the outage")
    # Nothing of this is in memory or on scratch: an error in time, never wrong bytes.
    begin, error, data = time.monotonic(), None, b""
    reader.send(READ, COLD + outage.next_cold * MIB, 4096)
    outage.next_cold += 32   # another block: this one may be fetched whole
    while reader.waiting and time.monotonic() - begin < 20:
        time.sleep(0.02)
        for _, _, error, data in reader.replies(block=False):
            expect(error or data == b"\xc0" * 4096, f"a cold read during the outage gave wrong bytes ({data[:8].hex()})")
    took = time.monotonic() - begin
    if took > 8:
        late.append(f"{mode}: a cold read was answered after {took:.1f} s (if at all), with a read-timeout of 4 s")
    gate.mode = "open"
    begin = time.monotonic()
    settle(load, client, 90)
    resumed = time.monotonic() - begin
    while show(NAME)["generation"] <= before:
        expect(time.monotonic() - begin < 60, "no commit within 60 s of the store's return")
        time.sleep(0.1)
    committed = time.monotonic() - begin
    n2, _ = drive(load, client, 1.5)
    settle(load, client, 60)
    expect(n2 > 0, "no writes after the outage")
    load.check(client, f"after the outage ({mode})")
    client.cut()
    reader.cut()
    say(f"{mode} for {seconds} s: {n0} writes before, {n1} during (longest wait {longest:.1f} s, journal {status['journalBytes'] / MIB:.0f} MiB, "
        f"{status['waitingWriters']} waiting), cold read {'error' if error else 'right'} in {took:.1f} s; writers went on after {resumed:.1f} s, committed after {committed:.1f} s")
    return longest


def refused_stores():
    """Stores that ignore or refuse conditions are refused at open, and the message says why."""
    for quirk in ("ignore-none-match", "ignore-match", "no-conditions-501"):
        server = subprocess.Popen(["/usr/bin/python3", f"{os.environ['ROOT']}/Tests/servers/s3check.py", "--quirk", quirk, "--until-stdin-closes"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            endpoint = server.stdout.readline().split()[1]
            r = margined("disk", "create", "x", "--size", "1G", store=f"s3://margarine/q?endpoint={endpoint}&region=us-east-1", check=False)
            expect(r.returncode == 1, f"a store that does {quirk} was taken (status {r.returncode})")
            text = r.stderr.strip()
            expect(any(w in text.lower() for w in ("condition", "if-", "lacks what margarine needs")), f"{quirk}: the message does not say why: {text}")
            say(f"{quirk}: {text}")
        finally:
            server.stdin.close()
            server.wait(20)


def main():
    if os.environ["STORE_KIND"] == "s3check":
        refused_stores()
    rng = random.Random(SEED)
    gate, url = before_store(STORE)
    daemon = Daemon("o", store=url, commit="200ms", dead_after="10m", settings=["journal=64M", "journal-per-disk=64M", "dirty-memory=40M", "read-timeout=4s"])
    create(NAME, 1 << 30, safe_points="flush", durability="scratch", resume_window="10m")
    daemon.start()
    c = daemon.attach(NAME)
    for i in range(64):
        c.write(COLD + i * MIB, b"\xc0" * 4096)
    c.flush()
    c.disconnect()
    daemon.stop()
    shutil.rmtree(daemon.scratch)
    daemon.start()
    outage.load, outage.next_cold = Stamps(rng), 0
    seconds = 12 if QUICK else 600

    longest = outage(gate, daemon, rng, "refuse", seconds)
    expect(longest > 1, "the writers never waited: the journal has no limit?")
    outage(gate, daemon, rng, "freeze", seconds if QUICK else 60)

    # A kill while the store is away.
    load = outage.load
    client = daemon.attach(f"{NAME}?session=w")
    drive(load, client, 0.5)
    gate.mode = "refuse"
    drive(load, client, 1)
    daemon.kill()
    try:
        while True:
            load.take(client, block=True)
    except (Gone, OSError):
        pass
    gate.mode = "open"
    daemon.start()
    client = daemon.attach(f"{NAME}?session=w")
    load.check(client, "after a kill in mid-outage")
    say(f"killed in mid-outage: all {load.acknowledged} acknowledged writes are there")
    for place in list(load.flight):   # what was in flight is sent anew
        client.write(place * load.PIECE, load.bytes(place, load.flight[place]))
        load.counts[place] = load.flight.pop(place)

    if os.environ["STORE_KIND"] == "ceph":
        drive(load, client, 2)
        hurt_store()
        n1, longest = drive(load, client, 10)
        settle(load, client, 60)
        say(f"{n1} writes in the 10 s after, longest wait {longest:.1f} s")

    client.flush()
    client.disconnect()
    daemon.stop()
    shutil.rmtree(daemon.scratch)
    daemon.start()
    client = daemon.attach(NAME)
    load.check(client, "from the store alone")
    client.disconnect()
    daemon.stop()
    say("from the store alone, with an empty scratch: every acknowledged write")
    expect(not late, "; ".join(late))


run_main(main)
