"""``@eda.saga``: makes a function's description a saga that can be started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from sqlalchemy import Connection

from celery_eda.saga_definition import Definition, Definitions
from celery_eda.saga_log import Saga as Instance
from celery_eda.saga_steps import Steps, defined
from celery_eda.sagas import Sagas


class HasSagas(Protocol):
    """What a saga needs of the hall."""

    @property
    def sagas(self) -> Sagas: ...

    @property
    def saga_definitions(self) -> Definitions: ...

    def transaction(self, target: Any = None) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Saga:
    """A saga of this service, to be started, signalled and cancelled.

    Each call takes part in the transaction of a *session* or connection, if one is given, or of the
    message in progress; else it has one of its own.
    """

    eda: HasSagas
    definition: Definition

    def start(self, data: Mapping[str, Any], *, id: str | None = None, session: Any = None) -> str:
        """Begin one, with what it is to know.

        Args:
            data: what JSON can say, by name.
            id: what it is called; by default a new UUID. With an *id* of yours, as that of the
                order that it is about, doing it twice is harmless.
            session: whose transaction it is to be begun in.

        Returns:
            Its id.
        """
        id = id or str(uuid4())
        with self._connection(session) as connection:
            self.eda.sagas.begin(connection, self.definition, id, data)
        return id

    def signal(
        self, id: str, name: str, value: Any = None, *, who: str = "code", session: Any = None
    ) -> None:
        """Give a signal that it waits for, or will.

        Raises:
            SagaError: it waits for no such signal, has had it, or is over.
        """
        with self._connection(session) as connection:
            self.eda.sagas.signal(connection, id, name, value, who)

    def cancel(self, id: str, *, who: str = "code", session: Any = None) -> None:
        """Have it undone.

        Raises:
            SagaError: it is over, or has passed its pivot.
        """
        with self._connection(session) as connection:
            self.eda.sagas.cancel(connection, id, who)

    def find(self, id: str, *, session: Any = None) -> Instance:
        """Where it is.

        Raises:
            SagaError: there is none of that id.
        """
        with self._connection(session) as connection:
            return self.eda.sagas.log.find(connection, id)

    @contextmanager
    def _connection(self, session: Any) -> Iterator[Connection]:
        with self.eda.transaction(session) as target:
            yield target if isinstance(target, Connection) else target.connection()


def decorator(eda: HasSagas, name: str, version: int) -> Callable[[Callable[[Steps], Any]], Saga]:
    """What makes a function's description a saga."""

    def decorate(describe: Callable[[Steps], Any]) -> Saga:
        definition = defined(name, version, describe)
        eda.saga_definitions.add(definition)
        return Saga(eda, definition)

    return decorate
