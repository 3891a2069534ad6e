"""``celery -A … eda projections``: lists, rebuilds, compares and swaps projections.

Exit codes: 0 done, 1 the tables differ or the command failed, 2 the command line is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TextIO
from uuid import UUID

import click
from kombu.utils import json as kombu_json
from sqlalchemy.exc import OperationalError

from celery_eda.app import EDA
from celery_eda.core.error_text import printable
from celery_eda.core.event import Event
from celery_eda.errors import InvalidEvent
from celery_eda.events import Difference, EventFilter, Projection, Shadow
from celery_eda.ops.cli.console import Command, channel_of, confirm, eda_of, report
from celery_eda.ops.cli.options import MOMENT, as_json, confirmed


@click.group(name="projections")
def projections() -> None:
    """List, rebuild, compare and swap the tables made of events."""


@projections.command(cls=Command, name="list")
@as_json
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the projections of this app with their lags.

    The lag of a projection for which events are waiting is the age of the newest event that it
    has handled; otherwise it is 0.
    """
    eda = eda_of(context)
    found = [_state(context, eda, each) for each in eda.events.projections.known.values()]
    if as_json:
        click.echo(json.dumps(found))
    else:
        for each in found:
            click.echo(printable(_line(each)))
    if not found:
        click.echo("This app has no projection.", err=True)
        raise SystemExit(1)


@projections.command(cls=Command)
@click.argument("name")
@click.option("--from", "log", type=click.File(), help="Output of `events export`; - for stdin.")
@click.option("--at", type=MOMENT, help="As of this time, local; the shadow is then frozen.")
@click.option("--skip", type=click.UUID, multiple=True, help="Leave this event out; repeatable.")
@click.option("--anew", is_flag=True, help="Drop an existing shadow and begin again.")
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
    """Build a shadow of a projection beside the live table; nothing is published.

    The events come from this service's own store, or from the exports of other services, which
    must hold whole categories from their first event. Repeat the command to continue after an
    interruption, or with newer events.
    """
    eda, projection = _found(context, name)
    _begin(eda, projection, Shadow.following if at is None else Shadow.frozen, anew=anew)
    events = _stored(eda, name) if log is None else _read(log)
    number = 0
    try:
        for number in eda.events.rebuild.feed(projection, _until(events, at), set(skip)):
            click.echo(f"{number} events", err=True)
    except OperationalError as error:
        reason = printable(error.orig)
        raise click.ClickException(f"Database error: {reason}. Repeat the command.") from error
    table = projection.shadow.fullname
    done = {"events": number, "shadow": table}
    report(done, f"{table} is built from {number} events.", as_json=as_json)


@projections.command(cls=Command)
@click.argument("name")
@as_json
@click.pass_context
def compare(context: click.Context, name: str, as_json: bool) -> None:
    """Compare the shadow with the live table, which handles no event meanwhile."""
    eda, projection = _found(context, name)
    with eda.databases.engine.begin() as connection:
        difference = eda.events.rebuild.compare(connection, projection)
    _print(difference, as_json=as_json)
    if difference.rows or difference.behind:
        raise SystemExit(1)


@projections.command(cls=Command)
@click.argument("name")
@confirmed
@as_json
@click.pass_context
def swap(context: click.Context, name: str, yes: bool, as_json: bool) -> None:
    """Replace the rows of the live table by those of its shadow, in one transaction."""
    eda, projection = _found(context, name)
    table = printable(projection.table.fullname)
    confirm(f"Replace the rows of {table} with those of its shadow?", yes=yes)
    _print(eda.events.rebuild.swap(projection), as_json=as_json)


@projections.command(cls=Command)
@click.argument("name")
@confirmed
@click.pass_context
def discard(context: click.Context, name: str, yes: bool) -> None:
    """Drop the shadow."""
    eda, projection = _found(context, name)
    confirm(f"Drop {printable(projection.shadow.fullname)}?", yes=yes)
    eda.events.rebuild.discard(projection)
    click.echo(printable(f"{projection.shadow.fullname} is dropped."))


def _found(context: click.Context, name: str) -> tuple[EDA, Projection]:
    """The service, and its projection called *name*."""
    eda = eda_of(context)
    if (projection := eda.events.projections.known.get(name)) is None:
        names = ", ".join(sorted(eda.events.projections.known)) or "none"
        raise click.ClickException(printable(f"There is no projection {name}; there are: {names}."))
    return eda, projection


def _begin(eda: EDA, projection: Projection, wanted: Shadow, *, anew: bool) -> None:
    """Begin a shadow, unless an unfinished one of the *wanted* kind can be continued."""
    with eda.databases.engine.connect() as connection:
        existing = eda.events.shadows.find(connection, projection.name)
    if existing is None or anew:
        eda.events.rebuild.begin(projection, wanted)
    elif existing is not wanted:
        raise click.ClickException(
            f"Its shadow is {existing.value}. Add --anew to begin another one."
        )


def _state(context: click.Context, eda: EDA, projection: Projection) -> dict[str, Any]:
    name = projection.name
    queue = eda.events.subscriptions.name_of(eda.events.subscriptions.known[name])
    with channel_of(context) as channel:
        waiting = eda.events.queues.waiting(channel, queue) or 0
    with eda.databases.engine.connect() as connection:
        shadow = eda.events.shadows.find(connection, name)
        parked = eda.ordering.progress.count_parked(connection, name)
        newest = eda.inbox.store.newest(connection, name)
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


def _line(state: dict[str, Any]) -> str:
    lag = "?" if state["lag_seconds"] is None else f"{state['lag_seconds']:.1f} s"
    waits = f"{state['waiting']} waiting, {state['parked']} parked"
    shadow = f", its shadow is {state['shadow']}" if state["shadow"] else ""
    return f"{state['name']}: {state['table']}, {waits}, {lag} behind{shadow}"


def _stored(eda: EDA, name: str) -> Iterator[Event]:
    """The stored events of the categories to which the projection *name* subscribes."""
    for category in eda.events.subscriptions.known[name].categories:
        yield from eda.events.store.follow(eda.databases.engine, EventFilter(category=category))


def _read(log: TextIO) -> Iterator[Event]:
    """The events of *log*, one per line."""
    for number, line in enumerate(log, 1):
        try:
            yield Event.of_cloud(kombu_json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidEvent(f"Line {number} of the log is not an event: {error}") from error


def _until(events: Iterator[Event], at: datetime | None) -> Iterator[Event]:
    """The *events* recorded until *at*; all of them if it is None."""
    moment = at and at.astimezone()
    for event in events:
        if moment is not None and event.recorded is None:
            raise InvalidEvent(f"{event.type} {event.id} does not say when it was recorded.")
        if moment is None or (event.recorded and event.recorded <= moment):
            yield event


def _print(difference: Difference, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(difference), default=str))
        return
    for what in ("missing", "extra", "changed"):
        click.echo(f"{getattr(difference, what):>8} {what}")
    if difference.examples:
        click.echo(printable(f"e.g. {', '.join(map(str, difference.examples))}"))
    if difference.behind:
        keys = ", ".join(difference.behind)
        click.echo(printable(f"The two tables have not handled the same events of {keys}."))
