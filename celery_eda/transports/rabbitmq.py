"""Messages to RabbitMQ: many under way at once, each waiting for its own confirm.

Every message is ``mandatory``: one that no queue takes is refused, not confirmed. A message that
makes the broker close the channel is found and refused alone. A channel on which a confirm is
missing is thrown away with its connection: a late confirm would count for another message.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from amqp import Connection
from amqp.exceptions import AMQPError, Blocked, ConnectionForced
from kombu.exceptions import OperationalError

from celery_eda import checkpoints
from celery_eda.message import Message
from celery_eda.transports.base import (
    Answer,
    Verdict,
    declare,
    nothing,
    refused,
    unknown,
)
from celery_eda.transports.confirms import Flight
from celery_eda.transports.frames import Frames

WINDOW = 500  # messages that wait for their confirm at the same time
CHUNK = 2**20  # bytes written at once, so that answers are read in between
GOODBYE = 1.0  # seconds for closing in good order

OUTAGES = (AMQPError, OperationalError, OSError)


class RabbitMQ:
    """One connection to RabbitMQ, with one channel for sending."""

    def __init__(self, app: Any, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._connect_timeout = min(app.conf.broker_connection_timeout or timeout, timeout)
        # Without heartbeats: between two batches nobody would send one, and within a batch
        # the time-out notices a dead broker.
        self._broker = app.connection_for_write(
            heartbeat=0,
            connect_timeout=self._connect_timeout,
            transport_options={"confirm_publish": False},
        )
        self._connection: Connection | None = None
        self._channel: _ConfirmChannel | None = None
        self._declared: set[str] = set()
        self._blocked = False

    def publish(
        self, messages: Sequence[Message], meanwhile: Callable[[], None] = nothing
    ) -> list[Answer]:
        until = time.monotonic() + self._timeout
        batch = _Batch(messages, meanwhile)
        lost = Answer(Verdict.unknown)
        try:
            self._wake(until)
            while batch.unsent:
                self._send(batch, until)
        except OUTAGES as error:
            blocked = self._blocked and isinstance(error, TimeoutError)
            lost = unknown(Blocked("memory or disk alarm") if blocked else error)
            self._drop()
        self._declared -= batch.queues_refused
        return [batch.answers.get(position, lost) for position in range(len(messages))]

    def close(self) -> None:
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(GOODBYE)
            self._broker.release()
        self._drop()

    def _wake(self, until: float) -> None:
        """Hear what came since the last batch, and wait for the end of an alarm.

        The broker may have closed the connection, which then need not cost a batch.
        """
        if self._connection is None:
            return
        try:
            while self._blocked or _readable(self._connection.sock):
                self._connection.sock.settimeout(_left(until))
                self._connection.drain_events()
        except OUTAGES:
            if self._blocked:
                raise
            self._drop()

    def _send(self, batch: _Batch, until: float) -> None:
        """Send what is unsent, until all is answered or the broker closes over a message."""
        connection = self._connection or self._connect(until)
        connection.sock.settimeout(_left(until))
        self._declare(connection, batch, until)
        channel = self._channel = self._channel or _ConfirmChannel(connection)
        flight = Flight(channel.tags, batch.answers)
        try:
            channel.send(batch, flight, until)
        except AMQPError as error:
            if not _closed_over_message(error):
                raise
            batch.blame(flight, error)
            self._channel = None
            if connection.connected:
                channel.close()
            else:
                self._drop()

    def _connect(self, until: float) -> Connection:
        """Connect to the first of the broker's hosts that answers, by kombu's own failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0),
            timeout=max(_left(until) - self._connect_timeout, 0.001),
        )
        connection = self._connection = self._broker.connection
        connection.on_blocked = self._on_blocked
        connection.on_unblocked = self._on_unblocked
        return connection

    def _on_blocked(self, _: str) -> None:
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked = False

    def _declare(self, connection: Connection, batch: _Batch, until: float) -> None:
        """Declare the queues that this connection has not declared yet.

        On a channel of its own, which the broker closes if a queue exists with other arguments.
        """
        if not (names := batch.queues_unsent - self._declared):
            return
        channel = connection.channel()
        for name in names:
            connection.sock.settimeout(_left(until))
            try:
                declare(self._app, channel, name)
            except (AMQPError, KeyError) as error:
                if isinstance(error, AMQPError) and not _closed_over_message(error):
                    raise
                batch.refuse_queue(name, error)
            self._declared.add(name)
        channel.close()

    def _drop(self) -> None:
        """Forget the connection, without a word to the broker: it may not be listening."""
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(0)
        self._broker.collect()
        self._connection = self._channel = None
        self._declared = set()
        self._blocked = False


