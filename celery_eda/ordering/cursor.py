"""A consumer's progress through the messages of one ordering key, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from celery_eda.core.identity import Position


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
        written: True if the cursor has a row.
    """

    epoch: int = 0
    last: int = 0
    held: int | None = None
    parked: int = 0
    written: bool = False

    def turn_of(self, position: Position) -> Turn:
        """The turn of the message at *position*."""
        if position.epoch == self.epoch:
            if position.number <= self.last:
                return Turn.past
            return Turn.now if position.number == self.last + 1 else Turn.later
        if position.epoch < self.epoch:
            return Turn.past
        if position.number == 1 and self._previous_epoch_is_complete(position.previous):
            return Turn.now
        return Turn.later

    def after(self, position: Position) -> Cursor:
        """The cursor once the message at *position* is done with."""
        return Cursor(position.epoch, position.number, parked=self.parked, written=True)

    def _previous_epoch_is_complete(self, previous: tuple[int, int] | None) -> bool:
        """True if every message before the new epoch has been handled.

        *previous* is the last epoch and number before it, as far as the producer knows. After a
        restore from a backup it does not; then nothing may be blocked or parked.
        """
        if previous is not None:
            return self.held is None and (self.epoch, self.last) >= previous
        return self.epoch == 0 or (self.held is None and self.parked == 0)
