"""Replies over Redis or Valkey: lists that exist for as long as their process renews them.

A list without a consumer would stay forever, and an empty list does not exist. So each list has a
mark, a key that expires unless the process renews it; without the mark nothing is pushed.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from celery import Celery
from kombu.utils.json import loads

#: The suffix of a mark's name.
MARK = ".open"
#: Renewals of a mark within its lifetime.
RENEWALS = 4
#: Seconds after which a server that does not answer counts as lost; longer than any wait.
TIMEOUT = 10.0
#: Replies taken at once.
BATCH = 500
#: The payload that wakes a waiting consumer.
WAKE_UP = b""

# KEYS: the list and its mark. ARGV: a message; the return value if the list is not open.
PUSH = """
local left = redis.call('PTTL', KEYS[2])
if left <= 0 then return tonumber(ARGV[2]) end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], left)
return 1
"""


def push(channel: Any, name: str, payload: str | bytes, *, refuse: bool = True) -> list[Any]:
    """The command that pushes *payload* to the list *name* if that is open.

    If the list is not open, the command returns 0 to *refuse* the message, else 1 to drop it.
    """
    key = channel.global_keyprefix + name
    return ["EVAL", PUSH, 2, key, key + MARK, payload, int(not refuse)]


def declare(app: Celery, name: str, expires: float) -> None:
    """Open the list *name* for *expires* seconds."""
    with app.pool.acquire_channel(block=True) as (_, channel), channel.conn_or_acquire() as client:
        mark(client, name, expires)


def mark(client: Any, name: str, expires: float) -> None:
    """Keep the list *name* open for *expires* seconds from now."""
    milliseconds = int(expires * 1000)
    client.set(name + MARK, "", px=milliseconds)
    client.pexpire(name, milliseconds)


class ReplyConsumer:
    """The reply lists of one process, over one connection. See ``brokers.base``."""

    def __init__(self, app: Celery, *, expires: float) -> None:
        self._expires = expires
        self._broker = app.connection_for_read(transport_options={"socket_timeout": TIMEOUT})
        self._channel: Any = None
        self._names: list[str] = []
        self._renewed = 0.0
        self._bell = threading.Event()
        self._waker: threading.Thread | None = None
        self._dropped = False

    def open(self, name: str) -> None:
        self._channel = self._channel or self._broker.channel()
        mark(self._channel.client, name, self._expires)
        self._names.append(name)
        if self._waker is None:
            self._waker = threading.Thread(
                target=self._wake_on_bell, name="celery_eda replies: wake-up", daemon=True
            )
            self._waker.start()

    def close(self, name: str) -> None:
        self._names.remove(name)
        self._channel.client.delete(name, name + MARK)

    def take(self, timeout: float) -> list[Any]:
        self._renew()
        client = self._channel.client
        seconds = min(timeout, self._expires / RENEWALS)  # so that marks are renewed in time
        if not (found := client.brpop(self._names, timeout=seconds)):
            return []
        name, first = found
        payloads = [first]
        with suppress(Exception):  # the first reply is not lost, and the next call raises
            payloads += client.rpop(name.decode(), BATCH) or []
        return [self._read(each) for each in payloads if each != WAKE_UP]

    def wake(self) -> None:
        self._bell.set()

    def drop(self) -> None:
        self._dropped = True
        self._bell.set()
        self._broker.collect()
        self._channel = None
        self._names = []

    def _wake_on_bell(self) -> None:
        """Push a wake-up for each :meth:`wake`, in a thread of its own: a caller must not block."""
        while self._bell.wait() and not self._dropped:
            self._bell.clear()
            with suppress(Exception):  # a consumer without a connection does not wait
                # Not an unconditional push: that could leave a list without a consumer.
                command = push(self._channel, self._names[0], WAKE_UP)
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
