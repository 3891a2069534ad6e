"""The tables of one service, on one SQLAlchemy ``MetaData``.

Names that differ in case, trailing blanks or Unicode form are different on every database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
)

from celery_eda.core.limits import KEY_BYTES, NAME_LENGTH
from celery_eda.databases.types import Bytes, Identifier, LongText, MessageId, Moment, Name

_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_bin",
}


@dataclass(frozen=True)
class Tables:
    """The tables of one service.

    Attributes:
        prefix: the beginning of their names.
        schema: the database schema of the tables, None for the default one.
        outbox: committed messages that are not sent yet.
        inbox: the outcome of each attempt at a message.
        attempts: deliveries of messages that have no outcome yet.
        dead_letters: messages that could not be sent or handled, complete.
        sequences: the last number assigned to a message of each ordering key, by this service.
        cursors: the last number handled of each ordering key, by each consumer.
        parked: messages that arrived before their predecessor, complete.
        audit: actions on dead letters, with author and reason.
        requests: durable requests of this service, and their replies.
        events: every event that this service has emitted.
        snapshots: folded states of event streams, each at a version.
        declarations: broker queues declared for subscriptions of this service.
        projections: the tables that projections write, and the state of their rebuilds.
        sagas: the state of each saga of this service.
        saga_steps: each attempt at a step of a saga, and its outcome.
        saga_locks: keys locked by sagas, and the sagas that wait for them.
        queue: messages waiting for a worker, where the database itself is the broker.
        bindings: queues, and the exchanges that route to them.
        takers: processes that currently consume from those queues.
        services: the names of the services that use these tables, each with a unique id.
        version: the revision of the tables, as Alembic records it.
    """

    prefix: str
    schema: str | None
    metadata: MetaData
    outbox: Table
    inbox: Table
    attempts: Table
    dead_letters: Table
    sequences: Table
    cursors: Table
    parked: Table
    audit: Table
    requests: Table
    events: Table
    snapshots: Table
    declarations: Table
    projections: Table
    sagas: Table
    saga_steps: Table
    saga_locks: Table
    queue: Table
    bindings: Table
    takers: Table
    services: Table
    version: Table

    @property
    def all(self) -> tuple[Table, ...]:
        """Every table except that of the version."""
        return (
            self.outbox,
            self.inbox,
            self.attempts,
            self.dead_letters,
            self.sequences,
            self.cursors,
            self.parked,
            self.audit,
            self.requests,
            self.events,
            self.snapshots,
            self.declarations,
            self.projections,
            self.sagas,
            self.saga_steps,
            self.saga_locks,
            self.queue,
            self.bindings,
            self.takers,
            self.services,
        )

    @classmethod
    def on(
        cls, metadata: MetaData | None = None, *, prefix: str = "eda_", schema: str | None = None
    ) -> Tables:
        """The tables, added to *metadata*: a project's own, so that its migrations see them."""
        metadata = MetaData() if metadata is None else metadata
        where = (metadata, prefix, schema)
        inbox, attempts = _inbox_tables(*where)
        dead_letters, audit = _dead_letter_tables(*where)
        sequences, cursors, parked = _ordering_tables(*where)
        events, snapshots, declarations, projections = _event_tables(*where)
        sagas, saga_steps, saga_locks = _saga_tables(*where)
        queue, bindings, takers = _queue_tables(*where)
        return cls(
            prefix=prefix,
            schema=schema,
            metadata=metadata,
            outbox=_outbox_table(*where),
            inbox=inbox,
            attempts=attempts,
            dead_letters=dead_letters,
            audit=audit,
            sequences=sequences,
            cursors=cursors,
            parked=parked,
            requests=_request_table(*where),
            events=events,
            snapshots=snapshots,
            declarations=declarations,
            projections=projections,
            sagas=sagas,
            saga_steps=saga_steps,
            saga_locks=saga_locks,
            queue=queue,
            bindings=bindings,
            takers=takers,
            services=_service_table(*where),
            version=_version_table(*where),
        )


