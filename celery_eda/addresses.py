"""Where a reply goes: the address that a request carries, and that nobody else can choose.

An address is the name of a queue that holds nothing but replies. It comes over the wire, so what
does not look like one of these is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from enum import Enum
from secrets import token_hex
from typing import Any

#: The header of a request that says where its reply goes.
REPLY_HEADER = "eda_reply_to"
#: The task that a reply calls, with a correlation id and an outcome.
REPLY_TASK = "celery_eda.reply"
#: The header of a command that says which saga it belongs to.
SAGA_HEADER = "eda_saga"

_PROCESS = "eda.reply."
_SERVICE = "eda.replies."
_VOLATILE = re.compile(r"eda\.reply\.[0-9a-f]{32}(\.[0-9a-f]{32})?")
_DURABLE = re.compile(r"eda\.replies\.[^\x00-\x1f\x7f]{1,200}")


class ReplyAddressKind(str, Enum):
    """How a request is answered.

    ``correlation``: over the one queue of the requesting process, told apart by correlation id.
    ``temporary``: over a queue made for this request alone. ``durable``: into the database of the
    requesting service, over its queue.
    """

    correlation = "correlation"
    temporary = "temporary"
    durable = "durable"


def of_process() -> str:
    """An address for one process, that nobody can guess."""
    return _PROCESS + token_hex(16)


def of_request(process: str) -> str:
    """An address for one request of the process at the address *process*."""
    return f"{process}.{token_hex(16)}"


def of_service(service: str) -> str:
    """The address of a *service*."""
    return _SERVICE + service


def is_volatile(address: str) -> bool:
    """Whether *address* ends with the process that made it."""
    return _VOLATILE.fullmatch(address) is not None


def is_durable(address: str) -> bool:
    """Whether *address* is that of a service."""
    return _DURABLE.fullmatch(address) is not None


def of_headers(headers: Mapping[str, Any]) -> str | None:
    """The address in the *headers* of a request; None if nobody asks for a reply.

    Raises:
        ValueError: there is something in its place that this system cannot have written.
    """
    if (address := headers.get(REPLY_HEADER)) is None:
        return None
    if isinstance(address, str) and (is_volatile(address) or is_durable(address)):
        return address
    raise ValueError(f"malformed {REPLY_HEADER} header")


def write_to_successor(address: str, task_id: str, message: Any) -> bool:
    """Write *address* into the successor of the task *task_id* that a task *message* contains.

    The successor is the message itself if it replaces the task, or else what it will publish
    later: the last task of a chain, or the body of a chord.

    Returns:
        True if there is a successor, which will then reply in place of the task.
    """
    if message.headers["id"] == task_id and message.headers["replaced_task_nesting"]:
        message.headers[REPLY_HEADER] = address
        return True
    embedded = message.body[2]
    found = [
        options
        for signature in (*(embedded["chain"] or ()), embedded["chord"])
        for options in _options_of(signature, task_id)
    ]
    for options in found:
        options["headers"] = {**(options.get("headers") or {}), REPLY_HEADER: address}
    return bool(found)


def _options_of(signature: Any, task_id: str) -> Iterator[MutableMapping[str, Any]]:
    """Options of the signature with the id *task_id* within *signature*, at any depth."""
    match signature:
        case {"kwargs": {"tasks": [*_, last]}} | {"kwargs": {"body": Mapping() as last}}:
            yield from _options_of(last, task_id)
        case {"options": {"task_id": given} as options} if given == task_id:
            yield options
