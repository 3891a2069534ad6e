"""Helpers of every command: the extended app, its broker, and output that is safe to print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from celery.bin.base import CeleryCommand
from kombu.exceptions import OperationalError

from celery_eda.app import EDA
from celery_eda.core.error_text import printable
from celery_eda.errors import EDAError

#: Seconds to wait for a connection to the broker.
BROKER_TIMEOUT = 10.0


class Command(CeleryCommand):
    """A command that reports the errors of this package in one line, and ends with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            ClickException: the command failed; its message says what to do next.
        """
        try:
            return super().invoke(ctx)
        except EDAError as error:
            raise click.ClickException(printable(error)) from error


def eda_of(context: click.Context) -> EDA:
    """The :class:`celery_eda.EDA` of the app that the command line names with ``-A``.

    Raises:
        ClickException: the app has none.
    """
    app = context.obj.app
    eda: EDA | None = getattr(app, "eda", None)
    if eda is None:
        raise click.ClickException(
            f"The app {app.main or ''!r} is not extended. Add `eda = EDA(app)` to its module."
        )
    return eda


@contextmanager
def channel_of(context: click.Context) -> Iterator[Any]:
    """A channel on a connection of its own to the app's broker.

    Raises:
        ClickException: the broker is unreachable.
    """
    connection = context.obj.app.connection_for_write()
    try:
        connection.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT)
        channel = connection.channel()
    except (OperationalError, OSError) as error:
        raise click.ClickException(f"The broker cannot be reached: {error}") from error
    try:
        yield channel
    finally:
        connection.collect()


def confirm(question: str, *, yes: bool) -> None:
    """Ask *question* unless *yes*; any answer but yes ends the command with exit code 1."""
    if not yes:
        click.confirm(question, abort=True, err=True)


def report(figures: Any, text: str, *, as_json: bool) -> None:
    """Print *figures* as JSON if *as_json*, else *text* on one line."""
    click.echo(json.dumps(figures, default=str) if as_json else printable(text))
