"""Sphinx directives that print reference pages from the code, so that no page can be out of date.

The directive ``generated`` takes the name of one of ``PAGES``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from celery_eda import errors
from celery_eda.core import addresses, checkpoints, identity
from celery_eda.core.settings import DAY, HOUR, PREFIX, Settings
from celery_eda.databases import Tables

#: Headers of messages, each with its meaning.
HEADERS = {
    identity.ID_HEADER: "The id of the message, a UUID. Copies of a message have the same id.",
    identity.REVISION_HEADER: "The number of the attempt, from 0. A retry, a repair and a redrive "
    "are the next revision of the same message.",
    identity.ORDER_HEADER: "The place of the message among those of its ordering key: source, "
    "stream, key, epoch and number.",
    identity.REPLAY_HEADER: "Marks a replayed event, whose handler must not publish anything.",
    addresses.REPLY_HEADER: "The address of the reply: the name of a queue.",
    addresses.SAGA_HEADER: "The saga that has sent the command.",
}


def settings() -> Iterator[str]:
    """Every setting: its name, its default, its effect."""
    for each in fields(Settings):
        yield f"(setting-{each.name})="
        yield f"`{PREFIX}{each.name}`"
        yield f": Default: {_default(each.default)}. {each.metadata['doc']}"
        if each.metadata["choices"]:
            yield f"  One of {', '.join(_default(choice) for choice in each.metadata['choices'])}."
        yield ""


def error_classes() -> Iterator[str]:
    """Every class of errors: its bases and its meaning."""
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if kind.__module__ != errors.__name__:
            continue
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        yield f"`celery_eda.errors.{name}`"
        yield f": {inspect.cleandoc(kind.__doc__ or '').splitlines()[0]} A kind of {bases}."
        yield ""


def steps() -> Iterator[str]:
    """The names of the checkpoints, in the order in which a message reaches them."""
    yield from (f"1. `{step}`" for step in checkpoints.STEPS)


def tables() -> Iterator[str]:
    """Every table with its columns and indexes."""
    made = Tables.on()
    meanings = _attributes(Tables)
    for name in (*(each.name for each in fields(Tables)),):
        table = getattr(made, name)
        if name not in meanings or not hasattr(table, "columns"):
            continue
        yield from (f"## {table.name}", "", f"{meanings[name][0].upper()}{meanings[name][1:]}", "")
        yield from ("| column | type | null |", "|---|---|---|")
        for column in table.columns:
            primary = " (primary key)" if column.primary_key else ""
            nullable = "yes" if column.nullable else "no"
            yield f"| `{column.name}`{primary} | `{column.type!r}` | {nullable} |"
        yield ""
        for index in sorted(table.indexes, key=lambda each: str(each.name)):
            columns = ", ".join(f"`{column.name}`" for column in index.columns)
            yield f"Index `{index.name}`: {columns}."
            yield ""


def headers() -> Iterator[str]:
    """Every header that this package adds to a message."""
    for name, meaning in HEADERS.items():
        yield f"`{name}`"
        yield f": {meaning}"
        yield ""


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "settings": settings,
    "errors": error_classes,
    "checkpoints": steps,
    "tables": tables,
    "headers": headers,
}


def _default(value: Any) -> str:
    """A value as a person writes it in a configuration."""
    if isinstance(value, float) and value >= DAY and value % DAY == 0:
        return f"`{value:g}` ({value / DAY:g} days)"
    if isinstance(value, float) and value >= HOUR and value % HOUR == 0:
        return f"`{value:g}` ({value / HOUR:g} hours)"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**20:
        return f"`{value}` ({value / 2**20:g} MiB)"
    return f"`{value!r}`"


def _attributes(kind: type) -> dict[str, str]:
    """The section "Attributes" of a docstring, by name."""
    lines = inspect.cleandoc(kind.__doc__ or "").split("Attributes:\n")[1].splitlines()
    return dict(line.strip().split(": ", 1) for line in lines if ": " in line)


class Generated(SphinxDirective):
    """Prints one of ``PAGES``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = "\n".join(PAGES[self.arguments[0]]())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Any) -> dict[str, bool]:
    """Add the directive to Sphinx."""
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
