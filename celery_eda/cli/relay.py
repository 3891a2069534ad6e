"""``celery -A … eda relay``."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_eda.cli.service import service_of
from celery_eda.errors import SchemaOutdated


@click.command(cls=CeleryCommand)
@click.option("--once", is_flag=True, help="Send what is due now, then end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print figures as JSON.")
@click.pass_context
def relay(context: click.Context, once: bool, as_json: bool) -> None:
    """Send committed messages to the broker. Run as many as you like."""
    service = service_of(context)
    context.obj.app.log.setup()
    try:
        service.check()
        service.note_subscriptions()
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
        else f"{done.confirmed} sent, {done.dropped} dropped, {done.refused} refused, "
        f"{done.unknown} still waiting"
    )
    if done.refused or done.unknown:
        raise SystemExit(1)
