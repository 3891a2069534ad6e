"""``celery -A … eda order``: the numbers given to messages with an ordering key."""

from __future__ import annotations

import json

import click
from celery.bin.base import CeleryCommand

from celery_eda.cli.options import confirmed
from celery_eda.cli.service import confirm, printable, service_of


@click.group(name="order")
def order() -> None:
    """The order of messages that share a key."""


@order.command(cls=CeleryCommand, name="new-epoch")
@click.option("--stream", help="Only the messages of this task.")
@confirmed
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def new_epoch(context: click.Context, stream: str | None, yes: bool, as_json: bool) -> None:
    """Let every count begin again: after the database was restored from a backup.

    Numbers given since the backup are given once more otherwise, and consumers take the new
    messages for old ones. Exit code 1 if there is no count.
    """
    service = service_of(context)
    what = f"of {printable(stream)}" if stream else "of all tasks"
    confirm(f"Begin a new epoch {what}? Do so only after a restore.", yes=yes)
    with service.engine.begin() as connection:
        begun = service.sequences.begin_epoch(connection, stream)
    click.echo(json.dumps({"begun": begun}) if as_json else f"{begun} counts begin again.")
    if not begun:
        raise SystemExit(1)
