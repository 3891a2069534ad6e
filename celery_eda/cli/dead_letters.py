"""``celery -A … eda dead-letters``: see, mend, send again or give up what could not be handled.

Each letter is treated in a transaction of its own, so a command that was killed half-way is simply
given again: what is done is done, once. Exit codes: 0 all is as asked, 1 nothing matched or
something could not be done, 2 the command line is wrong.
"""

from __future__ import annotations

import getpass
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import click
from celery.bin.base import CeleryCommand
from kombu.utils import json as kombu_json
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from celery_eda import redaction
from celery_eda.arguments import Arguments
from celery_eda.audit import Author, Entry
from celery_eda.cli.options import MOMENT, JSONValue, Rate, as_json, options
from celery_eda.cli.service import confirm, printable, service_of
from celery_eda.dead_letters import Filter, Letter, State
from celery_eda.errors import RepairError, UnreadableBody
from celery_eda.identity import ORDER_HEADER
from celery_eda.repair import End, edited, in_order

#: Letters read at once.
PAGE = 500
#: Characters of an error shown in a list.
SHORT_ERROR = 80

Command = TypeVar("Command", bound=Callable[..., Any])
Treatment = Callable[[Connection, int, Author], End]


@click.group(name="dead-letters")
def dead_letters() -> None:
    """Messages that could not be sent or handled."""


# ── options ─────────────────────────────────────────────────────────────────────────────────


LETTER_ID = click.IntRange(1, 2**63 - 1)


def filters(state: str) -> Callable[[Command], Command]:
    """Which letters; by default those in *state*."""
    return options(
        click.option("--task", help="Of this task."),
        click.option("--queue", help="From this queue, or with this routing key."),
        click.option("--error", help="With an error of this type, e.g. ValueError."),
        click.option("--key", help="With this ordering key."),
        click.option("--reason", help="For this reason, e.g. failed or 'lost worker'."),
        click.option(
            "--state",
            type=click.Choice([*(each.value for each in State), "all"]),
            default=state,
            show_default=True,
        ),
        click.option("--since", type=MOMENT, help="Dead since then; local time."),
        click.option("--until", type=MOMENT, help="Dead before then; local time."),
    )


authorship = options(
    click.option("--why", default="", help="The reason, for the audit."),
    click.option("--actor", default=None, help="Who does it; by default the system's user."),
)
in_bulk = options(
    click.argument("ids", nargs=-1, type=LETTER_ID),
    filters("open"),
    click.option("--all", "everything", is_flag=True, help="All open letters."),
    click.option("--limit", type=click.IntRange(1), help="At most so many."),
    click.option("--rate", type=Rate(), help="At most so many: 10/s, 30/m, 100/h."),
    click.option("--dry-run", is_flag=True, help="Show which letters, and do nothing."),
    click.option("--yes", is_flag=True, help="Do not ask, even for more than one."),
    authorship,
    as_json,
)


def _filter(
    *,
    ids: tuple[int, ...] | None = None,
    state: str,
    error: str | None,
    since: datetime | None,
    until: datetime | None,
    **others: str | None,
) -> Filter:
    return Filter(
        ids=ids or None,
        # Named by id, a letter is wanted whatever has become of it.
        state=None if state == "all" or ids else state,
        error_type=error,
        since=since,
        until=until,
        **others,  # type: ignore[arg-type]  # task, queue, key, reason
    )


def _author(actor: str | None, why: str) -> Author:
    return Author(actor or _user(), why)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without users
        return "unknown"


# ── seeing ──────────────────────────────────────────────────────────────────────────────────


@dead_letters.command(cls=CeleryCommand, name="list")
@filters("open")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@click.option("--after", type=click.IntRange(0), default=0, help="Only those with higher ids.")
@as_json
@click.pass_context
def list_(context: click.Context, /, limit: int, after: int, as_json: bool, **which: Any) -> None:
    """List dead letters, oldest first. Exit code 1 if there are none."""
    service = service_of(context)
    wanted = _filter(**which)
    with service.engine.connect() as connection:
        letters = service.dead_letters.select(connection, wanted, limit, after)
        total = service.dead_letters.count(connection, wanted)
    if as_json:
        click.echo(json.dumps({"total": total, "letters": [_summary(each) for each in letters]}))
    else:
        for each in letters:
            click.echo(_line(each))
        click.echo(f"{len(letters)} of {total}", err=True)
    if not letters:
        raise SystemExit(1)


