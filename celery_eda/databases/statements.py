"""Cached statements: building a statement costs more than executing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol, TypeVar

from sqlalchemy import Column, ColumnElement, Table, bindparam
from sqlalchemy.dialects import postgresql

Statement = TypeVar("Statement")


class HasStatements(Protocol):
    """An object with methods that build statements.

    Attributes:
        statements: the cache, by method and arguments.
    """

    statements: dict[Any, Any]


def cached_statement(build: Callable[..., Statement]) -> Callable[..., Statement]:
    """A decorator for a method whose result depends only on its arguments, such as a table.

    Values enter the statement as parameters, so that the statement is the same in every call.
    """

    @wraps(build)
    def cached(owner: HasStatements, *arguments: Any) -> Statement:
        key = (build, *arguments)
        if (found := owner.statements.get(key)) is None:
            found = owner.statements.setdefault(key, build(owner, *arguments))
        statement: Statement = found
        return statement

    return cached


def columns_of(table: Table, names: tuple[str, ...]) -> Sequence[Column[Any]]:
    """The columns of *table* with these *names*; all columns if there are no names."""
    return [table.c[name] for name in names] or list(table.c)


def formatted_name(table: Table) -> str:
    """The name of *table* as PostgreSQL writes it: with its schema, and quoted if need be."""
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    name: str = preparer.format_table(table)
    return name


def quoted_name(table: Table) -> str:
    """The formatted name of *table*, for the text of a statement that psycopg executes."""
    return formatted_name(table).replace("%", "%%")


def is_of_service(table: Table) -> ColumnElement[bool]:
    """True for rows of the parameter ``its_service``, and for rows that name no service."""
    return table.c.service.is_(None) | (table.c.service == bindparam("its_service"))
