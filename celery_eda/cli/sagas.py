"""``celery -A … eda sagas``: the sagas of this service, and what a person decides about them.

Exit codes: 0 all is as asked, 1 nothing matched or it cannot be done, 2 the command line is wrong.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable
from typing import Any

import click
from celery.bin.base import CeleryCommand
from sqlalchemy import Connection

from celery_eda import saga_pictures as pictures
from celery_eda.cli.options import as_json, confirmed
from celery_eda.cli.service import confirm, printable, service_of
from celery_eda.errors import SagaError
from celery_eda.saga_log import Entry, Saga, State


@click.group(name="sagas")
def sagas() -> None:
    """The sagas of this service."""


@sagas.command(cls=CeleryCommand, name="list")
@click.option("--state", type=click.Choice([each.value for each in State]), help="In this state.")
@click.option("--name", help="Of this definition.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@as_json
@click.pass_context
def list_(
    context: click.Context, state: str | None, name: str | None, limit: int, as_json: bool
) -> None:
    """Show sagas, those that changed last first."""
    service = service_of(context)
    with service.engine.connect() as connection:
        wanted = None if state is None else State(state)
        found = service.sagas.log.select(connection, wanted, name, limit)
    if as_json:
        click.echo(json.dumps([_plain(each) for each in found], default=str))
    for each in () if as_json else found:
        click.echo(printable(_summary(each)))
    if not found:
        click.echo("No saga matches.", err=True)
        sys.exit(1)


@sagas.command(cls=CeleryCommand)
@click.argument("id")
@as_json
@click.pass_context
def show(context: click.Context, id: str, as_json: bool) -> None:
    """Show one saga, and its history: steps, attempts, waits, what was undone, who decided."""
    service = service_of(context)
    try:
        with service.engine.connect() as connection:
            saga = service.sagas.log.find(connection, id)
            history = service.sagas.log.history(connection, id)
            parts = service.sagas.log.sub_sagas(connection, id)
    except SagaError as error:
        raise click.ClickException(printable(error)) from error
    lines = [_line(each) for each in history]
    if as_json:
        sub_sagas = [_plain(each) for each in parts]
        found = {**_plain(saga), "history": lines, "sub_sagas": sub_sagas}
        click.echo(json.dumps(found, default=str))
        return
    click.echo(printable(_summary(saga)))
    for line in lines:
        times = f"{line['begun_at']}  {line['ended_at'] or '…':<26}"
        value = "" if line["value"] is None else f"  {line['value']}"
        who = f"  by {line['who']}" if line["who"] else ""
        what = f"{line['kind']} {line['place']} #{line['attempt']}: {line['status']}"
        click.echo(printable(f"{times}  {what}{value}{who}"))
    for part in parts:
        click.echo(printable(f"its part {_summary(part)}"))


@sagas.command(cls=CeleryCommand)
@click.argument("name")
@click.option("--version", type=int, help="Of the definition; the newest by default.")
@click.pass_context
def draw(context: click.Context, name: str, version: int | None) -> None:
    """Print the flow chart of the definition NAME as Mermaid text. Needs no database."""
    versions = service_of(context).saga_definitions.known.get(name, {})
    if not versions or version not in (None, *versions):
        known = ", ".join(map(str, sorted(versions))) or "none"
        raise click.ClickException(
            printable(f"There is no such saga {name} here; its versions: {known}.")
        )
    definition = versions[max(versions) if version is None else version]
    click.echo(pictures.graph(definition).to_mermaid())


@sagas.command(cls=CeleryCommand)
@click.argument("id")
@click.argument("name")
@click.option("--value", default="null", help="As JSON.")
@click.pass_context
def signal(context: click.Context, id: str, name: str, value: str) -> None:
    """Give the signal NAME to a saga: a decision that it waits for."""
    try:
        given = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"no JSON: {error}", param_hint="--value") from error
    _act(context, lambda sagas, at: sagas.signal(at, id, name, given, getpass.getuser()))


@sagas.command(cls=CeleryCommand)
@click.argument("id")
@confirmed
@click.pass_context
def cancel(context: click.Context, id: str, yes: bool) -> None:
    """Have a saga undone."""
    confirm(f"Have {printable(id)} undone?", yes=yes)
    _act(context, lambda sagas, at: sagas.cancel(at, id, getpass.getuser()))


@sagas.command(cls=CeleryCommand)
@click.argument("id")
@click.pass_context
def resume(context: click.Context, id: str) -> None:
    """Let a parked saga go on: all that failed is tried again."""
    _act(context, lambda sagas, at: sagas.resume(at, id, getpass.getuser()))


@sagas.command(cls=CeleryCommand, name="retry-step")
@click.argument("id")
@click.argument("place")
@click.pass_context
def retry_step(context: click.Context, id: str, place: str) -> None:
    """Let a parked saga go on: what failed at PLACE is tried again."""
    _act(context, lambda sagas, at: sagas.resume(at, id, getpass.getuser(), place))


@sagas.command(cls=CeleryCommand, name="skip-step")
@click.argument("id")
@click.argument("place")
@confirmed
@click.pass_context
def skip_step(context: click.Context, id: str, place: str, yes: bool) -> None:
    """Let a parked saga go on as if what failed at PLACE were done."""
    confirm(f"Take {printable(place)} of {printable(id)} for done?", yes=yes)
    _act(context, lambda sagas, at: sagas.skip(at, id, getpass.getuser(), place))


def _act(context: click.Context, act: Callable[[Any, Connection], None]) -> None:
    """Do it in one transaction, with what the saga sends then."""
    service = service_of(context)
    try:
        with service.transaction() as session:
            act(service.sagas, session.connection())
    except SagaError as error:
        raise click.ClickException(printable(error)) from error
    click.echo("Done.")


def _summary(saga: Saga) -> str:
    error = f"; {saga.error}" if saga.error else ""
    return f"{saga.id}: {saga.name} v{saga.version}, {saga.state.value}{error}"


def _plain(saga: Saga) -> dict[str, Any]:
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


def _line(entry: Entry) -> dict[str, Any]:
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
