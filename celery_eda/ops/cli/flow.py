"""``celery -A … eda flow`` and ``eda asyncapi``: the events of the code, drawn and specified.

Neither command needs a broker or a database.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

import click

from celery_eda.app import EDA
from celery_eda.ops import asyncapi as specification
from celery_eda.ops.cli.console import Command, eda_of
from celery_eda.ops.diagrams import flow as flows
from celery_eda.ops.diagrams.flow import Flow

FORMATS: dict[str, Callable[[list[Flow]], str]] = {
    "mermaid": lambda given: flows.graph(given).to_mermaid(),
    "json": lambda given: json.dumps(asdict(given[0]), indent=2),
}


@click.command(cls=Command, name="flow")
@click.option("--format", "format_", type=click.Choice(list(FORMATS)), default="mermaid")
@click.option(
    "--with",
    "others",
    type=click.File(),
    multiple=True,
    help="The flow of another service, printed there by `eda flow --format json`; repeatable.",
)
@click.pass_context
def flow(context: click.Context, format_: str, others: tuple[TextIO, ...]) -> None:
    """Draw the events that services emit, and their subscriptions to them.

    Each service knows its own part; add the flows of the others for the complete picture.
    """
    found = [_flow_of(eda_of(context))]
    for other in others:
        try:
            found.append(Flow.read(json.load(other)))
        except ValueError as error:
            raise click.ClickException(f"{other.name}: {error}") from error
    click.echo(FORMATS[format_](found))


@click.command(cls=Command)
@click.option("--version", default="0", help="Of the service.")
@click.pass_context
def asyncapi(context: click.Context, version: str) -> None:
    """Print the AsyncAPI 3.0 document of this service, as JSON.

    The document lists the events that the code emits by name or registers with `eda.event`, and
    the queues of the subscriptions.
    """
    eda = eda_of(context)
    document = specification.document(
        _flow_of(eda),
        eda.events.registry,
        eda.events.subscriptions.by_queue,
        version,
    )
    click.echo(json.dumps(document, indent=2))


def _flow_of(eda: EDA) -> Flow:
    subscriptions = eda.events.subscriptions
    listening = [*subscriptions.known.values(), *subscriptions.per_worker.values()]
    return Flow.of(eda.service.app, eda.service.name, listening)
