"""``celery -A … eda events``: what this service has emitted, shown, exported and sent once more.

Exit codes: 0 all is as asked, 1 nothing matched, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from celery.bin.base import CeleryCommand
from kombu.utils import json as kombu_json

from celery_eda.cli.options import MOMENT, Rate, as_json, confirmed, options
from celery_eda.cli.service import confirm, printable, service_of
from celery_eda.errors import InvalidEvent
from celery_eda.event import Event
from celery_eda.event_store import Choice

#: Events after which the progress is told.
STEP = 1000


@click.group(name="events")
def events() -> None:
    """The events that this service has emitted."""


filters = options(
    click.option("--stream", help="Of this stream: <category>.<key>, e.g. order.7."),
    click.option("--category", help="Of this category, e.g. order."),
    click.option("--type", "types", multiple=True, help="Of this name; may be repeated."),
    click.option("--since", type=MOMENT, help="Stored since then; local time."),
    click.option("--until", type=MOMENT, help="Stored before then; local time."),
    click.option("--after", type=click.IntRange(0), default=0, help="Behind this position."),
)


@events.command(cls=CeleryCommand, name="list")
@filters
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@as_json
@click.pass_context
def list_(context: click.Context, /, limit: int, as_json: bool, after: int, **choice: Any) -> None:
    """Show events by their positions, the oldest first."""
    found = list(islice(_events(context, after, **choice), limit))
    if as_json:
        click.echo(json.dumps([_plain(event) for event in found]))
    else:
        for event in found:
            when = event.time.astimezone().isoformat(" ", "seconds")
            names = f"{event.type} {event.key or '-'}"
            click.echo(printable(f"{event.position:>8}  {when}  {event.id}  {names}"))
    _require(found)


@events.command(cls=CeleryCommand)
@click.argument("event_id", type=click.UUID)
@click.pass_context
def show(context: click.Context, event_id: UUID) -> None:
    """Print one event as CloudEvents 1.0 has it, in JSON."""
    service = service_of(context)
    with service.engine.connect() as connection:
        event = service.event_store.find(connection, event_id)
    if event is None:
        raise click.ClickException(f"This service has emitted no event {event_id}.")
    click.echo(json.dumps(_plain(event), indent=2))


@events.command(cls=CeleryCommand)
@filters
@click.pass_context
def export(context: click.Context, /, after: int, **choice: Any) -> None:
    """Print events as CloudEvents 1.0, one JSON object in a line, by their positions."""
    last = None
    for last in _events(context, after, **choice):
        click.echo(json.dumps(_plain(last)))
    _require(last)


@events.command(cls=CeleryCommand)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--until", type=MOMENT, required=True, help="Stored before then; local time.")
@click.option("--category", help="Of this category alone, e.g. order.")
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
    """Move events into a new FILE, written as `export` does, and delete them from the store.

    They are deleted once the file is on the disk. What dies in between leaves them in both; then
    archive to another file, and nothing is lost: whoever reads both passes over the second. A
    stream whose beginning is archived can be folded only from a snapshot; the newest event stays.
    """
    if file.exists():
        raise click.ClickException(f"{file} is there already. Give the name of a new file.")
    confirm(f"Move events into {file}?", yes=yes)
    service, choice = service_of(context), Choice(**_aware({"until": until, "category": category}))
    part = file.with_name(f"{file.name}.part")
    number, last = 0, None
    with part.open("w") as lines:
        for number, last in enumerate(service.event_store.follow(service.engine, choice), 1):
            lines.write(f"{json.dumps(_plain(last))}\n")
            if number % STEP == 0:
                click.echo(f"{number} events written", err=True)
        lines.flush()
        os.fsync(lines.fileno())
    part.rename(file)
    deleted = 0
    while last is not None:
        with service.engine.begin() as connection:
            gone = service.event_store.forget(connection, choice, last.position, STEP)
        if not gone:
            break
        deleted += gone
    done = {"events": number, "deleted": deleted}
    click.echo(json.dumps(done) if as_json else f"{number} events are in {file}.")
    _require(last)


@events.command(cls=CeleryCommand)
@click.option("--to", "queue", required=True, help="The queue of the subscription.")
@filters
@click.option("--rate", type=Rate(), help="At most so many: 10/s, 30/m, 100/h.")
@click.option("--publish", is_flag=True, help="Let the handler publish, which else fails.")
@click.option("--dry-run", is_flag=True, help="Count them, and send nothing.")
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
    """Send events once more to one subscription, e.g. one that is new.

    It takes effect only with those that it has not handled yet, unless that was longer ago than
    its inbox remembers (eda_inbox_retention). A command that was killed half-way is given again,
    or goes on with --after and the last position that it told. A handler that publishes when it
    is told of the past fails, and the event is a dead letter: what followed from it has left long
    ago. For a subscription that is new add --publish.
    """
    service = service_of(context)
    if dry_run:
        number = sum(1 for _ in _events(context, after, **choice))
        click.echo(json.dumps({"events": number}) if as_json else f"{number} events")
        return
    confirm(f"Send events to {printable(queue)} once more?", yes=yes)
    number, last = 0, None
    try:
        chosen = Choice(**_aware(choice))
        for last in service.replaying.replay(queue, chosen, after=after, publish=publish):
            number += 1
            if number % STEP == 0:
                click.echo(f"{number} events, up to position {last.position}", err=True)
            if rate:
                time.sleep(rate)
    except InvalidEvent as error:
        raise click.ClickException(str(error)) from error
    done = {"events": number, "position": last.position if last else None}
    click.echo(json.dumps(done) if as_json else f"{number} events are on their way to {queue}.")
    _require(last)


def _events(context: click.Context, after: int, **choice: Any) -> Iterator[Event]:
    """The events of a choice; those that had no position get one."""
    service = service_of(context)
    try:
        yield from service.event_store.follow(service.engine, Choice(**_aware(choice)), after=after)
    except InvalidEvent as error:
        raise click.ClickException(str(error)) from error


def _aware(choice: dict[str, Any]) -> dict[str, Any]:
    """*choice* with its moments in local time, where they have no other."""
    return {
        name: value.astimezone() if isinstance(value, datetime) else value
        for name, value in choice.items()
    }


def _plain(event: Event) -> Any:
    """*event* as plain JSON; dates and the like stay as kombu writes them."""
    return json.loads(kombu_json.dumps(event.to_cloud()))


def _require(found: Any) -> None:
    if not found:
        click.echo("No event matches.", err=True)
        sys.exit(1)
