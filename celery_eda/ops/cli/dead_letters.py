"""``celery -A … eda dead-letters``: lists, edits, redrives, skips and discards dead letters.

Each letter is treated in a transaction of its own, and treating it twice has no second effect:
repeat a command that was killed. Exit codes: 0 done, 1 no letter matched or one could not be
treated, 2 the command line is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import click

from celery_eda.app import EDA
from celery_eda.core.error_text import printable
from celery_eda.core.identity import ORDER_HEADER
from celery_eda.dead_letters import (
    Letter,
    LetterFilter,
    LetterState,
    RepairResult,
    edited,
    in_order,
)
from celery_eda.ops.cli import letters_view as view
from celery_eda.ops.cli.console import Command, confirm, eda_of
from celery_eda.ops.cli.letters_treatment import Treatment, refusal, treat
from celery_eda.ops.cli.options import (
    MOMENT,
    JSONValue,
    Rate,
    as_json,
    author_of,
    authorship,
    options,
)

#: Letters read by one query.
PAGE = 500

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@click.group(name="dead-letters")
def dead_letters() -> None:
    """List, edit, redrive, skip and discard messages that could not be sent or handled."""


# ── options ─────────────────────────────────────────────────────────────────────────────────


LETTER_ID = click.IntRange(1, 2**63 - 1)


def filters(state: str) -> Callable[[Decorated], Decorated]:
    """Options that choose letters; *state* is the default of ``--state``."""
    return options(
        click.option("--task", help="Of this task."),
        click.option("--queue", help="From this queue, or with this routing key."),
        click.option("--error", help="With an error of this type, e.g. ValueError."),
        click.option("--key", help="With this ordering key."),
        click.option("--reason", help="For this reason, e.g. failed or 'lost worker'."),
        click.option(
            "--state",
            type=click.Choice([*(each.value for each in LetterState), "all"]),
            default=state,
            show_default=True,
        ),
        click.option("--since", type=MOMENT, help="Dead at or after this time; local."),
        click.option("--until", type=MOMENT, help="Dead before this time; local."),
    )


in_bulk = options(
    click.argument("ids", nargs=-1, type=LETTER_ID),
    filters("open"),
    click.option("--all", "everything", is_flag=True, help="All open letters."),
    click.option("--limit", type=click.IntRange(1), help="At most this many."),
    click.option("--rate", type=Rate(), help="At most this many: 10/s, 30/m, 100/h."),
    click.option("--dry-run", is_flag=True, help="Show the letters and change nothing."),
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
) -> LetterFilter:
    return LetterFilter(
        ids=ids or None,
        # An explicit id selects its letter in any state.
        state=None if state == "all" or ids else state,
        error_type=error,
        since=since and since.astimezone(),
        until=until and until.astimezone(),
        **others,  # type: ignore[arg-type]  # task, queue, key, reason
    )


# ── commands that read ──────────────────────────────────────────────────────────────────────


@dead_letters.command(cls=Command, name="list")
@filters("open")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@click.option("--after", type=click.IntRange(0), default=0, help="Only those with higher ids.")
@as_json
@click.pass_context
def list_(context: click.Context, /, limit: int, after: int, as_json: bool, **which: Any) -> None:
    """List dead letters, oldest first. Exit code 1 if there are none."""
    eda = eda_of(context)
    wanted = _filter(**which)
    with eda.databases.engine.connect() as connection:
        letters = eda.dead_letters.store.select(connection, wanted, limit, after)
        total = eda.dead_letters.store.count(connection, wanted)
    if as_json:
        summaries = [view.summary(each) for each in letters]
        click.echo(json.dumps({"total": total, "letters": summaries}))
    else:
        for each in letters:
            click.echo(view.line(each))
        click.echo(f"{len(letters)} of {total}", err=True)
    if not letters:
        raise SystemExit(1)


@dead_letters.command(cls=Command)
@click.argument("id", type=LETTER_ID)
@as_json
@click.pass_context
def show(context: click.Context, id: int, as_json: bool) -> None:
    """Show one letter: arguments, error, traceback, headers, history."""
    eda = eda_of(context)
    with eda.databases.engine.connect() as connection:
        letter = eda.dead_letters.store.find(connection, id)
        if letter is None:
            raise click.ClickException(f"There is no letter {id}.")
        history = eda.dead_letters.repair.history(connection, letter)
    if as_json:
        entries = [view.history_entry(each) for each in history]
        click.echo(json.dumps({**view.whole(letter), "history": entries}))
    else:
        click.echo("\n".join(view.page(letter, history)))


# ── commands that write ─────────────────────────────────────────────────────────────────────


@dead_letters.command(cls=Command)
@click.argument("id", type=LETTER_ID)
@click.option("--args", type=JSONValue(list, "an array"), help="New positional arguments.")
@click.option("--kwargs", type=JSONValue(dict, "an object"), help="New keyword arguments.")
@click.option("--dry-run", is_flag=True, help="Show the new body and change nothing.")
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
    """Change the arguments of an open letter, before a redrive."""
    if args is None and kwargs is None:
        raise click.UsageError("Give new arguments: --args JSON, --kwargs JSON, or both.")
    eda = eda_of(context)
    if dry_run:
        with eda.databases.engine.connect() as connection:
            letter = eda.dead_letters.store.find(connection, id)
        if letter is None or not letter.is_open:
            state = letter.state if letter else None
            raise click.ClickException(refusal(RepairResult(id, state, fresh=False)))
        click.echo(printable(edited(letter, args, kwargs).body.decode()))
        return
    change = partial(eda.dead_letters.repair.edit, args=args, kwargs=kwargs)
    treat(eda, [id], change, LetterState.open, author_of(actor, why), as_json=as_json)


@dead_letters.command(cls=Command)
@in_bulk
@click.option(
    "--out-of-order",
    is_flag=True,
    help="Also letters that later messages of their key were allowed to pass.",
)
@click.pass_context
def redrive(context: click.Context, /, out_of_order: bool, **options: Any) -> None:
    """Send letters again, those of one key in order. Redriving twice sends once."""
    eda = eda_of(context)
    send = partial(eda.dead_letters.repair.redrive, out_of_order=out_of_order)
    _in_bulk(eda, "Redrive", send, LetterState.redriven, **options)


@dead_letters.command(cls=Command)
@in_bulk
@click.pass_context
def skip(context: click.Context, /, **options: Any) -> None:
    """Give up messages that block their key; the next message of the key proceeds."""
    eda = eda_of(context)
    _in_bulk(eda, "Skip", eda.dead_letters.repair.skip, LetterState.skipped, **options)


@dead_letters.command(cls=Command)
@in_bulk
@click.option("--awaited", is_flag=True, help="Also letters that others of their key wait for.")
@click.pass_context
def discard(context: click.Context, /, awaited: bool, **options: Any) -> None:
    """Give up messages that no other message waits for."""
    eda = eda_of(context)
    give_up = partial(eda.dead_letters.repair.discard, awaited=awaited)
    _in_bulk(eda, "Discard", give_up, LetterState.discarded, **options)


def _in_bulk(
    eda: EDA,
    verb: str,
    treatment: Treatment,
    aim: LetterState,
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
    """Treat all chosen letters, each in a transaction of its own."""
    narrowed = any(value for name, value in which.items() if name != "state")
    if not (ids or narrowed or everything):
        raise click.UsageError("Choose letters by ids, by filters such as --task, or with --all.")
    found = _found(eda, _filter(ids=ids, **which), limit)
    missing = sorted(set(ids) - {letter.id for letter in found}) if limit is None else []
    if dry_run:
        _show(found, as_json=as_json)
        if missing or not found:
            raise SystemExit(1)
        return
    if len(found) > 1:
        confirm(f"{verb} {len(found)} letters?", yes=yes)
    chosen = [letter.id for letter in found]
    author = author_of(actor, why)
    treat(eda, chosen, treatment, aim, author, missing=missing, rate=rate, as_json=as_json)


def _show(letters: Iterable[Letter], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"letters": [view.summary(each) for each in letters]}))
    else:
        for each in letters:
            click.echo(view.line(each))


def _found(eda: EDA, which: LetterFilter, limit: int | None) -> list[Letter]:
    """The chosen letters, in the order in which to treat them."""
    found: list[Letter] = []
    with eda.databases.engine.connect() as connection:
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            after = found[-1].id if found else 0
            page = eda.dead_letters.store.select(connection, which, size, after)
            found += map(_shortened, page)
            if len(page) < size:
                break
    return in_order(found)


def _shortened(letter: Letter) -> Letter:
    """*letter* with only the fields that a list shows, since a command may hold a million."""
    order = {ORDER_HEADER: letter.message.headers.get(ORDER_HEADER)}
    message = replace(letter.message, body=b"", headers=order, properties={})
    error = letter.error and letter.error[: view.SHORT_ERROR]
    return replace(letter, message=message, error=error, traceback=None)
