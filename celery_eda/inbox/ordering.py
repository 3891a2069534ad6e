"""The order of the messages of one key at the consumer: each takes effect in its turn.

A message that is early is parked. Its predecessor passes it on to the same worker, or sends it
again in the same transaction. A message without a key passes untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery.exceptions import Ignore
from sqlalchemy import Connection

from celery_eda.core import redaction
from celery_eda.core.delivery import Delivery
from celery_eda.core.identity import DRAIN
from celery_eda.core.message import Message
from celery_eda.databases import LostRace
from celery_eda.errors import OutOfSequence
from celery_eda.inbox.drain import Drain
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

    def advance(self, unit: UnitOfWork, cursor: Cursor) -> Message | None:
        """Pass the turn to the next message of the key.

        Returns:
            The next message if it is parked and this worker may handle it, for :meth:`pass_on`.
            None if there is none, or if it is sent again in this transaction.

        Raises:
            LostRace: the *cursor* has moved meanwhile; the transaction is void.
        """
        delivery, position = unit.delivery, unit.delivery.position
        if position is None:
            return None
        released = self.cursors.advance(unit.connection, delivery.consumer, position, cursor)
        # One delivery of the broker must not be redelivered for one message after the other: some
        # brokers give it up then.
        drain = _drain_of(delivery)
        if released is None or (drain and drain.may_go_on and not delivery.redelivered):
            return released
        unit.outgoing.capture(released)
        return None

    def pass_on(self, delivery: Delivery, successor: Message | None) -> None:
        """Have this worker handle the *successor* next, once the turn is committed to be its."""
        drain = _drain_of(delivery)
        if drain and successor:
            drain.pass_on(successor, redelivered=False)

    def pass_on_again(self, unit: UnitOfWork) -> None:
        """Have this worker handle the parked message whose turn has come, if there is one.

        For a copy: the worker of the first one may have been lost with the message that was next.
        """
        delivery, position, drain = unit.delivery, unit.delivery.position, _drain_of(unit.delivery)
        if position is None or drain is None:
            return
        successor = self.cursors.next_parked(unit.connection, delivery.consumer, position.lane)
        if successor:
            drain.pass_on(successor, redelivered=delivery.redelivered)

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
        if turn is Turn.now and (
            released := self.cursors.advance(unit.connection, delivery.consumer, position, cursor)
        ):
            unit.outgoing.capture(released)


def _drain_of(delivery: Delivery) -> Drain | None:
    """The parked messages that may follow *delivery*; None if none may."""
    drain: Drain | None = delivery.request.get(DRAIN)
    return drain


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
