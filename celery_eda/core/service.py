"""One service: a Celery app, its settings and its wings."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TypeVar

from celery import Celery

from celery_eda.core.once import cached_once
from celery_eda.core.settings import Settings
from celery_eda.errors import ConfigurationError, UnsafeSetting

W = TypeVar("W")


class Service:
    """A Celery app as all wings see it.

    Nothing is read from ``app.conf`` before the first use, so the app may be configured later.

    Attributes:
        app: the Celery app.
    """

    app: Celery

    def __init__(self) -> None:
        self._wings: dict[type, object] = {}

    @cached_once
    def settings(self) -> Settings:
        """The checked ``eda_*`` settings of the app.

        Raises:
            ConfigurationError: a setting is unknown, wrong or unsafe.
        """
        if self.app.conf.task_protocol != 2:
            raise UnsafeSetting(
                "task_protocol must be 2: older messages have no headers, so copies of a message "
                "could not be told apart. Remove the setting."
            )
        return Settings.of(self.app.conf)

    @property
    def name_or_none(self) -> str | None:
        """The name of this service, None if it has none."""
        return self.settings.service or self.app.main or None

    @cached_once
    def name(self) -> str:
        """The name of this service, by which other services know the order of its messages.

        Raises:
            ConfigurationError: the service has no name.
        """
        if not (name := self.name_or_none):
            raise ConfigurationError(
                "Messages with an ordering key, durable requests, events and repairs need the name "
                "of their service. Set eda_service, or give the Celery app a name."
            )
        return name

    def is_reliable(self, task: str) -> bool:
        """True if each message for the task of this name takes effect exactly once.

        A registered task says so by its attribute ``reliable``. For all others, those of other
        services among them, the patterns of ``eda_tasks`` decide.
        """
        registered = getattr(self.app.tasks.get(task), "reliable", None)
        return self.is_named(task) if registered is None else bool(registered)

    def is_named(self, task: str) -> bool:
        """True if a pattern of ``eda_tasks`` matches the name."""
        return any(fnmatchcase(task, pattern) for pattern in self.settings.tasks)

    def add(self, wing: object) -> None:
        """Register *wing*, to be found by :meth:`wing`."""
        self._wings[type(wing)] = wing

    def wing(self, kind: type[W]) -> W:
        """The wing of this class, for code that Celery calls with nothing but its app."""
        wing = self._wings[kind]
        assert isinstance(wing, kind)
        return wing


def service_of(app: Celery) -> Service:
    """The service of *app*.

    Raises:
        ConfigurationError: the app is not extended by :class:`celery_eda.EDA`.
    """
    eda = getattr(app, "eda", None)
    if eda is None:
        raise ConfigurationError(
            f"The Celery app {app.main!r} is not extended. Call `EDA(app)`, or `eda.init_app(app)`."
        )
    service: Service = eda.service
    return service
