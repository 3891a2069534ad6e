"""Messages to write down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from celery_eda.identity import Identity
from celery_eda.message import Message

PLAIN = Message(
    identity=Identity.fresh(),
    task="shop.charge",
    body=b'[[7], {}, {"chain": null}]',
    content_type="application/json",
    content_encoding="utf-8",
    headers={"task": "shop.charge", "retries": 0, "eta": None},
    properties={"delivery_mode": 2, "priority": None},
    exchange="",
    routing_key="celery",
)


def message(**changes: Any) -> Message:
    """A message of its own identity, plain but for *changes*."""
    return replace(PLAIN, **{"identity": Identity.fresh(), **changes})
