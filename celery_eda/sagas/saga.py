"""``@eda.saga``: turns a function that describes a saga into a saga that can be started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from celery_eda.outbox import transaction
from celery_eda.sagas.definition import Definition
from celery_eda.sagas.steps import Steps, defined
from celery_eda.sagas.store import SagaInstance
from celery_eda.sagas.wiring import Sagas


@dataclass(frozen=True)
class Saga:
    """A saga of this service, to be started, signalled and cancelled.

    Each call joins the transaction of *session*, if a session or connection is given, else that of
    the message in progress. Otherwise the call has a transaction of its own.
    """

    sagas: Sagas
    definition: Definition

    def start(self, data: Mapping[str, Any], *, id: str | None = None, session: Any = None) -> str:
        """Start a saga.

        Args:
            data: the initial data, by name, as JSON values.
            id: at most 255 bytes, by default a new UUID. With an id of your own, such as that of
                the order, a second start has no effect.
            session: the session or connection in whose transaction the saga starts.

        Returns:
            The id.
        """
        id = id or str(uuid4())
        with self._connection(session) as connection:
            self.sagas.coordinator.begin(connection, self.definition, id, data)
        return id

    def signal(
        self, id: str, name: str, value: Any = None, *, who: str = "code", session: Any = None
    ) -> None:
        """Send a signal. A signal that comes before its wait is stored for it.

        Raises:
            SagaError: the saga has no such wait, has received the signal, or has ended.
        """
        with self._connection(session) as connection:
            self.sagas.coordinator.signal(connection, id, name, value, who)

    def cancel(self, id: str, *, who: str = "code", session: Any = None) -> None:
        """Compensate a running saga.

        Raises:
            SagaError: the saga has ended, or has passed its pivot.
        """
        with self._connection(session) as connection:
            self.sagas.coordinator.cancel(connection, id, who)

    def find(self, id: str, *, session: Any = None) -> SagaInstance:
        """Return the state and the data of a saga.

        Raises:
            SagaError: no saga has this id.
        """
        with self._connection(session) as connection:
            return self.sagas.coordinator.store.find(connection, id)

    @contextmanager
    def _connection(self, session: Any) -> Iterator[Connection]:
        with transaction(self.sagas.outbox, session) as target:
            yield target if isinstance(target, Connection) else target.connection()


def saga_decorator(
    sagas: Sagas, name: str, version: int
) -> Callable[[Callable[[Steps], Any]], Saga]:
    """Return the decorator that registers a described saga under *name* and *version*."""

    def decorate(describe: Callable[[Steps], Any]) -> Saga:
        definition = defined(name, version, describe)
        sagas.definitions.add(definition)
        return Saga(sagas, definition)

    return decorate
