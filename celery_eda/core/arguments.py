"""The arguments of a task message, read from its body and written into it.

Only JSON is read: other formats may run code, or make no sense outside their own worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from celery.utils.saferepr import saferepr
from kombu.utils import json

from celery_eda.core.message import Message
from celery_eda.errors import UnreadableBody

JSON = "application/json"
_NOTHING_FOLLOWS: Mapping[str, Any] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
#: Characters of the arguments that Celery shows in its events.
_LONGEST_REPR = 1024


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call.

    Attributes:
        embedded: callbacks, the rest of the chain, and the chord, as in Celery's protocol.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    embedded: Mapping[str, Any] = field(default_factory=lambda: _NOTHING_FOLLOWS)

    @classmethod
    def of(cls, message: Message) -> Arguments:
        """The arguments of *message*.

        Raises:
            UnreadableBody: its body is not JSON, or not the body of a task message.
        """
        _require_json(message)
        try:
            read = json.loads(message.body.decode("utf-8"))
        # A body may be nested deeper than the stack.
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UnreadableBody(
                f"The body of {message.task} is not readable JSON. Write all arguments again "
                "(`edit --args … --kwargs …`), or discard the letter."
            ) from error
        match read:
            case [list(args), dict(kwargs), dict(embedded)]:
                return cls(tuple(args), kwargs, embedded)
        raise UnreadableBody(
            f"The body of {message.task} is not the body of a task message: [args, kwargs, …]. "
            "Write all arguments again (`edit --args … --kwargs …`), or discard the letter."
        )

    def in_place_of(self, message: Message) -> Message:
        """*message* with these arguments instead of its own.

        Raises:
            UnreadableBody: its body has a format that is not written here.
        """
        _require_json(message)
        headers = {
            **message.headers,
            "argsrepr": saferepr(self.args, _LONGEST_REPR),
            "kwargsrepr": saferepr(dict(self.kwargs), _LONGEST_REPR),
        }
        written = json.dumps([list(self.args), dict(self.kwargs), dict(self.embedded)])
        return message.with_body(written.encode("utf-8"), headers)


def as_json(message: Message) -> Message:
    """*message*, whose body could not be read, prepared for a new body of JSON."""
    headers = {name: value for name, value in message.headers.items() if name != "compression"}
    return replace(message, content_type=JSON, headers=headers)


def _require_json(message: Message) -> None:
    if message.content_type != JSON or message.headers.get("compression"):
        kind = message.headers.get("compression") or message.content_type or "unknown"
        raise UnreadableBody(
            f"The body of {message.task} has the format {kind!r}, but only plain {JSON} can be "
            "read and changed here. Redrive the letter as it is, or publish the task again and "
            "discard the letter."
        )
