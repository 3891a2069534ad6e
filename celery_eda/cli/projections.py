"""``celery -A … eda projections``: the tables made of events, looked at and made anew.

Exit codes: 0 all is as asked, 1 they differ, or it cannot be done, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TextIO
from uuid import UUID

import click
from celery.bin.base import CeleryCommand
from kombu.utils import json as kombu_json
from sqlalchemy.exc import OperationalError

from celery_eda.cli.broker import channel_of
from celery_eda.cli.options import MOMENT, as_json, confirmed
from celery_eda.cli.service import confirm, printable, service_of
from celery_eda.errors import InvalidEvent, RebuildError
from celery_eda.event import Event
from celery_eda.event_store import Choice
from celery_eda.projecting import Difference
from celery_eda.projections import Projection, Shadow


@click.group(name="projections")
def projections() -> None:
    """The tables that are made of events."""


@projections.command(cls=CeleryCommand, name="list")
@as_json
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """Show the projections of this app, and how far each is behind.

    That is, while events wait for it, the age of the newest one that it has handled.
    """
    service = service_of(context)
    found = [_state(context, service, each) for each in service.projections.known.values()]
    if as_json:
        click.echo(json.dumps(found))
    for each in () if as_json else found:
        lag = "?" if each["lag_seconds"] is None else f"{each['lag_seconds']:.1f} s"
        waits = f"{each['waiting']} waiting, {each['parked']} parked"
        shadow = f", its shadow is {each['shadow']}" if each["shadow"] else ""
        click.echo(printable(f"{each['name']}: {each['table']}, {waits}, {lag} behind{shadow}"))
    if not found:
        click.echo("This app has no projection.", err=True)
        sys.exit(1)


@projections.command(cls=CeleryCommand)
@click.argument("name")
@click.option("--from", "log", type=click.File(), help="What `events export` printed; - for stdin.")
@click.option("--at", type=MOMENT, help="As it was then; local time. It then does not follow.")
@click.option("--skip", type=click.UUID, multiple=True, help="Leave this event out; repeatable.")
@click.option("--anew", is_flag=True, help="Drop a shadow that is there, and begin again.")
@as_json
@click.pass_context
def rebuild(
    context: click.Context,
    name: str,
    log: TextIO | None,
    at: datetime | None,
    skip: tuple[UUID, ...],
    anew: bool,
    as_json: bool,
) -> None:
    """Make a projection anew beside the live one, as its shadow, and publish nothing.

    The events come from this service's own store; those of others from what they exported, whole
    categories from their beginning. Given once more it goes on, with what is new or was missing.
    """
    service, projection = _found(context, name)
    shadow = Shadow.following if at is None else Shadow.frozen
    with service.engine.connect() as connection:
        there = service.projections.find(connection, name)
    if there not in (None, shadow) and not anew:
        raise click.ClickException(f"Its shadow is {there.value}. Add --anew to begin another one.")
    if there is None or anew:
        service.projecting.begin(projection, shadow)
    events = _stored(service, name) if log is None else _read(log)
    number = 0
    try:
        for number in service.projecting.feed(projection, _until(events, at), set(skip)):
            click.echo(f"{number} events", err=True)
    except (InvalidEvent, RebuildError) as error:
        raise click.ClickException(printable(error)) from error
    except OperationalError as error:
        why = printable(error.orig)
        raise click.ClickException(f"The database: {why}. Give the command again.") from error
    table = projection.shadow.fullname
    done = {"events": number, "shadow": table}
    click.echo(json.dumps(done) if as_json else printable(f"{table} is made of {number} events."))


@projections.command(cls=CeleryCommand)
@click.argument("name")
@as_json
@click.pass_context
def compare(context: click.Context, name: str, as_json: bool) -> None:
    """Tell how the shadow differs from the live table; meanwhile no event is handled."""
    service, projection = _found(context, name)
    try:
        with service.engine.begin() as connection:
            difference = service.projecting.compare(connection, projection)
    except RebuildError as error:
        raise click.ClickException(printable(error)) from error
    _tell(difference, as_json=as_json)
    sys.exit(1 if difference.rows or difference.behind else 0)


@projections.command(cls=CeleryCommand)
@click.argument("name")
@confirmed
@as_json
@click.pass_context
def swap(context: click.Context, name: str, yes: bool, as_json: bool) -> None:
    """Let the live table say what its shadow says, in one transaction, and drop the shadow."""
    service, projection = _found(context, name)
    confirm(f"Let {printable(projection.table.fullname)} say what its shadow says?", yes=yes)
    try:
        difference = service.projecting.swap(projection)
    except RebuildError as error:
        raise click.ClickException(printable(error)) from error
    _tell(difference, as_json=as_json)


@projections.command(cls=CeleryCommand)
@click.argument("name")
@confirmed
@click.pass_context
def discard(context: click.Context, name: str, yes: bool) -> None:
    """Drop the shadow."""
    service, projection = _found(context, name)
    confirm(f"Drop {printable(projection.shadow.fullname)}?", yes=yes)
    service.projecting.discard(projection)
    click.echo(printable(f"{projection.shadow.fullname} is gone."))


def _found(context: click.Context, name: str) -> tuple[Any, Projection]:
    """The service, and its projection of that *name*."""
    service = service_of(context)
    if (projection := service.projections.known.get(name)) is None:
        names = ", ".join(sorted(service.projections.known)) or "none"
        raise click.ClickException(printable(f"There is no projection {name}; there are: {names}."))
    return service, projection


def _state(context: click.Context, service: Any, projection: Projection) -> dict[str, Any]:
    name = projection.name
    queue = service.subscriptions.name_of(service.subscriptions.known[name])
    with channel_of(context) as channel:
        waiting = service.subscriptions.waiting(channel, queue) or 0
    with service.engine.connect() as connection:
        shadow = service.projections.find(connection, name)
        parked = service.cursors.waiting(connection, name)
        newest = service.inbox.newest(connection, name)
    lag = None if newest is None else (datetime.now(timezone.utc) - newest).total_seconds()
    return {
        "name": name,
        "table": projection.table.fullname,
        "queue": queue,
        "waiting": waiting,
        "parked": parked,
        "newest": newest and newest.isoformat(),
        "lag_seconds": lag if waiting or parked else 0.0,
        "shadow": shadow and shadow.value,
    }


def _stored(service: Any, name: str) -> Iterator[Event]:
    """The events of its categories in this service's own store."""
    for category in service.subscriptions.known[name].categories:
        yield from service.event_store.follow(service.engine, Choice(category=category))


def _read(log: TextIO) -> Iterator[Event]:
    """The events in the lines of a *log*."""
    for number, line in enumerate(log, 1):
        try:
            yield Event.of_cloud(kombu_json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidEvent(f"Line {number} of the log is no event: {error}") from error


def _until(events: Iterator[Event], at: datetime | None) -> Iterator[Event]:
    """Those of *events* that were recorded until *at*."""
    moment = at and at.astimezone()
    for event in events:
        if moment is not None and event.recorded is None:
            raise InvalidEvent(f"Nobody has told when {event.type} {event.id} was recorded.")
        if moment is None or (event.recorded and event.recorded <= moment):
            yield event


def _tell(difference: Difference, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(difference), default=str))
        return
    for what in ("missing", "extra", "changed"):
        click.echo(f"{getattr(difference, what):>8} {what}")
    if difference.examples:
        click.echo(printable(f"e.g. {', '.join(map(str, difference.examples))}"))
    if difference.behind:
        keys = ", ".join(difference.behind)
        click.echo(printable(f"They have not handled the same events of {keys}."))
