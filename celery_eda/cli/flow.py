"""``celery -A … eda flow`` and ``eda asyncapi``: what the code says of events, drawn and described.

Neither needs a broker or a database.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO

import click
from celery.bin.base import CeleryCommand

from celery_eda import asyncapi as specification
from celery_eda import flow as flows
from celery_eda.cli.service import service_of
from celery_eda.flow import Flow

FORMATS: dict[str, Callable[[list[Flow]], str]] = {
    "mermaid": lambda given: flows.graph(given).to_mermaid(),
    "json": lambda given: json.dumps(asdict(given[0]), indent=2),
}


@click.command(cls=CeleryCommand, name="flow")
@click.option("--format", "format_", type=click.Choice(list(FORMATS)), default="mermaid")
@click.option(
    "--with",
    "others",
    type=click.File(),
    multiple=True,
    help="The flow of another service, which `eda flow --format json` printed there; repeatable.",
)
@click.pass_context
def flow(context: click.Context, format_: str, others: tuple[TextIO, ...]) -> None:
    """Draw who emits which events, and who listens.

    Each service knows its own part; together with those of the others it is the whole picture.
    """
    found = [_flow_of(service_of(context))]
    for other in others:
        try:
            found.append(Flow.read(json.load(other)))
        except ValueError as error:
            raise click.ClickException(f"{other.name}: {error}") from error
    click.echo(FORMATS[format_](found))


@click.command(cls=CeleryCommand)
@click.option("--version", default="0", help="Of the service.")
@click.pass_context
def asyncapi(context: click.Context, version: str) -> None:
    """Print the AsyncAPI 3.0 document of this service, as JSON.

    It has the events that the code emits by name or registers with `eda.event`, and the queues of
    the subscriptions.
    """
    service = service_of(context)
    by_queue, types = service.subscriptions.by_queue, service.event_types
    found = specification.document(_flow_of(service), types, by_queue, version)
    click.echo(json.dumps(found, indent=2))


def _flow_of(service: Any) -> Flow:
    subscriptions = service.subscriptions
    listening = [*subscriptions.known.values(), *subscriptions.private.values()]
    return Flow.of(service.app, service.service, listening)
