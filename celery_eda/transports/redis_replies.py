"""Replies over Redis or Valkey: lists that are there for as long as somebody says so.

A list that nobody takes from would stay for ever, and one that is empty is not there at all. So
beside each there is a mark that expires; its process renews it, and without it nothing is put
into the list.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from kombu.utils.json import loads

#: What the mark of a list has at the end of its name.
MARK = ".open"
#: How often a mark is renewed in the time that it lasts.
RENEWALS = 4
#: Seconds after which a server that says nothing is given up; longer than any wait.
SILENCE = 10.0
#: Replies taken at once.
AT_ONCE = 500
#: What wakes whoever waits.
NOTHING = b""

# KEYS: the list and its mark. ARGV: a message; what to return if the list is not open.
PUSH = """
local left = redis.call('PTTL', KEYS[2])
if left <= 0 then return tonumber(ARGV[2]) end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], left)
return 1
"""


def push(channel: Any, name: str, payload: str | bytes, *, needed: bool = True) -> list[Any]:
    """The command that puts *payload* into the list *name* if that is open.

    It returns 0 if it is not, and somebody *needed* it to be.
    """
    key = channel.global_keyprefix + name
    return ["EVAL", PUSH, 2, key, key + MARK, payload, int(not needed)]


def declare(app: Any, name: str, expires: float) -> None:
    """Open the list *name* for *expires* seconds."""
    with app.pool.acquire_channel(block=True) as (_, channel), channel.conn_or_acquire() as client:
        mark(client, name, expires)


def mark(client: Any, name: str, expires: float) -> None:
    """Keep the list *name* open for *expires* seconds from now."""
    milliseconds = int(expires * 1000)
    client.set(name + MARK, "", px=milliseconds)
    client.pexpire(name, milliseconds)


class ReplyConsumer:
    """The lists of one process, on one connection."""

    def __init__(self, app: Any, *, expires: float) -> None:
        self._expires = expires
        self._broker = app.connection_for_read(transport_options={"socket_timeout": SILENCE})
        self._channel: Any = None
        self._names: list[str] = []
        self._renewed = 0.0
        self._bell = threading.Event()
        self._ringing: threading.Thread | None = None
        self._dropped = False

    def open(self, name: str) -> None:
        self._channel = self._channel or self._broker.channel()
        mark(self._channel.client, name, self._expires)
        self._names.append(name)
        if self._ringing is None:
            self._ringing = threading.Thread(
                target=self._ring, name="celery_eda replies: bell", daemon=True
            )
            self._ringing.start()

    def close(self, name: str) -> None:
        self._names.remove(name)
        self._channel.client.delete(name, name + MARK)

    def take(self, timeout: float) -> list[Any]:
        self._renew()
        client = self._channel.client
        seconds = min(timeout, self._expires / RENEWALS)  # a mark is to be renewed in time
        if not (found := client.brpop(self._names, timeout=seconds)):
            return []
        name, first = found
        payloads = [first]
        with suppress(Exception):  # what has come is not lost with it, and the next call raises
            payloads += client.rpop(name.decode(), AT_ONCE) or []
        return [self._read(each) for each in payloads if each != NOTHING]

    def wake(self) -> None:
        self._bell.set()

    def drop(self) -> None:
        self._dropped = True
        self._bell.set()
        self._broker.collect()
        self._channel = None
        self._names = []

    def _ring(self) -> None:
        """Wake whoever waits, in a thread of its own: who asks must not wait for the server."""
        while self._bell.wait() and not self._dropped:
            self._bell.clear()
            with suppress(Exception):  # who is not connected does not wait
                # Not a plain push: that would leave a list behind which nobody takes away.
                command = push(self._channel, self._names[0], NOTHING)
                self._channel.client.execute_command(*command)

    def _renew(self) -> None:
        if time.monotonic() - self._renewed < self._expires / RENEWALS:
            return
        for name in self._names:
            mark(self._channel.client, name, self._expires)
        self._renewed = time.monotonic()

    def _read(self, payload: bytes) -> Any:
        try:
            return self._channel.Message(loads(payload), channel=self._channel)
        except Exception:
            return None
