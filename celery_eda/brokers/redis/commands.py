"""The commands that put a batch of messages into Redis, and the results that its replies give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kombu.messaging import Producer
from redis import exceptions

from celery_eda.brokers.base import (
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
from celery_eda.brokers.redis import replies as redis_replies
from celery_eda.brokers.redis.envelopes import Payloads
from celery_eda.core import addresses
from celery_eda.core.event import EVENT_EXCHANGE, OF_ONE_WORKER

#: Errors of the server as a whole: at the moment it accepts no message at all.
SERVER_ERRORS = (
    exceptions.ClusterError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
SERVER_WORDS = ("BUSY", "MISCONF", "NOREPLICAS")


class Commands:
    """The commands of a batch; consecutive messages for the same list share one.

    A stand-in for the channel of kombu's producer, and for the pipeline of kombu's channel.

    Attributes:
        all: each command with its arguments, as sent to the server.
    """

    def __init__(self, channel: Any, payloads: Payloads) -> None:
        self.prepare_message = channel.prepare_message
        self.all: list[list[Any]] = []
        self._channel = channel
        self._producer = Producer(self)
        self._payloads = payloads
        self._used: list[int] = []
        #: The list that the last command pushes to, if it may take more messages.
        self._open: str | None = None

    def put(self, message: Sendable) -> list[int]:
        """Add *message*; returns the indexes of its commands.

        Raises:
            Unroutable: no queue would get it.
        """
        self._used = []
        if message.exchange == EVENT_EXCHANGE:
            # One copy a queue: kombu's copies share one delivery tag, so that acknowledging one
            # would acknowledge the others.
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
        """The bindings of the exchange of events, read once a batch."""
        bindings: list[tuple[str, str, str]] = self._channel.get_table(EVENT_EXCHANGE)
        return bindings

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **_: Any) -> None:
        self._channel.basic_publish(
            message, exchange=exchange, routing_key=routing_key, _publish_batch=self
        )

    def add(self, name: str, key: str, *rest: Any) -> None:
        """Add a command; kombu's channel calls this as a pipeline."""
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
                return redis_replies.push(self._channel, key, *rest, refuse=False)
            self._open = key
        return [name.upper(), self._channel.global_keyprefix + key, *rest]


def results_of(commands: Iterable[str], replies: Iterable[Any]) -> list[PublishResult]:
    """The results that the server's *replies* give to *commands* of these names."""
    return [_result(name, reply) for name, reply in zip(commands, replies, strict=True)]


def result_of_error(error: Exception) -> PublishResult:
    """The result of a message that the server did not accept because of *error*."""
    is_outage = isinstance(error, SERVER_ERRORS) or str(error).startswith(SERVER_WORDS)
    return unknown(error) if is_outage else refused(error)


def _result(command: str, reply: Any) -> PublishResult:
    if isinstance(reply, Exception):
        return result_of_error(reply)
    if command == "EVAL" and reply == 0:
        return PublishResult(
            Verdict.refused, "No process waits for this reply any more.", unroutable=True
        )
    if command == "PUBLISH" and reply == 0:
        return PublishResult(Verdict.refused, "No consumer is subscribed to the exchange.")
    return CONFIRMED


def first_failure(results: Sequence[PublishResult], indexes: Iterable[int]) -> PublishResult:
    """The result of a message, from the *results* of its commands, which are at *indexes*.

    Returns:
        The first result that is no confirmation, or ``CONFIRMED``.
    """
    for index in indexes:
        if results[index] is not CONFIRMED:
            return results[index]
    return CONFIRMED
