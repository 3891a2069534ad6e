"""One worker slot without its process, to which messages of the outbox are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.app.trace import trace_task_ret
from sqlalchemy import Column, Integer, MetaData, Table, delete, insert, select

from celery_eda import EDA
from celery_eda.core.identity import DRAIN, WIRE
from celery_eda.core.message import Message, Wire
from celery_eda.databases import message_rows
from celery_eda.inbox.drain import Drain
from tests.faults.programs.tables import effects
from tests.support.databases import Database

#: No two rows with the same number.
unique = Table("unique_numbers", MetaData(), Column("number", Integer, primary_key=True))


class Slot:
    """One slot of a worker: an app, its database, and the messages that wait for it."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.engine = database.engine
        self.app = Celery(f"slot-{uuid4()}", broker="memory://", backend="cache+memory://")
        self.app.conf.update(eda_send_after_commit=False, eda_outage_patience=0.0, **settings)
        self.eda = EDA(self.app, engine=database.engine)

    def task(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """``@eda.task``, named as the function."""
        if function is None:
            return lambda given: self.task(given, **options)
        return self.eda.task(**{"name": function.__name__, **options})(function)

    def write(self, number: int) -> None:
        """Take effect."""
        self.eda.session.execute(insert(effects).values(name="effect", number=number))

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def sent(self) -> list[Message]:
        """Take what waits in the outbox, in the order of publishing, due or not."""
        table = self.database.tables.outbox
        with self.engine.begin() as connection:
            rows = connection.execute(select(table).order_by(table.c.id)).all()
            connection.execute(delete(table))
        return [message_rows.from_row(row) for row in rows]

    def waiting(self) -> list[str]:
        """The tasks of what waits in the outbox."""
        with self.engine.connect() as connection:
            columns = self.database.tables.outbox.c
            return list(connection.scalars(select(columns.task).order_by(columns.id)))

    def deliver(
        self, message: Message, *, drain: Drain | None = None, **delivery_info: Any
    ) -> BaseException | None:
        """Bring *message* to its task; with a *drain*, parked messages may follow it.

        Returns:
            The exception that tells Celery how it ended; None after a success.
        """
        headers = dict(message.headers)
        properties = dict(message.properties)
        request = {
            **headers,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id"),
            "properties": properties,
            DRAIN: drain,
            WIRE: Wire(
                message.body,
                message.content_type,
                message.content_encoding,
                headers,
                properties,
            ),
            "delivery_info": {
                "exchange": message.exchange,
                "routing_key": message.routing_key,
                "priority": 0,
                "redelivered": False,
                **delivery_info,
            },
        }
        failed, result, _ = trace_task_ret(
            message.task,
            headers["id"],
            request,
            message.body,
            message.content_type,
            message.content_encoding,
            app=self.app,
        )
        if not failed:
            return None
        # With a traceback, unless Celery means the exception for itself.
        return getattr(result.exception, "exc", result.exception)

    def work(self, rounds: int = 20) -> list[BaseException | None]:
        """Deliver everything in the outbox, and what that publishes; returns how each ended."""
        endings = []
        for _ in range(rounds):
            if not (messages := self.sent()):
                return endings
            endings += [self.deliver(each) for each in messages]
        raise AssertionError(f"no end after {rounds} rounds")

    # ── what happened ───────────────────────────────────────────────────────────────────────

    def effects(self) -> list[int]:
        """The numbers that took effect."""
        with self.engine.connect() as connection:
            return sorted(connection.scalars(select(effects.c.number)))

    def outcomes(self) -> list[tuple[int, str]]:
        """Revision and outcome of each attempt."""
        columns = self.database.tables.inbox.c
        with self.engine.connect() as connection:
            rows = connection.execute(select(columns.revision, columns.outcome))
            return sorted(tuple(row) for row in rows)

    def dead(self) -> Sequence[Any]:
        """The dead letters."""
        with self.engine.connect() as connection:
            return connection.execute(select(self.database.tables.dead_letters)).all()

    def result(self, message: Message) -> Any:
        """What somebody who waits for the result of *message* gets."""
        return self.app.AsyncResult(message.headers["id"])


@pytest.fixture
def slot(shared_database: Database) -> Iterator[Slot]:
    """A slot on each database, with empty tables."""
    for table in (effects, unique):
        table.create(shared_database.engine, checkfirst=True)
    yield Slot(shared_database)
    with shared_database.engine.begin() as connection:
        for table in (*shared_database.tables.all, effects, unique):
            connection.execute(delete(table))
