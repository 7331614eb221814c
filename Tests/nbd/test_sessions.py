"""Connections of one named session: what one of them had sent takes effect before another one is served."""
import threading
import time

from wire import *


def _attach(t, export, **how):
    """Once the server knows that the clients before are gone."""
    for _ in range(100):
        try:
            return t.serve(export=export, **how)
        except AssertionError:
            time.sleep(0.05)
    return t.serve(export=export, **how)


def what_had_arrived_takes_effect_before_another_connection_is_served(t):
    """Found by the simulator: a connection that was held off while a second one joined did not look at its socket when a third
    one did. Its client may long have given it up."""
    name = t.session(b"arrived-%d" % time.time_ns())
    for number in range(3):
        first = _attach(t, name)
        old, new = bytes([2 * number + 1]) * 4096, bytes([2 * number + 2]) * 4096
        first.write(8192, old)
        # Half a request: the second connection waits for the rest of it, and holds off what comes behind.
        whole = header(WRITE, 0, 4096, 0, 1) + old
        first.send(whole[:1000])
        second = threading.Thread(target=t.serve, kwargs={"export": name})
        second.start()
        time.sleep(0.05)
        first.send(whole[1000:] + header(WRITE, 8192, 4096, 0, 2) + new)
        second.join()
        third = t.serve(export=name)
        assert third.read(8192, 4096) == new
        t.close()
    _attach(t, t.export).disconnect()
