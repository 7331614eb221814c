"""What is done to the file system, what was promised about it, and whether the promises hold.

Runs where the file system is mounted: on the host or in the guest. Each kind of load is a process of its own; after a call
that makes something durable has returned, it writes one line into a pipe that leads off the disk. A line stands before its
action where the action takes a promise back (a deletion), after it where it makes one: so what stands in the journal at any
instant is the least that must be there, whatever happens next.

Always holds: names are never used twice; a line is shorter than PIPE_BUF, so lines of several processes do not mix.
"""
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import sqlite3
import stat
import struct
import sys
import tarfile
import time
import zlib

PAGE = 4096
SUBVOL_CREATE, SNAP_CREATE, SNAP_DESTROY = 0x5000940E, 0x50009401, 0x5000940F   # linux/btrfs.h
FITRIM, SETFLAGS, NOCOW = 0xC0185879, 0x40086602, 0x00800000                    # linux/fs.h
libc = ctypes.CDLL(None, use_errno=True)


# ---- what Python has no name for

def subvolume(path):
    _named(SUBVOL_CREATE, path, 0)


def snapshot(source, path):
    fd = os.open(source, os.O_RDONLY)
    try:
        _named(SNAP_CREATE, path, fd)
    finally:
        os.close(fd)


def delete_subvolume(path):
    _named(SNAP_DESTROY, path, 0)


def _named(request, path, fd):
    parent, name = os.path.split(path)
    directory = os.open(parent, os.O_RDONLY)
    try:
        fcntl.ioctl(directory, request, bytearray(struct.pack("=q4088s", fd, name.encode())))
    finally:
        os.close(directory)


def trim(root):
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FITRIM, bytearray(struct.pack("=QQQ", 0, (1 << 64) - 1, 0)))
    finally:
        os.close(fd)


