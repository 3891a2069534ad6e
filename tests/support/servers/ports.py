"""Loopback ports that no other test process on this machine will pick.

All lie below 32768, the usual start of the range for outgoing connections: in that range
a client that connects to a closed port can be given that very port and talk to itself.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

PORTS = range(20_000, 32_768)

_locks: dict[int, int] = {}


def claim() -> int:
    """Return a free port; it stays ours until ``release`` or the end of this process."""
    folder = Path(tempfile.gettempdir(), f"celery-eda-ports-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # The system's randomness: a test run with a fixed seed must not make two runs meet here.
    for port in random.SystemRandom().sample(PORTS, min(200, len(PORTS))):
        lock = os.open(folder / str(port), os.O_CREAT | os.O_RDWR, 0o600)
        if _locked(lock) and _free(port):
            _locks[port] = lock
            return port
        os.close(lock)
    raise RuntimeError(f"No free port found between {PORTS[0]} and {PORTS[-1]}.")


def release(port: int) -> None:
    """Let others have a claimed port."""
    os.close(_locks.pop(port))


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
