"""One channel to RabbitMQ in confirm mode: messages go in chunks, with confirms read in between."""

from __future__ import annotations

import time
from collections import deque
from itertools import count

from amqp import Connection

from celery_eda.brokers.base import PublishResult, Sendable, refused
from celery_eda.brokers.rabbitmq.confirms import InFlight
from celery_eda.brokers.rabbitmq.envelopes import Frames
from celery_eda.brokers.readiness import readable
from celery_eda.core import checkpoints

CHUNK = 2**17  # bytes written at once: the broker starts early, and its confirms are read soon
PROMPT = 1.0  # seconds for the rest of a frame that has begun to arrive


class ConfirmChannel:
    """A channel in confirm mode, usable as long as no confirm is missing on it.

    Attributes:
        in_flight: the messages not confirmed yet.
        is_proven: True once the broker has confirmed every message sent so far.
    """

    def __init__(self, connection: Connection, results: dict[int, PublishResult]) -> None:
        self.in_flight = InFlight(count(1), results)
        self.is_proven = False
        self._results = results
        self._connection = connection
        self._channel = connection.channel()
        self._channel.confirm_select()
        self._frames = Frames(self._channel.channel_id, connection.frame_max)
        self.in_flight.listen(self._channel)

    @property
    def is_connected(self) -> bool:
        return bool(self._connection.connected)

    @property
    def is_readable(self) -> bool:
        return bool(readable(self._connection.sock))

    def close(self) -> None:
        self._channel.close()

    def receive(self, until: float) -> None:
        """Wait for the next frame, *until* a time at most; one that has arrived is always read."""
        late = time.monotonic() > until and self.is_readable
        self._connection.sock.settimeout(PROMPT if late else left(until))
        self._connection.drain_events()
        self.is_proven |= not self.in_flight

    def write(self, unsent: deque[tuple[int, Sendable]], room: int, until: float) -> None:
        """Write up to *room* messages, or a chunk of bytes."""
        while unsent and room and self._frames.size < CHUNK:
            number, message = unsent.popleft()
            try:
                self._frames.add(message)
            except Exception as error:  # this message alone is at fault, not the batch
                self._results[number] = refused(error)
            else:
                self.in_flight.add(number, message)
                room -= 1
        self._connection.sock.settimeout(left(until))
        self._connection.transport.write(self._frames.take())
        checkpoints.reach("relay.published")


def left(until: float) -> float:
    """Seconds left *until* a time of :func:`time.monotonic`, as a socket's time-out.

    Raises:
        TimeoutError: no time is left.
    """
    if (seconds := until - time.monotonic()) <= 0:
        raise TimeoutError("The broker did not answer in time.")
    return seconds
