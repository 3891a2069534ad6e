"""Reply addresses: the names of queues to which replies are sent.

An address arrives with a request, so any other format is refused: nobody can direct a reply to a
queue of tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from enum import Enum
from secrets import token_hex
from typing import Any

from celery_eda.core.limits import KEY_BYTES, fits

#: Header of a request: the address for its reply.
REPLY_HEADER = "eda_reply_to"
#: The task that a reply calls, with a correlation id and an outcome.
REPLY_TASK = "celery_eda.reply"
#: Header of a command: the saga that has sent it.
SAGA_HEADER = "eda_saga"

_PROCESS = "eda.reply."
_SERVICE = "eda.replies."
_VOLATILE = re.compile(r"eda\.reply\.[0-9a-f]{32}(\.[0-9a-f]{32})?")
_DURABLE = re.compile(r"eda\.replies\..{1,200}", re.S)


class ReplyAddressKind(str, Enum):
    """The way of a reply to the requester.

    ``correlation``: over the one queue of the requesting process, matched by correlation id.
    ``temporary``: over a queue for this request alone. ``durable``: over the queue of the
    requesting service, into its database.
    """

    correlation = "correlation"
    temporary = "temporary"
    durable = "durable"


def of_process() -> str:
    """A new address for one process, which nobody can guess."""
    return _PROCESS + token_hex(16)


def of_request(process: str) -> str:
    """An address for one request of the process at the address *process*."""
    return f"{process}.{token_hex(16)}"


def of_service(service: str) -> str:
    """The address of a *service*."""
    return _SERVICE + service


def is_volatile(address: str) -> bool:
    """True if *address* exists only as long as the process that created it."""
    return _VOLATILE.fullmatch(address) is not None


def is_durable(address: str) -> bool:
    """True if *address* is the address of a service."""
    return _DURABLE.fullmatch(address) is not None and fits(address, KEY_BYTES)


def of_headers(headers: Mapping[str, Any]) -> str | None:
    """The address in the *headers* of a request; None if no reply is wanted.

    Raises:
        ValueError: the header is malformed.
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
