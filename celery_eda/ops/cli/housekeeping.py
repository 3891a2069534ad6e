"""``celery -A … eda housekeeping``: deletes rows that are past their retention."""

from __future__ import annotations

import click

from celery_eda.ops.cli.console import Command, eda_of, report
from celery_eda.ops.cli.options import as_json


@click.command(cls=Command)
@as_json
@click.pass_context
def housekeeping(context: click.Context, as_json: bool) -> None:
    """Delete rows that are past their retention. Running relays do this by themselves."""
    eda = eda_of(context)
    eda.check()
    done = eda.outbox.housekeeping.finish()
    released, skipped = done.pop("released"), done.pop("skipped")
    del done["overdue"]  # it only warns
    deleted = ", ".join(f"{rows} of {what}" for what, rows in done.items()) or "nothing"
    report(
        {"released": released, "skipped": skipped, "deleted": done},
        f"Deleted: {deleted}. Parked messages sent again: {released + skipped}.",
        as_json=as_json,
    )
