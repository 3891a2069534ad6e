"""Messages to RabbitMQ: many under way at once, each waiting for its own confirm.

While the broker works on one batch the next one is sent, so that it is never without work.
Every message is ``mandatory``: one that no queue takes is refused, not confirmed. A message that
makes the broker close the channel is found and refused alone. A channel on which a confirm is
missing is thrown away with its connection: a late confirm would count for another message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from amqp import Connection
from amqp.exceptions import AMQPError, Blocked, ConnectionForced
from kombu.exceptions import OperationalError

from celery_eda.transports.base import PublishResult, Sendable, Verdict, declare, refused, unknown
from celery_eda.transports.confirm_channel import ConfirmChannel, left, readable

WINDOW = 1000  # messages that wait for their confirm at the same time
GOODBYE = 1.0  # seconds for closing in good order

OUTAGES = (AMQPError, OperationalError, OSError)


@dataclass(frozen=True)
class _Batch:
    """Messages that were given to be sent.

    Attributes:
        numbers: theirs, among all that this transport was ever given.
        until: when the broker has to have answered, by :func:`time.monotonic`.
    """

    messages: Sequence[Sendable]
    numbers: range
    until: float


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
        self._channel: ConfirmChannel | None = None
        self._declared: set[str] = set()
        self._blocked = False
        self._batches: deque[_Batch] = deque()
        self._unsent: deque[tuple[int, Sendable]] = deque()
        self._answers: dict[int, PublishResult] = {}
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
        # The last one first: as long as that is not answered, the others need not be looked for.
        self._work(lambda: all(each in self._answers for each in reversed(numbers)), batch.until)
        self._batches.popleft()
        answers = [self._answers.pop(each) for each in numbers]
        # Their queues may have been deleted, so that they have to be declared again.
        self._declared -= {
            name
            for message, answer in zip(batch.messages, answers, strict=True)
            if answer.verdict is Verdict.refused and (name := message.queue)
        }
        return answers

    def close(self) -> None:
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(GOODBYE)
            self._broker.release()
        self._drop()
        self._batches.clear()
        self._answers.clear()

    def _work(self, is_done: Callable[[], bool], until: float) -> None:
        """Send and listen until *is_done*, but not longer than *until*.

        An outage is the answer to everything that was not answered before.
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
                self._answers.setdefault(number, lost)

    def _step(self, until: float) -> None:
        """Hear what the broker says, or write what there is room for.

        The first message on a new channel goes alone: a broker with a memory alarm takes
        connections and reads what was sent only after the alarm, so every further message
        would be one more copy.
        """
        if self._channel is None or not self._channel.flight:
            self._wake(until)
        try:
            if self._is_to_write():
                self._write(until)
            elif self._channel is not None:
                self._channel.hear(until)
        except AMQPError as error:
            if not _closed_over_message(error):
                raise
            self._blame(error)

    def _is_to_write(self) -> bool:
        """Whether there is room for all that is unsent, or much, and nothing to be heard first."""
        if self._blocked or not self._unsent:
            return False
        channel = self._channel
        if channel is None:
            return True
        window = self._window_on(channel)
        room = window - len(channel.flight)
        is_worth_it = room >= max(1, min(len(self._unsent), window // 2))
        return is_worth_it and not channel.is_readable

    def _window_on(self, channel: ConfirmChannel) -> int:
        """Messages that may be under way on *channel*."""
        return self._window if channel.is_proven else 1

    def _wake(self, until: float) -> None:
        """Hear what came since the last batch, and wait for the end of an alarm.

        The broker may have closed the connection, which then need not cost a batch.
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
        """Write a chunk of what is unsent."""
        connection = self._connection or self._connect(until)
        connection.sock.settimeout(left(until))
        self._declare(connection, until)
        channel = self._channel = self._channel or ConfirmChannel(connection, self._answers)
        channel.write(self._unsent, self._window_on(channel) - len(channel.flight), until)

    def _blame(self, error: AMQPError) -> None:
        """Refuse the only message under way; of several, send each again on its own."""
        channel, self._channel = self._channel, None
        if channel is None:
            raise error
        under_way = channel.flight.under_way
        if len(under_way) == 1:
            self._answers[under_way[0][0]] = refused(error)
        else:
            self._unsent.extendleft(reversed(under_way))
        self._window = 1
        if channel.is_connected:
            channel.close()
        else:
            self._drop()

    def _connect(self, until: float) -> Connection:
        """Connect to the first of the broker's hosts that answers, by kombu's own failover."""
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
        """Declare the queues of what is unsent that this connection has not declared yet.

        On a channel of its own, which the broker closes if a queue exists with other arguments.
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
                self._refuse_queue(name, error)
            self._declared.add(name)
        channel.close()

    def _refuse_queue(self, name: str, error: Exception) -> None:
        """Refuse every unsent message for the queue *name*."""
        unsent, self._unsent = self._unsent, deque()
        for number, message in unsent:
            if message.queue == name:
                self._answers[number] = refused(error)
            else:
                self._unsent.append((number, message))

    def _drop(self) -> None:
        """Forget the connection, without a word to the broker: it may not be listening."""
        if self._connection is not None and self._connection.connected:
            self._connection.sock.settimeout(0)
        self._broker.collect()
        self._connection = self._channel = None
        self._declared = set()
        self._blocked = False


def _closed_over_message(error: AMQPError) -> bool:
    """Whether the broker closed the channel or connection over something that we sent."""
    return error.method_sig is not None and error.reply_code != ConnectionForced.code
