"""``celery -A … eda order``: the numbers of messages with an ordering key."""

from __future__ import annotations

import click

from celery_eda.core.error_text import printable
from celery_eda.ops.cli.console import Command, confirm, eda_of, report
from celery_eda.ops.cli.options import as_json, confirmed


@click.group(name="order")
def order() -> None:
    """Manage the order of messages that share a key."""


@order.command(cls=Command, name="new-epoch")
@click.option("--stream", help="Only the messages of this task.")
@confirmed
@as_json
@click.pass_context
def new_epoch(context: click.Context, stream: str | None, yes: bool, as_json: bool) -> None:
    """Restart the numbering of every key, after the database was restored from a backup.

    Otherwise the numbers assigned since the backup would be assigned again, and consumers would
    treat the new messages as old ones. Exit code 1 if no key has a number yet.
    """
    eda = eda_of(context)
    what = f"of {printable(stream)}" if stream else "of all tasks"
    confirm(f"Begin a new epoch {what}? Do so only after a restore.", yes=yes)
    with eda.databases.engine.begin() as connection:
        begun = eda.ordering.sequences.begin_epoch(connection, stream)
    report({"begun": begun}, f"{begun} counts begin again.", as_json=as_json)
    if not begun:
        raise SystemExit(1)
