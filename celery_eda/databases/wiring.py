"""The service's own database: its URL, its tables, its engines."""

from __future__ import annotations

from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError

from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import engines, schema
from celery_eda.databases.dialect import Dialect
from celery_eda.databases.registry import dialect_of
from celery_eda.databases.tables import Tables
from celery_eda.errors import ConfigurationError

#: Names of a database that SQLite does not store in a file.
IN_MEMORY = (None, "", ":memory:")


class Databases:
    """The database that holds the outbox, the inbox and all other tables of one service.

    Args:
        service: whose database it is.
        engine: given by the user; made from ``eda_database_url`` if None.
    """

    def __init__(self, service: Service, engine: Engine | None = None) -> None:
        self._service = service
        self._given = engine
        service.add(self)

    @cached_once
    def url(self) -> URL:
        """The address of the database.

        Raises:
            ConfigurationError: neither an engine nor ``eda_database_url`` is given.
        """
        if self._given is not None:
            return self._given.url
        if not self._service.settings.database_url:
            raise ConfigurationError(
                "eda_database_url is not set: the outbox and the inbox live in the service's own "
                "database. Set it to a SQLAlchemy URL, e.g. sqlite:///shop.db."
            )
        try:
            return make_url(self._service.settings.database_url)
        except (ArgumentError, ValueError):
            pass  # the error quotes the URL, with its password
        raise ConfigurationError(
            "eda_database_url is no SQLAlchemy URL. Write it as "
            "postgresql+psycopg://user:password@host:5432/name, and characters such as : / @ in "
            "the password as %3A %2F %40."
        )

    def _refuse_in_memory(self) -> None:
        if self.url.get_backend_name() == "sqlite" and self.url.database in IN_MEMORY:
            raise ConfigurationError(
                "A SQLite database in memory cannot be used by workers and relays, which need "
                "connections of their own: each would have another database, or share the "
                "transaction of the others. Name a file, in a temporary folder for tests: "
                "sqlite:////tmp/shop.db."
            )

    @cached_once
    def dialect(self) -> Dialect:
        """The statements that differ from database to database."""
        return dialect_of(self.url, claim_timeout=self._service.settings.claim_timeout)

    @cached_once
    def tables(self) -> Tables:
        """The tables of this service. ``Tables.on(metadata)`` adds them to another MetaData."""
        settings = self._service.settings
        return Tables.on(prefix=settings.table_prefix, schema=settings.schema)

    @cached_once
    def engine(self) -> Engine:
        """The engine for the transactions of producers and handlers."""
        if self._given is not None:
            self.dialect.watch(self._given)
            return engines.forkable(self._given)
        self._refuse_in_memory()
        return engines.create(self.url, self.dialect, self._service.settings.transaction_timeout)

    def check(self) -> None:
        """Make sure that the tables exist, and that the database takes the largest messages.

        Raises:
            ConfigurationError: SQLite is in memory.
            SchemaOutdated: the tables are missing or too old.
            UnsafeSetting: the database refuses rows as large as the settings allow messages.
        """
        self._refuse_in_memory()
        schema.check(self.engine, self.tables)
        settings = self._service.settings
        body = max(settings.max_message_bytes, settings.max_decompressed_bytes)
        with self.engine.connect() as connection:
            self.dialect.check_room(connection, body + settings.max_message_bytes)

    @cached_once
    def relay_engine(self) -> Engine:
        """The engine of the relays, whose claims end sooner than a handler's transaction."""
        timeout = self._service.settings.claim_timeout
        engine = engines.create(self.url, self.dialect, timeout, like=self._given)
        self.dialect.configure_relay_engine(engine)
        return engine
