"""The state of a stream: the fold of its events, now or at a time in the past.

A fold with a name stores a snapshot every 100 events, and the next fold begins at the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from celery_eda.core import context
from celery_eda.core.event import Event, ordering_scope
from celery_eda.errors import ArchivedEvents
from celery_eda.events.registry import EventRegistry
from celery_eda.events.snapshots import Snapshot, Snapshots
from celery_eda.events.store import EventStore, parts_of
from celery_eda.ordering import Sequences

S = TypeVar("S")

#: Events after the last snapshot from which on a fold stores another one.
EVERY = 100


@dataclass(frozen=True)
class StreamFold:
    """Folds the streams of one service."""

    engine: Engine
    store: EventStore
    snapshots: Snapshots
    sequences: Sequences
    registry: EventRegistry

    def fold(
        self,
        stream: str,
        initial: S,
        apply: Callable[[S, Event], S],
        *,
        at: datetime | None,
        snapshot: str | None,
        session: Session | Connection | None,
    ) -> S:
        """Fold a stream; see :meth:`celery_eda.EDA.fold`."""
        with self._connection(session) as connection:
            begin = Snapshot(0, initial)
            if snapshot is not None:
                begin = self.snapshots.latest(connection, stream, snapshot, at) or begin
            state, last = begin.state, None
            for event in self.store.stream(connection, stream, after=begin.version, at=at):
                if last is None:
                    self._require_next(stream, begin.version, event.version)
                state, last = apply(state, self.registry.restored(event)), event
            if last is None:
                self._require_end(connection, stream, begin.version)
            elif snapshot is not None and (last.version or 0) - begin.version >= EVERY:
                assert last.recorded is not None, "it comes from the store"
                made = Snapshot(last.version or 0, state)
                self.snapshots.add(connection, stream, snapshot, made, last.recorded)
        result: S = state
        return result

    def _connection(
        self, session: Session | Connection | None
    ) -> AbstractContextManager[Connection]:
        """The connection of *session*, else of the message in progress, else a new one."""
        if session is not None:
            given = session.connection() if isinstance(session, Session) else session
            return nullcontext(given)
        progress = context.in_progress.get()
        if progress is not None and not progress.finished:
            return nullcontext(progress.connection)
        return self.engine.begin()

    def _require_next(self, stream: str, after: int, version: int | None) -> None:
        """Make sure that *version*, the first one read, follows *after* without a gap."""
        if version != after + 1:
            raise ArchivedEvents(stream, after + 1)

    def _require_end(self, connection: Connection, stream: str, after: int) -> None:
        """Make sure that every event after version *after* is still in the store.

        Raises:
            ArchivedEvents: the next event of the stream has left the store.
        """
        category, key = parts_of(stream)
        if self.sequences.version(connection, ordering_scope(category), key) <= after:
            return
        first = next(self.store.stream(connection, stream, after=after), None)
        self._require_next(stream, after, None if first is None else first.version)
