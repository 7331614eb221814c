#!/usr/bin/env python3
"""Holds an NBD server against the protocol document, and against clients that break it.

    run.py                                       nbdbench-server, then a daemon ($MARGINED or the build's) with a new disk
    run.py [options] HOST:PORT|/SOCKET...        a running server
    run.py [options] --server COMMAND...         starts COMMAND; its first line must be `ready ADDRESS...`

    --export NAME     writable export, 64 MiB or more; its content is lost (default: the empty name)
    --readonly NAME   a read-only export; without it those tests are skipped
    --pid PID         the server's process: its memory is watched (known with --server)
    --handshake-timeout SECONDS   what the server is set to; without it that test is skipped
    --sessions        the export takes margined's ?session=NAME
    --only TEXT       only tests whose name contains TEXT
    --slow            also tests of more than 15 seconds

Each test is named after the one behaviour that it shows, and runs on each address. Exit status 0 if all passed."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import test_handshake, test_hostile, test_peculiar, test_sessions, test_sharing, test_transmission  # noqa: E402
from wire import ALLOCATION, Client, resident  # noqa: E402


class Skip(Exception):
    pass


class Bed:
    """What a test is given: one server at one address."""

    def __init__(self, address, options, names):
        self.address, self.options, self.names = address, options, names
        self.export = options.export.encode()
        self.pid = options.pid
        self.clients = []

    def connect(self, **how):
        """A connection on which nothing was said yet."""
        client = Client(self.address, **how)
        self.clients.append(client)
        return client

    def haggle(self, flags=3, **how):
        return self.connect(**how).greet(flags)

    def serve(self, structured=False, context=False, export=None, **how):
        """A connection in its transmission phase."""
        name = self.export if export is None else export
        client = self.haggle(**how)
        if structured or context:
            client.structure()
        if context:
            client.select(name)
        return client.go(name)

    def special(self, name):
        """An export that only the test server has."""
        if name not in self.names:
            raise Skip
        return name

    def session(self, name):
        """The export under a session of that name, where the server has such."""
        if not self.options.sessions:
            raise Skip
        return self.export + b"?session=" + name

    def readonly(self):
        if not self.options.readonly:
            raise Skip
        return self.options.readonly.encode()

    def memory(self):
        # Under a sanitizer memory tells nothing: what is freed is kept, and all has a shadow.
        if not self.pid or os.environ.get("SANITIZED"):
            raise Skip
        return resident(self.pid)

    @property
    def is_tcp(self):
        return not isinstance(self.address, str)

    def crowd(self, count):
        """How many hostile clients to have: all connections to one disk are one session, and there each new one waits
        up to ten seconds for those that hold half a request."""
        return count if b"stuck" in self.names else count // 32

    def skip(self):
        raise Skip

    def close(self):
        for client in self.clients:
            client.close()
        self.clients = []


def parse(text):
    for scheme in ("unix:", "tcp://"):
        text = text.removeprefix(scheme)
    if text.startswith("/"):
        return text
    host, port = text.rsplit(":", 1)
    return (host.strip("[]"), int(port))


def tests(module):
    for name, value in list(vars(module).items()):
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
            if value.__code__.co_varnames[:1] == ("t",):
                yield name, value


def exports(address):
    client = Client(address).greet()
    _, replies = client.ask(3)
    client.close()
    return {data[4:4 + int.from_bytes(data[:4], "big")] for _, data in replies}


def standard():
    """What CI runs: the server on memory, with all its peculiar exports, then the daemon on a directory store."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    build = os.environ.get("NBD_BUILD") or os.path.join(root, ".build", "release")
    if not os.path.exists(os.path.join(build, "nbdbench-server")):
        build = os.path.join(root, ".build", "debug")
    margined = os.environ.get("MARGINED") or os.path.join(build, "margined")
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, os.path.abspath(__file__), "--slow"]
        print("nbdbench-server:", flush=True)
        status |= subprocess.call(own + [
            "--export", "mem", "--readonly", "ro", "--handshake-timeout", "2", "--server",
            os.path.join(build, "nbdbench-server"), "--listen", "127.0.0.1:0", "--unix", folder + "/memory.sock", "--limit",
            "handshakeTimeoutMs=2000"])
        print("margined:", flush=True)
        store = "file://%s/store" % folder
        os.mkdir(folder + "/store")
        with open(folder + "/image", "wb") as image:
            image.write(os.urandom(1 << 20))
            image.truncate(1 << 30)
        subprocess.check_call([margined, "disk", "import", folder + "/image", "nbd", "--store", store], stdout=2)
        shown = subprocess.check_output([margined, "disk", "show", "nbd", "--json", "--store", store])
        status |= subprocess.call(own + [
            "--sessions", "--export", "nbd", "--readonly", "nbd@%d" % json.loads(shown)["generation"], "--server", margined, "serve",
            "--log-level", "warning", "--store", store, "--scratch", folder + "/scratch", "--listen", "127.0.0.1:0", "--unix",
            folder + "/margined.sock"])
    sys.exit(1 if status else 0)


def serve_again(bed):
    """The next client, once the server has seen the end of those before."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return bed.serve()
        except AssertionError as error:
            if "0x80000002" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main():
    if len(sys.argv) == 1:
        standard()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("addresses", nargs="*")
    parser.add_argument("--server", nargs=argparse.REMAINDER)
    parser.add_argument("--export", default="")
    parser.add_argument("--readonly")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--handshake-timeout", type=float)
    parser.add_argument("--sessions", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    server = None
    if options.server:
        server = subprocess.Popen(options.server, stdout=subprocess.PIPE, text=True)
        options.pid = server.pid
        line = server.stdout.readline().split()
        if line[:1] != ["ready"]:
            sys.exit("run.py: the server did not say 'ready'")
        options.addresses += line[1:]
    if not options.addresses:
        parser.error("no address")
    passed, skipped, failed = 0, 0, []
    try:
        for text in options.addresses:
            address = parse(text)
            names = exports(address)
            for module in (test_handshake, test_transmission, test_sessions, test_sharing, test_hostile, test_peculiar):
                for name, test in tests(module):
                    if options.only not in name or (getattr(test, "is_slow", False) and not options.slow):
                        continue
                    bed = Bed(address, options, names)
                    began = time.monotonic()
                    try:
                        test(bed)
                        bed.close()
                        # Whatever the test did, the next client is served.
                        client = serve_again(bed)
                        client.alive()
                        client.disconnect()
                        passed += 1
                    except Skip:
                        skipped += 1
                    except Exception:
                        failed.append((text, name))
                        print("FAILED %s (%s)" % (name, text))
                        traceback.print_exc(file=sys.stdout)
                        if server and server.poll() is not None:
                            print("the server ended with status %d" % server.returncode)
                            raise SystemExit(1)
                    finally:
                        bed.close()
                    if options.verbose:
                        print("%6.2f s  %s" % (time.monotonic() - began, name), flush=True)
    finally:
        if server and server.poll() is None:
            server.terminate()
            try:
                if server.wait(20) != 0:
                    failed.append(("", "the server ends with status 0 on SIGTERM"))
            except subprocess.TimeoutExpired:
                failed.append(("", "the server ends on SIGTERM"))
                server.kill()
        for text, name in failed:
            print("failed: %s (%s)" % (name, text))
        print("%d passed, %d failed, %d skipped" % (passed, len(failed), skipped))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