@dead_letters.command(cls=CeleryCommand)
@click.argument("id", type=LETTER_ID)
@as_json
@click.pass_context
def show(context: click.Context, id: int, as_json: bool) -> None:
    """Show a whole letter: arguments, error, traceback, headers, history."""
    service = service_of(context)
    with service.engine.connect() as connection:
        letter = service.dead_letters.find(connection, id)
        if letter is None:
            raise click.ClickException(f"There is no letter {id}.")
        history = service.repair.history(connection, letter)
    if as_json:
        click.echo(
            json.dumps({**_whole(letter), "history": [_happening(each) for each in history]})
        )
    else:
        click.echo("\n".join(_page(letter, history)))


# ── doing ───────────────────────────────────────────────────────────────────────────────────


@dead_letters.command(cls=CeleryCommand)
@click.argument("id", type=LETTER_ID)
@click.option("--args", type=JSONValue(list, "an array"), help="New positional arguments.")
@click.option("--kwargs", type=JSONValue(dict, "an object"), help="New keyword arguments.")
@click.option("--dry-run", is_flag=True, help="Show what the letter would be, and do nothing.")
@authorship
@as_json
@click.pass_context
def edit(
    context: click.Context,
    id: int,
    args: list[Any] | None,
    kwargs: dict[str, Any] | None,
    dry_run: bool,
    why: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """Change the arguments of an open letter, to be redriven then."""
    if args is None and kwargs is None:
        raise click.UsageError("Give new arguments: --args JSON, --kwargs JSON, or both.")
    service = service_of(context)
    if dry_run:
        with service.engine.connect() as connection:
            letter = service.dead_letters.find(connection, id)
        if letter is None or not letter.is_open:
            raise click.ClickException(_already(End(id, letter and letter.state, False)))
        try:
            new = edited(letter, args, kwargs)
        except RepairError as error:
            raise click.ClickException(printable(error)) from error
        click.echo(printable(new.body.decode()))
        return

    def change(connection: Connection, id: int, author: Author) -> End:
        end: End = service.repair.edit(connection, id, author, args=args, kwargs=kwargs)
        return end

    _treat(service, [id], change, State.open, _author(actor, why), as_json=as_json)


@dead_letters.command(cls=CeleryCommand)
@in_bulk
@click.option(
    "--out-of-order", is_flag=True, help="Also letters that others of their key were let past."
)
@click.pass_context
def redrive(context: click.Context, /, out_of_order: bool, **options: Any) -> None:
    """Send letters again, those of one key in its order. Doing so twice is harmless."""
    service = service_of(context)

    def send(connection: Connection, id: int, author: Author) -> End:
        end: End = service.repair.redrive(connection, id, author, out_of_order=out_of_order)
        return end

    _in_bulk(service, "Redrive", send, State.redriven, **options)


@dead_letters.command(cls=CeleryCommand)
@in_bulk
@click.pass_context
def skip(context: click.Context, /, **options: Any) -> None:
    """Give up messages that hold their key; the next one of the key takes its turn."""
    service = service_of(context)
    _in_bulk(service, "Skip", service.repair.skip, State.skipped, **options)


@dead_letters.command(cls=CeleryCommand)
@in_bulk
@click.option("--awaited", is_flag=True, help="Also letters that others of their key wait for.")
@click.pass_context
def discard(context: click.Context, /, awaited: bool, **options: Any) -> None:
    """Give up messages that no other one waits for."""
    service = service_of(context)

    def give_up(connection: Connection, id: int, author: Author) -> End:
        end: End = service.repair.discard(connection, id, author, awaited=awaited)
        return end

    _in_bulk(service, "Discard", give_up, State.discarded, **options)


def _in_bulk(
    service: Any,
    verb: str,
    treat: Treatment,
    aim: State,
    *,
    ids: tuple[int, ...],
    everything: bool,
    limit: int | None,
    rate: float | None,
    dry_run: bool,
    yes: bool,
    why: str,
    actor: str | None,
    as_json: bool,
    **which: Any,
) -> None:
    """Treat all letters that are asked for, each in a transaction of its own."""
    narrowed = any(value for name, value in which.items() if name != "state")
    if not (ids or narrowed or everything):
        raise click.UsageError("Say which: ids, filters such as --task, or --all.")
    found = _found(service, _filter(ids=ids, **which), limit)
    missing = sorted(set(ids) - {letter.id for letter in found}) if limit is None else []
    if dry_run:
        _echo_all(found, as_json=as_json)
        if missing or not found:
            raise SystemExit(1)
        return
    if len(found) > 1:
        confirm(f"{verb} {len(found)} letters?", yes=yes)
    chosen = [letter.id for letter in found]
    author = _author(actor, why)
    _treat(service, chosen, treat, aim, author, missing=missing, rate=rate, as_json=as_json)


def _found(service: Any, which: Filter, limit: int | None) -> list[Letter]:
    """The letters to treat, in the order to treat them in."""
    found: list[Letter] = []
    with service.engine.connect() as connection:
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            after = found[-1].id if found else 0
            page = service.dead_letters.select(connection, which, size, after)
            found += map(_briefly, page)
            if len(page) < size:
                break
    return in_order(found)


def _briefly(letter: Letter) -> Letter:
    """*letter* without what a list does not show: there may be a million of them."""
    order = {ORDER_HEADER: letter.message.headers.get(ORDER_HEADER)}
    message = replace(letter.message, body=b"", headers=order, properties={})
    error = letter.error and letter.error[:SHORT_ERROR]
    return replace(letter, message=message, error=error, traceback=None)


@dataclass
class Tally:
    """What became of the letters of one command."""

    done: int = 0
    already: int = 0
    failed: int = 0


def _treat(
    service: Any,
    ids: Sequence[int],
    treat: Treatment,
    aim: State,
    author: Author,
    *,
    missing: Sequence[int] = (),
    rate: float | None = None,
    as_json: bool,
) -> None:
    """Treat each letter in a transaction of its own, then say what became of them."""
    tally, reports = Tally(failed=len(missing)), []
    for id in missing:
        click.echo(f"There is no letter {id} among those that were asked for.", err=True)
    with _progress(ids, shown=not as_json) as progress:
        for id in _paced(progress, rate):
            end, why = _treated(service, treat, id, author)
            if why is None and end.fresh:
                tally.done += 1
            elif why is None and end.state == aim.value and aim is not State.open:
                tally.already += 1
            else:
                tally.failed += 1
            reports.append({"id": id, "state": end.state, "fresh": end.fresh, "error": why})
            if not as_json and (why or not end.fresh):
                click.echo(printable(why or _already(end)), err=True)
    if as_json:
        click.echo(json.dumps({**vars(tally), "letters": reports}))
    else:
        what = "edited" if aim is State.open else aim.value
        click.echo(f"{tally.done} {what}, {tally.already} already, {tally.failed} failed")
    if tally.failed or not ids:
        raise SystemExit(1)


def _treated(service: Any, treat: Treatment, id: int, author: Author) -> tuple[End, str | None]:
    """What became of the letter, and why it could not be treated, if it could not."""
    try:
        with service.engine.begin() as connection:
            return treat(connection, id, author), None
    except RepairError as error:
        return End(id, None, fresh=False), str(error)
    except SQLAlchemyError as error:
        # Whatever was not committed is undone; given again, the command does the rest.
        return End(id, None, fresh=False), redaction.redact(f"Letter {id}: {error}")


def _already(end: End) -> str:
    if end.state is None:
        return f"There is no letter {end.id}."
    return f"Letter {end.id} is {end.state} already."


def _progress(ids: Sequence[int], *, shown: bool) -> AbstractContextManager[Iterable[int]]:
    """*ids*, with a bar that moves on with each, if somebody looks."""
    if shown and len(ids) > 1 and sys.stderr.isatty():
        return click.progressbar(ids, file=sys.stderr)
    return nullcontext(ids)


def _paced(ids: Iterable[int], seconds: float | None) -> Iterator[int]:
    """*ids*, not more than one in so many *seconds*."""
    due = time.monotonic()
    for each in ids:
        if seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - seconds) + seconds
        yield each


