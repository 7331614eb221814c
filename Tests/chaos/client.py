"""The client's side of the chaos run: attaches, mounts, loads and looks, as told by chaos.py in lines of JSON.

Runs in the client's network namespace on the host (nbdfuse and a loop device) or in the guest (nbd.ko), where the journal of
the load is kept and its lines are also sent on. Commands: {"do": NAME, ...}; answers: {"ok": ...} or {"failed": TEXT};
in between {"r": RECORD} for each line of the journal.

    client.py host WORK | client.py guest PORT-FILE | client.py modules (prints the files that Python needs for it)
"""
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import load
import wire


class Failed(Exception):
    pass


def run(*words, timeout=60, check=True):
    """A program's (status, output)."""
    try:
        r = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(words)}: not done within {timeout} s") from None
    text = r.stdout.decode(errors="replace")
    if check and r.returncode:
        raise Failed(f"{' '.join(words)}: status {r.returncode}: {text.strip()[-400:]}")
    return r.returncode, text


def wait_for(what, seconds, holds):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.01)


def mounted(path):
    with open("/proc/self/mounts") as f:
        return any(line.split(" ")[1] == path for line in f)


class HostDevice:
    """An export as a loop device of this kernel: nbdfuse, behind the relay where the client is to reconnect."""

    count = 0

    def __init__(self, work, host, port, name, session, resume, **_):
        HostDevice.count += 1
        self.base = f"{work}/at{HostDevice.count}"
        os.makedirs(self.base + "/f")
        self.relay = None
        export = f"{name}?session={session}"
        if resume:
            path = self.base + "/sock"
            here = os.path.dirname(os.path.abspath(__file__))
            self.relay = subprocess.Popen([sys.executable, f"{here}/wire.py", "relay", path, host, str(port), export, "45"],
                                          stdin=subprocess.DEVNULL, stdout=open(self.base + "/relay.log", "wb"), stderr=subprocess.STDOUT)
            wait_for("the relay", 10, lambda: os.path.exists(path))
            uri = f"nbd+unix:///?socket={path}"
        else:
            uri = f"nbd://{host}:{port}/{name}%3Fsession%3D{session}"
        self.fuse = subprocess.Popen(["nbdfuse", self.base + "/f/nbd", uri], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=open(self.base + "/nbdfuse.log", "wb"), start_new_session=True)
        self.loop = None
        try:
            wait_for("nbdfuse", 15, lambda: os.path.exists(self.base + "/f/nbd") or self.fuse.poll() is not None)
            if self.fuse.poll() is not None:
                raise Failed("nbdfuse: " + open(self.base + "/nbdfuse.log").read().strip()[-300:])
            self.loop = run("losetup", "-f", "--show", self.base + "/f/nbd")[1].strip()
        except Failed:
            self.end(clean=False)
            raise
        self.device = self.loop

    def crash(self):
        """The client is killed, and its kernel ends its connections."""
        for p in (self.fuse, self.relay):
            if p:
                p.kill()

    def end(self, clean):
        """`clean`: the client says goodbye."""
        programs = [p for p in (self.fuse, self.relay) if p]
        if not clean:
            self.crash()
        if self.loop:
            run("losetup", "-d", self.loop, check=False)
            # A loop device that something still has open goes with its last user.
            wait_for(f"the end of {self.loop}", 20, lambda: run("losetup", self.loop, check=False)[0] != 0)
        if mounted(self.base + "/f"):
            if run("umount", self.base + "/f", check=False)[0]:
                run("umount", "-l", self.base + "/f", check=False)
        try:
            self.fuse.wait(20)
        except subprocess.TimeoutExpired:
            self.fuse.kill()
        if self.relay:
            if clean:
                time.sleep(0.02)
            self.relay.kill()
        for p in programs:
            p.wait()

    def said(self):
        """What the client was told at its end."""
        if not self.relay:
            return ""
        with open(self.base + "/relay.log") as f:
            return f.read().strip()[-200:]


