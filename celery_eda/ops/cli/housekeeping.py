"""``celery -A … eda housekeeping``: deletes rows that are past their retention."""

from __future__ import annotations

import click

from celery_eda.ops.cli.console import Command, report, service_of
from celery_eda.ops.cli.options import as_json


@click.command(cls=Command)
@as_json
@click.pass_context
def housekeeping(context: click.Context, as_json: bool) -> None:
    """Delete what is older than the settings allow. Running relays do this by themselves."""
    service = service_of(context)
    service.check()
    done = service.housekeeping.finish()
    released = done.pop("released")
    deleted = ", ".join(f"{rows} of {what}" for what, rows in done.items()) or "nothing"
    report(
        {"released": released, "deleted": done},
        f"Deleted: {deleted}. Parked messages sent again: {released}.",
        as_json=as_json,
    )
