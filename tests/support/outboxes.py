"""A stand-in for the outbox of a service, for tests of transactions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine

from celery_eda.core.message import Message


@dataclass(frozen=True)
class StandInWriter:
    """Calls the test instead of writing.

    Attributes:
        write: gets a connection and messages, returns where each was written.
        dispatch: gets what was written, once its transaction is over.
        write_now: gets messages published outside any transaction.
    """

    write: Callable[[Connection, Sequence[Message]], Sequence[Any]]
    dispatch: Callable[[list[Any]], object]
    write_now: Callable[[Sequence[Message]], object]


@dataclass(frozen=True)
class StandInDatabases:
    """The database of the outbox."""

    engine: Engine | None


@dataclass(frozen=True)
class StandInOutbox:
    """An outbox with nothing but a writer and an engine."""

    writer: StandInWriter
    databases: StandInDatabases
    service: None = None


def stand_in_outbox(
    write: Callable[[Connection, Sequence[Message]], Sequence[Any]],
    dispatch: Callable[[list[Any]], object],
    write_now: Callable[[Sequence[Message]], object],
    engine: Engine | None = None,
) -> Any:
    """An outbox on *engine* whose writer calls these functions."""
    return StandInOutbox(StandInWriter(write, dispatch, write_now), StandInDatabases(engine))
