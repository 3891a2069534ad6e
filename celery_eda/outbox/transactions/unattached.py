"""Warns of work that a handler commits apart from its message, on the message's own database.

Such work stays if the handler fails, or if its worker dies, and the next attempt repeats it. A
session of an attached sessionmaker is part of the message's transaction; one of another
sessionmaker is not, and neither is a connection that the handler opens.
"""

from __future__ import annotations

import logging
from functools import cache
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event

from celery_eda.core import context
from celery_eda.databases import is_same_database, known_dialect
from celery_eda.outbox.writer import OWN

log = logging.getLogger(__name__)

_before: WeakKeyDictionary[Connection, object] = WeakKeyDictionary()
_warned: set[str] = set()


@cache
def listen() -> None:
    """Listen to every engine of this process from now on."""
    event.listen(Engine, "begin", on_begin)
    event.listen(Engine, "commit", on_commit)


def on_begin(connection: Connection) -> None:
    """Remember what a connection had changed before, if a handler begins a transaction on it."""
    if _task_apart_from(connection) and (dialect := known_dialect(connection.dialect.name)):
        _before[connection] = dialect.changes_before(connection)


def on_commit(connection: Connection) -> None:
    """Warn, once for each task, if the database says that the transaction has written."""
    task = _task_apart_from(connection)
    if task is None or task in _warned or connection.get_execution_options().get(OWN):
        return
    dialect = known_dialect(connection.dialect.name)
    if dialect and dialect.has_written(connection, _before.get(connection)):
        _warned.add(task)
        log.warning(
            "The handler of %s commits work apart from its message: it stays if the handler "
            "fails, and is repeated by the next attempt. Use the session of the message (a "
            "parameter `session`, or `eda.session`), or attach the sessionmaker by `eda.attach`.",
            task,
        )


def _task_apart_from(connection: Connection) -> str | None:
    """The task whose handler uses *connection* beside the transaction of its message, if any."""
    progress = context.in_progress.get()
    if progress is None or progress.finished or not progress.in_handler:
        return None
    if connection is progress.connection:
        return None
    if not is_same_database(connection.engine, progress.connection.engine):
        return None
    return progress.delivery.consumer
