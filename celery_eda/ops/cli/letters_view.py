"""A dead letter as a line, a page and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from kombu.utils import json as kombu_json

from celery_eda.core.arguments import Arguments
from celery_eda.core.error_text import printable
from celery_eda.dead_letters import AuditEntry, Letter
from celery_eda.errors import UnreadableBody

#: Characters of an error shown in a list.
SHORT_ERROR = 80
#: Bytes of an undecodable body shown on a page.
SHORT_BODY = 2000


def line(letter: Letter) -> str:
    """One line of a list."""
    error = " ".join(filter(None, (letter.error_type, letter.error)))[:SHORT_ERROR]
    key = f"key={letter.key}" if letter.key is not None else ""
    columns = (_time(letter.at), letter.state, letter.reason, letter.message.task, key, error)
    return f"{letter.id:>6}  " + "  ".join(printable(each) for each in columns if each)


def page(letter: Letter, history: Iterable[Letter | AuditEntry]) -> Iterator[str]:
    """The lines of a page: facts, arguments, headers, error, traceback, history."""
    for name, value in _facts(letter).items():
        yield f"{name + ':':<16}{printable('' if value is None else value)}"
    arguments = _arguments(letter)
    for name in ("args", "kwargs", "body"):
        if name in arguments:
            yield f"{name + ':':<16}{printable(arguments[name])}"
    for name, value in sorted(letter.message.headers.items()):
        yield f"header {printable(name)}: {printable(value)}"
    yield ""
    yield printable(f"{letter.error_type or 'Error'}: {letter.error}", lines=True)
    if letter.traceback:
        yield printable(letter.traceback, lines=True)
    for each in history:
        happened = history_entry(each)
        yield printable("  ".join(f"{name}={value}" for name, value in happened.items() if value))


def _facts(letter: Letter) -> dict[str, Any]:
    message = letter.message
    return {
        "id": letter.id,
        "state": letter.state,
        "reason": letter.reason,
        "task": message.task,
        "consumer": letter.consumer,
        "message id": str(message.identity.id),
        "revision": message.identity.revision,
        "key": letter.key,
        "place": message.position and f"{message.position.epoch}.{message.position.number}",
        "queue": message.queue or message.routing_key,
        "attempts": letter.attempts,
        "first at": letter.first_at and _time(letter.first_at),
        "at": _time(letter.at),
        "correlation id": letter.correlation_id,
        "causation id": letter.causation_id,
        "content type": message.content_type,
    }


def _arguments(letter: Letter) -> dict[str, Any]:
    """The arguments by name; if they cannot be decoded, the beginning of the raw body instead."""
    try:
        arguments = Arguments.of(letter.message)
    except UnreadableBody:
        return {"body": letter.message.body[:SHORT_BODY]}
    return {"args": list(arguments.args), "kwargs": dict(arguments.kwargs)}


def summary(letter: Letter) -> dict[str, Any]:
    """The JSON object of a letter in a list."""
    facts = {name.replace(" ", "_"): value for name, value in _facts(letter).items()}
    return {**facts, "error_type": letter.error_type, "error": letter.error}


def whole(letter: Letter) -> dict[str, Any]:
    """The JSON object of a whole letter, with arguments, headers and traceback."""
    arguments: Mapping[str, Any] = _arguments(letter)
    if "body" in arguments:
        arguments = {"body": letter.message.body.decode("latin-1")}
    readable = json.loads(kombu_json.dumps({**arguments, "headers": letter.message.headers}))
    return {**summary(letter), "traceback": letter.traceback, **readable}


def history_entry(each: Letter | AuditEntry) -> dict[str, Any]:
    """The JSON object of an earlier letter of the same message, or of an action on one."""
    if isinstance(each, Letter):
        what = {"letter": each.id, "reason": each.reason, "error": each.error}
        return {"at": _time(each.at), **what, "revision": each.message.identity.revision}
    who = {"action": each.action, "actor": each.actor, "why": each.why}
    return {"at": _time(each.at), **who, "letter": each.dead_letter, **each.detail}


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
