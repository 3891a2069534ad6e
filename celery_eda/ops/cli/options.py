"""Options and parameter types that several commands share."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from kombu.utils import json as kombu_json

from celery_eda.dead_letters import Author

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
confirmed = click.option("--yes", is_flag=True, help="Do not ask.")
MOMENT = click.DateTime(
    ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S"]
)


def options(*given: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


authorship = options(
    click.option("--why", default="", help="The reason, for the audit."),
    click.option("--actor", default=None, help="The author; by default the system's user."),
)


def author_of(actor: str | None, why: str) -> Author:
    """The author of an action, for the audit."""
    return Author(actor or _user(), why)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without users
        return "unknown"


class Rate(click.ParamType):  # type: ignore[type-arg]  # generic only in later versions of click
    """A rate per second, minute or hour: ``10/s``, ``30/m``, ``100/h``, or ``5`` per second."""

    name = "rate"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The interval of the rate *value*, in seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(?:/([smh]))?", value)
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a rate. Write e.g. 10/s, 30/m or 100/h.", param, ctx)
        return {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] / float(match[1])


class JSONValue(click.ParamType):  # type: ignore[type-arg]  # as above
    """A JSON text whose value has one type."""

    def __init__(self, type_: type, name: str) -> None:
        self.type = type_
        self.name = name

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value of the JSON text, with dates and UUIDs decoded as Celery encodes them."""
        if isinstance(value, self.type):
            return value
        try:
            read = kombu_json.loads(value)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.fail(f"not valid JSON: {error}", param, ctx)
        if not isinstance(read, self.type):
            self.fail(
                f"must be {self.name}, e.g. {'[7]' if self.type is list else '{}'}", param, ctx
            )
        return read
