"""``celery -A … eda events``: lists, exports, archives and replays the events of this service.

Exit codes: 0 done, 1 no event matched or the command failed, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from kombu.utils import json as kombu_json

from celery_eda.app import EDA
from celery_eda.core.error_text import printable
from celery_eda.core.event import Event
from celery_eda.events import EventFilter
from celery_eda.ops.cli.console import Command, confirm, eda_of, report
from celery_eda.ops.cli.options import MOMENT, Rate, as_json, confirmed, options

#: Events between two lines about the progress, and events deleted in one transaction.
STEP = 1000


@click.group(name="events")
def events() -> None:
    """List, export, archive and replay the events of this service."""


filters = options(
    click.option("--stream", help="Of this stream: <category>.<key>, e.g. order.7."),
    click.option("--category", help="Of this category, e.g. order."),
    click.option("--type", "types", multiple=True, help="Of this name; may be repeated."),
    click.option("--since", type=MOMENT, help="Stored at or after this time; local."),
    click.option("--until", type=MOMENT, help="Stored before this time; local."),
    click.option("--after", type=click.IntRange(0), default=0, help="After this position."),
)


@events.command(cls=Command, name="list")
@filters
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@as_json
@click.pass_context
def list_(context: click.Context, /, limit: int, as_json: bool, after: int, **choice: Any) -> None:
    """List events in the order of their positions, oldest first."""
    found = list(islice(_events(context, after, **choice), limit))
    if as_json:
        click.echo(json.dumps([_plain(event) for event in found]))
    else:
        for event in found:
            when = event.time.astimezone().isoformat(" ", "seconds")
            names = f"{event.type} {event.key or '-'}"
            click.echo(printable(f"{event.position:>8}  {when}  {event.id}  {names}"))
    _require(found)


@events.command(cls=Command)
@click.argument("event_id", type=click.UUID)
@click.pass_context
def show(context: click.Context, event_id: UUID) -> None:
    """Print one event in the JSON format of CloudEvents 1.0."""
    eda = eda_of(context)
    with eda.databases.engine.connect() as connection:
        event = eda.events.store.find(connection, event_id)
    if event is None:
        raise click.ClickException(f"This service has emitted no event {event_id}.")
    click.echo(json.dumps(_plain(event), indent=2))


@events.command(cls=Command)
@filters
@click.pass_context
def export(context: click.Context, /, after: int, **choice: Any) -> None:
    """Print events as CloudEvents 1.0, one JSON object per line, in the order of positions."""
    last = None
    for last in _events(context, after, **choice):
        click.echo(json.dumps(_plain(last)))
    _require(last)


@events.command(cls=Command)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--until", type=MOMENT, required=True, help="Stored before this time; local.")
@click.option("--category", help="Only of this category, e.g. order.")
@confirmed
@as_json
@click.pass_context
def archive(
    context: click.Context,
    file: Path,
    until: datetime,
    category: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Move events from the store into a new FILE, in the format of `export`.

    The events are deleted once the file is on disk. A command that is killed in between leaves
    them in both places: archive again, into another file; readers of both files recognize the
    copies by their ids. A stream whose first events are archived can be folded only from a
    snapshot. The newest event of the store is never deleted.
    """
    if file.exists():
        raise click.ClickException(f"{file} exists. Give the name of a new file.")
    confirm(f"Move events into {file}?", yes=yes)
    eda, choice = (
        eda_of(context),
        EventFilter(**_aware({"until": until, "category": category})),
    )
    number, last = _write(eda.events.store.follow(eda.databases.engine, choice), file)
    deleted = _delete(eda, choice, last.position) if last and last.position else 0
    done = {"events": number, "deleted": deleted}
    report(done, f"{number} events are in {file}.", as_json=as_json)
    _require(last)


@events.command(cls=Command)
@click.option("--to", "queue", required=True, help="The queue of the subscription.")
@filters
@click.option("--rate", type=Rate(), help="At most this many: 10/s, 30/m, 100/h.")
@click.option("--publish", is_flag=True, help="Allow the handler to publish.")
@click.option("--dry-run", is_flag=True, help="Count the events, send none.")
@confirmed
@as_json
@click.pass_context
def replay(
    context: click.Context,
    /,
    queue: str,
    after: int,
    rate: float | None,
    publish: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **choice: Any,
) -> None:
    """Send stored events again to one subscription, e.g. to a new one.

    An event that the subscription has handled takes no second effect, unless its inbox row has
    expired (eda_inbox_retention). Repeat a command that was killed, or continue with --after and
    the last position it reported. A handler that publishes during a replay fails, and the event
    becomes a dead letter, because the original consequences were published long ago. Add
    --publish for a new subscription.
    """
    eda = eda_of(context)
    if dry_run:
        number = sum(1 for _ in _events(context, after, **choice))
        report({"events": number}, f"{number} events", as_json=as_json)
        return
    confirm(f"Send events to {printable(queue)} again?", yes=yes)
    number, last = 0, None
    chosen = EventFilter(**_aware(choice))
    for last in eda.events.replay.replay(queue, chosen, after=after, publish=publish):
        number += 1
        if number % STEP == 0:
            click.echo(f"{number} events, up to position {last.position}", err=True)
        if rate:
            time.sleep(rate)
    done = {"events": number, "position": last.position if last else None}
    report(done, f"{number} events are on their way to {queue}.", as_json=as_json)
    _require(last)


def _write(events: Iterable[Event], file: Path) -> tuple[int, Event | None]:
    """Write *events* to *file*, which appears once all of them are on disk.

    Returns:
        The number of events, and the last one.
    """
    part = file.with_name(f"{file.name}.part")
    number, last = 0, None
    with part.open("w") as lines:
        for number, last in enumerate(events, 1):
            lines.write(f"{json.dumps(_plain(last))}\n")
            if number % STEP == 0:
                click.echo(f"{number} events written", err=True)
        lines.flush()
        os.fsync(lines.fileno())
    part.rename(file)
    return number, last


def _delete(eda: EDA, choice: EventFilter, position: int) -> int:
    """Delete the events of *choice* up to *position*; returns their number."""
    deleted = 0
    while True:
        with eda.databases.engine.begin() as connection:
            batch = eda.events.store.delete(connection, choice, position, STEP)
        if not batch:
            return deleted
        deleted += batch


def _events(context: click.Context, after: int, **choice: Any) -> Iterator[Event]:
    """The chosen events, in the order of their positions, which are assigned where missing."""
    eda = eda_of(context)
    return eda.events.store.follow(eda.databases.engine, EventFilter(**_aware(choice)), after=after)


def _aware(choice: dict[str, Any]) -> dict[str, Any]:
    """*choice* with naive moments understood as local time."""
    return {
        name: value.astimezone() if isinstance(value, datetime) else value
        for name, value in choice.items()
    }


def _plain(event: Event) -> Any:
    """*event* as CloudEvents JSON, with dates and the like encoded as kombu does."""
    return json.loads(kombu_json.dumps(event.to_cloud()))


def _require(found: Any) -> None:
    if not found:
        click.echo("No event matches.", err=True)
        raise SystemExit(1)
