"""Errors on the wire: what is known comes back as itself, and nothing else is made of them."""

from __future__ import annotations

from typing import Any

import pytest

from celery_eda.errors import OutOfSequence, RemoteError
from celery_eda.requests.remote_errors import RemoteErrors


class Odd(Exception):
    """An error that cannot be made from its arguments."""

    def __init__(self) -> None:
        super().__init__("odd", 7)


class Secretive(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise ValueError


def travelled(error: Exception, errors: RemoteErrors | None = None) -> Exception:
    errors = errors or RemoteErrors()
    return errors.from_wire(errors.to_wire(error))


@pytest.mark.parametrize(
    "error",
    [ValueError("no", 7), KeyError("x"), TimeoutError(), OutOfSequence("late"), OSError(2, "no")],
)
def test_known_errors_come_back_as_themselves(error: Exception) -> None:
    again = travelled(error)

    assert type(again) is type(error)
    assert again.args == error.args


@pytest.mark.parametrize(
    "error",
    [Odd(), Secretive(), ValueError(object()), ValueError("x" * 20_000), MemoryError("no")],
)
def test_other_errors_come_back_as_what_is_known_of_them(error: Exception) -> None:
    again = travelled(error)

    assert isinstance(again, RemoteError)
    assert again.type.endswith(type(error).__qualname__)
    assert len(again.message) <= 10_000


def test_an_error_that_cannot_be_made_anew_is_a_remote_one() -> None:
    errors = RemoteErrors()
    errors.register(Odd)

    assert isinstance(travelled(Odd(), errors), RemoteError)


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "subprocess.Popen", "SystemExit"])
def test_nothing_is_called_because_a_message_names_it(kind: str) -> None:
    described = {"type": kind, "args": ["true"], "message": "", "traceback": None}

    assert type(RemoteErrors().from_wire(described)) is RemoteError


@pytest.mark.parametrize(
    "described",
    [
        *(None, "ValueError", [], {}, {"type": "ValueError"}),
        {"type": 7, "args": [], "message": "", "traceback": None},
        {"type": "ValueError", "args": {}, "message": "", "traceback": None},
        {"type": "ValueError", "args": [], "message": None, "traceback": None},
        {"type": "x" * 300, "args": [], "message": "", "traceback": None},
    ],
)
def test_what_no_responder_has_written_is_refused(described: Any) -> None:
    with pytest.raises(ValueError, match="cannot have described"):
        RemoteErrors().from_wire(described)
