"""``celery -A … eda housekeeping``."""

from __future__ import annotations

import json

import click
from celery.bin.base import CeleryCommand

from celery_eda.cli.service import service_of
from celery_eda.errors import SchemaOutdated


@click.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def housekeeping(context: click.Context, as_json: bool) -> None:
    """Delete what is older than the settings say. Running relays do so by themselves."""
    service = service_of(context)
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
