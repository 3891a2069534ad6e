"""``celery -A … eda subscriptions``: lists, declares and drops the queues of subscriptions.

Exit codes: 0 done, 1 there is none or the command failed, 2 the command line is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from celery_eda.app import EDA
from celery_eda.core.error_text import printable
from celery_eda.events import PREFIX, Subscription
from celery_eda.ops.cli.console import Command, channel_of, confirm, eda_of
from celery_eda.ops.cli.options import as_json, confirmed


@click.group(name="subscriptions")
def subscriptions() -> None:
    """List, declare and drop the queues of this app's event handlers."""


@subscriptions.command(cls=Command, name="list")
@as_json
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the subscriptions of this app, with the number of messages waiting for each.

    The list includes subscriptions that were removed from the code while their queues still exist
    and fill up.
    """
    eda = eda_of(context)
    found = [
        *_states(context, eda.events.subscriptions.by_queue, gone=False),
        *_states(context, _gone(eda), gone=True),
    ]
    if as_json:
        click.echo(json.dumps(found))
    else:
        for each in found:
            click.echo(printable(_line(each)))
    if not found:
        click.echo("This app subscribes to nothing.", err=True)
        raise SystemExit(1)


@subscriptions.command(cls=Command)
@click.pass_context
def declare(context: click.Context) -> None:
    """Declare the queues of this app's subscriptions before any worker has started.

    From then on the queues collect events. Workers and relays also declare them at their start.
    """
    eda = eda_of(context)
    eda.events.record_queues()
    with channel_of(context) as channel:
        eda.events.queues.declare(channel)
    click.echo(f"{len(eda.events.subscriptions.known)} subscriptions are declared.")


@subscriptions.command(cls=Command)
@click.argument("queue")
@click.option("--force", is_flag=True, help="Even if messages wait in it; they are lost.")
@confirmed
@click.pass_context
def drop(context: click.Context, queue: str, force: bool, yes: bool) -> None:
    """Delete the queue of a subscription that was removed from the code; it would only grow."""
    if not queue.startswith(PREFIX):
        raise click.ClickException(
            f"{queue} is not the queue of a subscription; their names begin with {PREFIX!r}."
        )
    eda = eda_of(context)
    if queue in eda.events.subscriptions.by_queue:
        raise click.ClickException(
            f"This app still subscribes with {queue}. Remove the handler first, or its worker "
            "will declare the queue again."
        )
    with channel_of(context) as channel:
        waiting = eda.events.queues.waiting(channel, queue)
    if waiting is None:
        with eda.databases.engine.begin() as connection:
            eda.events.declarations.delete(connection, queue)
        raise click.ClickException(f"The broker has no queue {queue}.")
    if waiting and not force:
        raise click.ClickException(
            f"{waiting} messages wait in {queue}. Let a worker handle them, or add --force to "
            "lose them."
        )
    confirm(f"Delete {printable(queue)}?", yes=yes)
    with channel_of(context) as channel:
        eda.events.queues.drop(channel, queue)
    with eda.databases.engine.begin() as connection:
        eda.events.declarations.delete(connection, queue)
    click.echo(f"{queue} is deleted.")


def _line(state: dict[str, Any]) -> str:
    order = ", in order" if state["ordered"] else ""
    queued = f"{state['waiting']} waiting" if state["declared"] else "not declared yet"
    patterns = " ".join(map(str, state["patterns"]))
    gone = "; GONE from the code, drop it" if state["gone"] else ""
    return f"{state['task']}: {patterns}{order}; {state['queue']}: {queued}{gone}"


def _gone(eda: EDA) -> dict[str, Subscription]:
    """Subscriptions whose queues this service has declared, but which its code no longer has."""
    with eda.databases.engine.connect() as connection:
        declared = eda.events.declarations.all(connection)
    known = eda.events.subscriptions.by_queue
    return {queue: each for queue, each in declared.items() if queue not in known}


def _states(
    context: click.Context, by_queue: dict[str, Subscription], *, gone: bool
) -> Iterator[dict[str, Any]]:
    queues = eda_of(context).events.queues
    for queue, subscription in sorted(by_queue.items()):
        # One channel per queue, since RabbitMQ closes the channel if the queue does not exist.
        with channel_of(context) as channel:
            waiting = queues.waiting(channel, queue)
        if waiting is not None or not gone:
            yield {
                "task": subscription.task,
                "patterns": list(subscription.patterns),
                "ordered": subscription.ordered,
                "queue": queue,
                "declared": waiting is not None,
                "waiting": waiting or 0,
                "gone": gone,
            }
