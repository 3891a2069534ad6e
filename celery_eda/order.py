"""The messages of one key, one after the other, at the consumer: each takes effect in its turn.

What comes early is parked; whoever handles its predecessor sends it again, in the same
transaction. A message without a key passes here untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery.exceptions import Ignore

from celery_eda import redaction
from celery_eda.cursors import Cursor, Cursors, PlaceTaken, Turn
from celery_eda.delivery import Delivery
from celery_eda.dialects.base import LostRace
from celery_eda.errors import OutOfSequence
from celery_eda.unit_of_work import UnitOfWork

log = redaction.logger(__name__)


@dataclass(frozen=True)
class TurnKeeper:
    """Whose turn it is among the messages of a key, and what follows when that has had its end."""

    cursors: Cursors

    def turn_of(self, unit: UnitOfWork) -> tuple[Turn, Cursor]:
        """Whether it is the message's turn, and the cursor that said so."""
        delivery = unit.delivery
        if (position := delivery.position) is None:
            return Turn.now, Cursor()
        cursor = self.cursors.find(unit.connection, delivery.consumer, position.lane)
        return cursor.turn(position), cursor

    def park(self, unit: UnitOfWork) -> Ignore:
        """Keep a message that came before its predecessor, and commit; nothing else is left to do.

        Raises:
            LostRace: its turn has come meanwhile.
            OutOfSequence: another message waits at its place.
        """
        delivery, position = unit.delivery, unit.delivery.position
        assert position is not None, "only what has a place can be early"
        message = delivery.as_message()
        try:
            parked = self.cursors.park(unit.connection, delivery.consumer, position, message)
        except PlaceTaken as error:
            raise OutOfSequence("another message waits at its place") from error
        if not parked:
            raise LostRace
        unit.commit()
        log.info("%s[%s] waits for its predecessor", *delivery.names)
        return Ignore("parked until its predecessor has taken effect")

    def pass_over(self, delivery: Delivery, cursor: Cursor) -> Ignore:
        """What comes after its turn, and is no copy, has no effect; nor is it lost in silence.

        Raises:
            OutOfSequence: it was for this consumer.
        """
        if delivery.position and cursor.joined_after(delivery.position):
            return Ignore("sent before this consumer joined")
        raise OutOfSequence("another message has taken its place")

    def advance(self, unit: UnitOfWork, cursor: Cursor) -> None:
        """Let the next message have its turn; if it is parked, send it again.

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
        """Hold the key of a message that failed for good, or let it go on, as its task says."""
        delivery, position = unit.delivery, unit.delivery.position
        if position is None:
            return
        if delivery.task.when_dead == "block":
            revision = delivery.identity.revision
            self.cursors.hold(unit.connection, delivery.consumer, position, revision)
            return
        turn, cursor = self.turn_of(unit)
        if turn is Turn.now:
            self.advance(unit, cursor)
