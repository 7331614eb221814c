"""What the test beds in Python share: daemons to start and kill, and an NBD client that does what no decent client does.

Run by the scripts beside it, which set MARGINED, STORE, WORK, QUICK, SEED (see lib.sh). `Client` speaks the wire itself, so that
a test knows exactly which bytes went out, which replies came in, and can cut the connection between any two of them.
"""
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time

WORK = os.environ["WORK"]
STORE = os.environ["STORE"]
MARGINED = os.environ["MARGINED"]
QUICK = os.environ.get("QUICK") == "1"
SEED = int(os.environ.get("SEED", "1"))
BED = os.path.basename(sys.argv[0]).removesuffix(".py")

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
NAMES = ["READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS"]
FUA, NO_HOLE = 1, 2


def say(*words):
    print(f"{BED}:", *words, flush=True)


class Failed(Exception):
    """Something that must hold did not."""


class Refused(Exception):
    """The server answered GO with an error: (reply type, its message)."""

    def __init__(self, kind, text):
        super().__init__(f"{kind:#x}: {text}")
        self.kind, self.text = kind, text


class Gone(Exception):
    """The connection is over."""


def expect(holds, what):
    if not holds:
        raise Failed(what)


def until(what, seconds, holds):
    end = time.monotonic() + seconds
    while not holds():
        expect(time.monotonic() < end, f"{what} took more than {seconds} s")
        time.sleep(0.05)


def run_main(main):
    """Runs a bed; ends every daemon; says in one line what did not hold."""
    status = 0
    try:
        main()
    except Failed as e:
        say("FAILED:", e)
        status = 1
    except (Refused, Gone, OSError, subprocess.SubprocessError) as e:
        import traceback

        traceback.print_exc()
        say("FAILED:", type(e).__name__, e)
        status = 1
    finally:
        for d in Daemon.all:
            if status and os.path.exists(d.log):
                d.tell()
            d.kill()
    sys.exit(status)


def margined(*arguments, store=None, config=None, check=True, timeout=120):
    """Runs a command of margined and returns its standard output."""
    place = ["--config", config] if config else ["--store", store or STORE]
    r = subprocess.run([MARGINED, *arguments, *place], capture_output=True, text=True, timeout=timeout)
    if check and r.returncode:
        raise Failed(f"margined {' '.join(arguments)}: status {r.returncode}: {r.stderr.strip()}")
    return r.stdout if check else r


