"""Publisher confirms: which answer of the broker belongs to which message.

The broker answers with delivery tags, late, out of order, and many at once. A message that it
could not route comes back first, without a tag, and is confirmed all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from itertools import takewhile
from typing import Any

from amqp.exceptions import ChannelError, UnexpectedFrame

from celery_eda.identity import ID_HEADER, REVISION_HEADER
from celery_eda.transports.base import CONFIRMED, PublishResult, Sendable, Verdict

#: The broker's code for a message that no queue would get.
NO_ROUTE = 312
NACKED = PublishResult(
    Verdict.refused, "basic.nack: the queue is full, or cannot store the message"
)


class Flight:
    """The messages under way on one channel.

    Args:
        tags: the delivery tags that the channel gives out from here on.
        answers: where the answers go, by the message's number.
    """

    def __init__(self, tags: Iterator[int], answers: MutableMapping[int, PublishResult]) -> None:
        self._tags = tags
        self._answers = answers
        self._under_way: dict[int, tuple[int, Sendable]] = {}
        self._returned: dict[int, PublishResult] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def under_way(self) -> list[tuple[int, Sendable]]:
        """The messages under way with their numbers, in the order of sending."""
        return list(self._under_way.values())

    def add(self, number: int, message: Sendable) -> None:
        """Take off with *message*; it is the next that is published on the channel."""
        self._under_way[next(self._tags)] = number, message

    def listen(self, channel: Any) -> None:
        """Be the one that hears the answers on *channel*."""
        channel.events["basic_ack"] = {self.ack}
        channel.events["basic_nack"] = {self.nack}
        channel.events["basic_return"] = {self.come_back}

    def ack(self, tag: int, multiple: bool) -> None:
        for each in self._meant(tag, multiple):
            self._land(each, self._returned.pop(each, CONFIRMED))

    def nack(self, tag: int, multiple: bool) -> None:
        for each in self._meant(tag, multiple):
            self._land(each, self._returned.pop(each, NACKED))

    def come_back(
        self, error: ChannelError, exchange: str, routing_key: str, returned: Any
    ) -> None:
        """Remember that the broker could not route a message, until its confirm comes.

        Where two under way look the same, both count as returned: sending one of them again does
        no harm, taking it for delivered would.
        """
        headers = returned.headers or {}
        alike = [
            tag
            for tag, (_, message) in self._under_way.items()
            if str(message.identity.id) == headers.get(ID_HEADER)
            and message.identity.revision == headers.get(REVISION_HEADER)
            and message.routing_key == routing_key
            and message.exchange == exchange
        ]
        if not alike:
            raise UnexpectedFrame("The broker returned a message that is not under way.")
        why = f"{error.reply_code} {error.reply_text}: {exchange=} {routing_key=}"
        answer = PublishResult(Verdict.refused, why, unroutable=error.reply_code == NO_ROUTE)
        self._returned.update(dict.fromkeys(alike, answer))

    def _meant(self, tag: int, multiple: bool) -> list[int]:
        """The tags that the broker answers for: this one, or all up to it."""
        if multiple:
            return list(takewhile(lambda each: each <= tag, self._under_way))
        return [tag] if tag in self._under_way else []

    def _land(self, tag: int, answer: PublishResult) -> None:
        number, _ = self._under_way.pop(tag)
        self._answers[number] = answer
