"""The batches of rows that a relay has claimed, each in a transaction of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine

from celery_eda.brokers import PublishResult, Verdict
from celery_eda.core.message import Message
from celery_eda.outbox.store import ClaimedMessage, Pending

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(eq=False)
class Batch:
    """Claimed rows, and the transaction that locks them.

    Attributes:
        unprepared: the rows whose prerequisites failed, with the reasons, by row id.
        answers: the broker's answers to the sendable rows, in their order.
        since: time at which the claim began, by :func:`time.monotonic`.
    """

    connection: Connection
    pending: Sequence[Pending] = ()
    unprepared: Mapping[int, str] = field(default_factory=dict)
    answers: Sequence[PublishResult] = ()
    since: float = field(default_factory=time.monotonic)

    @property
    def sendable(self) -> list[Pending]:
        return [each for each in self.pending if each.id not in self.unprepared]

    @property
    def messages(self) -> list[Message | ClaimedMessage]:
        return [each.message for each in self.sendable]

    @property
    def answered(self) -> list[tuple[Pending, PublishResult]]:
        return list(zip(self.sendable, self.answers, strict=True))


class ClaimedBatches:
    """The batches that a relay has claimed; a context manager that ends all claims at its end.

    Attributes:
        count: the number of batches so far.
        is_in_doubt: True if the broker has left a message of some batch unanswered.
    """

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        self.is_in_doubt = False
        self._engine = engine
        self._open: list[Batch] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._open:
            batch.connection.close()

    def begin(self) -> Batch:
        """An empty batch with a connection of its own."""
        batch = Batch(self._engine.connect())
        self._open.append(batch)
        self.count += 1
        return batch

    def receive(self, batch: Batch, answers: Sequence[PublishResult]) -> None:
        """Store the broker's *answers* to *batch*."""
        batch.answers = answers
        self.is_in_doubt |= any(each.verdict is Verdict.unknown for each in answers)

    def commit(self, batch: Batch) -> None:
        """Commit the transaction of *batch*, which ends its claim."""
        batch.connection.commit()
        batch.connection.close()
        self._open.remove(batch)
