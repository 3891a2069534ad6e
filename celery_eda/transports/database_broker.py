"""A database as a broker: its engine and its queues, shared by all connections of a process."""

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

from celery_eda.dialects import dialect_of
from celery_eda.dialects.queueing import RANKS
from celery_eda.errors import ConfigurationError
from celery_eda.queues import Lease, Queues, Waiting
from celery_eda.tables import Tables
from celery_eda.transports.base import Sendable, publish_with

#: The scheme before the ``+`` of a database that is a broker: ``eda+sqlite:///queue.db``.
SCHEME = "eda"
#: Seconds after which the server ends a transaction in which nothing happens.
PATIENCE = 60.0
#: Of priorities as kombu knows them: the higher, the sooner.
HIGHEST = RANKS - 1
#: Longest delay or lifetime in seconds; databases end in the year 9999.
LONGEST = 36500 * 86400.0
SYNCHRONOUS = ("FULL", "NORMAL")

_brokers: dict[tuple[Any, ...], Broker] = {}
_making = Lock()


class Broker:
    """One database as a broker.

    Attributes:
        late: leases completed by who had lost its connection by then. Whoever has one completes
            them; they are void if somebody else has taken the message meanwhile.
    """

    def __init__(self, url: URL, tables: Tables, options: Mapping[str, Any]) -> None:
        self.url = url
        self.tables = tables
        self.dialect = dialect_of(url, claim_timeout=PATIENCE).queueing(url)
        self.queues = Queues(tables, self.dialect)
        self.engine = create_engine(url, max_overflow=-1, **self.dialect.engine_options(PATIENCE))
        self.dialect.prepare(self.engine, PATIENCE)
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
        os.register_at_fork(after_in_child=partial(self.engine.dispose, close=False))

    def make_ready(self) -> None:
        """See to it that the database is there, and has the tables.

        Raises:
            SQLAlchemyError: it is away.
        """
        if self._ready:
            return
        with self.engine.connect() as connection:
            queue = self.tables.queue
            there = inspect(connection).has_table(queue.name, queue.schema)
        if not there and self.creates:
            from celery_eda import upgrading  # Alembic takes long to import, and is needed once

            upgrading.upgrade(self.engine, self.tables)
        self._ready = True

    def put(self, messages: Sequence[Waiting]) -> None:
        """Put *messages* into their queues, in a transaction of their own."""
        with self.engine.begin() as connection:
            self.queues.put(connection, messages)
        self.ring()

    def ring(self) -> None:
        """Wake who waits for what has just been committed."""
        self.dialect.ring(self.engine, self.tables)

    def complete_late(self, connection: Connection) -> None:
        """Complete what was done with a connection that is lost."""
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
        """Whether these are the *tables* of the database at *url*."""
        same = (tables.prefix, tables.schema) == (self.tables.prefix, self.tables.schema)
        return same and _place(url) == _place(self.url)


def _heartbeat(seconds: Any, url: URL) -> float | None:
    """The seconds after which a silent taker is taken for gone; None if something better tells."""
    if seconds is None:
        return None
    is_number = isinstance(seconds, int | float) and seconds >= 1
    if url.get_backend_name() != "postgresql" or not is_number:
        raise ConfigurationError(
            f"broker_transport_options: heartbeat is {seconds!r}. It is for a pooler before "
            "PostgreSQL, and says after how many seconds (1 or more) a silent worker is taken for "
            "gone. Leave it out elsewhere."
        )
    return float(seconds)


def _relax(dbapi_connection: Any, record: Any) -> None:
    dbapi_connection.execute("PRAGMA synchronous=NORMAL")


def _place(url: URL) -> tuple[Any, ...]:
    vendor, name = url.get_backend_name(), url.database
    if vendor == "sqlite":
        return vendor, os.path.realpath(str(name))
    return vendor, url.host, url.port, name, url.username


def broker_at(url: str, options: Mapping[str, Any]) -> Broker:
    """The broker at *url*, without the scheme; *options* are those of kombu's transport.

    Raises:
        ConfigurationError: this database, or one of the options, is none for a broker.
    """
    place = make_url(url)
    tables = Tables.on(prefix=options.get("table_prefix", "eda_"), schema=options.get("schema"))
    chosen = (options.get("synchronous", "FULL"), options.get("heartbeat"))
    key = (place, tables.prefix, tables.schema, *chosen)
    with _making:
        if key not in _brokers:
            _brokers[key] = Broker(place, tables, options)
        return _brokers[key]


# ── messages as they wait ───────────────────────────────────────────────────────────────────


class _Unsent:
    """Stands where kombu's producer expects a channel: keeps the message, and where it goes."""

    def __init__(self) -> None:
        self.prepared: dict[str, Any] = {}

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        # As kombu's virtual channels do.
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
        self.prepared = message


def waiting(queue: str, prepared: Mapping[str, Any]) -> Waiting:
    """What kombu has *prepared* for a channel, as it waits in *queue*.

    Raises:
        Exception: a header or a property cannot be written down.
    """
    body, properties = prepared["body"], prepared["properties"]
    kept = {name: value for name, value in prepared.items() if name != "body"}
    return Waiting(
        queue=queue,
        message=dumps(kept),
        body=body.encode() if isinstance(body, str) else bytes(body or b""),
        rank=HIGHEST - _priority(properties.get("priority")),
        delay=_delay(prepared["headers"].get("eta")),
        lifetime=_lifetime(properties.get("expiration")),
    )


def prepared_for(message: Sendable) -> dict[str, Any]:
    """*message* as kombu would hand it to a channel."""
    channel = _Unsent()
    publish_with(Producer(channel), message)
    return channel.prepared


def _priority(value: Any) -> int:
    with suppress(TypeError, ValueError):
        return max(0, min(int(value), HIGHEST))
    return 0


def _delay(eta: Any) -> float | None:
    """Seconds until *eta*; None if that is none, over, or absurd: the worker sees to it then."""
    if not isinstance(eta, str):
        return None
    try:
        due = datetime.fromisoformat(eta)
        due = due if due.tzinfo else due.replace(tzinfo=timezone.utc)
        seconds = (due - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return seconds if 0 < seconds <= LONGEST else None


def _lifetime(expiration: Any) -> float | None:
    """Seconds, of the milliseconds that AMQP has in a string; None if there is no end."""
    try:
        milliseconds = float(expiration)
    except (TypeError, ValueError):
        return None
    return max(0.0, min(milliseconds / 1000, LONGEST)) if milliseconds == milliseconds else None
