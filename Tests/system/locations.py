"""The two regions of locations.sh."""
import shutil
import threading

from bed import *
from gate import Gate

MIB = 1 << 20
SIZE = 1 << 30
BLOCK = 16 * MIB
RTT = 0.150


class Region:
    """An S3 server of its own behind a gate that makes it far, to be ended and started again."""

    def __init__(self):
        self.port, self.folder, self.process = free_port(), f"{WORK}/far", None
        self.start()
        self.gate = Gate(("127.0.0.1", self.port))
        self.gate.delay = RTT / 2
        self.url = f"s3://margarine/us?endpoint=http://127.0.0.1:{self.gate.port}&region=us-east-1"

    def start(self):
        self.process = subprocess.Popen(
            ["/usr/bin/python3", f"{os.environ['ROOT']}/Tests/servers/s3check.py", "--port", str(self.port), "--dir", self.folder, "--until-stdin-closes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        expect(self.process.stdout.readline().startswith("ready"), "the far S3 server did not start")

    def stop(self):
        self.process.stdin.close()
        self.process.wait(20)

    def blocks(self):
        """Keys of the blocks there."""
        found = set()
        for name in os.listdir(f"{self.folder}/margarine"):
            if not name.endswith(".new"):
                with open(f"{self.folder}/margarine/{name}", "rb") as f:
                    key = json.loads(f.readline())["key"]
                if "/blocks/" in key:
                    found.add(key)
        return found


class Writer(threading.Thread):
    """Writes and flushes within the first block, on a connection of the session, and keeps `model` true. (What is written often
    becomes a new base, which is near.)"""

    def __init__(self, client, model, rng):
        super().__init__(daemon=True)
        self.client, self.model, self.rng, self.halt, self.count, self.why = client, model, rng, False, 0, None

    def run(self):
        try:
            while not self.halt:
                at = self.rng.randrange(BLOCK // 4096 - 8) * 4096
                data = content(self.rng, self.rng.choice([4096, 8192, 32768]))
                self.client.write(at, data)
                self.model[at:at + len(data)] = data
                self.count += 1
                if self.count % 10 == 0:
                    self.client.flush()
                time.sleep(0.002)
            self.client.flush()
        except (Failed, Gone, OSError) as e:
            self.why = f"{type(e).__name__} {e}"


def write_config(path, locations, near):
    listed = ", ".join(f'"{name}={url}"' for name, url in locations)
    with open(path, "w") as f:
        f.write(f'locations = [{listed}]\nnear = "{near}"\n')
    return path


def same(client, model, what):
    for at in range(0, len(model), 32 * MIB):
        got = bytes(client.read(at, min(32 * MIB, len(model) - at)))
        if got != model[at:at + len(got)]:
            bad = next(i for i, (a, b) in enumerate(zip(got, model[at:])) if a != b)
            raise Failed(f"{what}: byte {at + bad} is {got[bad]:#x}, not {model[at + bad]:#x}")


def main():
    rng = random.Random(SEED)
    used = (4 if QUICK else 24) * BLOCK
    far = Region()
    both = [("eu", STORE), ("us", far.url)]
    single = write_config(f"{WORK}/single.toml", both[:1], "eu")
    eu, us = write_config(f"{WORK}/eu.toml", both, "eu"), write_config(f"{WORK}/us.toml", both, "us")
    # While the store has no disks, what collection goes by can be set at once.
    margined("gc", "--grace", "10s", "--allow-short-grace", config=single)
    refused = margined("disk", "list", config=eu, check=False)
    expect(refused.returncode == 1 and "'us'" in refused.stderr, f"a location that was never added was taken: {refused.stderr}")
    margined("location", "add", "us", far.url, config=eu)
    listed = json.loads(margined("location", "list", "--json", config=us))
    expect([(l["number"], l["name"], l["near"], l["problem"]) for l in listed] == [(0, "eu", False, None), (1, "us", True, None)], f"locations: {listed}")

    # A disk made far, by a server there.
    there = Daemon("us", config=us, dead_after="10m", settings=["read-timeout=20s"])
    margined("disk", "create", "base", "--size", str(SIZE), "--safe-points", "flush", config=us)
    there.start()
    model = bytearray(used)
    client = there.attach("base", timeout=60)
    for at in range(0, used, BLOCK):
        data = content(rng, BLOCK // 2)
        client.write(at + 4 * MIB, data)
        model[at + 4 * MIB:at + 4 * MIB + len(data)] = data
    client.flush()
    for _ in range(40):   # deltas over them
        at = rng.randrange(used // 4096) * 4096
        data = content(rng, 4096)
        client.write(at, data)
        model[at:at + 4096] = data
    client.flush()
    client.disconnect()
    there.stop()
    base, of_base = bytes(model), far.blocks()
    # Another one, nothing of which will be localized.
    there.start()
    margined("disk", "create", "base2", "--size", str(SIZE), "--safe-points", "flush", config=us)
    client = there.attach("base2", timeout=60)
    late = bytearray(content(rng, 3 * BLOCK))
    for at in range(0, len(late), 4 * MIB):
        client.write(at, bytes(late[at:at + 4 * MIB]))
    client.flush()
    client.disconnect()
    there.stop()
    expect(len(far.blocks()) >= used // BLOCK, "the disk's blocks are not in the far location")
    before = far.blocks()

    # Forked near: at once, and nothing is copied.
    margined("disk", "create", "first", "--size", "1G", config=eu)
    begin = time.monotonic()
    forked = json.loads(margined("disk", "fork", "base", "work", "--json", config=eu))
    margined("disk", "fork", "base2", "late", "--location", "eu", config=eu)
    margined("disk", "fork", "base2", "unread", config=eu)
    took = time.monotonic() - begin
    expect(forked["location"] == "eu" and forked["generation"] == 1, f"the fork: {forked}")
    expect(took < 20, f"three forks across took {took:.1f} s")
    here = Daemon("eu", config=eu, dead_after="10m", settings=["read-timeout=20s", "commit-interval=200ms"])
    here.start()
    begin = time.monotonic()
    client = here.attach("work?session=w", timeout=60)
    same(client, model, "the fork, read from afar")
    read = time.monotonic() - begin

    # Another fork gets its first block near (with what an attachment looks at), and has all others far.
    other = here.attach("late", timeout=60)
    late[0:8 * MIB] = content(rng, 8 * MIB)
    other.write(0, bytes(late[0:8 * MIB]))
    other.flush()
    until("a commit of the other fork", 30, lambda: json.loads(margined("disk", "show", "late", "--json", config=eu))["generation"] == 2)
    other.disconnect()

    # Written near, under reads from afar; localized under its writer.
    writer = Writer(here.attach("work?session=w"), model, rng)
    writer.start()
    time.sleep(1)
    begin = time.monotonic()
    summary = json.loads(margined("disk", "localize", "work", "--json", config=eu, timeout=600))
    localized = time.monotonic() - begin
    time.sleep(1)
    writer.halt = True
    writer.join(60)
    expect(writer.why is None and writer.count > 50, f"the writer beside the localization: {writer.count} writes, {writer.why}")
    expect(summary["copiedObjects"] >= used // BLOCK - 1, f"localized: {summary}")
    expect(far.blocks() == before, "the near server has written to the far location")
    same(client, model, "the fork, after its localization")
    again = json.loads(margined("disk", "localize", "work", "--json", config=eu))
    expect(again["copiedObjects"] == 0 and again["generations"] == 0, f"a second localization found more: {again}")
    say(f"{used // MIB} MiB at {RTT * 1000:.0f} ms: three forks in {took:.1f} s, all read in {read:.1f} s, {summary['copiedObjects']} objects "
        f"({summary['copiedBytes'] // MIB} MiB) localized in {localized:.1f} s beside {writer.count} writes")

    # The far region is lost.
    far.stop()
    client.write(0, b"\x11" * 65536)
    model[0:65536] = b"\x11" * 65536
    client.flush()
    generation = json.loads(margined("disk", "show", "work", "--json", config=eu))["generation"]
    client.write(used - 4096, b"\x22" * 4096)
    model[used - 4096:] = b"\x22" * 4096
    client.flush()
    until("a commit without the far region", 20, lambda: json.loads(margined("disk", "show", "work", "--json", config=eu))["generation"] > generation)
    client.disconnect()
    begin = time.monotonic()
    here.stop()
    drained = time.monotonic() - begin
    shutil.rmtree(here.scratch)
    here.settings.append("read-timeout=4s")
    started = here.start()
    client = here.attach("work", timeout=30)
    same(client, model, "the fork, from the near location alone")
    client.write(MIB, b"\x33" * 4096)
    client.flush()
    model[MIB:MIB + 4096] = b"\x33" * 4096
    say(f"without the far region: committed, drained in {drained:.1f} s, started on an empty scratch in {started:.1f} s, all read back")
    trouble = next(l for l in here.status()["store"]["locations"] if l["name"] == "us")["trouble"]
    expect(trouble, "the status does not say that 'us' is out of reach")

    # What is not localized says what it needs.
    reader = here.attach("late", timeout=30)
    begin = time.monotonic()
    expect(bytes(reader.read(MIB, 4096)) == late[MIB:MIB + 4096], "the near part of a disk reads otherwise")
    reader.send(READ, BLOCK + 4 * MIB, 4096)
    _, _, error, _ = reader.replies()[0]
    took = time.monotonic() - begin
    expect(error == 5, f"a block that is only far was read with error {error}")
    expect(took < 12, f"the error came after {took:.1f} s with a read-timeout of 4 s")
    text = open(here.log, errors="replace").read()
    line = next((l for l in text.splitlines() if "late" in l and "location 'us'" in l), None)
    expect(line, "the daemon's log does not say that 'late' needs location 'us'")
    late[BLOCK + 8 * MIB:BLOCK + 8 * MIB + 4096] = b"\x44" * 4096
    reader.write(BLOCK + 8 * MIB, b"\x44" * 4096)
    expect(bytes(reader.read(BLOCK + 8 * MIB, 4096)) == b"\x44" * 4096, "a page written over far data reads otherwise")
    begin = time.monotonic()
    # Nothing is read at attach: what is far fails when it is read, and what is written is taken.
    unread = here.attach("unread", timeout=20, patient=False)
    unread.send(READ, 0, 4096)
    _, _, error, _ = unread.replies()[0]
    took = time.monotonic() - begin
    expect(error == 5 and took < 12, f"a disk of which nothing is near was read with error {error} after {took:.1f} s")
    unread.write(65536, b"\x55" * 4096)
    expect(bytes(unread.read(65536, 4096)) == b"\x55" * 4096, "a page written over far data reads otherwise")
    for arguments in (["disk", "show", "base"], ["disk", "export", "late", "/dev/null"], ["gc"], ["disk", "list"]):
        r = margined(*arguments, config=eu, check=False)
        expect(r.returncode == 1 and "location 'us'" in r.stderr, f"{' '.join(arguments)}: status {r.returncode}: {r.stderr}")
        say(f"{' '.join(arguments)}: {r.stderr.strip().splitlines()[-1][:160]}")
    names = [d["name"] for d in json.loads(margined("disk", "list", "--json", config=eu, check=False).stdout)]
    expect(names == ["first", "late", "unread", "work"], f"the disks that are listed without the far region: {names}")

    # It comes back; nobody needs to be started anew.
    far.start()

    def readable():
        reader.send(READ, BLOCK + 4 * MIB, 4096)
        return reader.replies()[0][2] == 0

    until("the far region's return", 60, readable)
    same(reader, late, "the other fork, once the far region is back")
    reader.disconnect()
    client.disconnect()
    here.stop()
    # What the deleted disk had is garbage once its records have left, a grace period after they were retired.
    margined("disk", "delete", "base2", config=eu)
    margined("disk", "delete", "late", "--force", config=eu)
    margined("disk", "delete", "unread", "--force", config=eu)
    stored = far.blocks()
    end = time.monotonic() + 60
    while len(far.blocks()) > len(of_base):
        expect(time.monotonic() < end, "collections have not deleted what was only the deleted disks'")
        margined("gc", config=us)
        time.sleep(2)
    expect(of_base == far.blocks(), "a collection has deleted blocks that are in use")
    shutil.rmtree(here.scratch)
    here.start()
    same(here.attach("work", timeout=30), model, "the fork, after a collection")
    margined("disk", "fork", "base", "again", config=eu)
    same(here.attach("again", timeout=60), base, "a new fork, after a collection")
    say(f"back: the other fork was read again; collections deleted {len(stored) - len(far.blocks())} far blocks of deleted disks, and nothing in use")
    here.stop()
    far.stop()


run_main(main)
