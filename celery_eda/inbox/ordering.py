"""The order of the messages of one key at the consumer: each takes effect in its turn.

A message that is early is parked. The one that handles its predecessor sends it again, in the
same transaction. A message without a key passes untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery.exceptions import Ignore
from sqlalchemy import Connection

from celery_eda.core import redaction
from celery_eda.databases import LostRace
from celery_eda.errors import OutOfSequence
from celery_eda.inbox.unit_of_work import UnitOfWork
from celery_eda.ordering import Cursor, Cursors, PositionTaken, Turn
from celery_eda.outbox import OutboxStore

log = redaction.logger(__name__)


@dataclass(frozen=True)
class TurnKeeper:
    """Determines the turn of each message among those of its key, and passes the turn on."""

    cursors: Cursors

    def turn_of(self, unit: UnitOfWork) -> tuple[Turn, Cursor]:
        """The turn of the message, now, later or past, and the cursor that it was read from."""
        delivery = unit.delivery
        if (position := delivery.position) is None:
            return Turn.now, Cursor()
        cursor = self.cursors.find(unit.connection, delivery.consumer, position.lane)
        return cursor.turn_of(position), cursor

    def park(self, unit: UnitOfWork) -> Ignore:
        """Park a message that came before its predecessor, and commit.

        Returns:
            The exception that makes Celery acknowledge the message and do nothing else.

        Raises:
            LostRace: the message's turn has come meanwhile.
            OutOfSequence: another message is parked at the same position.
        """
        delivery, position = unit.delivery, unit.delivery.position
        assert position is not None, "only a message with a position can be early"
        message = delivery.as_message()
        try:
            parked = self.cursors.park(unit.connection, delivery.consumer, position, message)
        except PositionTaken as error:
            raise OutOfSequence("another message is parked at the same position") from error
        if not parked:
            raise LostRace
        unit.commit()
        log.info("%s is parked until its predecessor has been handled", delivery.log_name)
        return Ignore("parked until its predecessor has taken effect")

    def advance(self, unit: UnitOfWork, cursor: Cursor) -> None:
        """Pass the turn to the next message of the key; send it again if it is parked.

        Raises:
            LostRace: the *cursor* has moved meanwhile; the transaction is void.
        """
        delivery, position = unit.delivery, unit.delivery.position
        if position is None:
            return
        released = self.cursors.advance(unit.connection, delivery.consumer, position, cursor)
        if released:
            unit.outgoing.capture(released)

    def block_or_skip(self, unit: UnitOfWork) -> None:
        """Block the key of a message that failed for good, or skip it, as its task says."""
        delivery, position = unit.delivery, unit.delivery.position
        if position is None:
            return
        if delivery.task.when_dead == "block":
            revision = delivery.identity.revision
            self.cursors.block(unit.connection, delivery.consumer, position, revision)
            return
        turn, cursor = self.turn_of(unit)
        if turn is Turn.now:
            self.advance(unit, cursor)


@dataclass(frozen=True)
class ReleasedMessages:
    """Sends parked messages again whose turn has come, but whose release was lost.

    A chore of housekeeping; see :class:`celery_eda.databases.Chore`.

    Attributes:
        seconds: how long a released message may take to arrive.
    """

    cursors: Cursors
    outbox: OutboxStore
    seconds: float
    what: str = "released"
    is_due: bool = True

    def step(self, connection: Connection, limit: int) -> int:
        messages = self.cursors.sweep(connection, self.seconds, limit)
        if messages:
            self.outbox.add(connection, messages)
        return len(messages)
