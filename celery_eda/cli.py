"""``celery -A … eda``: the commands."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_eda import schema
from celery_eda.errors import ConfigurationError, SchemaOutdated


@click.group(name="eda")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]  # Celery is untyped
def eda(context: click.Context) -> None:
    """Transactional outbox, idempotent inbox, relay."""


def _eda(context: click.Context) -> Any:
    app = context.obj.app
    if not hasattr(app, "eda"):
        raise click.ClickException(
            f"The app {app.main or ''!r} is not extended. Add `eda = EDA(app)` to its module."
        )
    try:
        app.eda.settings  # noqa: B018  # reading them checks them
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    return app.eda


@eda.command(cls=CeleryCommand)
@click.option("--once", is_flag=True, help="Send what is due now, then end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print figures as JSON.")
@click.pass_context
def relay(context: click.Context, once: bool, as_json: bool) -> None:
    """Send committed messages to the broker. Run as many as you like."""
    service = _eda(context)
    context.obj.app.log.setup()
    try:
        service.check()
    except SchemaOutdated as error:
        raise click.ClickException(str(error)) from error
    runner = service.relay()
    if not once:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.stop())
        click.echo("Relay is running. Ctrl-C ends it after the batch in progress.")
        runner.run()
        return
    done = runner.drain()
    click.echo(
        json.dumps(asdict(done))
        if as_json
        else f"{done.confirmed} sent, {done.refused} refused, {done.unknown} still waiting"
    )
    if done.refused or done.unknown:
        raise SystemExit(1)


@eda.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def housekeeping(context: click.Context, as_json: bool) -> None:
    """Delete what is older than the settings say. Running relays do so by themselves."""
    service = _eda(context)
    try:
        service.check()
    except SchemaOutdated as error:
        raise click.ClickException(str(error)) from error
    done = service.housekeeping.finish()
    released = done.pop("released")
    deleted = ", ".join(f"{rows} of {what}" for what, rows in done.items())
    click.echo(
        json.dumps({"released": released, "deleted": done})
        if as_json
        else f"Deleted: {deleted or 'nothing'}. Parked messages sent again: {released}."
    )


@eda.group()
def db() -> None:
    """The tables."""


@db.command(cls=CeleryCommand)
@click.pass_context
def upgrade(context: click.Context) -> None:
    """Create the tables, or bring them up to date."""
    service = _eda(context)
    schema.upgrade(service.engine, service.tables)
    click.echo("The tables are up to date.")


@db.command(cls=CeleryCommand)
@click.pass_context
def check(context: click.Context) -> None:
    """Exit with 1 if the tables are missing or out of date."""
    try:
        _eda(context).check()
    except SchemaOutdated as error:
        raise click.ClickException(str(error)) from error
    click.echo("The tables are up to date.")


@db.command(cls=CeleryCommand)
@click.pass_context
def sql(context: click.Context) -> None:
    """Print the DDL, for a DBA to run."""
    service = _eda(context)
    click.echo(schema.sql(service.engine, service.tables))
