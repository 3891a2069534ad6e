"""The AsyncAPI 3.0 document of one service: the events that the service sends and receives.

https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from celery_eda.core.event import EVENT_EXCHANGE, SPEC_VERSION
from celery_eda.events import EventRegistry, Subscription
from celery_eda.ops.diagrams.flow import Flow

VERSION = "3.0.0"
_EXCHANGE = {"name": EVENT_EXCHANGE, "type": "topic", "durable": True, "autoDelete": False}
_PLAIN: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    UUID: {"type": "string", "format": "uuid"},
    Decimal: {"type": "string"},
}


def document(
    flow: Flow, types: EventRegistry, subscriptions: Mapping[str, Subscription], version: str
) -> dict[str, Any]:
    """The document, as JSON values.

    Args:
        flow: gives the names of the emitted events.
        types: the classes registered for the data of events.
        subscriptions: the subscriptions of the service by their queues.
        version: the version of the service.
    """
    sent = sorted({*flow.events, *types.kinds})
    channels = {name: _topic(name) for name in sent}
    operations: dict[str, Any] = {
        f"send.{name}": {"action": "send", "channel": _reference("channels", name)} for name in sent
    }
    for queue, subscription in subscriptions.items():
        received = [name for name in sent if subscription.wants(name)]
        channels[queue] = _queue(queue, subscription, received)
        operations[f"receive.{subscription.task}"] = {
            "action": "receive",
            "channel": _reference("channels", queue),
        }
    messages = {name: _message(name, types) for name in sent}
    return {
        "asyncapi": VERSION,
        "info": {"title": flow.service, "version": version},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": {**messages, "event": _message(None, types)}},
    }


def _reference(*path: str) -> dict[str, str]:
    """A reference within the document (RFC 6901)."""
    steps = (step.replace("~", "~0").replace("/", "~1") for step in path)
    return {"$ref": "#/" + "/".join(steps)}


def _topic(name: str) -> dict[str, Any]:
    return {
        "address": name,
        "messages": {name: _reference("components", "messages", name)},
        "bindings": {
            "amqp": {"is": "routingKey", "exchange": _EXCHANGE, "bindingVersion": "0.3.0"}
        },
    }


def _queue(queue: str, subscription: Subscription, received: list[str]) -> dict[str, Any]:
    durable = {"name": queue, "durable": True, "exclusive": False, "autoDelete": False}
    return {
        "address": queue,
        "description": f"Events that match {' or '.join(subscription.patterns)}.",
        "messages": {
            name: _reference("components", "messages", name) for name in received or ["event"]
        },
        "bindings": {"amqp": {"is": "queue", "queue": durable, "bindingVersion": "0.3.0"}},
    }


def _message(name: str | None, types: EventRegistry) -> dict[str, Any]:
    """A Celery message, protocol 2, whose only argument is the event."""
    data = schema(types.kinds[name][0]) if name in types.kinds else {}
    event = {
        "type": "object",
        "required": ["specversion", "id", "source", "type", "time"],
        "properties": {
            "specversion": {"const": SPEC_VERSION},
            "id": {"type": "string", "format": "uuid"},
            "source": {"type": "string"},
            "type": {"const": name} if name else {"type": "string"},
            "subject": {"type": "string"},
            "time": {"type": "string", "format": "date-time"},
            "dataversion": {"type": "integer"},
            "correlationid": {"type": "string"},
            "causationid": {"type": "string"},
            "data": data,
        },
    }
    arguments = {"type": "array", "items": [event]}
    kind = {"type": "object"}
    return {
        "name": name or "event",
        "contentType": "application/json",
        "payload": {"type": "array", "items": [arguments, kind, kind]},
    }


def schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a dataclass, a pydantic model, or the type of a field.

    Types without a JSON equivalent get the empty schema, which accepts anything.
    """
    if hasattr(kind, "model_json_schema"):
        found: dict[str, Any] = kind.model_json_schema()
        return found
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if dataclasses.is_dataclass(kind):
        hints, fields = get_type_hints(kind), dataclasses.fields(kind)
        required = [each.name for each in fields if _is_required(each)]
        properties = {each.name: schema(hints[each.name]) for each in fields}
        return {"type": "object", "properties": properties, "required": required}
    arguments = get_args(kind)
    match get_origin(kind):
        case origin if origin in (Union, UnionType):
            return {"anyOf": [schema(each) for each in arguments]}
        case origin if origin in (list, tuple, set, frozenset):
            return {"type": "array", "items": schema(arguments[0])}
        case origin if origin is dict:
            return {"type": "object", "additionalProperties": schema(arguments[1])}
        case origin if origin is typing.Literal:
            return {"enum": list(arguments)}
    return {}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
