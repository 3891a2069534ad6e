"""Messages to Redis or Valkey: one round trip for a batch, one answer for each message.

Kombu's own channel chooses the keys and makes the format, priorities and bindings included.
Confirmed is what the server has answered; whether that survives a loss of power is up to its
``appendfsync``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kombu.exceptions import OperationalError
from kombu.messaging import Producer
from redis import exceptions

from celery_eda import addresses, checkpoints
from celery_eda.event import EVENT_EXCHANGE, OF_ONE_WORKER
from celery_eda.message import Message
from celery_eda.transports import redis_replies
from celery_eda.transports.base import (
    CONFIRMED,
    Answer,
    Verdict,
    declare,
    publish_with,
    refused,
    subscribers,
    unknown,
    unroutable,
)
from celery_eda.transports.redis_payloads import Payloads

# Not kombu's own list: it holds KeyError, which here means a queue that the app does not know.
OUTAGES = (exceptions.ConnectionError, exceptions.TimeoutError, OperationalError, OSError)
#: The server cannot take anything at the moment, whatever it is.
SERVER_ERRORS = (
    exceptions.ClusterError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
SERVER_WORDS = ("BUSY", "MISCONF", "NOREPLICAS")


class Redis:
    """One connection to Redis."""

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
        self._payloads: Payloads | None = None
        self._declared: set[str] = set()

    def publish(self, messages: Sequence[Message]) -> list[Answer]:
        try:
            answers = self._send(messages)
        except OUTAGES as error:
            self._drop()
            return [unknown(error)] * len(messages)
        verdicts = {answer.verdict for answer in answers}
        if Verdict.unknown in verdicts:
            self._drop()  # by now the name of the server may lead to another one
        elif Verdict.refused in verdicts:
            self._forget_declarations()
        return answers

    def close(self) -> None:
        self._drop()

    def _send(self, messages: Sequence[Message]) -> list[Answer]:
        self._channel = self._channel or self._connect()
        self._payloads = self._payloads or Payloads(self._channel)
        pipeline = _Pipeline(self._channel, self._payloads)
        added = [self._put(message, pipeline) for message in messages]
        replies = pipeline.execute()
        return [
            each if isinstance(each, Answer) else _worst(replies[index] for index in each)
            for each in added
        ]

    def _put(self, message: Message, pipeline: _Pipeline) -> list[int] | Answer:
        """Add *message* to *pipeline*: the places of its commands, or why it cannot be."""
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, self._channel, message.queue)
                self._declared.add(message.queue)
            return pipeline.put(message)
        except OUTAGES:
            raise
        except Exception as error:  # whatever is wrong with it, it is wrong with it alone
            return refused(error)

    def _connect(self) -> Any:
        """A channel to the first host that answers, by kombu's own failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0), timeout=self._hang
        )
        return self._broker.channel()

    def _forget_declarations(self) -> None:
        """Declare afresh from now on: the server may have lost a binding."""
        self._declared = set()
        self._channel.state.clear()
        self._payloads = None

    def _drop(self) -> None:
        if self._channel is not None:
            # Kombu would delete such queues with us; they belong to their consumers.
            self._channel.auto_delete_queues.clear()
        self._broker.collect()
        self._channel = self._payloads = None
        self._declared = set()


class _Pipeline:
    """The commands of a batch; messages for the same list, one after the other, share one.

    Stands in for a channel, to kombu's producer, and for a batch, to kombu's channel.
    """

    def __init__(self, channel: Any, payloads: Payloads) -> None:
        self.prepare_message = channel.prepare_message
        self._channel = channel
        self._producer = Producer(self)
        self._payloads = payloads
        self._commands: list[tuple[str, list[Any]]] = []
        self._used: list[int] = []

    def put(self, message: Message) -> list[int]:
        """Add *message*; returns the places of its commands.

        Raises:
            Unroutable: no queue would get it.
        """
        self._used = []
        if message.exchange == EVENT_EXCHANGE:
            # One by one: of kombu's copies the acknowledgement of one would forget the others,
            # since they have one delivery tag.
            for queue in subscribers(self._bindings, message.routing_key):
                publish_with(self._producer, replace(message, exchange="", routing_key=queue))
        elif made := self._payloads.of(message):
            self.add("lpush", *made)
        else:
            publish_with(self._producer, message)
            self._learn(message)
        if not self._used:
            raise unroutable(message)
        return self._used

    def _learn(self, message: Message) -> None:
        """If kombu has pushed *message* to a list and done nothing else, do the next ones so."""
        if len(self._used) == 1 and self._commands[-1][0] == "lpush":
            _, (key, *payloads) = self._commands[-1]
            self._payloads.learn(message, key, payloads[-1])

    @cached_property
    def _bindings(self) -> list[tuple[str, str, str]]:
        """Those of the exchange of events, as they are while this batch is sent."""
        bindings: list[tuple[str, str, str]] = self._channel.get_table(EVENT_EXCHANGE)
        return bindings

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **_: Any) -> None:
        self._channel.basic_publish(
            message, exchange=exchange, routing_key=routing_key, _publish_batch=self
        )

    def add(self, name: str, key: str, *rest: Any) -> None:
        """Add a command; kombu's channel calls this instead of the server."""
        if name == "lpush" and addresses.is_volatile(key):
            name, key, rest = redis_replies.push(self._channel, key, *rest)
        elif name == "lpush" and key.startswith(OF_ONE_WORKER):
            name, key, rest = redis_replies.push(self._channel, key, *rest, needed=False)
        if name == "lpush" and self._commands:
            last, arguments = self._commands[-1]
            if last == name and arguments[0] == key:
                arguments.extend(rest)
                self._used.append(len(self._commands) - 1)
                return
        self._used.append(len(self._commands))
        self._commands.append((name, [key, *rest]))

    def execute(self) -> list[Answer]:
        """Send all commands at once; returns what the server said to each."""
        with self._channel.conn_or_acquire() as client:
            pipeline = client.pipeline(transaction=False)
            for name, arguments in self._commands:
                getattr(pipeline, name)(*arguments)
            replies = pipeline.execute(raise_on_error=False)
        checkpoints.reach("relay.published")
        return [
            _answer(name, reply) for (name, _), reply in zip(self._commands, replies, strict=True)
        ]


def _answer(command: str, reply: Any) -> Answer:
    if isinstance(reply, SERVER_ERRORS) or (
        isinstance(reply, Exception) and str(reply).startswith(SERVER_WORDS)
    ):
        return unknown(reply)
    if isinstance(reply, Exception):
        return refused(reply)
    if command == "eval" and reply == 0:
        return Answer(Verdict.refused, "Nobody waits for this reply any more.", unroutable=True)
    if command == "publish" and reply == 0:
        return Answer(Verdict.refused, "Nobody is subscribed to the exchange.")
    return CONFIRMED


def _worst(answers: Any) -> Answer:
    """The answer to a message of several commands: the first that is no confirmation."""
    return next((each for each in answers if each.verdict is not Verdict.confirmed), CONFIRMED)
