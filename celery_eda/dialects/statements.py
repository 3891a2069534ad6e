"""Statements that are made once for each table: making one costs more than having it run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol, TypeVar

from sqlalchemy import Column, Table
from sqlalchemy.dialects import postgresql

Made = TypeVar("Made")


class KeepsStatements(Protocol):
    """What has methods that make statements.

    Attributes:
        statements: what was made, by the method and its arguments.
    """

    statements: dict[Any, Any]


def cached_statement(make: Callable[..., Made]) -> Callable[..., Made]:
    """A method whose result depends on its arguments alone, a table among them.

    Values go into a statement as parameters, so that it stays the same from call to call.
    """

    @wraps(make)
    def made(keeper: KeepsStatements, *arguments: Any) -> Made:
        key = (make, *arguments)
        if (found := keeper.statements.get(key)) is None:
            found = keeper.statements.setdefault(key, make(keeper, *arguments))
        statement: Made = found
        return statement

    return made


def columns_of(table: Table, names: tuple[str, ...]) -> Sequence[Column[Any]]:
    """The columns of *table* with these *names*; all of them, if none is named."""
    return [table.c[name] for name in names] or list(table.c)


def quoted_name(table: Table) -> str:
    """The name of *table*, as psycopg has it in the text of a statement."""
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    name: str = preparer.format_table(table)
    return name.replace("%", "%%")
