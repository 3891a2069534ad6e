"""``celery -A … eda sagas``: lists, draws, signals, cancels and resumes the sagas of this service.

Exit codes: 0 done, 1 no saga matched or the command failed, 2 the command line is wrong.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from typing import Any

import click
from sqlalchemy import Connection

from celery_eda.core.error_text import printable
from celery_eda.ops.cli.console import Command, confirm, eda_of
from celery_eda.ops.cli.options import as_json, confirmed
from celery_eda.ops.diagrams import sagas as pictures
from celery_eda.sagas import Coordinator, HistoryEntry, SagaInstance, State


@click.group(name="sagas")
def sagas() -> None:
    """List, draw, signal, cancel and resume the sagas of this service."""


@sagas.command(cls=Command, name="list")
@click.option("--state", type=click.Choice([each.value for each in State]), help="In this state.")
@click.option("--name", help="Of this definition.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@as_json
@click.pass_context
def list_(
    context: click.Context, state: str | None, name: str | None, limit: int, as_json: bool
) -> None:
    """List sagas, the most recently changed first."""
    eda = eda_of(context)
    with eda.databases.engine.connect() as connection:
        wanted = None if state is None else State(state)
        found = eda.sagas.coordinator.store.select(connection, wanted, name, limit)
    if as_json:
        click.echo(json.dumps([_plain(each) for each in found], default=str))
    else:
        for each in found:
            click.echo(printable(_summary(each)))
    if not found:
        click.echo("No saga matches.", err=True)
        raise SystemExit(1)


@sagas.command(cls=Command)
@click.argument("id")
@as_json
@click.pass_context
def show(context: click.Context, id: str, as_json: bool) -> None:
    """Show one saga and its history: steps, attempts, waits, compensations, decisions."""
    eda = eda_of(context)
    with eda.databases.engine.connect() as connection:
        saga = eda.sagas.coordinator.store.find(connection, id)
        history = eda.sagas.coordinator.store.history(connection, id)
        parts = eda.sagas.coordinator.store.sub_sagas(connection, id)
    entries = [_entry(each) for each in history]
    if as_json:
        sub_sagas = [_plain(each) for each in parts]
        found = {**_plain(saga), "history": entries, "sub_sagas": sub_sagas}
        click.echo(json.dumps(found, default=str))
        return
    click.echo(printable(_summary(saga)))
    for entry in entries:
        click.echo(printable(_line(entry)))
    for part in parts:
        click.echo(printable(f"sub-saga {_summary(part)}"))


@sagas.command(cls=Command)
@click.argument("name")
@click.option("--version", type=int, help="Of the definition; the newest by default.")
@click.pass_context
def draw(context: click.Context, name: str, version: int | None) -> None:
    """Print the flow chart of the definition NAME as Mermaid text. Needs no database."""
    versions = eda_of(context).sagas.definitions.known.get(name, {})
    if not versions or version not in (None, *versions):
        known = ", ".join(map(str, sorted(versions))) or "none"
        raise click.ClickException(
            printable(f"There is no such saga {name} here; its versions: {known}.")
        )
    definition = versions[max(versions) if version is None else version]
    click.echo(pictures.graph(definition).to_mermaid())


@sagas.command(cls=Command)
@click.argument("id")
@click.argument("name")
@click.option("--value", default="null", help="As JSON.")
@click.pass_context
def signal(context: click.Context, id: str, name: str, value: str) -> None:
    """Send the signal NAME to a saga that waits for it, e.g. a person's decision."""
    try:
        given = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"not valid JSON: {error}", param_hint="--value") from error
    _act(context, lambda sagas, at: sagas.signal(at, id, name, given, getpass.getuser()))


@sagas.command(cls=Command)
@click.argument("id")
@confirmed
@click.pass_context
def cancel(context: click.Context, id: str, yes: bool) -> None:
    """Cancel a saga: its completed steps are compensated."""
    confirm(f"Cancel {printable(id)} and compensate its completed steps?", yes=yes)
    _act(context, lambda sagas, at: sagas.cancel(at, id, getpass.getuser()))


@sagas.command(cls=Command)
@click.argument("id")
@click.pass_context
def resume(context: click.Context, id: str) -> None:
    """Resume a parked saga by retrying everything that failed."""
    _act(context, lambda sagas, at: sagas.resume(at, id, getpass.getuser()))


@sagas.command(cls=Command, name="retry-step")
@click.argument("id")
@click.argument("place")
@click.pass_context
def retry_step(context: click.Context, id: str, place: str) -> None:
    """Resume a parked saga by retrying the step that failed at PLACE."""
    _act(context, lambda sagas, at: sagas.resume(at, id, getpass.getuser(), place))


@sagas.command(cls=Command, name="skip-step")
@click.argument("id")
@click.argument("place")
@confirmed
@click.pass_context
def skip_step(context: click.Context, id: str, place: str, yes: bool) -> None:
    """Resume a parked saga as if the step that failed at PLACE had succeeded."""
    confirm(f"Treat {printable(place)} of {printable(id)} as done?", yes=yes)
    _act(context, lambda sagas, at: sagas.skip(at, id, getpass.getuser(), place))


def _act(context: click.Context, act: Callable[[Coordinator, Connection], None]) -> None:
    """Call *act* in one transaction, together with the messages that the saga then sends."""
    eda = eda_of(context)
    with eda.transaction() as session:
        act(eda.sagas.coordinator, session.connection())
    click.echo("Done.")


def _summary(saga: SagaInstance) -> str:
    error = f"; {saga.error}" if saga.error else ""
    return f"{saga.id}: {saga.name} v{saga.version}, {saga.state.value}{error}"


def _plain(saga: SagaInstance) -> dict[str, Any]:
    return {
        "id": saga.id,
        "name": saga.name,
        "version": saga.version,
        "state": saga.state.value,
        "data": saga.data,
        "error": saga.error,
        "root": saga.root,
        "begun_at": saga.begun_at,
        "changed_at": saga.changed_at,
    }


def _line(entry: dict[str, Any]) -> str:
    times = f"{entry['begun_at']}  {entry['ended_at'] or '…':<26}"
    value = "" if entry["value"] is None else f"  {entry['value']}"
    who = f"  by {entry['who']}" if entry["who"] else ""
    what = f"{entry['kind']} {entry['place']} #{entry['attempt']}: {entry['status']}"
    return f"{times}  {what}{value}{who}"


def _entry(entry: HistoryEntry) -> dict[str, Any]:
    record = entry.record
    failed = isinstance(record.value, Exception)
    return {
        "kind": record.kind.value,
        "place": record.path,
        "attempt": record.attempt,
        "status": "timed out" if record.timed_out else record.status.value,
        "value": f"{type(record.value).__name__}: {record.value}" if failed else record.value,
        "who": entry.who,
        "begun_at": str(entry.begun_at),
        "ended_at": entry.ended_at and str(entry.ended_at),
    }
