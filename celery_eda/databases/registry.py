"""The databases: one dialect each, which overrides only what differs from the base."""

from __future__ import annotations

from functools import cache

from kombu.utils.imports import symbol_by_name
from sqlalchemy import URL

from celery_eda.databases.dialect import Dialect
from celery_eda.errors import ConfigurationError

__all__ = ["ALIASES", "Dialect", "dialect_of", "known_dialect"]

ALIASES = {
    "postgresql": "celery_eda.databases.postgresql:PostgreSQL",
    "mysql": "celery_eda.databases.mysql:MySQL",
    "mariadb": "celery_eda.databases.mysql:MySQL",
    "sqlite": "celery_eda.databases.sqlite:SQLite",
}


def dialect_of(url: URL, *, claim_timeout: float = 60.0) -> Dialect:
    """The dialect of the database at *url*.

    *claim_timeout* is the number of seconds that a claim of outbox rows lasts.

    Raises:
        ConfigurationError: the database is not supported.
    """
    backend = url.get_backend_name()
    if backend not in ALIASES:
        raise ConfigurationError(
            f"eda_database_url names the database {backend!r}; supported are "
            f"{', '.join(sorted(ALIASES))}."
        )
    dialect: Dialect = symbol_by_name(ALIASES[backend])(claim_timeout)
    return dialect


@cache
def known_dialect(name: str) -> Dialect | None:
    """The dialect of SQLAlchemy's *name*; None if the database is not supported."""
    return dialect_of(URL.create(name)) if name in ALIASES else None
