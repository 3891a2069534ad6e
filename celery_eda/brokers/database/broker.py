"""A database as the broker: its engine and its queues, shared by all connections of a process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from threading import Lock
from typing import Any

from kombu import Producer
from kombu.utils.json import dumps
from sqlalchemy import URL, Connection, create_engine, event, inspect, make_url

from celery_eda.brokers.base import Sendable, publish_with
from celery_eda.brokers.database.postgresql import PostgreSQLQueues
from celery_eda.brokers.database.queueing import RANKS, Queueing
from celery_eda.brokers.database.queues import Lease, Queued, Queues
from celery_eda.brokers.database.sqlite import SQLiteQueues
from celery_eda.brokers.database.sqlite_presence import (
    file_of,
    refuse_remote,
    refuse_without_pipes,
)
from celery_eda.core.clock import utc
from celery_eda.core.forks import on_fork
from celery_eda.databases import Dialect, PostgreSQL, SQLite, Tables, dialect_of
from celery_eda.errors import ConfigurationError

#: The scheme before the ``+`` in the URL of a database as the broker: ``eda+sqlite:///queue.db``.
SCHEME = "eda"
#: Seconds after which the server ends an idle transaction.
PATIENCE = 60.0
#: The highest of kombu's priorities; higher ones come first.
HIGHEST = RANKS - 1
#: Longest delay or lifetime in seconds; databases end in the year 9999.
LONGEST = 36500 * 86400.0
SYNCHRONOUS = ("FULL", "NORMAL")

_brokers: dict[tuple[Any, ...], DatabaseBroker] = {}
_making = Lock()


class DatabaseBroker:
    """One database as the broker.

    Attributes:
        late: leases of messages that were acknowledged after their taker had lost its connection.
            The next taker with a connection completes them; a lease is void if its message has
            been leased again meanwhile.
    """

    def __init__(self, url: URL, tables: Tables, options: Mapping[str, Any]) -> None:
        self.url = url
        self.tables = tables
        self.dialect = dialect_of(url, claim_timeout=PATIENCE)
        self.queueing = queueing_of(self.dialect, url)
        self.queues = Queues(tables, self.queueing)
        self.engine = create_engine(url, max_overflow=-1, **self.dialect.engine_options(PATIENCE))
        self.dialect.configure_engine(self.engine, PATIENCE)
        self.heartbeat = _heartbeat(options.get("heartbeat"), url)
        if (synchronous := options.get("synchronous", "FULL")) not in SYNCHRONOUS:
            raise ConfigurationError(
                f"broker_transport_options: synchronous is {synchronous!r}; it may be 'FULL' (what "
                "is committed survives a loss of power) or 'NORMAL' (faster; the last commits may "
                "be lost with the power, but not with a process)."
            )
        if synchronous != "FULL" and url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _relax)
        self.creates = bool(options.get("create_tables", True))
        self.late: deque[Lease] = deque()
        self._ready = False
        on_fork(partial(self.engine.dispose, close=False))

    def make_ready(self) -> None:
        """Connect to the database, and create the tables if they are missing.

        Raises:
            SQLAlchemyError: the database cannot be reached.
        """
        if self._ready:
            return
        with self.engine.connect() as connection:
            queue = self.tables.queue
            exists = inspect(connection).has_table(queue.name, queue.schema)
        if not exists and self.creates:
            from celery_eda.databases import upgrade  # Alembic is slow to import and rarely needed

            upgrade.upgrade(self.engine, self.tables)
        self._ready = True

    def put(self, messages: Sequence[Queued]) -> None:
        """Put *messages* into their queues, in a transaction of their own."""
        with self.engine.begin() as connection:
            self.queues.put(connection, messages)
        self.wake_all()

    def wake_all(self) -> None:
        """Wake all takers, after a commit."""
        self.queueing.wake_all(self.engine, self.tables)

    def complete_late(self, connection: Connection) -> None:
        """Complete the ``late`` leases."""
        leases: list[Lease] = []
        with suppress(IndexError):
            while True:
                leases.append(self.late.popleft())
        try:
            self.queues.complete(connection, leases)
        except BaseException:
            self.late.extend(leases)
            raise

    def is_at(self, url: URL, tables: Tables) -> bool:
        """True if this broker is the database at *url*, with the same *tables*."""
        same = (tables.prefix, tables.schema) == (self.tables.prefix, self.tables.schema)
        return same and _address(url) == _address(self.url)


def queueing_of(dialect: Dialect, url: URL) -> Queueing:
    """The statements of queues for *dialect*, to use the database at *url* as the broker.

    Raises:
        ConfigurationError: this database cannot wake a taker, or cannot prove that one is dead.
    """
    if isinstance(dialect, PostgreSQL):
        return PostgreSQLQueues(dialect)
    if isinstance(dialect, SQLite):
        refuse_without_pipes()
        refuse_remote(file_of(url))
        return SQLiteQueues(dialect)
    raise ConfigurationError(
        f"{url.get_backend_name()} cannot be the broker: it cannot wake a consumer that waits "
        "for a row. Use eda+postgresql:// or eda+sqlite:///, or RabbitMQ or Redis beside this "
        "database."
    )


def _heartbeat(seconds: Any, url: URL) -> float | None:
    """Seconds after which a silent taker counts as dead; None if its connection proves its life."""
    if seconds is None:
        return None
    is_number = isinstance(seconds, int | float) and seconds >= 1
    if url.get_backend_name() != "postgresql" or not is_number:
        raise ConfigurationError(
            f"broker_transport_options: heartbeat is {seconds!r}. It is for a pooler before "
            "PostgreSQL: the number of seconds (1 or more) after which a silent worker counts as "
            "dead. Remove it elsewhere."
        )
    return float(seconds)


def _relax(dbapi_connection: Any, record: Any) -> None:
    dbapi_connection.execute("PRAGMA synchronous=NORMAL")


def _address(url: URL) -> tuple[Any, ...]:
    vendor, name = url.get_backend_name(), url.database
    if vendor == "sqlite":
        return vendor, os.path.realpath(str(name))
    return vendor, url.host, url.port, name, url.username


def broker_at(url: str, options: Mapping[str, Any]) -> DatabaseBroker:
    """The broker at *url*, given without ``eda+``; *options* are those of kombu's transport.

    Raises:
        ConfigurationError: this database cannot be the broker, or an option is invalid.
    """
    address = make_url(url)
    tables = Tables.on(prefix=options.get("table_prefix", "eda_"), schema=options.get("schema"))
    chosen = (options.get("synchronous", "FULL"), options.get("heartbeat"))
    key = (address, tables.prefix, tables.schema, *chosen)
    with _making:
        if key not in _brokers:
            _brokers[key] = DatabaseBroker(address, tables, options)
        return _brokers[key]


# ── messages as rows of a queue ─────────────────────────────────────────────────────────────


class _Unsent:
    """A stand-in for the channel of kombu's producer, which keeps the message and its route."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        # The same dictionary as kombu's virtual channels make.
        properties = properties or {}
        properties.setdefault("delivery_info", {})
        properties.setdefault("priority", priority or 0)
        return {
            "body": body,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": headers or {},
            "properties": properties,
        }

    def basic_publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, **_: Any
    ) -> None:
        message["properties"]["delivery_info"].update(exchange=exchange, routing_key=routing_key)
        self.message = message