# ── in words ────────────────────────────────────────────────────────────────────────────────


def _echo_all(letters: Iterable[Letter], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"letters": [_summary(each) for each in letters]}))
        return
    for each in letters:
        click.echo(_line(each))


def _line(letter: Letter) -> str:
    error = " ".join(filter(None, (letter.error_type, letter.error)))[:SHORT_ERROR]
    key = f"key={letter.key}" if letter.key is not None else ""
    columns = (_time(letter.at), letter.state, letter.reason, letter.message.task, key, error)
    return f"{letter.id:>6}  " + "  ".join(printable(each) for each in columns if each)


def _page(letter: Letter, history: Iterable[Letter | Entry]) -> Iterator[str]:
    """A whole letter for a reader."""
    for name, value in _facts(letter).items():
        yield f"{name + ':':<16}{printable('' if value is None else value)}"
    arguments = _arguments(letter)
    for name in ("args", "kwargs", "body"):
        if name in arguments:
            yield f"{name + ':':<16}{printable(arguments[name])}"
    for name, value in sorted(letter.message.headers.items()):
        yield f"header {printable(name)}: {printable(value)}"
    yield ""
    yield printable(f"{letter.error_type or 'Error'}: {letter.error}", lines=True)
    if letter.traceback:
        yield printable(letter.traceback, lines=True)
    for each in history:
        happened = _happening(each)
        yield printable("  ".join(f"{name}={value}" for name, value in happened.items() if value))


