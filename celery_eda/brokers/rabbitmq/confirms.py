"""Publisher confirms, matched to the messages in flight on a channel.

The broker confirms delivery tags late, out of order, and many at once. An unroutable message is
returned first, without a tag, and is confirmed nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from itertools import takewhile
from typing import Any

from amqp.exceptions import ChannelError, UnexpectedFrame

from celery_eda.brokers.base import CONFIRMED, PublishResult, Sendable, Verdict
from celery_eda.core.identity import ID_HEADER, REVISION_HEADER

#: The broker's code for a message that no queue would get.
NO_ROUTE = 312
NACKED = PublishResult(
    Verdict.refused, "basic.nack: the queue is full, or cannot store the message"
)


class InFlight:
    """The messages in flight on one channel.

    Args:
        tags: the delivery tags that the channel assigns from here on.
        results: receives the results, by the message's number.
    """

    def __init__(self, tags: Iterator[int], results: MutableMapping[int, PublishResult]) -> None:
        self._tags = tags
        self._results = results
        self._messages: dict[int, tuple[int, Sendable]] = {}
        self._returned: dict[int, PublishResult] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def messages(self) -> list[tuple[int, Sendable]]:
        """The messages in flight with their numbers, in the order of sending."""
        return list(self._messages.values())

    def add(self, number: int, message: Sendable) -> None:
        """Add *message*, which must be the next one published on the channel."""
        self._messages[next(self._tags)] = number, message

    def listen(self, channel: Any) -> None:
        """Subscribe to the confirms and returns of *channel*."""
        channel.events["basic_ack"] = {self.ack}
        channel.events["basic_nack"] = {self.nack}
        channel.events["basic_return"] = {self.on_return}

    def ack(self, tag: int, multiple: bool) -> None:
        for each in self._tags_of(tag, multiple):
            self._settle(each, self._returned.pop(each, CONFIRMED))

    def nack(self, tag: int, multiple: bool) -> None:
        for each in self._tags_of(tag, multiple):
            self._settle(each, self._returned.pop(each, NACKED))

    def on_return(
        self, error: ChannelError, exchange: str, routing_key: str, returned: Any
    ) -> None:
        """Record that the broker could not route a message, until the message is confirmed.

        If two messages in flight are identical, both count as returned: publishing a delivered
        message again does no harm, but a returned one that counts as delivered would be lost.
        """
        headers = returned.headers or {}
        alike = [
            tag
            for tag, (_, message) in self._messages.items()
            if str(message.identity.id) == headers.get(ID_HEADER)
            and message.identity.revision == headers.get(REVISION_HEADER)
            and message.routing_key == routing_key
            and message.exchange == exchange
        ]
        if not alike:
            raise UnexpectedFrame("The broker returned a message that is not in flight.")
        why = f"{error.reply_code} {error.reply_text}: {exchange=} {routing_key=}"
        result = PublishResult(Verdict.refused, why, unroutable=error.reply_code == NO_ROUTE)
        self._returned.update(dict.fromkeys(alike, result))

    def _tags_of(self, tag: int, multiple: bool) -> list[int]:
        """The tags in flight that a confirm covers: this one, or all up to it."""
        if multiple:
            return list(takewhile(lambda each: each <= tag, self._messages))
        return [tag] if tag in self._messages else []

    def _settle(self, tag: int, result: PublishResult) -> None:
        number, _ = self._messages.pop(tag)
        self._results[number] = result
