"""The held writes of deadwrite.sh. Each case: A's write is held, A is gone, B writes the same place, A's write is let go."""
import shutil

from bed import *
from gate import Gate, before_store

MIB = 1 << 20
gate, url = before_store(STORE)
daemon = Daemon("d", store=url, commit="100ms", settings=["read-timeout=30s"])


def cold():
    """The daemon anew, with nothing of any disk in memory or on scratch."""
    if daemon.process:
        daemon.stop()
        shutil.rmtree(daemon.scratch)
    daemon.start()


def is_block_get(piece):
    return piece.startswith(b"GET ") and b"/blocks/" in piece.split(b"\r\n", 1)[0]


def settle(client, offset, length, wanted, what):
    """Gives a late write every chance to land, then looks."""
    for pause in (0, 0.3, 1.0):
        time.sleep(pause)
        found = bytes(client.read(offset, length))
        expect(found == wanted, f"{what}: the dead write landed ({sum(a != b for a, b in zip(found, wanted))} bytes differ)")


def inside(n, how, same_session, full):
    """Held up inside the daemon. how: "cut" (reset), "close" (FIN), "one of two" (its session lives on by another connection)."""
    name = f"in{n}"
    create(name, 64 * MIB, durability="memory", resume_window="60s")
    c = daemon.attach(name)
    old = random.Random(n).randbytes(MIB)
    c.write(16 * MIB, old)
    c.flush()
    c.disconnect()
    cold()
    gate.held, gate.hold = 0, is_block_get
    at, dead = 16 * MIB + 5000, b"\xdd" * 700
    a = daemon.attach(f"{name}?session=a")
    other = daemon.attach(f"{name}?session=a") if how == "one of two" else None
    a.send(WRITE, at, data=dead)
    end = time.monotonic() + 5
    while not gate.held and time.monotonic() < end and a.waiting:
        time.sleep(0.01)
        a.replies(block=False)
    held = bool(gate.held and a.waiting)
    if not held:
        gate.hold = None
        expect(not a.waiting, "the write is neither answered nor waiting for the store")
        return False
    if how == "close":
        a.socket.close()
    else:
        a.cut()
    time.sleep(0.05)
    b = other or daemon.attach(f"{name}?session={'a' if same_session else 'b'}")
    # Of a page of its own, so that B was certainly served before the store answers.
    b.write(0, b"\xb0" * 4096)
    page = 16 * MIB + 4096
    if full:
        b.write(page, b"\xbb" * 4096)
        wanted = b"\xbb" * 4096
        gate.hold = None
    else:
        # As unaligned as the dead one, so held up as well, behind it or beside it.
        b.send(WRITE, at + 100, data=b"\xbb" * 300)
        time.sleep(0.2)
        gate.hold = None
        expect(b.replies()[0][2] == 0, "B's write failed")
        i = 4096 + 904 + 100
        wanted = bytearray(old[4096:8192])
        wanted[1004:1304] = b"\xbb" * 300
        wanted = bytes(wanted)
        found = bytes(b.read(page, 4096))
        if how == "one of two" and found != wanted:
            # The session lives: its write may have taken effect before B's, but B's lies over it.
            both = bytearray(old[4096:8192])
            both[904:1604] = dead
            both[1004:1304] = b"\xbb" * 300
            wanted = bytes(both)
    settle(b, page, 4096, wanted, f"{how}, {'same' if same_session else 'new'} session, B {'whole page' if full else 'unaligned'}")
    b.flush()
    b.disconnect()
    daemon.stop()
    margined("disk", "export", name, f"{WORK}/{name}.img")
    with open(f"{WORK}/{name}.img", "rb") as f:
        f.seek(page)
        expect(f.read(4096) == wanted, f"{how}: the dead write is in the committed generation")
    os.unlink(f"{WORK}/{name}.img")
    shutil.rmtree(daemon.scratch)
    daemon.start()
    return True


def on_the_way(n, same_session):
    """Held up in a proxy between A and the daemon, which still sees A's connection."""
    name = f"way{n}"
    create(name, 64 * MIB, durability="memory", resume_window="60s")
    proxy = Gate(("127.0.0.1", daemon.port))
    a = Client(("127.0.0.1", proxy.port), f"{name}?session=a")
    a.write(0, b"\xaa" * 8192)
    proxy.hold = lambda piece: b"\xdd" * 64 in piece
    a.send(WRITE, 4096, data=b"\xdd" * 4096)
    end = time.monotonic() + 5
    while not proxy.held and time.monotonic() < end:
        time.sleep(0.01)
    expect(proxy.held == 1, "the proxy saw no write")
    a.cut()
    time.sleep(0.1)
    try:
        b = daemon.attach(f"{name}?session={'a' if same_session else 'b'}", patient=False)
    except Refused as e:
        # While A counts as alive nobody else gets in: also right. Then A's write comes first.
        proxy.hold = None
        time.sleep(0.5)
        b = daemon.attach(f"{name}?session=b", timeout=20)
        b.write(4096, b"\xbb" * 4096)
        settle(b, 4096, 4096, b"\xbb" * 4096, "in the proxy, B let in afterwards")
        b.disconnect()
        return f"refused while A's connection stands ({e.text})"
    b.write(4096, b"\xbb" * 4096)
    proxy.hold = None
    settle(b, 4096, 4096, b"\xbb" * 4096, f"in the proxy, {'same' if same_session else 'new'} session")
    b.disconnect()
    return "A's connection was over when B was served"


def main():
    daemon.start()
    held = n = 0
    for how, same in (("cut", True), ("cut", False), ("close", False), ("one of two", True)):
        for full in (True, False):
            n += 1
            held += inside(n, how, same, full)
    say(f"{n} writes into cold pages: {held} were held up in the daemon, none landed late")
    expect(held == n or held == 0, "only some were held up")
    if not held:
        say("note: the daemon takes unaligned writes into cold pages without waiting for the store, so nothing can be held up there")
    say("held up in a proxy, new session:", on_the_way(1, False))
    daemon.stop()


run_main(main)
