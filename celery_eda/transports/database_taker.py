"""One connection's standing among those who take messages out of a database."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from celery_eda.transports.database_broker import Broker
from celery_eda.transports.database_marks import Marks

log = logging.getLogger(__name__)

#: Seconds between two looks for takers that are gone, and for what has expired; less than those
#: between two looks at all, or every second one would be left out.
SWEEP = 0.9
#: Seconds at least between two questions when the next message is due.
PLAN = 0.05


class Busy(Exception):
    """Others were quicker to lock what was to be changed; nothing has been. Try again soon."""


class Taker:
    """Holds messages for as long as it is there; the others see at once when it is gone.

    Everything it takes it takes over one connection, which is the one that says it is there.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.queues = broker.queues
        self.lock = threading.RLock()
        self.marks = Marks()
        self._told: set[str] | None = set()
        self._swept = self._planned = -SWEEP
        self.presence = broker.dialect.presence(broker.engine, broker.tables, broker.heartbeat)
        try:
            self.connection = broker.engine.connect()
        except BaseException:
            self.presence.end()
            raise
        try:
            self.id = self.queues.register(self.connection, self.presence)
        except BaseException:
            self._drop()
            raise
        _takers.add(self)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction on the connection; committed at the end.

        Raises:
            Busy: it lost against others.
        """
        with self.lock:
            try:
                yield self.connection
                self.connection.commit()
            except BaseException as error:
                self.marks.forget()
                with suppress(Exception):
                    self.connection.rollback()
                if self.broker.dialect.is_transient(error):
                    raise Busy from error
                raise

    def fileno(self) -> int:
        return self.presence.fileno()

    def woken(self) -> Collection[str] | None:
        """The queues that it was woken for since it was asked; None if nobody knows which."""
        with self.lock:  # not while another thread uses the connection
            self._listen()
            told, self._told = self._told, set()
            return told

    def _listen(self) -> None:
        if (lowest := self.presence.woken()) is None:
            self._told = None
            self.marks.forget()
        else:
            self.marks.move_back(lowest)
            if self._told is not None:
                self._told.update(lowest)

    def lease(self, connection: Connection, queue: str, room: int) -> Sequence[Any]:
        """Get up to *room* messages, to hold until they are completed or it is gone."""
        self._listen()
        return self.marks.claimed(
            queue, lambda passed: self.queues.lease(connection, queue, self.id, room, passed)
        )

    def take(self, connection: Connection, queue: str, room: int) -> Sequence[Any]:
        """Take up to *room* messages for good."""
        self._listen()
        return self.marks.claimed(
            queue, lambda passed: self.queues.take(connection, queue, room, passed)
        )

    def missed(self) -> bool:
        """Whether there may be something that nobody has woken it for."""
        with self.transaction() as connection:
            return self.presence.missed(connection)

    def sweep(self) -> bool:
        """Do what is to be done now and then; returns whether it was time for that.

        It is time to look into every queue, too. A message that somebody else had locked was
        passed over, and is free again without a word if that transaction was undone.
        """
        if (now := monotonic()) < self._swept + SWEEP:
            return False
        self._swept = now
        with self.transaction() as connection:
            found = self.queues.come_due(connection)
            self.queues.expire(connection)
            self.broker.complete_late(connection)
            for gone in self.queues.absent(connection, self.broker.engine, self.id):
                if left := self.queues.bury(connection, gone):
                    log.warning("taker %s is gone, what it held of %s is back", gone, sorted(left))
                found |= left
        if found:
            self.broker.ring()
        return True

    def come_due(self) -> set[str]:
        """Let those be taken whose time has come; returns their queues."""
        with self.transaction() as connection:
            found = self.queues.come_due(connection)
        if found:
            self.broker.ring()
        return found

    def plan(self) -> float | None:
        """Seconds until the next message is due; None if that is far, or was just asked."""
        if (now := monotonic()) < self._planned + PLAN:
            return None
        self._planned = now
        with self.transaction() as connection:
            return self.queues.next_due(connection)

    def end(self) -> None:
        """Be gone, in good order if the database is there."""
        _takers.discard(self)
        with self.lock:
            with suppress(Exception), self.transaction() as connection:
                self.queues.bury(connection, self.id)
            self._drop()
        self.broker.ring()

    def _drop(self) -> None:
        with suppress(Exception):
            self.connection.invalidate()  # with all that the server ties to it
            self.connection.close()
        self.presence.end()


_takers: weakref.WeakSet[Taker] = weakref.WeakSet()


def _disown_all() -> None:
    """In a forked child: it must not seem to be its parent, least of all after that has died."""
    for taker in list(_takers):
        taker.presence.disown()
        _inherited.append(taker)
    _takers.clear()


#: Kept from being collected: to close such a connection is its parent's business.
_inherited: list[Any] = []
os.register_at_fork(after_in_child=_disown_all)
