"""``celery -A … eda order``: keys that wait, and the numbers of messages with an ordering key.

Exit codes: 0 done, 1 no key waits or one could not be treated, 2 the command line is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.app import EDA
from celery_eda.core import redaction
from celery_eda.core.error_text import printable
from celery_eda.dead_letters import Author
from celery_eda.errors import RepairError
from celery_eda.ops.cli.console import Command, confirm, eda_of, report
from celery_eda.ops.cli.options import as_json, author_of, authorship, confirmed, options
from celery_eda.ordering import WaitingKey
from celery_eda.outbox import join

which_keys = options(
    click.option("--consumer", help="Of this task."),
    click.option("--source", help="Of messages from this service."),
    click.option("--stream", help="Of messages of this task, or of `<category>.#` for events."),
    click.option("--key", help="This ordering key."),
    click.option(
        "--longer-than",
        "seconds",
        type=click.FloatRange(0),
        default=0.0,
        help="Only keys that have waited for more seconds.",
    ),
)


@click.group(name="order")
def order() -> None:
    """Show and repair the order of messages that share a key."""


@order.command(cls=Command, name="list")
@which_keys
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@as_json
@click.pass_context
def list_(context: click.Context, /, limit: int, as_json: bool, **which: Any) -> None:
    """List the keys that wait for a message, the longest first. Exit code 1 if there are none.

    The message is on its way, waits for a retry, is a dead letter ("blocked"), or is lost.
    """
    found = _waiting(eda_of(context), limit, **which)
    _show(found, as_json=as_json)
    if not found:
        click.echo("No key waits.", err=True)
        raise SystemExit(1)


@order.command(cls=Command, name="skip-gap")
@which_keys
@click.option("--all", "everything", is_flag=True, help="All keys that wait.")
@click.option("--dry-run", is_flag=True, help="Show the keys and change nothing.")
@confirmed
@authorship
@as_json
@click.pass_context
def skip_gap(
    context: click.Context,
    /,
    everything: bool,
    dry_run: bool,
    yes: bool,
    why: str,
    actor: str | None,
    as_json: bool,
    **which: Any,
) -> None:
    """Let keys go on with the first message that they have, without the lost ones before it.

    Do so when the missing messages were lost, e.g. by a restore of this service's database. If one
    of them arrives later, it becomes a dead letter. A key that a dead letter blocks is left out:
    redrive or skip the letter.
    """
    if not (everything or any(which.values())):
        raise click.UsageError("Choose keys by filters such as --key, or with --all.")
    eda = eda_of(context)
    found = _waiting(eda, None, is_held=False, **which)
    if dry_run:
        _show(found, as_json=as_json)
    elif found:
        confirm(f"Skip the missing messages of {len(found)} keys?", yes=yes)
        author = author_of(actor, why)
        errors = [error for key in found if (error := _skip(eda, key, author))]
        for error in errors:
            click.echo(printable(error), err=True)
        done, failed = len(found) - len(errors), len(errors)
        tally = {"done": done, "failed": failed, "errors": errors}
        report(tally, f"{done} keys go on, {failed} failed", as_json=as_json)
        if errors:
            raise SystemExit(1)
    if not found:
        click.echo("No such key waits for a message that is not known here.", err=True)
        raise SystemExit(1)


@order.command(cls=Command, name="new-epoch")
@click.option("--stream", help="Only the messages of this task, or of `<category>.#`.")
@click.option(
    "--awaited",
    is_flag=True,
    help="Consumers first handle all messages published before, and wait for missing ones.",
)
@confirmed
@as_json
@click.pass_context
def new_epoch(
    context: click.Context, stream: str | None, awaited: bool, yes: bool, as_json: bool
) -> None:
    """Restart the numbering of every key, after the database was restored from a backup.

    Otherwise the numbers assigned since the backup would be assigned again, and consumers would
    treat the new messages as old ones. Consumers that wait for a lost message go on: first with the
    messages that they have parked, in order, then with the new ones. Exit code 1 if no key has a
    number yet.
    """
    eda = eda_of(context)
    what = f"of {printable(stream)}" if stream else "of all tasks"
    confirm(f"Begin a new epoch {what}? Do so only after a restore.", yes=yes)
    with eda.databases.engine.begin() as connection:
        begun = eda.ordering.sequences.begin_epoch(connection, stream, awaited=awaited)
    report({"begun": begun}, f"{begun} counts begin again.", as_json=as_json)
    if not begun:
        raise SystemExit(1)


def _waiting(eda: EDA, limit: int | None, **which: Any) -> Sequence[WaitingKey]:
    with eda.databases.engine.connect() as connection:
        return eda.ordering.progress.waiting(connection, limit, **which)


def _skip(eda: EDA, key: WaitingKey, author: Author) -> str | None:
    """Let one key go on, in a transaction of its own; returns the error, if there is one."""
    try:
        with eda.databases.engine.begin() as connection:
            eda.dead_letters.gap_repair.skip(join(connection, eda.outbox), key, author)
    except RepairError as error:
        return str(error)
    except SQLAlchemyError as error:
        # The transaction was rolled back; a repetition of the command treats the key.
        return redaction.redact(f"{key.name}: {error}")
    return None


def _show(keys: Sequence[WaitingKey], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"keys": [_plain(key) for key in keys]}))
        return
    for key in keys:
        blocked = "blocked by a dead letter; " if key.held is not None else ""
        since = key.since.astimezone().isoformat(" ", "seconds")
        line = f"{key.name}: {blocked}{key.parked} wait for {key.gap} since {since}"
        click.echo(printable(line))


def _plain(key: WaitingKey) -> dict[str, Any]:
    """*key* as JSON values."""
    return {
        "consumer": key.consumer,
        "source": key.lane.source,
        "stream": key.lane.scope,
        "key": key.lane.key,
        "epoch": key.epoch,
        "awaited": key.awaited,
        "blocked": key.held is not None,
        "parked": key.parked,
        "since": key.since.isoformat(),
        "next": {"epoch": key.following[0], "number": key.following[1]},
    }
