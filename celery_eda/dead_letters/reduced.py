"""The reduced form of a message that its database refuses to store whole.

It is the last resort, so that no message comes back for ever because its dead letter cannot be
written: the beginning of the body, with the length and the digest of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from celery_eda.core.identity import ID_HEADER, ORDER_HEADER, REVISION_HEADER
from celery_eda.core.message import Message
from celery_eda.databases import json_of

#: Header of a message in reduced form.
REDUCED_HEADER = "eda_reduced"
#: Bytes of a body, and of headers or properties as JSON, that are stored.
HEAD = 64 * 2**10
#: Headers that are stored in any case.
_ESSENTIAL = (ID_HEADER, REVISION_HEADER, ORDER_HEADER, "id", "task", "root_id", "parent_id")


def reduced(message: Message, why: str) -> Message:
    """*message* without most of its body, and without headers and properties that are long.

    Its header ``eda_reduced`` has the reason *why*, and length and digest of the whole body.
    """
    body, (headers, properties) = message.body, json_of(message)
    short = message.headers if len(headers) <= HEAD else _essential(message.headers)
    about = {"why": why, "bytes": len(body), "sha256": sha256(body).hexdigest()}
    return replace(
        message,
        body=body[:HEAD],
        headers={**short, REDUCED_HEADER: about},
        properties=message.properties if len(properties) <= HEAD else {},
    )


def is_reduced(message: Message) -> bool:
    """True if *message* is stored in reduced form, so that it cannot be sent again."""
    return REDUCED_HEADER in message.headers


def whole(message: Message) -> Message:
    """*message* whose body has been written again, so that it can be sent."""
    headers = {name: value for name, value in message.headers.items() if name != REDUCED_HEADER}
    return replace(message, headers=headers)


def _essential(headers: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: headers[name] for name in _ESSENTIAL if name in headers}
    return chosen if len(json.dumps(chosen, default=repr)) <= HEAD else {}
