"""One event as a value: the change, its source, its time and its cause.

On the wire, an event has the attributes of CloudEvents 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from celery_eda.core.clock import utc
from celery_eda.core.limits import KEY_BYTES, fits
from celery_eda.core.topics import NAME_BYTES, category_of

#: The task in an event's message, until a worker replaces it by the subscription's.
EVENT_TASK = "celery_eda.event"
#: The exchange that all services publish their events to.
EVENT_EXCHANGE = "eda.events"
SPEC_VERSION = "1.0"
#: Prefix of the queues from which only one worker consumes events.
OF_ONE_WORKER = "eda.each."


def ordering_scope(name: str) -> str:
    """The scope in which events named *name* are counted per key: all of their category."""
    return f"{category_of(name)}.#"


@dataclass(frozen=True)
class Event:
    """A change of state that has been committed, or will be with its transaction.

    Attributes:
        id: the same in every service.
        type: its name, as ``order.placed``.
        source: the service that emitted it.
        time: when it was emitted, by that service's clock.
        data: its content; an instance of the registered class, if there is one.
        key: of its subject; events of a category with the same key form a stream.
        data_version: version of the shape of *data*, as registered.
        correlation_id: shared by all messages that the same first message caused.
        causation_id: id of the event or task that caused this one.
        version: number in its stream, from 1; None without a key, and unless read from the store.
        position: number among all events of the store; None until a reader has asked for it.
        order: the position in its key's order, as the message's header has it; None if the event
            was neither read from the store nor delivered in order.
        recorded: when it was appended, by the database's clock; None unless read from the store.
    """

    id: UUID
    type: str
    source: str
    time: datetime
    data: Any = None
    key: str | None = None
    data_version: int = 1
    correlation_id: str | None = None
    causation_id: str | None = None
    version: int | None = None
    position: int | None = None
    order: tuple[Any, ...] | None = None
    recorded: datetime | None = None

    @property
    def category(self) -> str:
        """The part of the type before the first dot."""
        return category_of(self.type)

    @property
    def stream(self) -> str | None:
        """The event's stream, ``<category>.<key>``; None without a key."""
        return None if self.key is None else f"{self.category}.{self.key}"

    @property
    def lane(self) -> tuple[str, str, str | None]:
        """Source, scope and key: the events with the same ones are in one order."""
        return self.source, ordering_scope(self.type), self.key

    def to_cloud(self) -> dict[str, Any]:
        """The event as CloudEvents 1.0 attributes, without those that are None."""
        sequence, after = (None, None) if self.order is None else _sequences(self.order)
        recorded = self.recorded and utc(self.recorded)
        attributes = {
            "specversion": SPEC_VERSION,
            "id": str(self.id),
            "source": self.source,
            "type": self.type,
            "subject": self.key,
            "time": utc(self.time).isoformat(),
            "datacontenttype": "application/json",
            "dataversion": self.data_version,
            "correlationid": self.correlation_id,
            "causationid": self.causation_id,
            "streamversion": self.version,
            "position": self.position,
            "sequence": sequence,
            "sequenceafter": after,
            "recordedtime": recorded and recorded.isoformat(),
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        return {**known, "data": self.data}

    @classmethod
    def of_cloud(cls, attributes: Any) -> Event:
        """The event with these *attributes*.

        Raises:
            ValueError: an attribute is missing or malformed.
        """
        match attributes:
            case {
                "specversion": "1.0",
                "id": str(id_),
                "source": str(source),
                "type": str(type_),
                "time": str(time),
            } if fits(type_, NAME_BYTES) and fits(source, KEY_BYTES):
                key, recorded = (_optional(attributes, x, str) for x in ("subject", "recordedtime"))
                return cls(
                    id=UUID(id_),
                    type=type_,
                    source=source,
                    time=datetime.fromisoformat(time),
                    data=attributes.get("data"),
                    key=key,
                    data_version=_optional(attributes, "dataversion", int) or 1,
                    correlation_id=_optional(attributes, "correlationid", str),
                    causation_id=_optional(attributes, "causationid", str),
                    version=_optional(attributes, "streamversion", int),
                    position=_optional(attributes, "position", int),
                    order=_order(attributes, (source, ordering_scope(type_), key)),
                    recorded=datetime.fromisoformat(recorded) if recorded else None,
                )
        raise ValueError(
            "this is not an event: it lacks attributes of CloudEvents 1.0, or some are too long"
        )


def _optional(attributes: Mapping[str, Any], name: str, kind: type) -> Any:
    value = attributes.get(name)
    if value is None or (type(value) is kind and (not isinstance(value, str) or fits(value))):
        return value
    raise ValueError(f"the attribute {name} of an event is malformed")


def _sequences(order: tuple[Any, ...]) -> tuple[str, str | None]:
    """Epoch and number of the position in *order*, and of the last one before its epoch.

    Both are texts that sort like the events: the extension ``sequence`` of CloudEvents.
    """
    numbers = [f"{number:019d}" for number in order[3:]]
    return ".".join(numbers[:2]), ".".join(numbers[2:]) or None


def _order(
    attributes: Mapping[str, Any], lane: tuple[str, str, str | None]
) -> tuple[Any, ...] | None:
    sequence, after = (_optional(attributes, name, str) for name in ("sequence", "sequenceafter"))
    if sequence is None:
        return None
    numbers = [int(each) for text in (sequence, after) if text for each in text.split(".")]
    if len(numbers) not in (2, 4) or lane[-1] is None:
        raise ValueError("the sequence of an event is malformed")
    return (*lane, *numbers)


@dataclass(frozen=True)
class EventAppend:
    """An event to append to the store.

    Attributes:
        expected: the version that its stream must have before; None for any.
    """

    event: Event
    expected: int | None = None
