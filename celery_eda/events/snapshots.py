"""Snapshots: states of streams at some of their versions, where later folds begin."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kombu.utils import json
from sqlalchemy import Connection, Table, select

from celery_eda.core.clock import utc
from celery_eda.databases import Dialect
from celery_eda.errors import InvalidEvent
from celery_eda.events.store import parts_of


@dataclass(frozen=True)
class Snapshot:
    """The state of a stream after its event *version*."""

    version: int
    state: Any


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one database, by stream and by the name of the fold."""

    table: Table
    dialect: Dialect

    def latest(
        self, connection: Connection, stream: str, name: str, at: datetime | None = None
    ) -> Snapshot | None:
        """Return the latest snapshot of events appended until *at*; None if there is none."""
        columns = self.table.c
        category, key = parts_of(stream)
        query = select(columns.version, columns.state).where(
            columns.category == category, columns.key == key, columns.name == name
        )
        if at is not None:
            query = query.where(columns.at <= utc(at))
        row = connection.execute(query.order_by(columns.version.desc()).limit(1)).one_or_none()
        return None if row is None else Snapshot(row.version, json.loads(row.state))

    def add(
        self, connection: Connection, stream: str, name: str, snapshot: Snapshot, at: datetime
    ) -> None:
        """Store a snapshot, whose last event was appended at the time *at*. Idempotent.

        Raises:
            InvalidEvent: the state changes when it is written as JSON and read again.
        """
        try:
            state = json.dumps(snapshot.state)
            same = json.loads(state) == snapshot.state
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise InvalidEvent(
                f"The state {name!r} of {stream} changes when written as JSON and read again. "
                "Fold to strings, numbers, lists and dictionaries, or leave out the snapshot."
            )
        category, key = parts_of(stream)
        values = {"category": category, "key": key, "name": name, "version": snapshot.version}
        self.dialect.insert_once(connection, self.table, {**values, "state": state, "at": utc(at)})
