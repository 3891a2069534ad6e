"""The commands that put a batch of messages into Redis, and what its replies to them mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kombu.messaging import Producer
from redis import exceptions

from celery_eda import addresses
from celery_eda.event import EVENT_EXCHANGE, OF_ONE_WORKER
from celery_eda.transports import redis_replies
from celery_eda.transports.base import (
    CONFIRMED,
    PublishResult,
    Sendable,
    Verdict,
    publish_with,
    refused,
    subscribers,
    unknown,
    unroutable,
)
from celery_eda.transports.redis_envelopes import Payloads

#: The server cannot take anything at the moment, whatever it is.
SERVER_ERRORS = (
    exceptions.ClusterError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
SERVER_WORDS = ("BUSY", "MISCONF", "NOREPLICAS")


class Commands:
    """The commands of a batch; messages for the same list, one after the other, share one.

    Stands in for a channel, to kombu's producer, and for a batch, to kombu's channel.

    Attributes:
        all: each with its arguments, as they go to the server.
    """

    def __init__(self, channel: Any, payloads: Payloads) -> None:
        self.prepare_message = channel.prepare_message
        self.all: list[list[Any]] = []
        self._channel = channel
        self._producer = Producer(self)
        self._payloads = payloads
        self._used: list[int] = []
        #: The list that the last command pushes to, if more may be added to that.
        self._open: str | None = None

    def put(self, message: Sendable) -> list[int]:
        """Add *message*; returns the places of its commands.

        Raises:
            Unroutable: no queue would get it.
        """
        self._used = []
        if message.exchange == EVENT_EXCHANGE:
            # One by one: of kombu's copies the acknowledgement of one would forget the others,
            # since they have one delivery tag.
            event = message.whole()
            for queue in subscribers(self._bindings, event.routing_key):
                publish_with(self._producer, replace(event, exchange="", routing_key=queue))
        elif made := self._payloads.of(message):
            self.add("lpush", *made)
        else:
            publish_with(self._producer, message)
        if not self._used:
            raise unroutable(message)
        return self._used

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
        if name == "lpush" and key == self._open:
            self.all[-1] += rest
        else:
            self._open = None
            self.all.append(self._command(name, key, rest))
        self._used.append(len(self.all) - 1)

    def _command(self, name: str, key: str, rest: Sequence[Any]) -> list[Any]:
        if name == "lpush":
            if addresses.is_volatile(key):
                return redis_replies.push(self._channel, key, *rest)
            if key.startswith(OF_ONE_WORKER):
                return redis_replies.push(self._channel, key, *rest, needed=False)
            self._open = key
        return [name.upper(), self._channel.global_keyprefix + key, *rest]


def answers(commands: Iterable[str], replies: Iterable[Any]) -> list[PublishResult]:
    """What the server's *replies* to *commands* of these names mean."""
    return [_answer(name, reply) for name, reply in zip(commands, replies, strict=True)]


def of_error(error: Exception) -> PublishResult:
    """The answer to a message that the server did not take for this reason."""
    is_everybodys = isinstance(error, SERVER_ERRORS) or str(error).startswith(SERVER_WORDS)
    return unknown(error) if is_everybodys else refused(error)


def _answer(command: str, reply: Any) -> PublishResult:
    if isinstance(reply, Exception):
        return of_error(reply)
    if command == "EVAL" and reply == 0:
        return PublishResult(
            Verdict.refused, "Nobody waits for this reply any more.", unroutable=True
        )
    if command == "PUBLISH" and reply == 0:
        return PublishResult(Verdict.refused, "Nobody is subscribed to the exchange.")
    return CONFIRMED


def worst(said: Sequence[PublishResult], places: Iterable[int]) -> PublishResult:
    """The answer to a message by what was *said* to its commands: the first that confirms nothing.

    They are those at these *places*.
    """
    for place in places:
        if said[place] is not CONFIRMED:
            return said[place]
    return CONFIRMED
