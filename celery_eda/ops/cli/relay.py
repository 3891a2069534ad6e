"""``celery -A … eda relay``: sends committed messages from the outbox to the broker."""

from __future__ import annotations

import signal
from dataclasses import asdict

import click

from celery_eda.ops.cli.console import Command, eda_of, report
from celery_eda.ops.cli.options import as_json


@click.command(cls=Command)
@click.option("--once", is_flag=True, help="Send what is due now and exit; --json is for this.")
@as_json
@click.pass_context
def relay(context: click.Context, once: bool, as_json: bool) -> None:
    """Send committed messages to the broker. Several relays may run at once."""
    eda = eda_of(context)
    context.obj.app.log.setup()
    eda.check()
    eda.events.record_queues()
    runner = eda.outbox.relay()
    if not once:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.stop())
        click.echo("Relay is running. Ctrl-C ends it after the batch in progress.")
        runner.run()
        return
    done = runner.drain()
    report(
        asdict(done),
        f"{done.confirmed} sent, {done.dropped} dropped, {done.refused} refused, "
        f"{done.unknown} still waiting",
        as_json=as_json,
    )
    if done.refused or done.unknown:
        raise SystemExit(1)
