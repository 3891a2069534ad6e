"""Messages to RabbitMQ: many in flight at once, each waiting for its own confirm.

The next batch is sent while the broker works on the one before, so that the broker never idles.
Every message is ``mandatory``: one that no queue accepts is refused, not confirmed. A message that
makes the broker close the channel is identified and refused alone. A channel with a missing confirm
is discarded with its connection: a late confirm would count for another message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amqp import Connection
from amqp.exceptions import AMQPError, Blocked, ConnectionForced, InternalError, NotFound
from celery import Celery
from kombu.exceptions import OperationalError

from celery_eda.brokers.base import (
    PublishResult,
    Sendable,
    Verdict,
    refused,
    unavailable,
    unknown,
)
from celery_eda.brokers.rabbitmq.confirm_channel import ConfirmChannel, left
from celery_eda.brokers.readiness import readable
from celery_eda.brokers.topology import declare

WINDOW = 1000  # messages in flight at the same time
GOODBYE = 1.0  # seconds for an orderly close

OUTAGES = (AMQPError, OperationalError, OSError)


@dataclass(frozen=True)
class _Batch:
    """Messages to send.

    Attributes:
        numbers: their serial numbers among all messages of this transport.
        until: the deadline for the confirms, by :func:`time.monotonic`.
    """

    messages: Sequence[Sendable]
    numbers: range
    until: float


class RabbitMQ:
    """One connection to RabbitMQ, with one channel for sending."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._connect_timeout = min(app.conf.broker_connection_timeout or timeout, timeout)
        # Without heartbeats: between two batches no code runs that would send one, and within a
        # batch the time-out detects a dead broker.
        self._broker = app.connection_for_write(
            heartbeat=0,
            connect_timeout=self._connect_timeout,
            transport_options={"confirm_publish": False},
        )
        self._connection: Connection | None = None
        self._channel: ConfirmChannel | None = None
        self._declared: set[str] = set()
        self._blocked = False
        self._batches: deque[_Batch] = deque()
        self._unsent: deque[tuple[int, Sendable]] = deque()
        self._results: dict[int, PublishResult] = {}
        self._numbered = 0
        self._window = WINDOW

    def publish(self, messages: Sequence[Sendable]) -> list[PublishResult]:
        self.begin(messages)
        return self.finish()

    def begin(self, messages: Sequence[Sendable]) -> None:
        if not self._batches:
            self._window = WINDOW
        numbers = range(self._numbered, self._numbered + len(messages))
        self._numbered = numbers.stop
        batch = _Batch(messages, numbers, time.monotonic() + self._timeout)
        self._batches.append(batch)
        self._unsent.extend(zip(numbers, messages, strict=True))
        self._work(lambda: not self._unsent, batch.until)

    def finish(self) -> list[PublishResult]:
        batch = self._batches[0]
        numbers = batch.numbers
        # The last one first: while it has no result, the others need not be checked.
        self._work(lambda: all(each in self._results for each in reversed(numbers)), batch.until)
        self._batches.popleft()
        results = [self._results.pop(each) for each in numbers]
        # The queues of refused messages may have been deleted: declare them again.
        self._declared -= {
            name
            for message, result in zip(batch.messages, results, strict=True)
            if result.verdict is Verdict.refused and (name := message.queue)
        }
        return results

    def close(self) -> None:
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(GOODBYE)
            self._broker.release()
        self._drop()
        self._batches.clear()
        self._results.clear()

    def _work(self, is_done: Callable[[], bool], until: float) -> None:
        """Send and receive until *is_done*, but no longer than *until*.

        An outage is the result of every message that has none yet.
        """
        try:
            while not is_done():
                self._step(until)
        except OUTAGES as error:
            blocked = self._blocked and isinstance(error, TimeoutError)
            lost = unknown(Blocked("memory or disk alarm") if blocked else error)
            self._drop()
            self._unsent.clear()
            for number in (each for batch in self._batches for each in batch.numbers):
                self._results.setdefault(number, lost)

    def _step(self, until: float) -> None:
        """Receive a frame, or write as many messages as there is room for.

        The first message on a new channel goes alone: a broker with a memory alarm accepts
        connections but reads what was sent only after the alarm, so that every further message
        would be delivered as one more copy.
        """
        if self._channel is None or not self._channel.in_flight:
            self._catch_up(until)
        try:
            if self._is_to_write():
                self._write(until)
            elif self._channel is not None:
                self._channel.receive(until)
        except AMQPError as error:
            if not _closed_over_message(error):
                raise
            self._find_culprit(error)

    def _is_to_write(self) -> bool:
        """True if all unsent messages or half a window fit, and there is no frame to receive."""
        if self._blocked or not self._unsent:
            return False
        channel = self._channel
        if channel is None:
            return True
        window = self._window_on(channel)
        room = window - len(channel.in_flight)
        is_worth_it = room >= max(1, min(len(self._unsent), window // 2))
        return is_worth_it and not channel.is_readable

    def _window_on(self, channel: ConfirmChannel) -> int:
        """The number of messages that may be in flight on *channel*."""
        return self._window if channel.is_proven else 1

    def _catch_up(self, until: float) -> None:
        """Read the frames since the last batch, and wait for the end of an alarm.

        If the broker has closed the connection meanwhile, the next batch uses a new one.
        """
        if self._connection is None:
            return
        try:
            while self._blocked or readable(self._connection.sock):
                self._connection.sock.settimeout(left(until))
                self._connection.drain_events()
        except OUTAGES:
            if self._blocked:
                raise
            self._drop()

    def _write(self, until: float) -> None:
        """Write a chunk of unsent messages."""
        connection = self._connection or self._connect(until)
        connection.sock.settimeout(left(until))
        self._declare(connection, until)
        channel = self._channel = self._channel or ConfirmChannel(connection, self._results)
        channel.write(self._unsent, self._window_on(channel) - len(channel.in_flight), until)

    def _find_culprit(self, error: AMQPError) -> None:
        """Refuse the only message in flight; if there are several, send each again alone."""
        channel, self._channel = self._channel, None
        if channel is None:
            raise error
        messages = channel.in_flight.messages
        if len(messages) == 1:
            self._results[messages[0][0]] = refused(error)
        else:
            self._unsent.extendleft(reversed(messages))
        self._window = 1
        if channel.is_connected:
            channel.close()
        else:
            self._drop()

    def _connect(self, until: float) -> Connection:
        """Connect to the first of the broker's hosts that answers, by kombu's failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0),
            timeout=max(left(until) - self._connect_timeout, 0.001),
        )
        connection = self._connection = self._broker.connection
        connection.on_blocked = self._on_blocked
        connection.on_unblocked = self._on_unblocked
        return connection

    def _on_blocked(self, _: str) -> None:
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked = False

    def _declare(self, connection: Connection, until: float) -> None:
        """Declare the queues of unsent messages that this connection has not declared yet.

        A separate channel is used: the broker closes it if a queue exists with other arguments.
        """
        unsent = {name for _, message in self._unsent if (name := message.queue)}
        if not (names := unsent - self._declared):
            return
        channel = connection.channel()
        for name in names:
            connection.sock.settimeout(left(until))
            try:
                declare(self._app, channel, name)
            except (AMQPError, KeyError) as error:
                if isinstance(error, AMQPError) and not _closed_over_message(error):
                    raise
                if is_down(error):
                    self._settle_queue(name, unavailable(error))
                    continue
                self._settle_queue(name, refused(error))
            self._declared.add(name)
        channel.close()

    def _settle_queue(self, name: str, result: PublishResult) -> None:
        """Make *result* that of every unsent message for the queue *name*."""
        unsent, self._unsent = self._unsent, deque()
        for number, message in unsent:
            if message.queue == name:
                self._results[number] = result
            else:
                self._unsent.append((number, message))

    def _drop(self) -> None:
        """Drop the connection without an orderly close: the broker may not be reading."""
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(0)
        self._broker.collect()
        self._connection = self._channel = None
        self._declared = set()
        self._blocked = False


def _closed_over_message(error: AMQPError) -> bool:
    """True if the broker closed the channel or connection because of a message or declaration."""
    return error.method_sig is not None and error.reply_code != ConnectionForced.code


def is_down(error: Exception) -> bool:
    """True if the broker cannot declare a queue because the queue's process or node is down.

    RabbitMQ reports that as ``NOT_FOUND``, as it does a missing exchange, but in other words ("home
    node … is down", "process is stopped", "due to timeout"), and for a queue without a leader as
    ``INTERNAL_ERROR``.
    """
    if isinstance(error, NotFound):
        return not str(error.reply_text).startswith("NOT_FOUND - no ")
    return isinstance(error, InternalError)