# A process begins with the peak of the one that it was forked from, and a bed may be large: a small one goes between.
LAUNCHER = """
import os, sys, time
begin = time.monotonic()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as f: f.write(f"{time.monotonic() - begin} {usage.ru_maxrss / 1024}")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(*arguments):
    """Runs a command of margined: seconds, MiB of memory at its most, standard output."""
    figures = f"{WORK}/figures"
    r = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, figures, MARGINED, *arguments, "--store", STORE], stdout=subprocess.PIPE)
    expect(r.returncode == 0, f"margined {' '.join(arguments)} ended with {r.returncode}")
    with open(figures) as f:
        seconds, mib = map(float, f.read().split())
    return seconds, mib, r.stdout


def create(name, size, safe_points="flush", durability="scratch", resume_window="60s", density=2):
    margined("disk", "create", name, "--size", str(size), "--safe-points", safe_points, "--durability", durability, "--resume-window", resume_window, "--history-density", str(density))


def show(name):
    return json.loads(margined("disk", "show", name, "--json"))


def hurt_store():
    """Of a Ceph store, ends one of the two gateways, once; a bed calls it in the middle of its load."""
    if os.environ["STORE_KIND"] == "ceph" and not hurt_store.done:
        hurt_store.done = True
        subprocess.run([f"{os.environ['ROOT']}/Tests/servers/ceph.sh", "kill", f"{WORK}/objects", "rgw1"], check=True, stdout=subprocess.DEVNULL)
        say("one of the two gateways is ended")


hurt_store.done = False


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Daemon:
    """One `margined serve` with a scratch directory, a TCP port and a unix socket of its own."""

    all = []

    def __init__(self, name="a", store=None, commit="500ms", settings=(), dead_after="1s", config=None):
        self.name, self.place = name, ["--config", config] if config else ["--store", store or STORE]
        self.scratch, self.socket = f"{WORK}/scratch-{name}", f"{WORK}/{name}.sock"
        self.log, self.port, self.process = f"{WORK}/daemon-{name}.log", free_port(), None
        self.settings = ["commit-interval=" + commit, "heartbeat-interval=300ms", "owner-dead-after=" + dead_after, *settings]
        Daemon.all.append(self)

    def start(self, *arguments, timeout=30):
        begin = time.monotonic()
        sets = [x for s in self.settings for x in ("--set", s)]
        self.process = subprocess.Popen(
            [MARGINED, "serve", *self.place, "--scratch", self.scratch, "--listen", f"127.0.0.1:{self.port}", "--unix", self.socket, *sets, *arguments],
            stdout=subprocess.PIPE, stderr=open(self.log, "ab"), stdin=subprocess.DEVNULL)
        os.set_blocking(self.process.stdout.fileno(), False)
        seen = b""
        while not any(l.startswith(b"ready") for l in seen.split(b"\n")):
            expect(self.process.poll() is None, f"margined serve ({self.name}) ended with status {self.process.returncode} before it was ready")
            expect(time.monotonic() - begin < timeout, f"margined serve ({self.name}) was not ready within {timeout} s")
            seen += self.process.stdout.read() or b""
            time.sleep(0.005)
        return time.monotonic() - begin

    @property
    def pid(self):
        return self.process.pid

    def kill(self):
        """kill -9, and wait for the end."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout=60):
        """SIGTERM; it must end well."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout)
        expect(status == 0, f"margined ({self.name}) ended with status {status} after SIGTERM")

    def alive(self):
        return self.process.poll() is None

    def status(self):
        r = subprocess.run([MARGINED, "status", "--json", "--control", self.scratch + "/control.sock"], capture_output=True, text=True, timeout=30)
        expect(r.returncode == 0, f"margined status: {r.stderr.strip()}")
        return json.loads(r.stdout)

    def disk_status(self, name):
        return next((d for d in self.status()["disks"] if d["name"] == name), None)

    def tell(self):
        """Prints what the daemon said last; of a crash, what and where."""
        lines = [l.rstrip()[:240] for l in open(self.log, errors="replace") if l.strip()]
        print(f"--- daemon {self.name}:")
        crash = next((i for i, l in enumerate(lines) if "Fatal error" in l or "Program crashed" in l), None)
        if crash is not None:
            here = next((i for i in range(crash, len(lines)) if " crashed:" in lines[i]), crash)
            print("\n".join(lines[crash:crash + 1] + lines[here:here + 20]))
        else:
            print("\n".join(lines[-12:]))
        sys.stdout.flush()

    def rss_kib(self):
        with open(f"/proc/{self.pid}/status") as f:
            return next(int(l.split()[1]) for l in f if l.startswith("VmRSS"))

    def attach(self, export, timeout=10, unix=False, patient=True):
        """A connected client. A refusal is tried again until `timeout`, if patient (the daemon before may still count as alive)."""
        end = time.monotonic() + timeout
        while True:
            try:
                return Client(self.socket if unix else ("127.0.0.1", self.port), export, timeout=timeout)
            except Refused:
                if not patient or time.monotonic() > end:
                    raise
                time.sleep(0.1)


class Client:
    """One NBD connection with simple replies. Requests are told apart by cookies that the caller may choose."""

    def __init__(self, address, export, timeout=30):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(timeout)
        self.socket.connect(address)
        if not isinstance(address, str):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received, self.cookie, self.waiting, self.export = bytearray(), 0, {}, export
        try:
            self._handshake(export.encode())
        except BaseException:
            self.socket.close()
            raise

    def _exactly(self, n):
        out = bytearray()
        while len(out) < n:
            piece = self.socket.recv(n - len(out))
            if not piece:
                raise Gone(f"closed in the handshake of {self.export}")
            out += piece
        return bytes(out)

    def _handshake(self, export):
        magic, opt, flags = struct.unpack(">8s8sH", self._exactly(18))
        expect(magic == b"NBDMAGIC" and opt == b"IHAVEOPT", "not a newstyle NBD server")
        data = struct.pack(">I", len(export)) + export + b"\0\0"
        self.socket.sendall(struct.pack(">I", flags & 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        self.size = self.flags = None
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._exactly(20))
            body = self._exactly(length)
            expect(magic == 0x3E889045565A9 and option == 7, "not an answer to GO")
            if kind == 1:
                return
            if kind >> 31:
                raise Refused(kind, body.decode(errors="replace"))
            if kind == 3 and body[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", body[2:12])

    def header(self, command, offset=0, length=0, flags=0, cookie=0):
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)

    def send(self, command, offset=0, length=0, data=b"", flags=0, tag=None):
        """Sends a request; returns its cookie. `tag` comes back with the reply."""
        self.cookie += 1
        self.waiting[self.cookie] = (command, length or len(data), tag)
        try:
            self.socket.sendall(self.header(command, offset, length or len(data), flags, self.cookie) + data)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone("reset while sending") from None
        return self.cookie

    def replies(self, block=True):
        """All replies that are there (at least one, if `block`): [(cookie, tag, error, data)]. Gone when the connection is over."""
        out = self._parse()
        while not out:
            # Not MSG_DONTWAIT: Python would wait for the socket's timeout all the same.
            if not block and not select.select([self.socket], [], [], 0)[0]:
                return out
            try:
                piece = self.socket.recv(1 << 20)
            except ConnectionResetError:
                raise Gone("reset") from None
            if not piece:
                raise Gone("closed")
            self.received += piece
            out = self._parse()
        return out

    def _parse(self):
        out, at = [], 0
        while len(self.received) - at >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", self.received, at)
            expect(magic == 0x67446698, f"reply magic {magic:#x}")
            expect(cookie in self.waiting, f"a reply with the unknown cookie {cookie}")
            command, length, tag = self.waiting[cookie]
            n = length if command == READ and not error else 0
            if len(self.received) - at < 16 + n:
                break
            del self.waiting[cookie]
            out.append((cookie, tag, error, bytes(self.received[at + 16:at + 16 + n])))
            at += 16 + n
        del self.received[:at]
        return out

    def ask(self, command, offset=0, length=0, data=b"", flags=0):
        """One request and its reply; nothing else may be in flight. Returns the data of a read."""
        mine = self.send(command, offset, length, data, flags)
        cookie, _, error, data = self.replies()[0]
        expect(cookie == mine, "another reply came")
        expect(error == 0, f"{NAMES[command]} at {offset}: error {error}")
        return data

    def read(self, offset, length):
        """Any length, in pieces of up to 1 MiB, several in flight."""
        out, pieces = bytearray(length), [(o, min(1 << 20, length - o)) for o in range(0, length, 1 << 20)]
        flight = 0
        while pieces or flight:
            while pieces and flight < 8:
                o, n = pieces.pop(0)
                self.send(READ, offset + o, n, tag=o)
                flight += 1
            for _, o, error, data in self.replies():
                expect(error == 0, f"READ at {offset + o}: error {error}")
                out[o:o + len(data)] = data
                flight -= 1
        return out

    def write(self, offset, data, flags=0):
        self.ask(WRITE, offset, data=data, flags=flags)

    def flush(self):
        self.ask(FLUSH)

    def disconnect(self):
        """DISC, and wait until the server has closed: a clean end."""
        try:
            self.socket.sendall(self.header(DISC))
            while self.socket.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.socket.close()

    def cut(self):
        """Ends the connection by a reset, without a word."""
        if self.socket.family == socket.AF_INET:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def content(rng, length):
    """Bytes of which half compress."""
    half = length // 2
    return rng.randbytes(length - half) + bytes([rng.randrange(256)]) * half


class Places:
    """Windows of a disk, far apart, seen as one flat range: what the model holds and what the load touches."""

    def __init__(self, starts, window):
        self.starts, self.window = sorted(starts), window
        self.size = len(starts) * window

    def offset(self, flat):
        return self.starts[flat // self.window] + flat % self.window

    def read(self, client):
        return b"".join(bytes(client.read(s, self.window)) for s in self.starts)


def spread(rng, size, count, window):
    """`count` windows across block borders (16 MiB), the first at 0, the last at the very end."""
    block = 16 << 20
    starts = {0, size - window}
    while len(starts) < count:
        b = rng.randrange(1, size // block) * block
        starts.add(b - window // 2 if rng.random() < 0.5 else b - rng.randrange(window))
    ok = sorted(starts)
    if any(b - a < window for a, b in zip(ok, ok[1:])):
        return spread(rng, size, count, window)
    return ok
