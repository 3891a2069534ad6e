"""What a relay has in its hands: batches of rows, each in a transaction of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine

from celery_eda.message import Message
from celery_eda.outbox import ClaimedMessage, Pending
from celery_eda.transports.base import PublishResult, Verdict

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(eq=False)
class Batch:
    """Claimed rows, and the transaction that holds them.

    Attributes:
        unprepared: why what has to precede some of them cannot be done, by their ids.
        answers: the broker's, to those that can be sent.
        since: when it was begun to claim them, by :func:`time.monotonic`.
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


class Hands:
    """The batches that a relay holds; whatever happens, it lets go of them at the end.

    Attributes:
        taken: how many there were so far.
        is_in_doubt: whether the broker has left some of one unanswered.
    """

    def __init__(self, engine: Engine) -> None:
        self.taken = 0
        self.is_in_doubt = False
        self._engine = engine
        self._held: list[Batch] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._held:
            batch.connection.close()

    def take(self) -> Batch:
        """A batch to be filled."""
        batch = Batch(self._engine.connect())
        self._held.append(batch)
        self.taken += 1
        return batch

    def hear(self, batch: Batch, answers: Sequence[PublishResult]) -> None:
        """Have the broker's *answers* to *batch*; where one is missing it may be away."""
        batch.answers = answers
        self.is_in_doubt |= any(each.verdict is Verdict.unknown for each in answers)

    def let_go(self, batch: Batch) -> None:
        """Commit what was done about *batch*."""
        batch.connection.commit()
        batch.connection.close()
        self._held.remove(batch)
