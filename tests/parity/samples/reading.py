"""All names of celery_eda that the samples touch and that are not public."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from enum import Enum
from typing import Any

from kombu.utils.json import dumps
from sqlalchemy import Connection, Table, select

from celery_eda import EDA
from celery_eda.brokers.database import postgresql_presence
from celery_eda.brokers.rabbitmq import dead_letter_exchange
from celery_eda.brokers.redis import consume
from celery_eda.core import addresses, checkpoints, event, identity
from celery_eda.core.identity import Identity, Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import message_rows, upgrade
from celery_eda.databases.tables import Tables
from celery_eda.dead_letters.letter import LetterFilter
from celery_eda.events.queues import EXCHANGE
from celery_eda.events.snapshots import Snapshot, Snapshots
from celery_eda.inbox import refusals
from celery_eda.inbox.attempts import Attempts
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.sagas import messages

# ── what a program's helpers do ─────────────────────────────────────────────────────────────


def create_tables(eda: EDA) -> None:
    """Make the tables of a service."""
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)


def tables_of(eda: EDA) -> tuple[Table, ...]:
    """Those tables, without that of the version."""
    return eda.databases.tables.all


def send_due(eda: EDA) -> None:
    """Send all that is due, as a relay does."""
    done = eda.outbox.relay().drain()
    assert not done.refused, done
    assert not done.unknown, done


def note_subscriptions(eda: EDA) -> None:
    """Write down whose queues are made, as a worker does when it starts."""
    eda.events.record_queues()


def address_event(eda: EDA, received: Any, queue: str) -> None:
    """Make a *received* event a call of the subscription that has this *queue*."""
    if subscription := eda.events.subscriptions.by_queue.get(queue):
        eda.events.subscriptions.address(received, subscription, queue)


def add_snapshot(eda: EDA, stream: str, name: str, version: int, state: Any) -> None:
    """Keep a snapshot of a stream's fold, as :meth:`EDA.fold` does after some events."""
    with eda.databases.engine.begin() as connection:
        last = list(eda.events.store.stream(connection, stream))[version - 1]
        assert last.recorded, "it comes from the store"
        made = Snapshot(version, state)
        _snapshots(eda).add(connection, stream, name, made, last.recorded)


def keep_unreadable(eda: EDA, payload: bytes) -> None:
    """Make a dead letter of what is no message, as a worker does."""
    eda.inbox.refusals.dead_letter(refusals.unread(payload))


def give_positions(eda: EDA) -> None:
    """Give the events their positions, as their readers do."""
    eda.events.store.assign_positions(eda.databases.engine)


# ── rows, as they are read ──────────────────────────────────────────────────────────────────


