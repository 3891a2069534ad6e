"""A consumer's progress through the messages of one ordering key, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from celery_eda.core.identity import ANY, Position


class Turn(Enum):
    """The turn of a message among those of its key.

    ``now``: it is the next one. ``later``: an earlier one is missing. ``past``: a message at the
    same position, or a later one, has been handled.
    """

    now = "now"
    later = "later"
    past = "past"


@dataclass(frozen=True)
class Cursor:
    """The progress of a consumer through the messages of one ordering key.

    Attributes:
        epoch: that of the last message; 0 before the first one.
        last: number of the last message that is done with: handled, retried or skipped.
        held: revision of the failed message that blocks the key; None if none does.
        parked: number of parked messages.
        oldest: the earliest epoch of a parked message; None if none is parked.
        written: True if the cursor has a row.
    """

    epoch: int = 0
    last: int = 0
    held: int | None = None
    parked: int = 0
    oldest: int | None = None
    written: bool = False

    def turn_of(self, position: Position) -> Turn:
        """The turn of the message at *position*."""
        if position.epoch == self.epoch:
            if position.number <= self.last:
                return Turn.past
            return Turn.now if position.number == self.last + 1 else Turn.later
        if position.epoch < self.epoch:
            return Turn.past
        if position.number == 1 and self._earlier_epochs_are_complete(position):
            return Turn.now
        return Turn.later

    def after(self, position: Position) -> Cursor:
        """The cursor once the message at *position* is done with."""
        return replace(self, epoch=position.epoch, last=position.number, held=None, written=True)

    def _earlier_epochs_are_complete(self, position: Position) -> bool:
        """True if every message before the epoch of *position* has been handled.

        Where the producer does not know the last one, or knows that it may be lost, no earlier
        message may be parked: those that have come are handled first.
        """
        if self.held is not None:
            return False
        if position.previous not in (None, ANY):
            return (self.epoch, self.last) >= position.previous
        return self.oldest is None or self.oldest >= position.epoch
