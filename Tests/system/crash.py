"""The model and the kills of crash.sh."""
import shutil

from bed import *

GIB = 1 << 30


class Operation:
    __slots__ = ("command", "at", "length", "data")

    def __init__(self, command, at, length, data):
        self.command, self.at, self.length, self.data = command, at, length, data


class Load:
    """Random writes, trims and zeroes over `places`; knows what is acknowledged and what is in flight.

    `flat` is the model. No two operations in flight share a byte (they may share a page), so their order does not matter.
    A byte in `unknown` was trimmed: it may read as anything."""

    def __init__(self, rng, places):
        self.rng, self.places = rng, places
        self.flat, self.unknown = bytearray(places.size), bytearray(places.size)
        self.flight, self.acknowledged = {}, 0

    def choose(self):
        rng, window = self.rng, self.places.window
        while True:
            kind = rng.random()
            if kind < 0.45:
                command, length = WRITE, 4096 * rng.randint(1, 4)
            elif kind < 0.85:
                command, length = WRITE, rng.choice([1, 511, 512, 4095, 4097, rng.randint(1, 20000)])
            elif kind < 0.90:
                command, length = WRITE, rng.randint(60000, min(260000, window))
            elif kind < 0.96:
                command, length = ZEROES, rng.randint(1, 40000)
            else:
                command, length = TRIM, rng.randint(1, 40000)
            at = rng.randrange(window - length + 1)
            if rng.random() < 0.6:
                at &= ~4095
            at += window * rng.randrange(len(self.places.starts))
            if any(at < o.at + o.length and o.at < at + length for o in self.flight.values()):
                continue
            return Operation(command, at, length, content(rng, length) if command == WRITE else b"")

    def apply(self, o, flat=None, unknown=None):
        flat, unknown = self.flat if flat is None else flat, self.unknown if unknown is None else unknown
        flat[o.at:o.at + o.length] = o.data or bytes(o.length)
        unknown[o.at:o.at + o.length] = bytes([o.command == TRIM]) * o.length

    def send(self, client, o, flags=0):
        self.flight[id(o)] = o
        client.send(o.command, self.places.offset(o.at), 0 if o.command == WRITE else o.length, o.data, flags, tag=o)

    def take(self, client, block=False):
        """Takes in replies; returns those that were no operation of the load (flushes)."""
        other = []
        for _, o, error, _ in client.replies(block):
            expect(error == 0, f"{NAMES[o.command] if o else 'FLUSH'} failed with error {error}")
            if o is None:
                other.append(o)
                continue
            del self.flight[id(o)]
            self.apply(o)
            self.acknowledged += 1
        return other

    def check(self, disk, what):
        """`disk` holds every acknowledged byte, and of what was in flight each byte is the old or the new one."""
        lost, landed = 0, 0
        page = 4096
        maybe = {}
        for o in self.flight.values():
            for p in range(o.at // page, (o.at + o.length - 1) // page + 1):
                maybe.setdefault(p, []).append(o)
        for p in range(len(disk) // page):
            a, b = p * page, (p + 1) * page
            if disk[a:b] == self.flat[a:b]:
                continue
            for i in range(a, b):
                if disk[i] == self.flat[i] or self.unknown[i]:
                    continue
                for o in maybe.get(p, ()):
                    if o.at <= i < o.at + o.length and (o.command == TRIM or disk[i] == (o.data[i - o.at] if o.data else 0)):
                        landed += 1
                        break
                else:
                    if not lost:
                        first = i
                    lost += 1
        if lost:
            near = [(NAMES[o.command], self.places.offset(o.at), o.length) for o in maybe.get(first // page, ())]
            raise Failed(f"{what}: {lost} bytes are neither what was acknowledged nor in flight, first at {self.places.offset(first)} "
                         f"(model {self.flat[first]}, disk {disk[first]}, {'zero' if disk[first] == 0 else 'other'}; in flight in that page: {near})")
        # What is on the disk now is what counts from here on.
        self.flat[:] = disk
        self.unknown = bytearray(self.places.size)
        self.flight.clear()
        return landed


def drain(load, clients):
    """After a kill: takes in every reply that was still under way."""
    for c in clients:
        try:
            while True:
                load.take(c, block=True)
        except (Gone, OSError):
            pass
        c.cut()


def resumed(durability, rounds, rng):
    """Part 1: the window is open; kills, and cuts of all connections."""
    name, size = "open-" + durability, 1 << 40
    create(name, size, durability=durability, resume_window="60s")
    # Its connections come over TCP and a unix socket at once.
    daemon = Daemon(name, commit="200ms", settings=["session-addresses=any"])
    daemon.start()
    places = Places(spread(rng, size, 8, 2 << 20), 2 << 20)
    load = Load(rng, places)
    kills = cuts = landed = 0
    slowest = 0
    export = name + "?session=one"
    for n in range(rounds):
        clients = [daemon.attach(export, unix=rng.random() < 0.3) for _ in range(rng.choice([1, 3]))]
        end = time.monotonic() + rng.choice([0.02, 0.2, 0.6, 1.2]) * (0.5 + rng.random())
        if n == 2:
            hurt_store()
        while time.monotonic() < end:
            for c in clients:
                while len(c.waiting) < 8:
                    if rng.random() < 0.02:
                        c.send(FLUSH)
                    else:
                        load.send(c, load.choose(), flags=FUA if rng.random() < 0.02 else 0)
            ready, _, _ = select.select([c.socket for c in clients], [], [], 0.05)
            for c in clients:
                if c.socket in ready:
                    load.take(c)
        if rng.random() < 0.75:
            daemon.kill()
            kills += 1
            drain(load, clients)
            slowest = max(slowest, daemon.start())
        else:
            cuts += 1
            for c in clients:
                c.cut()
        client = daemon.attach(export)
        try:
            landed += bool(load.check(places.read(client), f"{name}, round {n}"))
        finally:
            client.cut()
    say(f"{name}: {kills} kills and {cuts} cuts, {load.acknowledged} acknowledged writes, all there; slowest restart {slowest:.2f} s; "
        f"unacknowledged ones had landed in {landed} rounds; generation {show(name)['generation']}")
    daemon.stop()


def batch(load, clients, rng):
    """Some writes on all connections, all acknowledged. Not applied to the model that counts: returned."""
    done = []
    for _ in range(rng.randint(1, 60)):
        o = load.choose()
        load.send(rng.choice(clients), o)
        done.append(o)
        if rng.random() < 0.3:
            for c in clients:
                load.take(c)
    for c in clients:
        while c.waiting:
            load.take(c, block=True)
    return done


def states(load):
    return bytes(load.flat), bytes(load.unknown)


def same(disk, state):
    flat, unknown = state
    if disk == flat:
        return True
    return all(disk[i] == flat[i] or unknown[i] for p in range(0, len(disk), 4096) if disk[p:p + 4096] != flat[p:p + 4096] for i in range(p, p + 4096))


def where(disk, state):
    flat, unknown = state
    bad = [i for i in range(len(disk)) if disk[i] != flat[i] and not unknown[i]]
    return f"{len(bad)} bytes differ, first at model offset {bad[0]}, last at {bad[-1]}" if bad else "equal"


def rolled_back(durability, rounds, rng, lose_scratch):
    """Parts 2 and 3: in flush mode, with window 0; every end must leave exactly a safe point."""
    name, size = f"zero-{durability}{'-lost' if lose_scratch else ''}", 1 << 40
    create(name, size, durability=durability, resume_window="0s" if not lose_scratch else "60s")
    daemon = Daemon(name, commit="100ms")
    daemon.start()
    places = Places(spread(rng, size, 4, 1 << 20), 1 << 20)
    load = Load(rng, places)
    history = [states(load)]   # all safe points that were acknowledged, and at the end those that may have been
    ends = {"kill": 0, "cut": 0, "clean": 0}
    back = 0
    for n in range(rounds):
        export = f"{name}?session=s{n}" if lose_scratch else name
        clients = [daemon.attach(export) for _ in range(rng.choice([1, 3]))]
        how = "kill" if lose_scratch else rng.choice(["kill", "kill", "cut", "clean"])
        ends[how] += 1
        end = time.monotonic() + rng.random() * 0.8
        maybe = None
        while True:
            batch(load, clients, rng)
            if time.monotonic() > end:
                if rng.random() < 0.5:
                    break              # acknowledged, not flushed
                clients[0].send(FLUSH)  # flushed, perhaps not acknowledged
                maybe = states(load)
                time.sleep(rng.choice([0, 0.0005, 0.005]))
                break
            clients[0].flush()
            history.append(states(load))
        if how == "clean":
            while clients[0].waiting:
                load.take(clients[0], block=True)
            for c in clients:
                c.disconnect()
            allowed = [states(load)]
        else:
            if how == "kill":
                daemon.kill()
                if maybe:
                    # Its reply may have been on the way.
                    try:
                        while clients[0].waiting:
                            load.take(clients[0], block=True)
                        history.append(maybe)
                        maybe = None
                    except (Gone, OSError):
                        pass
                for c in clients:
                    c.cut()
                if lose_scratch:
                    shutil.rmtree(daemon.scratch)
                daemon.start()
            else:
                for c in clients:
                    c.cut()
                # A connection that comes before the last of these is seen to be gone belongs to their session.
                end = time.monotonic() + 5
                while daemon.status()["daemon"]["connections"]:
                    expect(time.monotonic() < end, "the daemon has not seen the cut after 5 s")
                    time.sleep(0.01)
            allowed = [history[-1]] + ([maybe] if maybe else [])
            if lose_scratch and durability != "store":
                allowed = history[::-1] + ([maybe] if maybe else [])
        if lose_scratch:
            try:
                daemon.attach(export, timeout=5, patient=False).disconnect()
                raise Failed(f"{name}, round {n}: session s{n} was let in again after its disk had gone back")
            except Refused as e:
                expect(e.kind != 0x80000006, f"{name}: refused as unknown: {e}")
        client = daemon.attach(f"{name}?session=check{n}" if lose_scratch else name)
        disk = places.read(client)
        client.disconnect()
        found = next((i for i, s in enumerate(allowed) if same(disk, s)), None)
        if found is None:
            older = next((i for i, s in enumerate(history[::-1]) if same(disk, s)), None)
            acked = same(disk, states(load))
            raise Failed(f"{name}, round {n} ({how}, {len(clients)} connections): the disk is not its last safe point "
                         + (f"but the one {older} before" if older is not None else "but everything that was acknowledged" if acked else f"nor any other ({where(disk, allowed[0])})"))
        back = max(back, found) if lose_scratch else back
        load.flat[:] = disk
        load.unknown = bytearray(places.size)
        load.flight.clear()
        history = [states(load)]
    say(f"{name}: {ends['kill']} kills, {ends['cut']} cuts, {ends['clean']} clean ends, {load.acknowledged} writes; the disk was exactly "
        + (f"a safe point each time (at most {back} back)" if lose_scratch and durability != "store" else "its last safe point each time"))
    daemon.stop()


def main():
    parts = [
        (resumed, "memory", 5 if QUICK else 50), (resumed, "scratch", 4 if QUICK else 50),
        (rolled_back, "memory", 8 if QUICK else 50, False), (rolled_back, "scratch", 6 if QUICK else 50, False),
        (rolled_back, "scratch", 4 if QUICK else 20, True), (rolled_back, "store", 4 if QUICK else 20, True)]
    only, times = os.environ.get("PARTS"), int(os.environ.get("TIMES", "1"))
    for i, (part, durability, rounds, *rest) in enumerate(parts):
        if only and str(i + 1) not in only.split(","):
            continue
        part(durability, rounds * times, random.Random(SEED * 100 + i), *rest)


run_main(main)
