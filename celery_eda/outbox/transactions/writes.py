"""Finds out if the transaction of an attached session has written.

The first words of a statement say that it writes, or that it may only read. A function, a raw
cursor, ``COPY`` or ``EXPLAIN ANALYZE`` can write all the same. So before a transaction that seems
to have read only is rolled back, PostgreSQL and SQLite are asked if it has written. MariaDB cannot
tell cheaply: there the words alone decide.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event

from celery_eda.databases import known_dialect

_COMMENT = r"/\*.*?\*/|--[^\n]*\n"
_FLAGS = re.IGNORECASE | re.DOTALL
# Statements that begin like this write nothing, or what the database is asked about.
_READS = re.compile(
    rf"(?:\s|\(|{_COMMENT})*"
    r"(?:SELECT|TABLE|VALUES|SHOW|DESC|DESCRIBE|EXPLAIN|PRAGMA|SET|LOCK|DECLARE|FETCH|CLOSE"
    r"|BEGIN|START|SAVEPOINT|RELEASE|ROLLBACK|WITH)\b",
    _FLAGS,
)
# These may begin a query or a write.
_EITHER = re.compile(rf"(?:\s|\(|{_COMMENT})*(?:WITH|EXPLAIN)\b", _FLAGS)
_QUOTED = re.compile(rf"'[^']*'|\"[^\"]*\"|`[^`]*`|{_COMMENT}", _FLAGS)
_CHANGES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
# Locks of rows and tables, which PostgreSQL counts as writes.
_LOCKS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b|\bFOR\s+(?:KEY\s+)?SHARE\b|^\s*LOCK\b", re.IGNORECASE
)


@dataclass(eq=False)
class Work:
    """The work of a session's transaction.

    Attributes:
        in_progress: True from the first statement of the transaction to its end. After that, the
            connection may be used for other work.
        wrote: True if the transaction wrote, or tried to.
        locked: True if it locked what it read.
    """

    in_progress: bool = False
    wrote: bool = False
    locked: bool = False

    def end(self) -> None:
        """Forget the work: the transaction is over."""
        self.in_progress = self.wrote = self.locked = False

    def note(self, statement: str) -> None:
        """Note what the words of *statement* say. Before it runs: a failed write counts too."""
        self.wrote = self.wrote or not only_reads(statement)
        self.locked = self.locked or bool(_LOCKS.search(statement))

    def ask(self, connection: Connection, before: object) -> None:
        """Ask the database if the transaction of *connection* has written.

        Not after a lock, which PostgreSQL would report as a write. Without an answer, from an
        aborted transaction say, the words have to do.
        """
        dialect = known_dialect(connection.dialect.name)
        if self.wrote or self.locked or dialect is None:
            return
        with suppress(Exception):
            self.wrote = bool(dialect.has_written(connection, before))


# Connections with the work that is done on them, and the changes that they had made before.
_works: WeakKeyDictionary[Connection, tuple[Work, object]] = WeakKeyDictionary()


def only_reads(statement: str) -> bool:
    """True if *statement*, by its words, writes nothing."""
    if not _READS.match(statement):
        return False
    if not _EITHER.match(statement):
        return True
    words = _QUOTED.sub(" ", statement)
    return not _CHANGES.search(_LOCKS.sub(" ", words))


def watch(connection: Connection, work: Work) -> None:
    """Note the statements on *connection* as part of *work*; a transaction begins there."""
    work.in_progress = True
    dialect = known_dialect(connection.dialect.name)
    _works[connection] = work, dialect.changes_before(connection) if dialect else None


@cache
def listen() -> None:
    """Listen to every engine of this process from now on.

    The statements of all engines pass through :func:`on_before_cursor_execute`, so it is not
    installed before the first sessionmaker is attached.
    """
    event.listen(Engine, "before_cursor_execute", on_before_cursor_execute)
    event.listen(Engine, "rollback", on_rollback)


def on_before_cursor_execute(
    connection: Connection, cursor: object, statement: str, *_: object
) -> None:
    """Note the statement as work of its session."""
    if watched := _works.get(connection):
        work, _before = watched
        if work.in_progress:
            work.note(statement)


def on_rollback(connection: Connection) -> None:
    """Ask the database, as long as it knows the transaction."""
    if (watched := _works.get(connection)) and not connection.invalidated:
        work, before = watched
        if work.in_progress:
            work.ask(connection, before)