def _facts(letter: Letter) -> dict[str, Any]:
    message = letter.message
    return {
        "id": letter.id,
        "state": letter.state,
        "reason": letter.reason,
        "task": message.task,
        "consumer": letter.consumer,
        "message id": str(message.identity.id),
        "revision": message.identity.revision,
        "key": letter.key,
        "place": message.place and f"{message.place.epoch}.{message.place.number}",
        "queue": message.queue or message.routing_key,
        "attempts": letter.attempts,
        "first at": letter.first_at and _time(letter.first_at),
        "at": _time(letter.at),
        "correlation id": letter.correlation_id,
        "causation id": letter.causation_id,
        "content type": message.content_type,
    }


def _arguments(letter: Letter) -> dict[str, Any]:
    """Its arguments; if they cannot be read, the beginning of the body as it is."""
    try:
        arguments = Arguments.of(letter.message)
    except UnreadableBody:
        return {"body": letter.message.body[:2000]}
    return {"args": list(arguments.args), "kwargs": dict(arguments.kwargs)}


def _summary(letter: Letter) -> dict[str, Any]:
    facts = {name.replace(" ", "_"): value for name, value in _facts(letter).items()}
    return {**facts, "error_type": letter.error_type, "error": letter.error}


def _whole(letter: Letter) -> dict[str, Any]:
    arguments: Mapping[str, Any] = _arguments(letter)
    if "body" in arguments:
        arguments = {"body": letter.message.body.decode("latin-1")}
    readable = json.loads(kombu_json.dumps({**arguments, "headers": letter.message.headers}))
    return {**_summary(letter), "traceback": letter.traceback, **readable}


def _happening(each: Letter | Entry) -> dict[str, Any]:
    if isinstance(each, Letter):
        what = {"letter": each.id, "reason": each.reason, "error": each.error}
        return {"at": _time(each.at), **what, "revision": each.message.identity.revision}
    who = {"action": each.action, "actor": each.actor, "why": each.why}
    return {"at": _time(each.at), **who, "letter": each.dead_letter, **each.detail}


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
