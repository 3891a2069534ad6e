"""The progress of consumers through the messages of their keys, as people and checks see it.

Everything here reads without locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, exists, func, or_, select

from celery_eda.core.clock import utc
from celery_eda.core.identity import ANY, Lane, Position
from celery_eda.databases import Dialect

#: The columns that name a consumer and one of its lanes.
NAMES = ("consumer", "source", "stream", "key")


@dataclass(frozen=True)
class WaitingKey:
    """A key of which messages are parked, because an earlier one has not been handled.

    Attributes:
        epoch: that of the last message handled; 0 before the first one.
        last: its number.
        held: revision of the dead letter that blocks the key; None if the message that is awaited
            is not known here: it may still come, or be lost.
        parked: the number of messages that wait.
        since: when the first of them was parked.
        following: epoch and number of the lowest of them.
    """

    consumer: str
    lane: Lane
    epoch: int
    last: int
    held: int | None
    parked: int
    since: datetime
    following: tuple[int, int]

    @property
    def awaited(self) -> int:
        """The number of the message that has to come next."""
        return self.last + 1

    @property
    def name(self) -> str:
        """Consumer and key, for people."""
        lane = self.lane
        return f"{self.consumer}, key {lane.key!r} of {lane.scope} from {lane.source}"

    @property
    def gap(self) -> str:
        """The missing numbers, for people."""
        epoch, number = self.following
        if number == 1:
            return f"the messages before epoch {epoch}"
        if self.epoch not in (0, epoch):
            return f"number {self.awaited} and all later ones of epoch {self.epoch}"
        if number == self.awaited + 1:
            return f"number {self.awaited}"
        return f"numbers {self.awaited} to {number - 1}"

    @property
    def skipped(self) -> Position:
        """The position directly before the lowest parked message."""
        epoch, number = self.following
        return Position(self.lane, epoch, number - 1)


@dataclass(frozen=True)
class Progress:
    """Reads the cursors, and the messages parked, of one database."""

    cursors: Table
    parked: Table
    dialect: Dialect

    def waiting(
        self,
        connection: Connection,
        limit: int | None = None,
        *,
        seconds: float = 0.0,
        is_held: bool | None = None,
        is_given_up: bool = False,
        **names: str | None,
    ) -> Sequence[WaitingKey]:
        """The keys that wait, the longest first.

        Args:
            connection: to read with.
            limit: the most keys; None for all.
            seconds: leaves out keys that have waited for less.
            is_held: True for keys that a dead letter blocks, False for those that wait for a
                message not known here, None for both.
            is_given_up: True for keys whose producer has begun a new epoch after a restore, so that
                no message before that epoch need be waited for.
            names: the ``consumer``, ``source``, ``stream`` or ``key``; None for any.
        """
        cursor, parked = self.cursors.c, self.parked.c
        since = func.min(parked.created_at)
        following = self.parked.alias()
        is_on_its_way = exists().where(
            *(following.c[name] == cursor[name] for name in NAMES),
            following.c.epoch == cursor.epoch,
            following.c.number == cursor.last + 1,
        )
        columns: list[ColumnElement[Any]] = [
            *(cursor[name] for name in (*NAMES, "epoch", "last", "held")),
            func.count().label("parked"),
            since.label("since"),
            func.min(parked.epoch).label("following"),
        ]
        query = (
            select(*columns)
            .join(self.cursors, and_(*(parked[name] == cursor[name] for name in NAMES)))
            # Messages of an epoch that the cursor has left wait for nothing.
            .where(parked.epoch >= cursor.epoch, ~is_on_its_way)
            .group_by(*self.cursors.primary_key, cursor.epoch, cursor.last, cursor.held)
            .having(since <= self.dialect.later(-seconds))
            .order_by(since, *self.cursors.primary_key)
            .limit(limit)
        )
        for name, value in names.items():
            if value is not None:
                query = query.where(cursor[name] == value)
        if is_held is not None:
            query = query.where(cursor.held.is_not(None) if is_held else cursor.held.is_(None))
        if is_given_up:
            anew = self.parked.alias()
            query = query.where(
                exists().where(
                    *(anew.c[name] == cursor[name] for name in NAMES),
                    anew.c.epoch > cursor.epoch,
                    anew.c.previous_epoch == ANY[0],
                )
            )
        return [self._waiting_key(connection, row) for row in connection.execute(query).all()]

    def count_parked(self, connection: Connection, consumer: str) -> int:
        """Number of messages parked for *consumer*."""
        query = select(func.count()).where(self.parked.c.consumer == consumer)
        return connection.scalar(query) or 0

    def differing_keys(
        self, connection: Connection, one: str, other: str, limit: int
    ) -> tuple[str, ...]:
        """Up to *limit* keys in which two consumers have made different progress."""
        ends = self.cursors.alias(), self.cursors.alias()
        found: dict[str, None] = {}
        for here, there in (ends, ends[::-1]):
            names = {ends[0]: one, ends[1]: other}
            same = and_(
                there.c.consumer == names[there],
                *(here.c[name] == there.c[name] for name in NAMES[1:]),
            )
            far = [
                func.coalesce(here.c[name], 0) != func.coalesce(there.c[name], 0)
                for name in ("epoch", "last")
            ]
            query = select(here.c.key).outerjoin_from(here, there, same)
            query = query.where(here.c.consumer == names[here], or_(*far)).limit(limit)
            found.update(dict.fromkeys(connection.scalars(query)))
        return tuple(found)[:limit]

    def _waiting_key(self, connection: Connection, row: Row[Any]) -> WaitingKey:
        parked = self.parked.c
        its = (parked[name] == getattr(row, name) for name in NAMES)
        lowest = select(func.min(parked.number)).where(*its, parked.epoch == row.following)
        return WaitingKey(
            consumer=row.consumer,
            lane=Lane(row.source, row.stream, row.key),
            epoch=row.epoch,
            last=row.last,
            held=row.held,
            parked=row.parked,
            since=utc(row.since),
            following=(row.following, connection.execute(lowest).scalar_one()),
        )
