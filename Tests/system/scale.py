"""The measurements of scale.sh."""
import statistics

from bed import *

COUNT = 500


def idle(daemon, export, count=COUNT):
    r = subprocess.run([f"{WORK}/nbdload", "--uri", f"nbd://127.0.0.1:{daemon.port}/{export}", "--idle", str(count), "--hold", "2", "--pid", str(daemon.pid)],
                       capture_output=True, text=True, timeout=120)
    expect(r.returncode == 0, f"{count} idle connections to {export}: {r.stderr.strip()}")
    return json.loads(r.stdout)


def main():
    daemon = Daemon("d", commit="200ms")
    create("one", 1 << 30)
    daemon.start()
    begin = time.monotonic()
    for i in range(COUNT):
        create(f"idle{i}", 1 << 40)
    made = time.monotonic() - begin
    idle(daemon, "one", 8)   # what is allocated once is allocated
    connection = idle(daemon, "one")["kib_each"]
    disks = idle(daemon, "idle%d")
    disk = disks["kib_each"] - connection
    say(f"{COUNT} idle connections: {connection:.1f} KiB each; {COUNT} idle disks ({made:.1f} s to make), each with a connection: {disks['kib_each']:.1f} KiB, "
        f"so {disk:.1f} KiB a disk; attach {disks['attach_us']['p50'] / 1000:.1f} ms; resident {daemon.rss_kib() / 1024:.0f} MiB in all")
    expect(connection < 64, f"an idle connection costs {connection} KiB")
    expect(disk < 64, f"an idle disk costs {disk} KiB")
    daemon.stop()

    daemon.start()
    times = {}
    tries = 7
    for label, size in (("1G", "1G"), ("8E", str((1 << 63) - (16 << 20)))):
        for i in range(tries):
            margined("disk", "create", f"s{label}{i}", "--size", size, "--safe-points", "flush")
    for i in range(tries):   # in turns, so that a slow moment hits both
        for label in ("1G", "8E"):
            begin = time.monotonic()
            c = daemon.attach(f"s{label}{i}")
            c.read(c.size - 4096, 4096)
            times.setdefault(label, []).append(time.monotonic() - begin)
            if label == "8E":
                expect(c.size == (1 << 63) - (16 << 20), f"8E is served as {c.size} bytes")
                for at in (0, 1 << 50, c.size - 8192 - 5):
                    c.write(at, b"\x16" * 4100)
                c.flush()
                for at in (0, 1 << 50, c.size - 8192 - 5):
                    expect(bytes(c.read(at, 4100)) == b"\x16" * 4100, f"8E: what was written at {at}")
            c.disconnect()
    small, large = (statistics.median(times[l]) * 1000 for l in ("1G", "8E"))
    say(f"attach and first read: {small:.1f} ms at 1 GiB, {large:.1f} ms at 8 EiB")
    expect(large < 1.5 * small + 5, "a large disk attaches more slowly")

    create("wide", 4 << 40, durability="scratch")
    c = daemon.attach("wide")
    for i in range(64):
        c.write(i * (17 << 20) + 4096, b"\x77" * 4096)
        c.write((1 << 40) + i * (33 << 30), b"\x78" * 4096)
    c.flush()
    for command, base in ((TRIM, 0), (ZEROES, 1 << 40)):
        begin = time.monotonic()
        for i in range(512):
            c.send(command, base + (i << 31), 1 << 31)
            while len(c.waiting) >= 16:
                for _, _, error, _ in c.replies():
                    expect(error == 0, f"{NAMES[command]}: error {error}")
        while c.waiting:
            for _, _, error, _ in c.replies():
                expect(error == 0, f"{NAMES[command]}: error {error}")
        c.flush()
        took = time.monotonic() - begin
        say(f"{NAMES[command]} of 1 TiB in 512 requests: {took * 1000:.0f} ms")
        expect(took < 5, f"{NAMES[command]} of 1 TiB took {took:.1f} s")
    for i in range(64):
        expect(not any(c.read((1 << 40) + i * (33 << 30), 4096)) or i * (33 << 30) >= 1 << 40, "what was zeroed reads as data")
    c.disconnect()
    daemon.stop()


run_main(main)
