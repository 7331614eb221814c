"""The rounds of Scripts/chaos-tcpkill.sh: daemons, faults, and what must hold after them.

A disk lives for some rounds in one mode. A round: load on the mounted file system, faults in the midst of it, the end of the
attachment, then another one under a new session: `btrfs check`, mount, and every promise of the journal held against what is
there. The journal's lines are stamped when they arrive here. What a round may have lost follows from its faults alone:

- nothing that was synced, after cuts, kills, drains and outages: a btrfs fsync ends in a safe point, in both modes;
- where scratch was lost or the disk moved, what was synced after the last generation G was frozen. A line that had arrived when
  the head still named generation G - 2 or an older one is in G: G was taken from the layers after G - 1 was committed;
- with durability store nothing even then.
"""
import argparse
import atexit
import collections
import glob
import os
import queue
import re
import shutil
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "system"))
from bed import *
from gate import before_store

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ["writer1", "writer2", "writer3", "untar", "sqlite", "overwrite", "nocow", "snapshot", "discard"]
# How often which; (mode, form) that cannot do a fault leave it out.
FAULTS = {"tcpkill": 10, "reset": 4, "half": 2, "stall": 2, "client": 2, "kill": 4, "drain": 2, "wipe": 3, "move-dead": 2, "move-force": 2, "outage": 2}
LOSSY = {"wipe", "move-dead", "move-force"}
ENDED = re.compile(rb"\bended\b")
CUTS = {"tcpkill", "reset", "half", "stall"}


# A broken rule shows where it matters: (modes, windows, faults) of a run with --break; others get everything.
SHOWN_BY = {
    "lostSessionResumes": (["resume"], ["0"], ["tcpkill", "reset", "half", "stall", "kill"]),
    "layersMergedWrongly": (None, None, ["wipe", "kill", "move-dead"]),
    "superBlockOvertakes": (["rollback"], None, ["tcpkill", "reset", "half", "stall", "kill"]),
}


class Lost(Exception):
    """The client cannot be asked any more."""


class Peer:
    """client.py, on the host or in the guest: asked in lines of JSON, telling the journal's lines meanwhile."""

    def __init__(self, reader, writer, note):
        self.reader, self.writer, self.note = reader, writer, note
        self.answers, self.times, self.lines = queue.Queue(), {}, {}
        self.disk = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.reader:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if "r" in said:
                if said["r"]["op"] not in ("error", "bug"):
                    self.times[self.disk].append(time.monotonic())
                self.lines[self.disk].append((round(time.time(), 3), said["r"]))
            else:
                self.answers.put(said)
        self.answers.put(None)

    def ask(self, what, timeout=180, **words):
        if what != "ended":
            self.note(f"client: {what} {words}")
        self.writer.write(json.dumps({"do": what, **words}).encode() + b"\n")
        self.writer.flush()
        try:
            said = self.answers.get(timeout=timeout)
        except queue.Empty:
            said = None
        if said is None:
            raise Lost(f"the client does not answer to {what}")
        if "failed" in said:
            raise Failed(said["failed"])
        return said["ok"]

    def choose(self, disk):
        self.times.setdefault(disk, [])
        self.lines.setdefault(disk, [])
        self.ask("disk", name=disk)
        self.disk = disk


