"""A TCP forwarder that can hold, refuse and cut: between a daemon and its store, or between a client and a daemon.

As a program, `gate.py HOST:PORT...` forwards to the first that accepts, prints its own port, and runs until it is ended: two
gateways of a store behind one address."""
import select
import socket
import struct
import sys
import threading
import time
from urllib.parse import parse_qs, quote, urlsplit


class Gate:
    """Forwards 127.0.0.1:port to one of `targets` [(host, port)], the first that accepts.

    mode: "open"; "refuse" (connections are reset, those that exist too); "freeze" (nothing passes, nothing is closed).
    hold: None, or a function of bytes on their way to the target: those for which it is true wait until it is None again;
    what comes behind them on the same connection waits as well. `held` counts them.
    delay: seconds that everything takes, each way; a new connection takes as long there and back."""

    def __init__(self, *targets):
        self.targets, self.mode, self.hold, self.held, self.passed = list(targets), "open", None, 0, 0
        self.delay = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    @staticmethod
    def _reset(s):
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        s.close()

    def _serve(self, client):
        server = None
        time.sleep(2 * self.delay)
        for target in self.targets:
            if self.mode == "refuse":
                break
            try:
                server = socket.create_connection(target, timeout=5)
                break
            except OSError:
                continue
        if server is None:
            return self._reset(client)
        for s in (client, server):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            s.setblocking(False)
        waiting = {client: bytearray(), server: bytearray()}  # by destination
        late = []   # (when it is due, destination, bytes), in that order
        blocked, client_over = None, False
        try:
            while True:
                if self.mode == "refuse":
                    break
                if self.mode == "freeze":
                    time.sleep(0.02)
                    continue
                if blocked is not None and self.hold is None:
                    waiting[server] += blocked
                    blocked = None
                while late and late[0][0] <= time.monotonic():
                    _, to, piece = late.pop(0)
                    waiting[to] += piece
                reading = [s for s, to in ((client, server), (server, client)) if len(waiting[to]) < 1 << 20]
                if blocked is not None or client_over:
                    reading = [s for s in reading if s is server]
                if client_over and blocked is None and not waiting[server] and not late:
                    time.sleep(0.5)   # closing with an unread reply would reset what was just let go
                    break
                writing = [s for s, b in waiting.items() if b]
                due = max(0, min(0.05, late[0][0] - time.monotonic())) if late else 0.05
                r, w, _ = select.select(reading, writing, [], due)
                for s in r:
                    try:
                        piece = s.recv(256 << 10)
                    except BlockingIOError:
                        continue
                    except OSError:
                        piece = b""
                    to = server if s is client else client
                    if not piece:
                        # What the client had sent goes to the server whatever becomes of the client.
                        if s is client and (blocked is not None or waiting[server] or late):
                            client_over = True
                            continue
                        return
                    self.passed += len(piece)
                    if s is client and self.hold is not None and self.hold(piece):
                        self.held += 1
                        blocked = bytearray(piece)
                        continue
                    if self.delay:
                        late.append((time.monotonic() + self.delay, to, piece))
                    else:
                        waiting[to] += piece
                for s in w:
                    try:
                        del waiting[s][:s.send(memoryview(waiting[s])[:256 << 10].tobytes())]
                    except BlockingIOError:
                        pass
                    except OSError:
                        if s is client:
                            waiting[client].clear()
                            client_over = True
                        else:
                            return
        except OSError:
            pass
        finally:
            (self._reset if self.mode == "refuse" else socket.socket.close)(client)
            (self._reset if self.mode == "refuse" else socket.socket.close)(server)


def before_store(url):
    """A gate before the S3 endpoint of `url`: (gate, the URL through it)."""
    parts = urlsplit(url)
    query = {k: v[0] for k, v in parse_qs(parts.query).items()}
    endpoint = urlsplit(query["endpoint"])
    gate = Gate((endpoint.hostname, endpoint.port or 80))
    query["endpoint"] = f"http://127.0.0.1:{gate.port}"
    text = "&".join(f"{k}={quote(v, safe=':/')}" for k, v in query.items())
    return gate, f"{parts.scheme}://{parts.netloc}{parts.path}?{text}"


if __name__ == "__main__":
    print(Gate(*((host, int(port)) for host, port in (a.rsplit(":", 1) for a in sys.argv[1:]))).port, flush=True)
    threading.Event().wait()
