"""What every command needs: the extended app, and text that does nothing to a terminal."""

from __future__ import annotations

from typing import Any

import click

from celery_eda.errors import ConfigurationError


def service_of(context: click.Context) -> Any:
    """The :class:`celery_eda.EDA` of the app that the command line names, its settings checked."""
    app = context.obj.app
    if not hasattr(app, "eda"):
        raise click.ClickException(
            f"The app {app.main or ''!r} is not extended. Add `eda = EDA(app)` to its module."
        )
    try:
        app.eda.url  # noqa: B018  # reading it checks the settings
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    return app.eda


def printable(text: object, *, lines: bool = False) -> str:
    """*text* with everything escaped that a terminal would obey; line ends stay if *lines* may."""
    try:
        text = str(text)
    except RecursionError:
        text = "(nested too deep to be shown)"
    return "".join(
        each if each.isprintable() or (lines and each == "\n") else _escaped(each) for each in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless the answer is *yes* already; anything else ends the command with 1."""
    if not yes:
        click.confirm(question, abort=True, err=True)
