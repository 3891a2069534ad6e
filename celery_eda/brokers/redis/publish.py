"""Messages to Redis or Valkey: a batch is written without waiting, and each message gets a reply.

Kombu's own channel chooses the keys and makes the format, priorities and bindings included; most
messages were formatted when they were captured. The next batch is sent while the server works on
the one before. ``confirmed`` means that the server has replied, and behind Sentinel that a replica
has the message; ``appendfsync`` decides whether the message survives a power failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis import exceptions

from celery_eda.brokers.base import PublishResult, Sendable, Verdict, unknown
from celery_eda.brokers.redis.commands import Commands, first_failure, result_of_error, results_of
from celery_eda.brokers.redis.envelopes import Payloads
from celery_eda.brokers.redis.replication import Replication
from celery_eda.brokers.topology import declare
from celery_eda.core import checkpoints

# Not kombu's own list: it contains KeyError, which here means a queue unknown to the app.
OUTAGES = (exceptions.ConnectionError, exceptions.TimeoutError, OperationalError, OSError)
CHUNK = 2**17  # bytes written at once: the socket's time-out holds for each chunk


@dataclass
class _Batch:
    """Messages to send.

    Attributes:
        indexes: for each message the indexes of its commands, or its result if it has none.
        commands: the names of all commands.
        replicas: the number of replicas that have to have them.
        lost: the result of every message, if the connection was lost.
    """

    messages: Sequence[Sendable]
    indexes: list[list[int] | PublishResult] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    replicas: int = 0
    lost: PublishResult | None = None


class Redis:
    """One connection to Redis for sending, beside those of the channel that declares queues."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        self._app = app
        # By default kombu waits forever. A publish hangs at most once, so that half the time-out
        # for one hang leaves the other half for all that succeeded before it.
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
        self._replication = Replication(patience=hang / 2)
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
            self._lose(_lost(error))

    def finish(self) -> list[PublishResult]:
        batch, replies = self._batches[0], list[Any]()
        try:
            if not batch.lost:
                replies = [self._reply() for _ in batch.commands]
                self._require_replicas(batch)
        except OUTAGES as error:
            self._lose(_lost(error))
        self._batches.popleft()
        return [batch.lost] * len(batch.messages) if batch.lost else self._results(batch, replies)

    def close(self) -> None:
        self._drop()
        self._batches.clear()

    def _send(self, batch: _Batch) -> None:
        channel = self._channel = self._channel or self._connect()
        payloads = self._payloads = self._payloads or Payloads(channel)
        commands = Commands(channel, payloads)
        batch.indexes = [self._put(message, commands) for message in batch.messages]
        batch.commands = [command[0] for command in commands.all]
        if self._batches[0] is batch:
            self._catch_up()
        batch.replicas = self._replication.wanted
        everything = [*commands.all, *self._replication.commands()]
        packed = memoryview(b"".join(self._connection.pack_commands(everything)))
        chunks = [packed[at : at + CHUNK] for at in range(0, len(packed), CHUNK)]
        self._connection.send_packed_command(chunks)
        checkpoints.reach("relay.published")

    def _catch_up(self) -> None:
        """Reconnect if the server has closed the connection since the last batch."""
        try:
            is_open = not self._connection.can_read()
        except OUTAGES:
            is_open = False
        if not is_open:
            self._connection.disconnect()
            self._connection.connect()  # a write would connect too, but without asking Sentinel

    def _put(self, message: Sendable, commands: Commands) -> list[int] | PublishResult:
        """Add *message* to *commands*; returns the indexes of its own commands, or its refusal."""
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, self._channel, message.queue)
                self._declared.add(message.queue)
            return commands.put(message)
        except OUTAGES:
            raise
        except Exception as error:  # this message alone is at fault, not the batch
            return result_of_error(error)

    def _require_replicas(self, batch: _Batch) -> None:
        """Count *batch* as lost, with its connection, if its replicas have not confirmed it."""
        if lost := self._replication.shortfall(batch.replicas, self._reply):
            self._lose(lost)

    def _reply(self) -> Any:
        """The next reply; the server's error for one command is a reply too."""
        try:
            return self._connection.read_response()
        except exceptions.ResponseError as error:
            return error

    def _results(self, batch: _Batch, replies: Sequence[Any]) -> list[PublishResult]:
        """The result of each message, by the server's *replies* to all commands."""
        results = results_of(batch.commands, replies)
        found = [
            each if isinstance(each, PublishResult) else first_failure(results, each)
            for each in batch.indexes
        ]
        if lost := next((each for each in found if each.verdict is Verdict.unknown), None):
            self._lose(lost)  # by now the host name may lead to another server
        elif any(each.verdict is Verdict.refused for each in found):
            self._forget_declarations()
        return found

    def _connect(self) -> Any:
        """A channel to the first host that answers, by kombu's failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0), timeout=self._hang
        )
        channel = self._broker.channel()
        # Not from the pool: the channel needs the pool's connections to declare queues meanwhile.
        self._connection = channel.pool.connection_class(**channel.pool.connection_kwargs)
        self._connection.connect()
        self._replication.begin(channel, self._connection)
        return channel

    def _forget_declarations(self) -> None:
        """Declare every queue again from now on: the server may have lost a binding."""
        self._declared = set()
        self._channel.state.clear()
        self._payloads = None

    def _lose(self, lost: PublishResult) -> None:
        """Drop the connection; *lost* is the result of every message in flight on it."""
        for batch in self._batches:
            batch.lost = batch.lost or lost
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
        if self._channel is not None:
            # Kombu would delete these queues with the channel; they belong to their consumers.
            self._channel.auto_delete_queues.clear()
        self._broker.collect()
        self._channel = self._connection = self._payloads = None
        self._declared = set()


def _lost(error: Exception) -> PublishResult:
    return unknown(error, is_late=isinstance(error, TimeoutError | exceptions.TimeoutError))
