"""``celery -A … eda subscriptions``: the queues to which events come.

Exit codes: 0 all is as asked, 1 there is none or it cannot be done, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click
from celery.bin.base import CeleryCommand

from celery_eda.cli.broker import channel_of
from celery_eda.cli.options import as_json, confirmed
from celery_eda.cli.service import confirm, printable, service_of
from celery_eda.subscriptions import PREFIX, Subscription


@click.group(name="subscriptions")
def subscriptions() -> None:
    """The handlers of events, and their queues."""


@subscriptions.command(cls=CeleryCommand, name="list")
@as_json
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """Show the subscriptions of this app, and how many messages wait for each.

    Also those that are gone from its code while their queues are still being filled.
    """
    service = service_of(context)
    found = [
        *_states(context, service.subscriptions.by_queue, gone=False),
        *_states(context, _gone(service), gone=True),
    ]
    if as_json:
        click.echo(json.dumps(found))
    for each in () if as_json else found:
        order = ", in order" if each["ordered"] else ""
        there = f"{each['waiting']} waiting" if each["declared"] else "not declared yet"
        patterns = " ".join(map(str, each["patterns"]))
        gone = "; GONE from the code, drop it" if each["gone"] else ""
        line = f"{each['task']}: {patterns}{order}; {each['queue']}: {there}{gone}"
        click.echo(printable(line))
    if not found:
        click.echo("This app subscribes to nothing.", err=True)
        sys.exit(1)


@subscriptions.command(cls=CeleryCommand)
@click.pass_context
def declare(context: click.Context) -> None:
    """Make the queues of this app's subscriptions, before any worker has started.

    From then on events wait there. Workers and relays do the same.
    """
    service = service_of(context)
    service.note_subscriptions()
    with channel_of(context) as channel:
        service.subscriptions.declare(channel)
    click.echo(f"{len(service.subscriptions.known)} subscriptions are declared.")


@subscriptions.command(cls=CeleryCommand)
@click.argument("queue")
@click.option("--force", is_flag=True, help="Even if messages wait in it, which are lost then.")
@confirmed
@click.pass_context
def drop(context: click.Context, queue: str, force: bool, yes: bool) -> None:
    """Delete the queue of a subscription that is gone from the code: it would fill for ever."""
    if not queue.startswith(PREFIX):
        raise click.ClickException(f"{queue} is no queue of a subscription: {PREFIX}… are.")
    service = service_of(context)
    if queue in service.subscriptions.by_queue:
        raise click.ClickException(
            f"This app still subscribes by {queue}. Remove the handler first, or its worker "
            "makes the queue again."
        )
    with channel_of(context) as channel:
        waiting = service.subscriptions.waiting(channel, queue)
    if waiting is None:
        with service.engine.begin() as connection:
            service.declarations.forget(connection, queue)
        raise click.ClickException(f"The broker has no queue {queue}.")
    if waiting and not force:
        raise click.ClickException(
            f"{waiting} messages wait in {queue}. Let a worker handle them, or add --force to "
            "lose them."
        )
    confirm(f"Delete {printable(queue)}?", yes=yes)
    with channel_of(context) as channel:
        service.subscriptions.drop(channel, queue)
    with service.engine.begin() as connection:
        service.declarations.forget(connection, queue)
    click.echo(f"{queue} is deleted.")


def _gone(service: Any) -> dict[str, Subscription]:
    """Those whose queues this service has made, and that its code has no more."""
    with service.engine.connect() as connection:
        declared = service.declarations.all(connection)
    known = service.subscriptions.by_queue
    return {queue: each for queue, each in declared.items() if queue not in known}


def _states(
    context: click.Context, by_queue: dict[str, Subscription], *, gone: bool
) -> Iterator[dict[str, Any]]:
    known = service_of(context).subscriptions
    for queue, subscription in sorted(by_queue.items()):
        with channel_of(context) as channel:  # its own: RabbitMQ closes it if there is no queue
            waiting = known.waiting(channel, queue)
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