def values(eda: EDA) -> dict[str, Any]:
    """What the rows of all tables say, by what it is and in plain values."""
    with eda.databases.engine.connect() as connection:
        read = {name: list(of(eda, connection)) for name, of in _READERS.items()}
    plain: dict[str, Any] = json.loads(json.dumps(read, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            return value.decode("latin-1")
        case Enum():
            return value.value
        case BaseException():
            return [type(value).__qualname__, *map(str, value.args)]
    return json.loads(dumps(value))


def _rows(connection: Connection, table: Table) -> Iterable[Any]:
    return connection.execute(select(table).order_by(*table.primary_key.columns)).all()


def of_message(read: Message) -> dict[str, Any]:
    """What a message says."""
    position = read.position
    return {
        "identity": [read.identity.id, read.identity.revision],
        "task": read.task,
        "body": read.body,
        "content": [read.content_type, read.content_encoding],
        "headers": read.headers,
        "properties": read.properties,
        "route": [read.exchange, read.routing_key, read.queue],
        "prerequisites": read.prerequisites,
        "position": position and of_position(position),
        "reply to": addresses.of_headers(read.headers),
    }


def of_position(position: Position) -> list[Any]:
    """Where a message is in the order of its key."""
    lane = position.lane
    return [lane.source, lane.scope, lane.key, position.epoch, position.number, position.previous]


def _outbox(eda: EDA, connection: Connection) -> Iterable[Any]:
    return [
        of_message(message_rows.from_row(row))
        for row in _rows(connection, eda.databases.tables.outbox)
    ]


def _inbox(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.inbox):
        attempted = Identity(row.message_id, row.revision)
        handled = eda.inbox.store.find(connection, row.consumer, attempted)
        assert handled, row
        yield row.consumer, row.message_id, row.revision, handled.outcome, handled.result


def _attempts(eda: EDA, connection: Connection) -> Iterable[Any]:
    attempts = Attempts(eda.databases.tables.attempts, eda.databases.dialect)
    for row in _rows(connection, eda.databases.tables.attempts):
        attempted = Identity(row.message_id, row.revision)
        # It is rolled back.
        deliveries = attempts.count(connection, row.consumer, attempted)
        yield row.consumer, row.message_id, row.revision, deliveries


def _dead_letters(eda: EDA, connection: Connection) -> Iterable[Any]:
    for each in eda.dead_letters.store.select(connection, LetterFilter()):
        yield {**vars(each), "message": of_message(each.message)}


def _audit(eda: EDA, connection: Connection) -> Iterable[Any]:
    ids = {row.message_id for row in _rows(connection, eda.databases.tables.audit)}
    for message_id in sorted(ids):
        for each in eda.dead_letters.audit.of_message(connection, message_id):
            yield message_id, asdict(each)


def _sequences(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.sequences):
        version = eda.ordering.sequences.version(connection, row.stream, row.key)
        yield row.stream, row.key, row.epoch, row.last, version


def _cursors(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.cursors):
        lane = Lane(row.source, row.stream, row.key)
        cursor = eda.ordering.cursors.find(connection, row.consumer, lane)
        at = (cursor.epoch, cursor.last, cursor.held, cursor.parked)
        yield row.consumer, row.source, row.stream, row.key, at


def _parked(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.parked):
        yield row.consumer, of_message(message_rows.from_row(row))


def _requests(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.requests):
        outcome = eda.requests.store.outcome(connection, row.correlation_id)
        yield row.correlation_id, row.task, outcome


def _events(eda: EDA, connection: Connection) -> Iterable[Any]:
    return map(vars, eda.events.store.read(connection))


def _streams(eda: EDA, connection: Connection) -> Iterable[Any]:
    for stream in ("order.7", "order.8", "stock.spoon"):
        for each in eda.events.store.stream(connection, stream):
            yield stream, each.version, each.id


def _snapshots(eda: EDA) -> Snapshots:
    return Snapshots(eda.databases.tables.snapshots, eda.databases.dialect)


def _latest_snapshots(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.snapshots):
        snapshot = _snapshots(eda).latest(connection, f"{row.category}.{row.key}", row.name)
        assert snapshot, row
        yield row.category, row.key, row.name, snapshot.version, snapshot.state


def _declarations(eda: EDA, connection: Connection) -> Iterable[Any]:
    for queue, each in eda.events.declarations.all(connection).items():
        yield queue, each.task, each.patterns


def _projections(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.projections):
        yield row.name, eda.events.shadows.find(connection, row.name)


def _sagas(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.sagas):
        yield vars(eda.sagas.store.find(connection, row.id))


def _saga_histories(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.sagas):
        for each in eda.sagas.store.history(connection, row.id):
            record = each.record
            did = (record.kind, record.path, record.attempt, record.status, record.ended)
            then = (record.value, record.timed_out, record.id)
            yield row.id, did, then, each.begun_at, each.ended_at, each.due, each.who, each.request


def _saga_locks(eda: EDA, connection: Connection) -> Iterable[Any]:
    for row in _rows(connection, eda.databases.tables.saga_locks):
        yield row.key, row.place, row.owner, row.saga


_READERS: dict[str, Callable[[EDA, Connection], Iterable[Any]]] = {
    "outbox": _outbox,
    "inbox": _inbox,
    "attempts": _attempts,
    "dead letters": _dead_letters,
    "audit": _audit,
    "sequences": _sequences,
    "cursors": _cursors,
    "parked": _parked,
    "requests": _requests,
    "events": _events,
    "streams": _streams,
    "snapshots": _latest_snapshots,
    "declarations": _declarations,
    "projections": _projections,
    "sagas": _sagas,
    "saga histories": _saga_histories,
    "saga locks": _saga_locks,
}


# ── names that are stored or travel ─────────────────────────────────────────────────────────


def names(eda: EDA) -> dict[str, Any]:
    """Every name that another version has to know too."""
    tables = Tables.on()
    return {
        "tasks": {
            "event": event.EVENT_TASK,
            "reply": addresses.REPLY_TASK,
            "saga news": messages.WAKEUP_TASK,
            "all": sorted(name for name in eda.service.app.tasks if name.startswith("celery_eda.")),
        },
        "exchanges": {
            "events": [event.EVENT_EXCHANGE, EXCHANGE.name, EXCHANGE.type],
            "undelivered": dead_letter_exchange.EXCHANGE,
        },
        "queues": {
            "undelivered": [
                dead_letter_exchange.queue_of("shop").name,
                dead_letter_exchange.queue_arguments(3, "shop"),
            ],
            "replies": eda.requests.store.address,
            "process": addresses.of_process()[:-32],
            "repair": eda.service.settings.repair_queue,
            "subscriptions": sorted(eda.events.subscriptions.by_queue),
            "of one worker": event.OF_ONE_WORKER,
        },
        "headers": [
            identity.ID_HEADER,
            identity.REVISION_HEADER,
            identity.ORDER_HEADER,
            identity.REPLAY_HEADER,
            addresses.REPLY_HEADER,
            addresses.SAGA_HEADER,
        ],
        "redis keys": [consume.MALFORMED],
        # Python's own differ from version to version.
        "errors": sorted(each for each in RemoteErrors()._types if each.startswith("celery")),
        "consumer of what nobody reads": refusals.CONSUMER,
        "channels": postgresql_presence.channel_of(tables),
        "steps": checkpoints.STEPS,
        "tables": {table.name: [column.name for column in table.columns] for table in tables.all},
        "foreign identity": str(Identity.of_foreign("a task", 1, 2).id),
    }
