"""Messages as Celery makes them: the one factory of all tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from celery_eda.core.identity import Identity
from celery_eda.core.message import Message

BODY = b'[[7], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


def message(
    task: str = "shop.charge",
    *,
    identity: Identity | None = None,
    headers: Mapping[str, Any] | None = None,
    properties: Mapping[str, Any] | None = None,
    queue: str | None = None,
    routing_key: str | None = None,
    **others: Any,
) -> Message:
    """A call of *task* with an identity of its own; *headers* and *properties* are added to it.

    It goes through the default exchange to *queue*, without one to ``celery`` undeclared.
    """
    identity = identity or Identity.fresh()
    id_ = str(identity.id)
    return Message(
        identity=identity,
        task=task,
        headers={
            "lang": "py",
            "task": task,
            "id": id_,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": id_,
            "parent_id": None,
            "argsrepr": "(7,)",
            "kwargsrepr": "{}",
            "origin": "gen1@here",
            "ignore_result": False,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
            **(headers or {}),
            **identity.headers,
        },
        properties={
            "delivery_mode": 2,
            "priority": None,
            "correlation_id": id_,
            "reply_to": str(uuid4()),
            **(properties or {}),
        },
        queue=queue,
        routing_key=(queue or "celery") if routing_key is None else routing_key,
        **{
            "body": BODY,
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "exchange": "",
            **others,
        },
    )
