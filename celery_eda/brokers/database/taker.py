"""A taker: one connection that leases messages from a database which is the broker."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from celery_eda.brokers.database.broker import DatabaseBroker
from celery_eda.brokers.database.watermarks import Watermarks
from celery_eda.core.forks import on_fork

log = logging.getLogger(__name__)

#: Seconds between two sweeps for dead takers and expired messages; shorter than the poll interval,
#: or every second poll would skip its sweep.
SWEEP_INTERVAL = 0.9
#: Seconds at least between two queries for when the next message is due.
PLAN_INTERVAL = 0.05


class Busy(Exception):
    """Another transaction locked the rows first; nothing has been changed. Try again soon."""


class Taker:
    """Leases messages for as long as it lives; its death shows to other takers at once.

    All leases are made over one connection, and that connection is the proof that the taker lives.
    """

    def __init__(self, broker: DatabaseBroker) -> None:
        self.broker = broker
        self.queues = broker.queues
        self.lock = threading.RLock()
        self.watermarks = Watermarks()
        self._woken_for: set[str] | None = set()
        self._swept = self._planned = -SWEEP_INTERVAL
        self.presence = broker.queueing.presence(broker.engine, broker.tables, broker.heartbeat)
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
        """A transaction on the taker's connection, committed at the end.

        Raises:
            Busy: the transaction lost against others and has been rolled back.
        """
        with self.lock:
            try:
                yield self.connection
                self.connection.commit()
            except BaseException as error:
                self.watermarks.reset()
                with suppress(Exception):
                    self.connection.rollback()
                if self.broker.dialect.is_transient(error):
                    raise Busy from error
                raise

    def fileno(self) -> int:
        return self.presence.fileno()

    def woken(self) -> Collection[str] | None:
        """The queues that the taker was woken for since the last call; None if any may be it."""
        with self.lock:  # not while another thread uses the connection
            self._receive_wakeups()
            woken_for, self._woken_for = self._woken_for, set()
            return woken_for

    def _receive_wakeups(self) -> None:
        if (lowest := self.presence.woken()) is None:
            self._woken_for = None
            self.watermarks.reset()
        else:
            self.watermarks.lower(lowest)
            if self._woken_for is not None:
                self._woken_for.update(lowest)

    def lease(self, connection: Connection, queue: str, room: int) -> Sequence[Any]:
        """Lease up to *room* messages, until they are completed or the taker is dead."""
        self._receive_wakeups()
        return self.watermarks.claimed(
            queue, lambda passed: self.queues.lease(connection, queue, self.id, room, passed)
        )

    def take(self, connection: Connection, queue: str, room: int) -> Sequence[Any]:
        """Delete up to *room* messages of a queue and return them."""
        self._receive_wakeups()
        return self.watermarks.claimed(
            queue, lambda passed: self.queues.take(connection, queue, room, passed)
        )

    def missed(self) -> bool:
        """True if there may be messages that no wake-up has announced."""
        with self.transaction() as connection:
            return self.presence.missed(connection)

    def sweep(self) -> bool:
        """Free what is due, drop what has expired, and reclaim the leases of dead takers.

        Returns:
            True if a sweep was due and done. Then every queue has to be looked into as well: a
            message that another transaction had locked was skipped, and is free again without a
            wake-up if that transaction was rolled back.
        """
        if (now := monotonic()) < self._swept + SWEEP_INTERVAL:
            return False
        self._swept = now
        with self.transaction() as connection:
            found = self.queues.come_due(connection)
            self.queues.expire(connection)
            self.broker.complete_late(connection)
            for dead in self.queues.dead_takers(connection, self.broker.engine, self.id):
                if freed := self.queues.reclaim(connection, dead):
                    log.warning(
                        "taker %s is dead; its messages in %s have been requeued",
                        dead,
                        sorted(freed),
                    )
                found |= freed
        if found:
            self.broker.wake_all()
        return True

    def come_due(self) -> set[str]:
        """Free the messages that are due by now; returns their queues."""
        with self.transaction() as connection:
            found = self.queues.come_due(connection)
        if found:
            self.broker.wake_all()
        return found

    def plan(self) -> float | None:
        """Seconds until the next message is due; None if no message is delayed.

        Also None within ``PLAN_INTERVAL`` seconds of the last query.
        """
        if (now := monotonic()) < self._planned + PLAN_INTERVAL:
            return None
        self._planned = now
        with self.transaction() as connection:
            return self.queues.next_due(connection)

    def end(self) -> None:
        """End the taker, and free its messages at once if the database can be reached."""
        _takers.discard(self)
        with self.lock:
            with suppress(Exception), self.transaction() as connection:
                self.queues.reclaim(connection, self.id)
            self._drop()
        self.broker.wake_all()

    def _drop(self) -> None:
        with suppress(Exception):
            self.connection.invalidate()  # with all that the server ties to it
            self.connection.close()
        self.presence.end()


_takers: weakref.WeakSet[Taker] = weakref.WeakSet()


def _disown_all() -> None:
    """Disown, in a forked child, the presences of its parent, or they would outlive the parent."""
    for taker in list(_takers):
        taker.presence.disown()
        _inherited.append(taker)
    _takers.clear()


#: The parent's takers, kept from being collected: only the parent may close their connections.
_inherited: list[Any] = []
on_fork(_disown_all)
