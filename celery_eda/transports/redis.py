"""Messages to Redis or Valkey: a batch is written without waiting, and each message is answered.

Kombu's own channel chooses the keys and makes the format, priorities and bindings included; of most
messages it has made it when they were captured. While the server works on one batch the next one is
sent. Confirmed is what the server has answered; whether that survives a loss of power is up to its
``appendfsync``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu.exceptions import OperationalError
from redis import exceptions

from celery_eda import checkpoints
from celery_eda.transports.base import PublishResult, Sendable, Verdict, declare, unknown
from celery_eda.transports.redis_commands import Commands, answers, of_error, worst
from celery_eda.transports.redis_envelopes import Payloads

# Not kombu's own list: it holds KeyError, which here means a queue that the app does not know.
OUTAGES = (exceptions.ConnectionError, exceptions.TimeoutError, OperationalError, OSError)
CHUNK = 2**17  # bytes written at once: a time-out is that of one of them


@dataclass
class _Batch:
    """Messages that were given to be sent.

    Attributes:
        places: of each, those of its commands, or why it has none.
        commands: their names.
        lost: the answer to each, if the connection is gone that they were sent over.
    """

    messages: Sequence[Sendable]
    places: list[list[int] | PublishResult] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    lost: PublishResult | None = None


class Redis:
    """One connection to Redis for sending, beside those that kombu's channel declares with."""

    def __init__(self, app: Any, *, timeout: float) -> None:
        self._app = app
        # By default kombu waits for ever. A publish hangs once at most, so that half the time
        # for one hang leaves the other half for what went well before it.
        self._hang = hang = timeout / 2
        options = app.conf.broker_transport_options
        connect = options.get("socket_connect_timeout") or app.conf.broker_connection_timeout
        self._broker = app.connection_for_write(
            transport_options={
                "socket_timeout": min(options.get("socket_timeout") or hang, hang),
                "socket_connect_timeout": min(connect or hang, hang),
                "retry_on_timeout": False,
                "health_check_interval": 0,
            },
        )
        self._channel: Any = None
        self._connection: Any = None
        self._payloads: Payloads | None = None
        self._declared: set[str] = set()
        self._batches: deque[_Batch] = deque()

    def publish(self, messages: Sequence[Sendable]) -> list[PublishResult]:
        self.begin(messages)
        return self.finish()

    def begin(self, messages: Sequence[Sendable]) -> None:
        batch = _Batch(messages)
        self._batches.append(batch)
        try:
            self._send(batch)
        except OUTAGES as error:
            self._lose(unknown(error))

    def finish(self) -> list[PublishResult]:
        batch, replies = self._batches[0], list[Any]()
        try:
            if not batch.lost:
                replies = [self._reply() for _ in batch.commands]
        except OUTAGES as error:
            self._lose(unknown(error))
        self._batches.popleft()
        return [batch.lost] * len(batch.messages) if batch.lost else self._heard(batch, replies)

    def close(self) -> None:
        self._drop()
        self._batches.clear()

    def _send(self, batch: _Batch) -> None:
        channel = self._channel = self._channel or self._connect()
        payloads = self._payloads = self._payloads or Payloads(channel)
        commands = Commands(channel, payloads)
        batch.places = [self._put(message, commands) for message in batch.messages]
        batch.commands = [command[0] for command in commands.all]
        if self._batches[0] is batch:
            self._wake()
        packed = memoryview(b"".join(self._connection.pack_commands(commands.all)))
        chunks = [packed[at : at + CHUNK] for at in range(0, len(packed), CHUNK)]
        self._connection.send_packed_command(chunks)
        checkpoints.reach("relay.published")

    def _wake(self) -> None:
        """Close what the server has closed since the last batch; that need not cost this one."""
        try:
            is_silent = not self._connection.can_read()
        except OUTAGES:
            is_silent = False
        if not is_silent:
            self._connection.disconnect()  # it is opened again when it is written to

    def _put(self, message: Sendable, commands: Commands) -> list[int] | PublishResult:
        """Add *message* to *commands*: the places of its own, or why there are none."""
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, self._channel, message.queue)
                self._declared.add(message.queue)
            return commands.put(message)
        except OUTAGES:
            raise
        except Exception as error:  # whatever is wrong with it, it is wrong with it alone
            return of_error(error)

    def _reply(self) -> Any:
        """The next one; an error that is the server's answer to one command is one too."""
        try:
            return self._connection.read_response()
        except exceptions.ResponseError as error:
            return error

    def _heard(self, batch: _Batch, replies: Sequence[Any]) -> list[PublishResult]:
        """What the server says of each message with its *replies* to their commands."""
        said = answers(batch.commands, replies)
        found = [
            each if isinstance(each, PublishResult) else worst(said, each) for each in batch.places
        ]
        if lost := next((each for each in found if each.verdict is Verdict.unknown), None):
            self._lose(lost)  # by now the name of the server may lead to another one
        elif any(each.verdict is Verdict.refused for each in found):
            self._forget_declarations()
        return found

    def _connect(self) -> Any:
        """A channel to the first host that answers, by kombu's own failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0), timeout=self._hang
        )
        channel = self._broker.channel()
        # Not one of the pool's: those are for what the channel declares while this one is used.
        self._connection = channel.pool.connection_class(**channel.pool.connection_kwargs)
        self._connection.connect()
        return channel

    def _forget_declarations(self) -> None:
        """Declare afresh from now on: the server may have lost a binding."""
        self._declared = set()
        self._channel.state.clear()
        self._payloads = None

    def _lose(self, lost: PublishResult) -> None:
        """Give up the connection; *lost* is the answer to all that is under way on it."""
        for batch in self._batches:
            batch.lost = batch.lost or lost
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
        if self._channel is not None:
            # Kombu would delete such queues with us; they belong to their consumers.
            self._channel.auto_delete_queues.clear()
        self._broker.collect()
        self._channel = self._connection = self._payloads = None
        self._declared = set()