def _outbox_table(metadata: MetaData, prefix: str, schema: str | None) -> Table:
    outbox = Table(
        f"{prefix}outbox",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        *_message_columns(),
        Column("available_at", Moment, nullable=True),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("last_error", LongText),
        Column("claimed_by", String(32)),
        Column("envelope", Bytes),
        Column("service", Name),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    # One index serves both claims: rows for now (NULL, by id) and rows that came due.
    Index(f"ix_{prefix}outbox_available", outbox.c.available_at, outbox.c.id)
    return outbox


def _inbox_tables(metadata: MetaData, prefix: str, schema: str | None) -> tuple[Table, Table]:
    inbox = Table(
        f"{prefix}inbox",
        metadata,
        *_attempt_columns(),
        Column("outcome", String(8), nullable=False),
        Column("result", Bytes),
        Column("at", Moment, nullable=False),
        PrimaryKeyConstraint("consumer", "message_id", "revision"),
        schema=schema,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}inbox_at", inbox.c.at)
    attempts = Table(
        f"{prefix}attempts",
        metadata,
        *_attempt_columns(),
        Column("deliveries", Integer, nullable=False),
        Column("at", Moment, nullable=False),
        Column("cause", String(16)),
        PrimaryKeyConstraint("consumer", "message_id", "revision"),
        schema=schema,
        **_OPTIONS,
    )
    return inbox, attempts


def _dead_letter_tables(metadata: MetaData, prefix: str, schema: str | None) -> tuple[Table, Table]:
    dead_letters = Table(
        f"{prefix}dead_letters",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        *_message_columns(),
        Column("consumer", Name),
        Column("reason", String(32), nullable=False),
        Column("error_type", String(NAME_LENGTH)),
        Column("error", LongText),
        Column("traceback", LongText),
        Column("attempts", Integer, nullable=False),
        Column("at", Moment, nullable=False),
        Column("state", String(16), nullable=False, server_default="open"),
        Column("first_at", Moment),
        Column("ordering_key", Name(KEY_BYTES)),
        Column("correlation_id", String(NAME_LENGTH)),
        Column("causation_id", String(NAME_LENGTH)),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}dead_letters_state", dead_letters.c.state, dead_letters.c.id)
    Index(f"ix_{prefix}dead_letters_message", dead_letters.c.message_id)
    Index(f"ix_{prefix}dead_letters_at", dead_letters.c.at)
    audit = Table(
        f"{prefix}audit",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        Column("at", Moment, nullable=False),
        Column("actor", String(NAME_LENGTH), nullable=False),
        Column("action", String(16), nullable=False),
        Column("why", LongText),
        Column("dead_letter", BigInteger),
        Column("consumer", Name),
        Column("message_id", MessageId),
        Column("revision", Integer),
        Column("detail", LongText),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}audit_message", audit.c.message_id, audit.c.id)
    Index(f"ix_{prefix}audit_letter", audit.c.dead_letter, audit.c.at)
    Index(f"ix_{prefix}audit_at", audit.c.at)
    return dead_letters, audit


def _ordering_tables(
    metadata: MetaData, prefix: str, schema: str | None
) -> tuple[Table, Table, Table]:
    sequences = Table(
        f"{prefix}sequences",
        metadata,
        Column("stream", Name, nullable=False),
        Column("key", Name(KEY_BYTES), nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("last", BigInteger, nullable=False),
        Column("previous_epoch", BigInteger),
        Column("previous_last", BigInteger),
        Column("version", BigInteger, nullable=False, server_default="0"),
        Column("history", String(80)),
        PrimaryKeyConstraint("stream", "key"),
        schema=schema,
        **_OPTIONS,
    )
    cursors = Table(
        f"{prefix}cursors",
        metadata,
        *_key_columns(),
        Column("epoch", BigInteger, nullable=False),
        Column("last", BigInteger, nullable=False),
        Column("held", Integer),
        Column("parked", Integer, nullable=False),
        PrimaryKeyConstraint("consumer", "source", "stream", "key"),
        schema=schema,
        **_OPTIONS,
    )
    parked = Table(
        f"{prefix}parked",
        metadata,
        *_key_columns(),
        Column("epoch", BigInteger, nullable=False),
        Column("number", BigInteger, nullable=False),
        Column("previous_epoch", BigInteger),
        Column("previous_last", BigInteger),
        *_message_columns(),
        Column("released_at", Moment),
        PrimaryKeyConstraint("consumer", "source", "stream", "key", "epoch", "number"),
        schema=schema,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}parked_message", parked.c.message_id)
    return sequences, cursors, parked


def _request_table(metadata: MetaData, prefix: str, schema: str | None) -> Table:
    requests = Table(
        f"{prefix}requests",
        metadata,
        Column("correlation_id", MessageId, nullable=False),
        Column("task", String(NAME_LENGTH), nullable=False),
        Column("at", Moment, nullable=False),
        Column("replied_at", Moment),
        Column("content_type", String(NAME_LENGTH)),
        Column("content_encoding", String(NAME_LENGTH)),
        Column("body", Bytes),
        PrimaryKeyConstraint("correlation_id"),
        schema=schema,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}requests_at", requests.c.at)
    return requests


def _version_table(metadata: MetaData, prefix: str, schema: str | None) -> Table:
    return Table(
        f"{prefix}version",
        metadata,
        Column("version_num", String(32), nullable=False),
        PrimaryKeyConstraint("version_num", name=f"{prefix}version_pkc"),
        schema=schema,
    )


def _event_tables(
    metadata: MetaData, prefix: str, schema: str | None
) -> tuple[Table, Table, Table, Table]:
    events = Table(
        f"{prefix}events",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        Column("position", BigInteger),
        Column("event_id", MessageId, nullable=False),
        Column("type", Name(KEY_BYTES), nullable=False),
        Column("category", Name(KEY_BYTES), nullable=False),
        Column("key", Name(KEY_BYTES)),
        Column("version", BigInteger),
        Column("source", Name(KEY_BYTES), nullable=False),
        Column("data_version", Integer, nullable=False),
        Column("data", LongText, nullable=False),
        Column("time", Moment, nullable=False),
        Column("at", Moment, nullable=False),
        Column("correlation_id", String(NAME_LENGTH)),
        Column("causation_id", String(NAME_LENGTH)),
        Column("ordered_at", LongText),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    by = events.c
    Index(f"ix_{prefix}events_position", by.position, unique=True)
    Index(f"ix_{prefix}events_event", by.event_id, unique=True)
    Index(f"ix_{prefix}events_stream", by.category, by.key, by.version, unique=True)
    Index(f"ix_{prefix}events_type", by.type, by.position)
    Index(f"ix_{prefix}events_category", by.category, by.position)
    snapshots = Table(
        f"{prefix}snapshots",
        metadata,
        Column("category", Name(KEY_BYTES), nullable=False),
        Column("key", Name(KEY_BYTES), nullable=False),
        Column("name", Name(KEY_BYTES), nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("state", LongText, nullable=False),
        Column("at", Moment, nullable=False),
        PrimaryKeyConstraint("category", "key", "name", "version"),
        schema=schema,
        **_OPTIONS,
    )
    declarations = Table(
        f"{prefix}declarations",
        metadata,
        Column("queue", Name, nullable=False),
        Column("task", Name, nullable=False),
        Column("patterns", LongText, nullable=False),
        Column("at", Moment, nullable=False),
        PrimaryKeyConstraint("queue"),
        schema=schema,
        **_OPTIONS,
    )
    projections = Table(
        f"{prefix}projections",
        metadata,
        Column("name", Name, nullable=False),
        Column("shadow", String(NAME_LENGTH)),
        PrimaryKeyConstraint("name"),
        schema=schema,
        **_OPTIONS,
    )
    return events, snapshots, declarations, projections


def _saga_tables(metadata: MetaData, prefix: str, schema: str | None) -> tuple[Table, Table, Table]:
    sagas = Table(
        f"{prefix}sagas",
        metadata,
        Column("id", Name(KEY_BYTES), nullable=False),
        Column("name", Name(KEY_BYTES), nullable=False),
        Column("version", Integer, nullable=False),
        Column("state", String(20), nullable=False),
        Column("data", LongText, nullable=False),
        Column("back", Boolean, nullable=False),
        Column("cancelled", Boolean, nullable=False),
        Column("error", LongText),
        Column("root", Name(KEY_BYTES)),
        Column("record", BigInteger),
        Column("begun_at", Moment, nullable=False),
        Column("changed_at", Moment),
        PrimaryKeyConstraint("id"),
        schema=schema,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}sagas_state", sagas.c.state, sagas.c.changed_at)
    Index(f"ix_{prefix}sagas_changed", sagas.c.changed_at)
    Index(f"ix_{prefix}sagas_root", sagas.c.root)
    Index(f"ix_{prefix}sagas_record", sagas.c.record, unique=True)
    steps = Table(
        f"{prefix}saga_steps",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        Column("saga", Name(KEY_BYTES), nullable=False),
        Column("kind", String(20), nullable=False),
        Column("place", Name(KEY_BYTES), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("status", String(20), nullable=False),
        Column("timed_out", Boolean, nullable=False),
        Column("ended", Integer),
        Column("request", MessageId),
        Column("value", LongText, nullable=False),
        Column("who", String(NAME_LENGTH)),
        Column("begun_at", Moment, nullable=False),
        Column("ended_at", Moment),
        Column("due", Moment),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}saga_steps_saga", steps.c.saga, steps.c.id)
    Index(f"ix_{prefix}saga_steps_request", steps.c.request, unique=True)
    locks = Table(
        f"{prefix}saga_locks",
        metadata,
        Column("key", Name(KEY_BYTES), nullable=False),
        Column("place", BigInteger, nullable=False, autoincrement=False),
        Column("owner", Name(KEY_BYTES), nullable=False),
        Column("saga", Name(KEY_BYTES), nullable=False),
        PrimaryKeyConstraint("key", "place"),
        schema=schema,
        **_OPTIONS,
    )
    Index(f"ix_{prefix}saga_locks_owner", locks.c.owner)
    return sagas, steps, locks


def _queue_tables(
    metadata: MetaData, prefix: str, schema: str | None
) -> tuple[Table, Table, Table]:
    queue = Table(
        f"{prefix}queue",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        Column("queue", String(NAME_LENGTH), nullable=False),
        Column("rank", Integer, nullable=False),
        Column("due", Moment),
        Column("expires_at", Moment),
        # NULL: free. 0: not due yet. Otherwise the id of the taker that has claimed it.
        Column("owner", BigInteger),
        Column("fence", Integer, nullable=False, server_default="0"),
        Column("message", LongText, nullable=False),
        Column("body", Bytes, nullable=False),
        Column("at", Moment, nullable=False),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    columns = queue.c
    for name, of, where in (
        ("ready", (columns.queue, columns.rank, columns.id), columns.owner.is_(None)),
        ("owned", (columns.owner, columns.due), columns.owner.is_not(None)),
        ("expires", (columns.expires_at,), columns.expires_at.is_not(None)),
    ):
        Index(f"ix_{prefix}queue_{name}", *of, postgresql_where=where, sqlite_where=where)
    bindings = Table(
        f"{prefix}bindings",
        metadata,
        Column("exchange", Name, nullable=False),
        Column("routing_key", Name, nullable=False),
        Column("queue", Name, nullable=False),
        Column("owner", BigInteger),
        PrimaryKeyConstraint("exchange", "routing_key", "queue"),
        schema=schema,
        **_OPTIONS,
    )
    takers = Table(
        f"{prefix}takers",
        metadata,
        Column("id", Identifier, primary_key=True, autoincrement=True),
        Column("name", String(NAME_LENGTH), nullable=False),
        Column("at", Moment, nullable=False),
        Column("lease", Float),
        schema=schema,
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    return queue, bindings, takers


def _service_table(metadata: MetaData, prefix: str, schema: str | None) -> Table:
    return Table(
        f"{prefix}services",
        metadata,
        Column("name", Name, nullable=False),
        Column("id", MessageId, nullable=False),
        Column("at", Moment, nullable=False),
        PrimaryKeyConstraint("name"),
        schema=schema,
        **_OPTIONS,
    )


def _key_columns() -> tuple[Column[Any], ...]:
    return (
        Column("consumer", Name, nullable=False),
        Column("source", Name(KEY_BYTES), nullable=False),
        Column("stream", Name, nullable=False),
        Column("key", Name(KEY_BYTES), nullable=False),
    )


def _attempt_columns() -> tuple[Column[Any], ...]:
    return (
        Column("consumer", Name, nullable=False),
        Column("message_id", MessageId, nullable=False),
        Column("revision", Integer, nullable=False),
    )


def _message_columns() -> tuple[Column[Any], ...]:
    return (
        Column("message_id", MessageId, nullable=False),
        Column("revision", Integer, nullable=False),
        Column("task", String(NAME_LENGTH), nullable=False),
        Column("queue", String(NAME_LENGTH)),
        Column("exchange", String(NAME_LENGTH), nullable=False),
        Column("routing_key", String(NAME_LENGTH), nullable=False),
        Column("content_type", String(NAME_LENGTH), nullable=False),
        Column("content_encoding", String(NAME_LENGTH), nullable=False),
        Column("headers", LongText, nullable=False),
        Column("properties", LongText, nullable=False),
        Column("body", Bytes, nullable=False),
        Column("preparation", LongText),
        Column("created_at", Moment, nullable=False),
    )