def queued(queue: str, message: Mapping[str, Any], due: datetime | None = None) -> Queued:
    """Kombu's dictionary of a *message*, as a row of *queue*.

    Args:
        queue: the name of the queue.
        message: the dictionary.
        due: when the message is due; by default at its header ``eta``, or at once without one.

    Raises:
        Exception: a header or a property cannot be encoded as JSON.
    """
    body, properties = message["body"], message["properties"]
    rest = {name: value for name, value in message.items() if name != "body"}
    return Queued(
        queue=queue,
        message=dumps(rest),
        body=body.encode() if isinstance(body, str) else bytes(body or b""),
        rank=HIGHEST - _priority(properties.get("priority")),
        delay=_delay(due or _date(message["headers"].get("eta"))),
        lifetime=_lifetime(properties.get("expiration")),
    )


def kombu_message(message: Sendable) -> dict[str, Any]:
    """The dictionary that kombu's producer passes to a channel for *message*."""
    channel = _Unsent()
    publish_with(Producer(channel), message)
    return channel.message


def _priority(value: Any) -> int:
    with suppress(TypeError, ValueError):
        return max(0, min(int(value), HIGHEST))
    return 0


def _date(eta: Any) -> datetime | None:
    """The date in the header ``eta``; None if it holds none: the worker decides then."""
    try:
        return datetime.fromisoformat(eta) if isinstance(eta, str) else None
    except ValueError:
        return None


def was_kept(message: Mapping[str, Any]) -> bool:
    """True if a *message* that has come was kept in its queue until its ETA.

    The clocks of its publisher and of this machine may differ, but not by half a century.
    """
    eta = _date(message["headers"].get("eta"))
    try:
        return eta is not None and _seconds_until(eta) < LONGEST / 2
    except OverflowError:
        return False


def _delay(due: datetime | None) -> float | None:
    """Seconds until *due*; None if that is past, or absurdly far."""
    if due is None:
        return None
    try:
        seconds = _seconds_until(due)
    except OverflowError:
        return None
    return seconds if 0 < seconds <= LONGEST else None


def _seconds_until(due: datetime) -> float:
    return (utc(due) - datetime.now(timezone.utc)).total_seconds()


def _lifetime(expiration: Any) -> float | None:
    """The lifetime in seconds, from AMQP's milliseconds in a string; None for an endless one."""
    try:
        milliseconds = float(expiration)
    except (TypeError, ValueError):
        return None
    return max(0.0, min(milliseconds / 1000, LONGEST)) if milliseconds == milliseconds else None