class Chaos:
    def __init__(self, a):
        self.a, self.rng = a, random.Random(SEED)
        self.log = open(f"{WORK}/chaos.log", "w")
        self.began = time.monotonic()
        self.store_url, self.gate = STORE, None
        if STORE.startswith("file://"):
            self.directory = STORE[7:]
            subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        else:
            self.directory = None
            self.gate, self.store_url = before_store(STORE)
        self.daemons = [self.daemon("a"), self.daemon("b")]
        self.at = 0
        self.injected, self.took, self.by_mode = collections.Counter(), collections.Counter(), collections.Counter()
        self.cuts_by_mode, self.violations, self.bad_by, self.sessions, self.disks = collections.Counter(), [], collections.Counter(), 0, 0
        self.checked, self.exports, self.lost_lines, self.samples = collections.Counter(), 0, 0, []
        self.name = None
        self.attached = self.mounted = False
        self.read_so_far, self.promised = {}, collections.Counter()

    def daemon(self, name):
        return Daemon(name, store=self.store_url, commit="100ms", settings=["journal-per-disk=512M"], dead_after="1s")

    @property
    def current(self):
        return self.daemons[self.at]

    def note(self, text):
        self.log.write(f"{time.monotonic() - self.began:9.3f} {text}\n")
        self.log.flush()

    # ---- daemons

    def start(self, d):
        d.start("--listen", f"{self.a.server}:{d.port}")
        if self.a.breaks and "breaks the rule" not in open(d.log, errors="replace").read():
            raise Failed(f"{MARGINED} is no build with MARGARINE_FAULTS")
        self.note(f"daemon {d.name} is up, pid {d.pid}")

    @staticmethod
    def runs(d):
        return d.process is not None and d.alive()

    def ended(self):
        """Connections that the daemons have seen end without DISC, so far."""
        for d in self.daemons:
            if os.path.exists(d.log):
                at, count = self.read_so_far.get(d.name, (0, 0))
                with open(d.log, "rb") as f:
                    f.seek(at)
                    whole = f.read().rpartition(b"\n")[0]
                self.read_so_far[d.name] = (at + len(whole), count + len(ENDED.findall(whole)))
        return sum(count for _, count in self.read_so_far.values())

    def was_refused(self):
        """Whether a daemon has told the client that its session can't go on."""
        told = f"session 's{SEED}-{self.sessions}' was away, so that session can't go on".encode()
        return any(os.path.exists(d.log) and told in open(d.log, "rb").read() for d in self.daemons)

    def wait_ended(self, before, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ended() > before:
                return self.ended() - before
            time.sleep(0.01)
        return 0

    # ---- generations

    def generation(self):
        if self.directory:
            try:
                with open(f"{self.directory}/disks/{self.name}/head", "rb") as f:
                    return int(re.search(rb'"generation"\s*:\s*(\d+)', f.read()).group(1))
            except (OSError, AttributeError):
                pass
        return show(self.name)["generation"]

    def settle(self):
        """Waits until there is a generation, and no other follows it."""
        end, still, last = time.monotonic() + 60, 0, None
        while still < 5:
            if time.monotonic() > end:
                raise Failed("a disk that was left cleanly is not committed within 60 s")
            time.sleep(0.06 if self.directory else 0.2)
            g = self.generation()
            still = still + 1 if g and g == last else 0
            last = g

    def sample(self):
        """A thread: which generation the head names, and when it was asked."""
        while not self.over:
            name, t = self.name, time.monotonic()
            if name:
                try:
                    g = self.generation()
                    if name == self.name:
                        self.samples.append((t, g))
                except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError):
                    pass
            time.sleep(0.02 if self.directory else 0.3)

    over = False

    def kept(self):
        """How many lines of the journal the generation that the head names now is sure to hold."""
        last = self.generation()
        asked = [t for t, g in self.samples if g <= last - 2]
        return sum(1 for t in self.client.times[self.name] if asked and t <= asked[-1]), last

    # ---- faults: each returns how often it took effect

    def fault_tcpkill(self):
        before = self.ended()
        p = subprocess.Popen(["tcpkill", "-i", self.a.interface, "-9", "port", str(self.current.port), "and", "host", self.a.client],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        n = self.wait_ended(before, 1.5)
        p.kill()
        p.wait()
        return n

    def fault_reset(self):
        before = self.ended()
        self.kill_sockets()
        return self.wait_ended(before, 1)

    def kill_sockets(self):
        subprocess.run(["ss", "-K", "-t", "src", self.a.server, "sport", "=", f":{self.current.port}", "dst", self.a.client], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def established(self, d):
        """What the kernel has of connections between the client and a daemon."""
        r = subprocess.run(["ss", "-Htn", "state", "established", "src", self.a.server, "sport", "=", f":{d.port}"], capture_output=True, text=True)
        return r.stdout.split("\n")[:-1]

    def serves(self, d):
        """Connections of the client that a daemon has attached: one that it refuses again and again is established too."""
        log = open(d.log, errors="replace").read()
        last = {}
        for what, client in re.findall(r" (attached|ended|detached|export refused) client=(\S+)", log):
            last[client] = what
        return [c for c in self.established(d) if last.get(c.split()[-1]) == "attached"]

    def fault_half(self):
        """The client's end is gone and it comes back while the server still believes in the old one: no packet tells it."""
        subprocess.run(["ip", "link", "set", self.a.interface, "down"], check=True)
        subprocess.run([*self.a.inside, "ss", "-K", "-t", "dst", self.a.server], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(self.rng.random() * 0.1)
        before = self.ended()
        subprocess.run(["ip", "link", "set", self.a.interface, "up"], check=True)
        return max(1, self.wait_ended(before, 0.5))

    def fault_stall(self):
        """The server's end is gone, and the client learns of it later; of a short resume window perhaps too late."""
        subprocess.run(["ip", "link", "set", self.a.interface, "down"], check=True)
        before = self.ended()
        self.kill_sockets()
        n = self.wait_ended(before, 1)
        time.sleep(self.rng.random() * (0.3 if self.window != "1s" else 2))
        subprocess.run(["ip", "link", "set", self.a.interface, "up"], check=True)
        return n

    def fault_client(self):
        self.client.ask("crash")
        return 1

    def fault_kill(self):
        self.current.kill()
        time.sleep(self.rng.choice([0, self.rng.random() * 0.3]))
        self.start(self.current)
        return 1

    def fault_drain(self):
        self.current.stop()
        self.start(self.current)
        return 1

    def fault_wipe(self):
        self.current.kill()
        shutil.rmtree(self.current.scratch)
        self.limit = self.kept()
        self.start(self.current)
        return 1

    def fault_move_dead(self):
        self.current.kill()
        self.limit = self.kept()
        self.at = 1 - self.at
        if not self.runs(self.current):
            self.start(self.current)
        return 1

    def fault_move_force(self):
        old, before = self.current, self.ended()
        self.at = 1 - self.at
        if not self.runs(self.current):
            self.start(self.current)
        probe, end = None, time.monotonic() + 30
        while probe is None:
            margined("disk", "release", self.name, "--force")
            try:
                probe = self.current.attach(f"{self.name}?session=probe{self.sessions}", timeout=30)
            except Refused as e:
                # The client asked the old server again in between, which took the disk for it.
                if "belongs to server" not in str(e) or time.monotonic() > end:
                    raise
        self.limit = self.kept()
        probe.disconnect()
        if not self.wait_ended(before, 3) and self.serves(old):
            self.wrong(f"server {old.name} goes on serving a disk that was taken from it")
        if self.rng.random() < 0.5:
            old.kill()
        return 1

    def fault_outage(self):
        """The store takes no writes for a while, and something else happens meanwhile."""
        self.store_fails(True)
        time.sleep(self.rng.random() * 0.4)
        before = self.ended()
        if self.rng.random() < 0.5:
            self.kill_sockets()
            n = self.wait_ended(before, 0.5)
        else:
            self.current.kill()
            n = 1
        time.sleep(self.rng.random() * 0.4)
        self.store_fails(False)
        if not self.runs(self.current):
            self.start(self.current)
        return n

    def store_fails(self, fails):
        if self.gate:
            self.gate.mode = "refuse" if fails else "open"
            return
        for _ in range(500):
            r = subprocess.run(["mount", "-o", f"remount,bind,{'ro' if fails else 'rw'}", self.directory], stderr=subprocess.DEVNULL)
            if r.returncode == 0:
                return
            time.sleep(0.002)      # a file is being written

    # ---- a round

    def wrong(self, what):
        self.note(f"VIOLATION: {what}")
        self.found.append(what)

    def attach(self):
        end = time.monotonic() + 60
        while True:
            self.sessions += 1
            try:
                self.client.ask("attach", host=self.a.server, port=self.current.port, name=self.name, session=f"s{SEED}-{self.sessions}",
                                resume=self.mode == "resume", connections=self.connections)
                self.attached = True
                return
            except Failed as e:
                if time.monotonic() > end:
                    raise Failed(f"attach: {e}") from None
                time.sleep(0.2)

    def new_disk(self):
        self.disks += 1
        modes = self.a.modes
        self.mode = modes[(self.disks - 1) % len(modes)]
        self.durability = self.rng.choice(["scratch", "scratch", "store", "memory"])
        self.connections = self.rng.choice([1, 1, 2, 4])
        self.window = "0" if self.mode != "resume" else self.rng.choice(self.a.windows)
        name = f"{self.mode}{self.disks}"
        create(name, self.a.size, safe_points="auto", durability=self.durability, resume_window=self.window)
        self.samples = []
        self.name, self.round_of_disk = name, 0
        self.client.choose(name)
        self.attach()
        self.client.ask("mkfs", timeout=300)
        # From here on the store holds a file system, whatever is wiped: the clean end of a session is committed.
        self.leave()
        self.settle()
        self.attach()
        self.mount()
        self.note(f"disk {name}: {self.mode}, window {self.window}, durability {self.durability}, {self.connections} connections in a guest")

    def mount(self):
        self.client.ask("mount", options=self.rng.choice(["commit=1", "commit=1,discard=async", "commit=2,discard=async,compress=zstd:1", "commit=1,flushoncommit"]))
        self.mounted = True

    def faults(self):
        """What this round does to the disk: names; those after which something may be missing come last."""
        weights = {f: w for f, w in FAULTS.items() if f in self.a.faults}
        if self.mode != "resume" or self.a.form == "guest":
            weights.pop("half", None)
        draw = lambda: self.rng.choices(list(weights), list(weights.values()))[0]
        if self.mode != "resume":
            return [draw()]
        chosen = [draw() for _ in range(self.rng.choice([1, 1, 2, 3]))]
        end = next((i for i, f in enumerate(chosen) if f in LOSSY or f == "client"), None)
        return chosen if end is None else chosen[:end + 1]

    def round(self, n):
        self.found, self.limit = [], None
        seconds = self.a.seconds * (0.6 + 0.8 * self.rng.random())
        kinds = self.rng.sample(KINDS, self.rng.randrange(4, len(KINDS) + 1))
        chosen = self.faults()
        self.round_of_disk += 1
        self.note(f"round {n}: {self.mode}, {chosen}, load {kinds} for {seconds:.2f} s")
        t0 = time.monotonic()
        self.client.ask("load", seed=SEED, seconds=seconds, kinds=kinds, round=n,
                        keep=n - (2 if self.a.form == "host" else 1))
        cuts = self.ended()
        begin = time.monotonic()
        instants = sorted(self.rng.random() * 0.85 * seconds for _ in chosen)
        for fault, instant in zip(chosen, instants):
            time.sleep(max(0, begin + instant - time.monotonic()))
            self.note(f"fault {fault}")
            took = getattr(self, "fault_" + fault.replace("-", "_"))()
            self.note(f"fault {fault}: took effect {took} times")
            self.injected[fault] += 1
            self.took[fault] += 1 if took else 0
            if not took and self.mode != "resume" and fault in CUTS:
                self.kill_sockets()
        goes_on = self.mode == "resume" and chosen[-1] not in LOSSY and chosen[-1] != "client"
        if goes_on:
            done = self.client.ask("wait", seconds=self.a.patience)
            refused = done["errors"] and self.window != "60s"     # its window may have ended; then it may not go on
            for e in done["errors"] if not refused else []:
                self.wrong(f"the client had an error though its session could be resumed: {e}")
            if done["stuck"]:
                self.wrong(f"{done['stuck']} parts of the load hung for {self.a.patience} s")
            if not self.found and not refused and self.rng.random() < 0.3:
                said = self.client.ask("verify", drop=True, timeout=300)
                # The load may have ended before its session did: then this is the first to meet the refusal.
                refused = bool(said["bad"]) and self.window != "60s" and self.was_refused()
                if not refused:
                    self.looked(said, "on the mount that went on")
            crash = bool(self.found) or refused or self.rng.random() < 0.4
        else:
            # The client learns of it at its next request; one that still has connections is ended.
            end = time.monotonic() + 1
            while time.monotonic() < end and not self.client.ask("ended")[0]:
                time.sleep(0.02)
            crash = True
        if crash:
            self.client.ask("crash")
            done = self.client.ask("wait", seconds=self.a.patience, timeout=300)
            if done["stuck"]:
                self.note(f"{done['stuck']} parts of the load had to be killed")
        for e in done["errors"]:
            if e["op"] == "bug":
                raise Failed(f"the load has an error of its own: {e}")
        self.client.ask("umount")
        self.mounted = False
        said = self.client.ask("detach", clean=not crash)
        self.attached = False
        self.note(f"detached {'by a crash' if crash else 'cleanly'} {said}")
        self.by_mode[self.mode] += 1
        self.cuts_by_mode[self.mode] += self.ended() - cuts
        self.inspect()
        self.note(f"round {n}: {time.monotonic() - t0:.2f} s")
        return chosen

    def looked(self, said, where):
        self.checked.update(said["count"])
        for b in said["bad"]:
            self.wrong(f"{where}: {b}")

    def inspect(self):
        """Another attachment: is the file system whole, and is everything there that must be?"""
        self.attach()
        status, text = self.client.ask("check", timeout=400)
        if status:
            self.wrong("btrfs check: " + text.strip()[-600:])
        try:
            self.mount()
        except Failed as e:
            self.wrong(str(e))
            return
        upto = None
        if self.limit is not None and self.durability != "store":
            upto, g = self.limit
            all_lines = len(self.client.times[self.name])
            self.lost_lines += all_lines - upto
            self.note(f"generation {g} holds at least {upto} of {all_lines} lines")
        said = self.client.ask("verify", upto=upto, timeout=400)
        self.promised[self.mode] += said["count"]["demanded"]
        if upto is not None:
            times = self.client.times[self.name]
            del times[upto:]
            times.extend([time.monotonic()] * (said["records"] - upto))
        self.looked(said, "after the attachment")

    def leave(self, clean=True):
        if self.mounted:
            self.client.ask("umount")
            self.mounted = False
        if self.attached:
            self.client.ask("detach", clean=clean)
            self.attached = False

    def end_disk(self):
        """The last generation, as the store has it, is a whole file system too."""
        self.leave()
        image = f"{WORK}/last.img"
        margined("disk", "export", self.name, image)
        r = subprocess.run(["btrfs", "check", "--readonly", image], capture_output=True, text=True)
        self.exports += 1
        if r.returncode:
            self.found = []
            self.wrong("btrfs check of the last generation: " + (r.stdout + r.stderr).strip()[-600:])
            self.keep("export", self.found)
        os.unlink(image)
        margined("disk", "delete", self.name, check=False)
        self.name = None

    # ---- what is kept of a violation

    def keep(self, n, chosen):
        self.violations.append((n, self.name, list(self.found), self.mode))
        to = f"{self.a.evidence}/round-{n}"
        os.makedirs(to, exist_ok=True)
        with open(f"{to}/violations.txt", "w") as f:
            f.write(f"seed {SEED}, {self.a.form}, disk {self.name}, {self.mode}, durability {self.durability}, faults {chosen}\n")
            f.write("".join(v + "\n" for v in self.found))
        with open(f"{to}/journal.jsonl", "w") as f:
            for t, r in self.client.lines[self.name]:
                f.write(json.dumps([t, r]) + "\n")
        for p in [f"{WORK}/chaos.log", *(d.log for d in self.daemons), *glob.glob(f"{WORK}/guest*.log")]:
            if os.path.exists(p):
                shutil.copy(p, to)
        try:
            with open(f"{to}/kernel.txt", "w") as f:
                f.write(self.client.ask("dmesg"))
            self.leave(clean=False)
        except (Failed, Lost) as e:
            self.note(f"evidence: {e}")
        try:
            g = self.generation()
            with open(f"{to}/show.json", "w") as f:
                json.dump(show(self.name), f, indent=1)
            for number in range(g, max(g - 3, 0), -1):
                margined("disk", "export", f"{self.name}@{number}" if number != g else self.name, f"{to}/{self.name}@{number}.img", check=False)
            if self.directory:
                subprocess.run(["cp", "-a", self.directory, f"{to}/store"])
            for d in self.daemons:
                if os.path.isdir(d.scratch):
                    subprocess.run(["cp", "-a", "--sparse=always", d.scratch, f"{to}/scratch-{d.name}"], stderr=subprocess.DEVNULL)
        except (Failed, OSError, subprocess.SubprocessError) as e:
            self.note(f"evidence: {e}")
        self.store_fails(False)
        say(f"VIOLATION in round {n} ({self.mode}, {'+'.join(chosen)}): {self.found[0][:200]}")
        say(f"  {len(self.found)} in all; evidence in {to}")

    # ---- the run

    def run(self):
        a = self.a
        self.client = self.connect_client()
        self.client.disk = None
        t = time.monotonic()
        kernel = self.client.ask("hello", timeout=240)
        say(f"the client's kernel is {kernel}" + (f", up after {time.monotonic() - t:.0f} s" if a.form == "guest" else ""))
        for d in self.daemons[:1]:
            self.start(d)
        threading.Thread(target=self.sample, daemon=True).start()
        n = 0
        began = time.monotonic()
        while n < a.rounds and (not a.minutes or time.monotonic() - began < a.minutes * 60):
            n += 1
            if self.name is None:
                self.new_disk()
            self.found, chosen = [], []
            try:
                chosen = self.round(n)
            except Failed as e:
                # Whatever the run cannot go on with is looked at by people.
                self.wrong(f"{type(e).__name__}: {e}")
            if self.found:
                for f in set(chosen) or {"?"}:
                    self.bad_by[f] += 1
                self.keep(n, chosen or ["?"])
                if a.breaks or len(self.violations) >= a.stop_after:
                    break
                try:
                    self.leave(clean=False)
                except Failed as e:
                    say(f"the client cannot be freed: {e}")
                    break
                self.name = None
            elif self.round_of_disk >= a.life:
                self.end_disk()
            if n % 25 == 0:
                say(f"{n} rounds in {time.monotonic() - began:.0f} s, {sum(self.cuts_by_mode.values())} connections ended by force, {len(self.violations)} violations")
        self.rounds = n
        if self.name and not self.violations:
            self.end_disk()
        self.over = True
        self.seconds = time.monotonic() - began
        return self.judge()

    def went_back(self):
        """How often a daemon rolled a disk back and something was undone."""
        return sum(open(d.log, errors="replace").read().count("rolled back to its last safe point") for d in self.daemons if os.path.exists(d.log))

    def judge(self):
        a = self.a
        print()
        print(f"{'mode':<12} {'rounds':>7} {'connections ended':>18} {'promises':>9} {'violations':>11}")
        for m in a.modes:
            bad = sum(1 for v in self.violations if v[3] == m)
            print(f"{m:<12} {self.by_mode[m]:>7} {self.cuts_by_mode[m]:>18} {self.promised[m]:>9} {bad:>11}")
        print(f"\n{'fault':<12} {'tried':>7} {'took effect':>12} {'violations':>11}")
        for f in FAULTS:
            if self.injected[f]:
                print(f"{f:<12} {self.injected[f]:>7} {self.took[f]:>12} {self.bad_by[f]:>11}")
        print(f"\n{self.rounds} rounds on {self.disks} disks in {self.seconds:.0f} s ({self.seconds / max(self.rounds, 1):.2f} s each); "
              f"{self.checked['demanded']} promises held against the disk, {self.checked['files']} files read ({self.checked['bytes'] >> 20} MiB); "
              f"disks went back {self.went_back()} times; {self.lost_lines} lines of the journal were lost as permitted; {self.exports} generations exported and checked; "
              f"{len(self.violations)} violations", flush=True)
        tried = sum(self.injected[f] for f in CUTS)
        took = sum(self.took[f] for f in CUTS)
        if a.breaks:
            if self.violations:
                say(f"the broken rule '{a.breaks}' was found in round {self.violations[0][0]}")
                return 0
            say(f"FAILED: the broken rule '{a.breaks}' was not found in {self.rounds} rounds")
            return 1
        if self.violations:
            say(f"FAILED: {len(self.violations)} violations; evidence in {a.evidence}")
            return 1
        if took * 2 < tried or not self.checked["demanded"] or sum(self.took.values()) < max(1, self.rounds // 3):
            say(f"FAILED: only {took} of {tried} cuts took effect: this run tested too little")
            return 1
        return 0

    def connect_client(self):
        if self.a.form == "host":
            os.makedirs(f"{WORK}/client", exist_ok=True)
            p = subprocess.Popen([*self.a.inside, sys.executable, f"{HERE}/client.py", "host", f"{WORK}/client"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(f"{WORK}/guest-client.log", "ab"))
            return Peer(p.stdout, p.stdin, self.note)
        s = socket.socket(socket.AF_UNIX)
        s.connect(self.a.guest)
        f = s.makefile("rwb")
        peer = Peer(f, f, self.note)
        return peer


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--form", choices=["host", "guest"], required=True)
    p.add_argument("--rounds", type=int, required=True)
    p.add_argument("--minutes", type=float, default=0)
    p.add_argument("--modes", required=True)
    p.add_argument("--faults", default="")
    p.add_argument("--breaks", default="")
    p.add_argument("--evidence", required=True)
    p.add_argument("--server", required=True)
    p.add_argument("--client", required=True)
    p.add_argument("--interface", required=True)
    p.add_argument("--inside", default="", help="words that run a command in the client's network namespace")
    p.add_argument("--guest", default="", help="the socket on which the guest's client.py is spoken to")
    a = p.parse_args()
    a.modes, a.inside = a.modes.split(","), a.inside.split()
    a.faults = a.faults.split(",") if a.faults else list(FAULTS)
    a.size, a.life, a.stop_after = "1G", 3 if QUICK else 8, 5
    a.seconds, a.patience = (0.7, 60) if a.form == "host" else (3.0, 120)
    a.windows = ["60s", "60s", "60s", "1s", "0"]
    modes, windows, faults = SHOWN_BY.get(a.breaks, (None, None, None))
    a.modes, a.windows, a.faults = modes or a.modes, windows or a.windows, faults or a.faults
    chaos = Chaos(a)
    return chaos.run()


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except (Failed, Lost) as e:
        say(f"FAILED: {e}")
    finally:
        for d in Daemon.all:
            if status and os.path.exists(d.log):
                d.tell()
            d.kill()
        if STORE.startswith("file://"):
            subprocess.run(["umount", STORE[7:]], stderr=subprocess.DEVNULL)
    sys.exit(status)