class _Batch:
    """Messages to send, and what became of them so far."""

    def __init__(self, messages: Sequence[Message], meanwhile: Callable[[], None]) -> None:
        self.messages = messages
        self.meanwhile: Callable[[], None] | None = meanwhile
        self.unsent = deque(range(len(messages)))
        self.answers: dict[int, Answer] = {}
        self.window = WINDOW

    def take_meanwhile(self) -> Callable[[], None] | None:
        """What there is to do while the broker works, the first time."""
        meanwhile, self.meanwhile = self.meanwhile, None
        return meanwhile

    @property
    def queues_unsent(self) -> set[str]:
        return {name for position in self.unsent if (name := self.messages[position].queue)}

    @property
    def queues_refused(self) -> set[str]:
        """Queues that may have been deleted, so that they have to be declared again."""
        return {
            name
            for position, answer in self.answers.items()
            if answer.verdict is Verdict.refused and (name := self.messages[position].queue)
        }

    def refuse_queue(self, name: str, error: Exception) -> None:
        """Refuse every unsent message for the queue *name*."""
        for position in list(self.unsent):
            if self.messages[position].queue == name:
                self.unsent.remove(position)
                self.answers[position] = refused(error)

    def blame(self, flight: Flight, error: AMQPError) -> None:
        """Refuse the only message under way; of several, send each again on its own."""
        if len(flight) == 1:
            self.answers[flight.positions[0]] = refused(error)
        else:
            self.unsent.extendleft(reversed(flight.positions))
        self.window = 1


class _ConfirmChannel:
    """A channel in confirm mode. Good as long as no confirm is missing on it."""

    def __init__(self, connection: Connection) -> None:
        self.tags = count(1)
        self._connection = connection
        self._channel = connection.channel()
        self._channel.confirm_select()
        self._frames = Frames(self._channel.channel_id, connection.frame_max)
        self._proven = False

    def close(self) -> None:
        self._channel.close()

    def send(self, batch: _Batch, flight: Flight, until: float) -> None:
        """Send what is unsent and wait for all answers.

        The first message on a new channel goes alone: a broker with a memory alarm takes
        connections and reads what was sent only after the alarm, so every further message
        would be one more copy.
        """
        flight.listen(self._channel)
        while batch.unsent or flight:
            window = batch.window if self._proven else 1
            self._connection.sock.settimeout(_left(until))
            if batch.unsent and len(flight) <= window // 2:
                self._write(batch, flight, window)
            elif not batch.unsent and (meanwhile := batch.take_meanwhile()):
                begun = time.monotonic()
                meanwhile()
                until += time.monotonic() - begun  # which is not the broker's
            else:
                self._connection.drain_events()
                self._proven |= not flight

    def _write(self, batch: _Batch, flight: Flight, window: int) -> None:
        """Write messages until the window is full; between two chunks hear what has come."""
        while batch.unsent and len(flight) < window:
            self._fill(batch, flight, window)
            self._connection.transport.write(self._frames.take())
            checkpoints.reach("relay.published")
            while flight and _readable(self._connection.sock):
                self._connection.drain_events()

    def _fill(self, batch: _Batch, flight: Flight, window: int) -> None:
        """Encode messages until the window, or a chunk of bytes, is full."""
        while batch.unsent and len(flight) < window and self._frames.size < CHUNK:
            position = batch.unsent.popleft()
            message = batch.messages[position]
            try:
                self._frames.add(message)
            except Exception as error:  # whatever is wrong with it, it is wrong with it alone
                batch.answers[position] = refused(error)
            else:
                flight.add(position, message)


def _closed_over_message(error: AMQPError) -> bool:
    """Whether the broker closed the channel or connection over something that we sent."""
    return error.method_sig is not None and error.reply_code != ConnectionForced.code


def _readable(sock: socket.socket) -> bool:
    """Whether the broker said something, or hung up."""
    watch = select.poll()
    watch.register(sock, select.POLLIN)
    return bool(watch.poll(0))


def _left(until: float) -> float:
    """Seconds until then, for a socket; raises ``TimeoutError`` if there are none."""
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError("The broker did not answer in time.")
    return left
