"""``celery -A … eda db``: the tables."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import click
from celery.bin.base import CeleryCommand

from celery_eda.cli.service import service_of
from celery_eda.errors import SchemaOutdated


@click.group()
def db() -> None:
    """The tables."""


@db.command(cls=CeleryCommand)
@click.pass_context
def upgrade(context: click.Context) -> None:
    """Create the tables, or bring them up to date."""
    service = service_of(context)
    _upgrading().upgrade(service.engine, service.tables)
    click.echo("The tables are up to date.")


@db.command(cls=CeleryCommand)
@click.pass_context
def check(context: click.Context) -> None:
    """Exit with 1 if the tables are missing or out of date."""
    try:
        service_of(context).check()
    except SchemaOutdated as error:
        raise click.ClickException(str(error)) from error
    click.echo("The tables are up to date.")


@db.command(cls=CeleryCommand)
@click.pass_context
def sql(context: click.Context) -> None:
    """Print the DDL, for a DBA to run."""
    service = service_of(context)
    click.echo(_upgrading().sql(service.engine, service.tables))


def _upgrading() -> ModuleType:
    """Alembic's part, imported when it is asked for: every `celery` command imports this module."""
    return import_module("celery_eda.upgrading")
