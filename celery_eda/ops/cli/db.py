"""``celery -A … eda db``: creates, upgrades and checks the tables."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import click

from celery_eda.ops.cli.console import Command, eda_of


@click.group()
def db() -> None:
    """Create, upgrade and check the tables."""


@db.command(cls=Command)
@click.pass_context
def upgrade(context: click.Context) -> None:
    """Create the tables, or bring them up to date."""
    eda = eda_of(context)
    _upgrading().upgrade(eda.databases.engine, eda.databases.tables)
    click.echo("The tables are up to date.")


@db.command(cls=Command)
@click.pass_context
def check(context: click.Context) -> None:
    """Exit with 1 if the tables are missing or out of date."""
    eda_of(context).check()
    click.echo("The tables are up to date.")


@db.command(cls=Command)
@click.pass_context
def sql(context: click.Context) -> None:
    """Print the DDL, for a DBA to run."""
    eda = eda_of(context)
    click.echo(_upgrading().sql(eda.databases.engine, eda.databases.tables))


def _upgrading() -> ModuleType:
    # Alembic is slow to import, and every `celery` command imports this module.
    return import_module("celery_eda.databases.upgrade")
