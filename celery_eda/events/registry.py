"""What the data of events look like: classes by the events' names, versions, and upcasters.

Events are kept for ever, and their shape changes. An upcaster turns the data of one version into
that of the next one, so that handlers and folds see only the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from kombu.utils import json

from celery_eda.core.event import Event
from celery_eda.core.topics import checked_name
from celery_eda.errors import ConfigurationError, InvalidEvent

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class EventRegistry:
    """The registered events of one service.

    Attributes:
        kinds: class and version of the data of each event.
        upcasters: by an event's name and the version that they begin with.
    """

    kinds: dict[str, tuple[type, int]] = field(default_factory=dict)
    upcasters: dict[tuple[str, int], Upcaster] = field(default_factory=dict)

    def register(self, name: str, kind: type, version: int = 1) -> None:
        """Let the data of the event *name* be of the class *kind*.

        Raises:
            ConfigurationError: that event has a class already, or *kind* is of no use.
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
        """Let *upcaster* make data of *version* of the event *name* into those of the next."""
        self.upcasters[checked_name(name), version] = upcaster

    def version_of(self, name: str) -> int:
        """The latest version of the data of the event *name*."""
        upcast = max((begin + 1 for each, begin in self.upcasters if each == name), default=1)
        return max(upcast, self.kinds[name][1] if name in self.kinds else 1)

    def to_plain(self, name: str, data: Any) -> Any:
        """*data* of the event *name* as JSON has them; what is changed in them later is not.

        Raises:
            InvalidEvent: they are not what is registered, or cannot be written as JSON.
        """
        plain = self._plain(name, data)
        try:
            return json.loads(json.dumps(plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidEvent(
                f"The data of {name} cannot be written as JSON: {error}. Give texts, numbers, "
                "lists and dictionaries, or a class that is registered for the event."
            ) from error

    def _plain(self, name: str, data: Any) -> Any:
        if name in self.kinds and isinstance(data, Mapping):
            data = self._made(name, data)
        if name in self.kinds and not isinstance(data, self.kinds[name][0]):
            raise InvalidEvent(
                f"The data of {name} have to be a {self.kinds[name][0].__name__}, "
                f"not a {type(data).__name__}."
            )
        if hasattr(data, "model_dump"):
            return data.model_dump(mode="json")
        if is_dataclass(data) and not isinstance(data, type):
            return asdict(data)
        return data

    def restored(self, event: Event) -> Event:
        """*event* with its data in the latest version, of the registered class.

        Raises:
            InvalidEvent: they are of a version that is not known here, or are none of the class.
        """
        latest, data = self.version_of(event.type), event.data
        # Without any registration the data are the handler's own affair.
        if event.data_version > latest and event.type in self.kinds:
            raise InvalidEvent(
                f"{event.type} {event.id} has data of version {event.data_version}, and this "
                f"service knows {latest}. Upgrade it, then redrive the event."
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
            return kind(**data)
        except (TypeError, ValueError) as error:
            raise InvalidEvent(f"The data of {name} make no {kind.__name__}: {error}") from error
