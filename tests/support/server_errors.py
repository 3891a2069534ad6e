"""Errors with which a server refuses a statement, raised in place of its execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event

#: The errors of a server that takes no writes, by SQLSTATE or number: what it says.
READ_ONLY: dict[str, dict[Any, str]] = {
    "postgresql": {"25006": "cannot execute INSERT in a read-only transaction"},
    "mariadb": {
        1290: "The MariaDB server is running with the --read-only option so it cannot execute it",
        1792: "Cannot execute statement in a READ ONLY transaction",
        1836: "Running in read-only mode",
    },
    "sqlite": {"SQLITE_READONLY": "attempt to write a readonly database"},
}
#: The errors of a server that has no room, or no time now.
NO_ROOM: dict[str, dict[Any, str]] = {
    "postgresql": {
        "53100": "could not extend file: No space left on device",
        "53200": "out of memory",
        "53300": "sorry, too many clients already",
        "57P01": "terminating connection due to administrator command",
        "57P03": "the database system is starting up",
        "58030": "could not write to file: Input/output error",
    },
    "mariadb": {
        1021: "Disk full (/tmp); waiting for someone to free some space",
        1026: "Error writing file '/tmp/x' (errno: 28)",
        1041: "Out of memory.",
        1114: "The table 'eda_inbox' is full",
        1203: "User eda already has more than 'max_user_connections' active connections",
    },
    "sqlite": {"SQLITE_FULL": "database or disk is full", "SQLITE_IOERR": "disk I/O error"},
}
#: Other refusals, which say nothing of the server.
REFUSALS: dict[str, dict[Any, str]] = {
    "postgresql": {
        "42501": "permission denied for table eda_inbox",
        "57014": "canceling statement due to statement timeout",
        "40P01": "deadlock detected",
    },
    "mariadb": {
        1142: "INSERT command denied to user 'eda' for table 'eda_inbox'",
        1317: "Query execution was interrupted",
        1969: "Query execution was interrupted (max_statement_time exceeded)",
        1205: "Lock wait timeout exceeded; try restarting transaction",
    },
    "sqlite": {None: "interrupted", "SQLITE_BUSY": "database is locked"},
}


KINDS = (READ_ONLY, NO_ROOM, REFUSALS)


def codes(vendor: str) -> list[Any]:
    """The codes of all errors above."""
    return [code for kind in KINDS for code in kind[vendor]]


def few_codes(vendor: str) -> list[Any]:
    """A code of each kind."""
    return [next(iter(kind[vendor])) for kind in KINDS]


def server_error(vendor: str, code: Any) -> Exception:
    """The exception that the driver raises when the server answers with *code*."""
    (text,) = (kind[vendor][code] for kind in KINDS if code in kind[vendor])
    if vendor == "postgresql":
        import psycopg

        return psycopg.errors.lookup(code)(text)
    if vendor == "mariadb":
        import pymysql

        return pymysql.err.OperationalError(code, text)
    import sqlite3

    return sqlite3.OperationalError(text)


class Statements:
    """Counts the statements and commits of an engine, and refuses some of them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._refuses: Callable[[int], Exception | None] = lambda number: None

    def on_statement(self, statement: str) -> None:
        """Count *statement*, or raise what it is refused with."""
        self.seen.append(statement)
        if error := self._refuses(len(self.seen) - 1):
            raise error

    @contextmanager
    def refused(self, error: Exception, number: int, *, lasting: bool = False) -> Iterator[None]:
        """A block whose statement of this *number*, from 0, is refused; if *lasting*, later too."""
        self.seen.clear()
        self._refuses = lambda at: error if at == number or (lasting and at > number) else None
        yield
        self._refuses = lambda number: None


@contextmanager
def statements_of(engine: Engine) -> Iterator[Statements]:
    """The statements of *engine* inside the block, its commits included."""
    statements = Statements()
    commit = engine.dialect.do_commit

    def on_execute(cursor: Any, statement: str, *_: Any) -> None:
        statements.on_statement(statement)

    def do_commit(connection: Any) -> None:
        try:
            statements.on_statement("COMMIT")
        except Exception:
            if engine.dialect.name != "sqlite":  # a server ends the transaction, SQLite does not
                connection.rollback()
            raise
        commit(connection)

    names = ("do_execute", "do_executemany", "do_execute_no_params")
    for name in names:
        event.listen(engine, name, on_execute)
    engine.dialect.do_commit = do_commit
    try:
        yield statements
    finally:
        engine.dialect.do_commit = commit
        for name in names:
            event.remove(engine, name, on_execute)