class GuestDevice:
    """An export as /dev/nbdN. For roll-back by nbd-client; to reconnect, by netlink: a lost connection is made again under
    the same session and handed to the device, whose requests meanwhile wait."""

    count = 0

    def __init__(self, work, host, port, name, session, resume, connections=1, **_):
        self.index = GuestDevice.count % 4
        GuestDevice.count += 1
        self.device, self.over, self.told = f"/dev/nbd{self.index}", False, ""
        self.where = (host, port, f"{name}?session={session}")
        self.thread, self.sockets = None, []
        if not resume:
            run("nbd-client", "-N", self.where[2], host, str(port), self.device, "-b", "4096", "-C", str(connections), timeout=30)
        else:
            self.netlink = Netlink()
            made = [wire.connect_again(*self.where, 20) for _ in range(connections)]
            if None in made:
                raise Failed("refused")
            self.sockets = [m[0] for m in made]
            self.netlink.connect(self.index, self.sockets, made[0][1], made[0][2], timeout=2, dead=60)
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        run("blockdev", "--flushbufs", self.device, check=False)

    def _watch(self):
        while not self.over:
            poll = select.poll()
            for s in self.sockets:
                poll.register(s, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
            for fd, _ in poll.poll(100):
                if self.over:
                    return
                at = next(i for i, s in enumerate(self.sockets) if s.fileno() == fd)
                up = wire.connect_again(*self.where, 45, lambda: self.over)
                if up is None:
                    self.told = "refused"
                    self.over = True
                    self.netlink.disconnect(self.index)
                    return
                old, self.sockets[at] = self.sockets[at], up[0]
                end = time.monotonic() + 10
                while True:
                    try:
                        self.netlink.replace(self.index, [up[0]])
                        break
                    except OSError:      # the device has not yet seen that the old one is dead
                        if self.over or time.monotonic() > end:
                            break
                        time.sleep(0.02)
                old.close()

    def crash(self):
        """The connections end without a word, and the device with them."""
        self.over = True
        for s in self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        run("nbd-client", "-d", self.device, check=False)

    def end(self, clean):
        """`clean`: by DISC, which the kernel sends."""
        self.over = True
        if self.thread:
            self.thread.join(60)
        if not clean:
            self.crash()
        run("nbd-client", "-d", self.device, check=False)
        for s in self.sockets:
            s.close()
        wait_for(f"the end of {self.device}", 20, lambda: not os.path.exists(f"/sys/block/nbd{self.index}/pid"))

    def said(self):
        return self.told


Netlink = wire.Netlink


class Client:
    def __init__(self, form, work, out):
        self.form, self.work, self.out, self.lock = form, work, out, threading.Lock()
        self.archive = f"{work}/archive.tar"
        self.root = f"{work}/mnt"
        os.makedirs(self.root, exist_ok=True)
        self.device, self.models, self.model, self.workers, self.reader = None, {}, None, [], None
        self.errors = []

    def send(self, line):
        with self.lock:
            self.out.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self.out.flush()

    def record(self, r):
        with self.lock:
            if r["op"] in ("error", "bug"):
                self.errors.append(r)
            else:
                self.model.add(r)
        self.send({"r": r})

    # ---- commands

    def do_hello(self):
        return os.uname().release

    def do_disk(self, name):
        """The disk that the next commands are about."""
        if name not in self.models:
            self.models[name] = load.Model(self.archive)
        self.model = self.models[name]

    def do_attach(self, **how):
        kind = HostDevice if self.form == "host" else GuestDevice
        self.device = kind(self.work, **how)
        return self.device.device

    def do_mkfs(self):
        run("mkfs.btrfs", "-q", "-f", self.device.device, timeout=120)

    def do_check(self):
        status, text = run("btrfs", "check", "--readonly", self.device.device, timeout=300, check=False)
        return [status, text[-1500:]]

    def do_mount(self, options):
        run("mount", "-t", "btrfs", "-o", options, self.device.device, self.root)

    def do_load(self, seed, seconds, kinds, round, keep):
        load.remove_old(self.root, keep, self.record)
        sub = f"{self.root}/sub{round}"
        load.subvolume(sub)
        self.errors = []
        inlet, outlet = os.pipe()
        self.workers = []
        for kind in kinds:
            pid = os.fork()
            if pid == 0:
                os.close(inlet)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                load.run(kind, sub, f"{seed}-{round}", seconds, self.archive, outlet)
            self.workers.append(pid)
        os.close(outlet)
        self.reader = threading.Thread(target=self._read, args=(inlet,), daemon=True)
        self.reader.start()

    def _read(self, inlet):
        with os.fdopen(inlet, "rb") as f:
            for line in f:
                self.record(json.loads(line))

    def _reap(self):
        left = []
        for pid in self.workers:
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    left.append(pid)
            except ChildProcessError:
                pass
        self.workers = left
        return not left

    def do_ended(self):
        """Whether every part of the load has ended, and the errors it met."""
        return [self._reap(), self.errors]

    def do_wait(self, seconds):
        """Waits for the end of the load; what does not end in time is killed. Returns the errors it met, and who was stuck."""
        stuck = 0
        try:
            wait_for("the load", seconds, self._reap)
        except Failed:
            stuck = len(self.workers)
            for pid in self.workers:
                os.kill(pid, signal.SIGKILL)
            wait_for("the end of the killed load", 90, self._reap)
        self.reader.join(30)
        return {"errors": self.errors, "stuck": stuck}

    def do_kill(self):
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)

    def do_umount(self):
        load_gone = not self.workers or self._reap()
        end = time.monotonic() + 60
        while mounted(self.root):
            status, text = run("umount", self.root, check=False)
            if status == 0:
                break
            if time.monotonic() > end:
                raise Failed(f"umount: {text.strip()} (load ended: {load_gone})")
            time.sleep(0.02)

    def do_crash(self):
        self.device.crash()

    def do_detach(self, clean):
        if self.device is None:
            return ""
        device, self.device = self.device, None
        device.end(clean)
        return device.said()

    def do_verify(self, upto=None, drop=False):
        """Holds the mounted file system against the first `upto` lines of the journal (None: all of it)."""
        if drop:
            with open("/proc/sys/vm/drop_caches", "w") as f:
                f.write("3\n")
        n = len(self.model.records) if upto is None else upto
        bad, count = load.verify(self.root, self.model.demanded(n), self.model.archive)
        if upto is not None:
            self.model.lose(upto)
        return {"bad": bad, "count": count, "records": len(self.model.records)}

    def do_records(self):
        return len(self.model.records)

    def do_dmesg(self):
        return run("dmesg", check=False)[1][-20000:]

    def serve(self, lines):
        for line in lines:
            words = json.loads(line)
            what = words.pop("do")
            if what == "end":
                return True
            try:
                self.send({"ok": getattr(self, "do_" + what)(**words)})
            except (Failed, OSError, wire.Refused) as e:
                self.send({"failed": f"{what}: {e}"})
        return False


def main():
    form = sys.argv[1]
    if form == "modules":
        for m in sorted({getattr(m, "__file__", None) or "" for m in list(sys.modules.values())}):
            if m.startswith("/usr/lib"):
                print(m)
        return
    if form == "host":
        Client(form, sys.argv[2], sys.stdout.buffer).serve(sys.stdin.buffer)
    else:
        port = os.open(sys.argv[2], os.O_RDWR)
        client, lines = Client(form, "/chaos", os.fdopen(os.dup(port), "wb")), os.fdopen(port, "rb")
        while not client.serve(lines):      # the port reads as ended while nobody has opened the other side
            time.sleep(0.1)


if __name__ == "__main__":
    main()
