"""One channel to RabbitMQ in confirm mode: messages go in chunks, answers are heard in between."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from itertools import count

from amqp import Connection

from celery_eda import checkpoints
from celery_eda.transports.base import PublishResult, Sendable, refused
from celery_eda.transports.confirms import Flight
from celery_eda.transports.frames import Frames

CHUNK = 2**17  # bytes written at once, so that the broker begins, and its answers are read
PROMPT = 1.0  # seconds for the rest of an answer that has begun to come


class ConfirmChannel:
    """A channel in confirm mode. Good as long as no confirm is missing on it.

    Attributes:
        flight: what is under way on it.
        is_proven: whether the broker has answered on it.
    """

    def __init__(self, connection: Connection, answers: dict[int, PublishResult]) -> None:
        self.flight = Flight(count(1), answers)
        self.is_proven = False
        self._answers = answers
        self._connection = connection
        self._channel = connection.channel()
        self._channel.confirm_select()
        self._frames = Frames(self._channel.channel_id, connection.frame_max)
        self.flight.listen(self._channel)

    @property
    def is_connected(self) -> bool:
        return bool(self._connection.connected)

    @property
    def is_readable(self) -> bool:
        return readable(self._connection.sock)

    def close(self) -> None:
        self._channel.close()

    def hear(self, until: float) -> None:
        """Wait for the next that the broker says; what it has said already is heard at any time."""
        late = time.monotonic() > until and self.is_readable
        self._connection.sock.settimeout(PROMPT if late else left(until))
        self._connection.drain_events()
        self.is_proven |= not self.flight

    def write(self, unsent: deque[tuple[int, Sendable]], room: int, until: float) -> None:
        """Write *room* messages, or a chunk of bytes."""
        while unsent and room and self._frames.size < CHUNK:
            number, message = unsent.popleft()
            try:
                self._frames.add(message)
            except Exception as error:  # whatever is wrong with it, it is wrong with it alone
                self._answers[number] = refused(error)
            else:
                self.flight.add(number, message)
                room -= 1
        self._connection.sock.settimeout(left(until))
        self._connection.transport.write(self._frames.take())
        checkpoints.reach("relay.published")


def readable(sock: socket.socket) -> bool:
    """Whether the broker said something, or hung up."""
    watch = select.poll()
    watch.register(sock, select.POLLIN)
    return bool(watch.poll(0))


def left(until: float) -> float:
    """Seconds until then, for a socket; raises ``TimeoutError`` if there are none."""
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError("The broker did not answer in time.")
    return left
