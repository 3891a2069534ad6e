"""A connection to the broker for as long as a command needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from kombu.exceptions import OperationalError

#: Seconds that the broker may take to answer.
PATIENCE = 10.0


@contextmanager
def channel_of(context: click.Context) -> Iterator[Any]:
    """A channel of a connection of its own.

    Raises:
        ClickException: the broker is away.
    """
    connection = context.obj.app.connection_for_write()
    try:
        connection.ensure_connection(max_retries=1, timeout=PATIENCE)
        channel = connection.channel()
    except (OperationalError, OSError) as error:
        raise click.ClickException(f"The broker cannot be reached: {error}") from error
    try:
        yield channel
    finally:
        connection.collect()
