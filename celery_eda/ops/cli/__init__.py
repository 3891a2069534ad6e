"""The commands ``celery -A … eda``, one module per group of commands."""

from __future__ import annotations

import click
from celery.bin.base import handle_preload_options

from celery_eda.ops.cli.db import db
from celery_eda.ops.cli.dead_letters import dead_letters
from celery_eda.ops.cli.events import events
from celery_eda.ops.cli.flow import asyncapi, flow
from celery_eda.ops.cli.housekeeping import housekeeping
from celery_eda.ops.cli.order import order
from celery_eda.ops.cli.projections import projections
from celery_eda.ops.cli.relay import relay
from celery_eda.ops.cli.sagas import sagas
from celery_eda.ops.cli.subscriptions import subscriptions


@click.group(name="eda")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]  # Celery is untyped
def eda(context: click.Context) -> None:
    """Transactional outbox, idempotent inbox, relay, dead letters, events, sagas."""


for command in (
    relay,
    db,
    dead_letters,
    order,
    events,
    subscriptions,
    projections,
    flow,
    asyncapi,
    sagas,
    housekeeping,
):
    eda.add_command(command)