def syncfs(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(fd)


# ---- a page that says which it is: 128 times the same 32 bytes, so that a torn or misplaced one shows

def page(path, index, version):
    unit = struct.pack("<IIQQ", zlib.crc32(path.encode()), index, version, 0x6D617267)
    return (unit + struct.pack("<II", zlib.crc32(unit), 0)) * (PAGE // 32)


def page_version(path, index, data):
    """0: never written (zeroes); None: not a page of this file at this place."""
    if not any(data):
        return 0
    version = struct.unpack_from("<Q", data, 8)[0]
    return version if data == page(path, index, version) else None


# ---- the kinds of load: each takes the subvolume, a source of chance, `tell` and `on` (false when it is time to end)

def writers(sub, rng, tell, on, who):
    """Small files with fsync: new, appended to, renamed, removed."""
    root, base = os.path.dirname(sub), os.path.basename(sub)
    os.makedirs(f"{sub}/{who}", exist_ok=True)
    mine, n = [], 0
    while on():
        what = rng.random()
        if mine and what < 0.15:                                    # append
            name, size, crc = mine.pop(rng.randrange(len(mine)))
            data = rng.randbytes(rng.randrange(1, 20000))
            with open(f"{root}/{name}", "ab", buffering=0) as f:
                f.write(data)
                os.fsync(f.fileno())
            size, crc = size + len(data), zlib.crc32(data, crc)
        elif mine and what < 0.25:                                  # rename
            old, size, crc = mine.pop(rng.randrange(len(mine)))
            name = f"{base}/{who}/m{n}"
            tell(op="del", p=old)
            os.rename(f"{root}/{old}", f"{root}/{name}")
            fd = os.open(f"{root}/{name}", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        elif mine and what < 0.35:                                  # remove
            old, _, _ = mine.pop(rng.randrange(len(mine)))
            tell(op="del", p=old)
            os.unlink(f"{root}/{old}")
            continue
        else:
            name, size, crc = f"{base}/{who}/f{n}", 0, 0
            fd = os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            left = rng.choice([rng.randrange(1, 2000), rng.randrange(1, 30000), rng.randrange(1, 150000)])
            while left:
                data = rng.randbytes(min(left, rng.randrange(1, 65536)))
                os.write(fd, data)
                size, crc, left = size + len(data), zlib.crc32(data, crc), left - len(data)
            os.fsync(fd)
            os.close(fd)
        n += 1
        tell(op="file", p=name, n=size, c=crc)
        mine.append((name, size, crc))
        pause(rng)


def untar(sub, rng, tell, on, who, archive):
    """An archive unpacked, then syncfs; over and over."""
    base, n = os.path.basename(sub), 0
    while on():
        to = f"{who}{n}"
        with tarfile.open(archive) as t:
            t.extractall(f"{sub}/{to}")
        syncfs(sub)
        tell(op="tree", p=f"{base}/{to}")
        n += 1
        pause(rng, 50)


def database(sub, rng, tell, on, who):
    """sqlite, each row a transaction of its own; with a write-ahead log or a roll-back journal."""
    name = f"{os.path.basename(sub)}/{who}.db"
    db = sqlite3.connect(f"{sub}/{who}.db", isolation_level=None)
    db.execute("PRAGMA synchronous=EXTRA")
    db.execute("PRAGMA journal_mode=" + rng.choice(["WAL", "DELETE", "TRUNCATE"]))
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)")
    n = 0
    while on():
        n += 1
        db.execute("INSERT INTO t VALUES(?, ?)", (n, rng.randbytes(rng.randrange(3000))))
        tell(op="rows", p=name, n=n)
        pause(rng)
    db.close()


def overwrites(sub, rng, tell, on, who, nocow):
    """Pages of one file written over, with fdatasync now and then; `nocow`: in place, half of them past the page cache."""
    name, path = f"{os.path.basename(sub)}/{who}", f"{sub}/{who}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    if nocow:
        fcntl.ioctl(fd, SETFLAGS, struct.pack("=l", NOCOW))
    direct = os.open(path, os.O_RDWR | os.O_DIRECT) if nocow else fd
    count, version, buffer = 96, 0, mmap.mmap(-1, 8 * PAGE)
    if nocow:
        os.posix_fallocate(fd, 0, count * PAGE)
    while on():
        touched, through = {}, direct if rng.random() < 0.5 else fd
        for _ in range(rng.randrange(1, 12)):
            at, length = rng.randrange(count), rng.randrange(1, 9)
            length = min(length, count - at)
            version += 1
            for i in range(length):
                buffer[i * PAGE:(i + 1) * PAGE] = page(name, at + i, version)
                touched[at + i] = version
            os.pwritev(through, [memoryview(buffer)[:length * PAGE]], at * PAGE)
        os.fdatasync(fd)
        tell(op="pages", p=name, v=sorted(touched.items()))
        pause(rng)


def snapshots(sub, rng, tell, on, who):
    """Snapshots of the subvolume that is being written; some are removed again."""
    root, base, kept, n = os.path.dirname(sub), os.path.basename(sub), [], 0
    while on():
        pause(rng, 300)
        if len(kept) > 2 or len(kept) > 1 and rng.random() < 0.5:
            old = kept.pop(rng.randrange(len(kept)))
            tell(op="del", p=old)
            delete_subvolume(f"{root}/{old}")
            continue
        name = f"{base}.{who}{n}"
        tell(op="snap-begins", p=name, of=base)
        snapshot(sub, f"{root}/{name}")
        tell(op="snap", p=name)
        kept.append(name)
        n += 1


def discards(sub, rng, tell, on, who):
    """Data that is written, synced and removed; fstrim."""
    n = 0
    while on():
        path = f"{sub}/{who}{n}"
        n += 1
        with open(path, "wb", buffering=0) as f:
            f.write(rng.randbytes(rng.randrange(1 << 20)))
            if rng.random() < 0.5:
                os.fsync(f.fileno())
        pause(rng, 30)
        os.unlink(path)
        if rng.random() < 0.3:
            syncfs(sub)
        if rng.random() < 0.3:
            trim(sub)


def pause(rng, ms=8):
    """The network has to be quiet now and then: a reset is only taken at the exact sequence number."""
    if rng.random() < 0.5:
        time.sleep(rng.random() * ms / 1000)


KINDS = {
    "writer1": lambda s, r, t, o, a: writers(s, r, t, o, "w1"),
    "writer2": lambda s, r, t, o, a: writers(s, r, t, o, "w2"),
    "writer3": lambda s, r, t, o, a: writers(s, r, t, o, "w3"),
    "untar": lambda s, r, t, o, a: untar(s, r, t, o, "t", a),
    "sqlite": lambda s, r, t, o, a: database(s, r, t, o, "base"),
    "overwrite": lambda s, r, t, o, a: overwrites(s, r, t, o, "cow", False),
    "nocow": lambda s, r, t, o, a: overwrites(s, r, t, o, "nocow", True),
    "snapshot": lambda s, r, t, o, a: snapshots(s, r, t, o, "s"),
    "discard": lambda s, r, t, o, a: discards(s, r, t, o, "x"),
}


def run(kind, sub, seed, seconds, archive, pipe):
    """One kind, in a process of its own; does not return. What stopped it early is told as well."""
    end = time.monotonic() + seconds

    def tell(**line):
        # Once btrfs has given up (its device failed), an fsync that returns 0 means nothing: seen with kernel 6.18.
        if line["op"] not in ("del", "error", "bug") and os.statvfs(sub).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, "read-only by now")
        os.write(pipe, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    status = 0
    try:
        KINDS[kind](sub, random.Random(f"{seed}-{kind}"), tell, lambda: time.monotonic() < end, archive)
    except (OSError, sqlite3.Error, tarfile.TarError) as e:
        tell(op="error", kind=kind, what=f"{type(e).__name__}: {e}"[:200])
        status = 1
    except BaseException as e:
        tell(op="bug", kind=kind, what=f"{type(e).__name__}: {e}"[:200])
        status = 2
    os._exit(status)


# ---- what must be there

class Model:
    """The journal of one disk, and what follows from it."""

    def __init__(self, archive):
        self.records, self.gone, self.archive = [], [], []
        with tarfile.open(archive) as t:
            for m in t:
                if m.isfile():
                    data = t.extractfile(m).read()
                    self.archive.append((m.name, len(data), zlib.crc32(data)))

    def add(self, record):
        self.records.append(record)
        if record["op"] == "del":
            self.gone.append((len(self.records) - 1, record["p"]))

    def demanded(self, upto):
        """What the first `upto` lines promise and none takes back: {path: (op, ...)}."""
        out, begun = {}, {}
        taken = {}
        for at, p in self.gone:
            taken.setdefault(p, at)

        def removed_before(path, limit):
            """Whether the path, or what it is in, was taken back by a line before `limit`."""
            while path:
                if taken.get(path, limit) < limit:
                    return True
                path = os.path.dirname(path)
            return False

        ever = len(self.records)
        for at, r in enumerate(self.records[:upto]):
            op, p = r["op"], r.get("p")
            if op == "snap-begins":
                begun[p] = at
            elif op == "snap":
                if removed_before(p, ever):
                    continue
                out[p] = ("directory",)
                of = self.records[begun[p]]["of"]
                for k, v in self._plain(begun[p]).items():
                    # sqlite in a snapshot would have to recover there; the live one is looked at.
                    if k.startswith(of + "/") and v[0] != "rows" and not removed_before(k, at):
                        out[p + k[len(of):]] = (*v, k)
        for k, v in self._plain(upto).items():
            if not removed_before(k, ever):
                out[k] = (*v, k)
        return out

    def _plain(self, upto):
        out = {}
        for r in self.records[:upto]:
            op, p = r["op"], r.get("p")
            if op == "file":
                out[p] = ("file", r["n"], r["c"])
            elif op == "tree":
                out[p] = ("tree",)
            elif op == "rows":
                out[p] = ("rows", r["n"])
            elif op == "pages":
                pages = dict(out[p][1]) if p in out else {}
                pages.update(r["v"])
                out[p] = ("pages", pages)
        return out

    def lose(self, upto):
        """What came after was allowed to go, and may or may not be there: nothing is demanded of it from now on."""
        self.records = self.records[:upto]
        known = {p for at, p in self.gone if at < upto}
        late = [p for at, p in self.gone if at >= upto and p not in known]
        self.gone = [(at, p) for at, p in self.gone if at < upto]
        for p in late:
            self.add({"op": "del", "p": p})


def verify(root, demanded, archive):
    """Reads the whole file system, and holds it against what is demanded: (violations, what was counted)."""
    bad, count, read = [], {"demanded": 0, "files": 0, "bytes": 0}, set()

    def wrong(what):
        if len(bad) < 40:
            bad.append(what)

    def whole(path):
        with open(path, "rb") as f:
            data = f.read()
        read.add(path)
        count["files"] += 1
        count["bytes"] += len(data)
        return data

    for p, want in demanded.items():
        path = f"{root}/{p}"
        count["demanded"] += 1
        try:
            if want[0] == "directory":
                os.stat(path)
            elif want[0] == "file":
                data = whole(path)[:want[1]]
                if len(data) < want[1]:
                    wrong(f"{p}: {len(data)} bytes, {want[1]} were synced")
                elif zlib.crc32(data) != want[2]:
                    wrong(f"{p}: other bytes than were synced")
            elif want[0] == "tree":
                for name, size, crc in archive:
                    data = whole(f"{path}/{name}")
                    if len(data) != size or zlib.crc32(data) != crc:
                        wrong(f"{p}/{name}: not what was unpacked and synced")
            elif want[0] == "rows":
                db = sqlite3.connect(path, isolation_level=None)
                said = db.execute("PRAGMA integrity_check").fetchone()[0]
                rows, last = db.execute("SELECT count(*), max(k) FROM t").fetchone()
                db.close()
                if said != "ok":
                    wrong(f"{p}: sqlite: {said[:120]}")
                elif rows < want[1] or rows != last:
                    wrong(f"{p}: {rows} rows up to {last}, {want[1]} were committed")
            elif want[0] == "pages":
                data = whole(path)
                for index in range(max(len(data) // PAGE, max(want[1]) + 1)):
                    found = page_version(want[2], index, data[index * PAGE:(index + 1) * PAGE])
                    if found is None:
                        wrong(f"{p}: page {index} holds what was never written there")
                    elif found < want[1].get(index, 0):
                        wrong(f"{p}: page {index} is version {found}, {want[1][index]} was synced")
        except (OSError, sqlite3.Error) as e:
            wrong(f"{p}: {type(e).__name__}: {e}")
    for directory, _, names in os.walk(root, onerror=lambda e: wrong(f"{e.filename}: {e}")):
        for name in names:
            path = os.path.join(directory, name)
            try:
                if path not in read and stat.S_ISREG(os.lstat(path).st_mode):
                    whole(path)
            except OSError as e:
                # sqlite and the like may remove their journals while they recover.
                if e.errno != errno.ENOENT:
                    wrong(f"{path[len(root) + 1:]}: cannot be read: {e}")
    return bad, count


def remove_old(root, keep, tell):
    """Removes the subvolumes of all rounds but the last ones, with their snapshots."""
    for name in sorted(os.listdir(root)):
        if name.startswith("sub") and int(name[3:].split(".")[0]) < keep:
            tell({"op": "del", "p": name})
            delete_subvolume(f"{root}/{name}")


if __name__ == "__main__":
    sys.exit("load.py is run by client.py")
