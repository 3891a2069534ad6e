"""A bell: a socket that wakes a thread which waits for a broker."""

from __future__ import annotations

import socket
from contextlib import suppress


class Bell:
    """Wakes the one thread that polls it, from any other thread."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that is readable once the bell has been rung."""
        return self._receiver.fileno()

    def ring(self) -> None:
        """Wake the thread that waits, or the next that does. Never waits."""
        with suppress(OSError):  # rung already, or closed
            self._sender.send(b"!")

    def reset(self) -> None:
        """Make the bell ready to be rung again."""
        with suppress(BlockingIOError):
            self._receiver.recv(4096)

    def close(self) -> None:
        """Close the bell. Repeating it, and ringing it afterwards, is harmless."""
        self._receiver.close()
        self._sender.close()
