"""The registered events: the class of an event's data, its version, and upcasters.

Events are stored forever, but the shape of their data changes. An upcaster converts the data of one
version into those of the next, so that handlers and folds see only the latest version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from kombu.utils import json

from celery_eda.core.event import Event
from celery_eda.core.topics import checked_name
from celery_eda.errors import ConfigurationError, InvalidEvent
from celery_eda.events import dataclass_values

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class EventRegistry:
    """The registered events of one service.

    Attributes:
        kinds: class and version of the data of each event.
        upcasters: by the name of an event and the version that they convert.
    """

    kinds: dict[str, tuple[type, int]] = field(default_factory=dict)
    upcasters: dict[tuple[str, int], Upcaster] = field(default_factory=dict)

    def register(self, name: str, kind: type, version: int = 1) -> None:
        """Make *kind* the class of the data of the event *name*.

        Raises:
            ConfigurationError: the event has another class already, or *kind* is neither a
                dataclass nor a pydantic model.
        """
        checked_name(name)
        if self.kinds.get(name, (kind, version)) != (kind, version):
            raise ConfigurationError(
                f"The event {name} is registered already, as {self.kinds[name][0].__name__}. "
                "Register one class for each event."
            )
        if not (is_dataclass(kind) or hasattr(kind, "model_validate")):
            raise ConfigurationError(
                f"{kind.__name__} is neither a dataclass nor a pydantic model. Make it one."
            )
        self.kinds[name] = kind, version

    def upcast(self, name: str, version: int, upcaster: Upcaster) -> None:
        """Convert data of the event *name* from *version* to the next one with *upcaster*."""
        self.upcasters[checked_name(name), version] = upcaster

    def version_of(self, name: str) -> int:
        """The latest version of the data of the event *name*."""
        upcast = max((begin + 1 for each, begin in self.upcasters if each == name), default=1)
        return max(upcast, self.kinds[name][1] if name in self.kinds else 1)

    def to_plain(self, name: str, data: Any) -> Any:
        """*data* of the event *name* as plain JSON values: a copy, which later changes spare.

        Raises:
            InvalidEvent: the data are not of the registered class, or cannot be written as JSON.
        """
        plain = self._plain(name, data)
        try:
            return json.loads(json.dumps(plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidEvent(
                f"The data of {name} cannot be written as JSON: {error}. Use strings, numbers, "
                "lists and dictionaries, or register a class for the event."
            ) from error

    def _plain(self, name: str, data: Any) -> Any:
        if name in self.kinds and isinstance(data, Mapping):
            data = self._made(name, data)
        if name in self.kinds and not isinstance(data, self.kinds[name][0]):
            raise InvalidEvent(
                f"The data of {name} must be of type {self.kinds[name][0].__name__}, "
                f"not {type(data).__name__}."
            )
        if hasattr(data, "model_dump"):
            return data.model_dump(mode="json")
        if is_dataclass(data) and not isinstance(data, type):
            return asdict(data)
        return data

    def restored(self, event: Event) -> Event:
        """*event* with its data in the latest version, of the registered class.

        Raises:
            InvalidEvent: the data have a version that is unknown here, or do not fit the class.
        """
        latest, data = self.version_of(event.type), event.data
        # Data of unregistered events reach the handler unchanged.
        if event.data_version > latest and event.type in self.kinds:
            raise InvalidEvent(
                f"{event.type} {event.id} has data of version {event.data_version}, but this "
                f"service knows only version {latest}. Upgrade the service, then redrive the event."
            )
        for version in range(event.data_version, latest):
            if upcaster := self.upcasters.get((event.type, version)):
                data = upcaster(data)
        if event.type in self.kinds:
            data = self._made(event.type, data)
        return replace(event, data=data, data_version=max(latest, event.data_version))

    def _made(self, name: str, data: Any) -> Any:
        kind: Any = self.kinds[name][0]
        try:
            if hasattr(kind, "model_validate"):
                return kind.model_validate(data)
            return dataclass_values.made(kind, data)
        except (TypeError, ValueError) as error:
            raise InvalidEvent(f"The data of {name} do not fit {kind.__name__}: {error}") from error
