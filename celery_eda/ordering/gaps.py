"""Gaps: numbers of a key that never come, because their messages were lost.

A restore from a backup, or a fail-over to a standby that was behind, loses messages that others
wait for. To skip a gap is to handle the next message without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from celery_eda.core.message import Message
from celery_eda.databases import LostRace
from celery_eda.ordering.cursors import Cursors
from celery_eda.ordering.progress import Progress, WaitingKey


@dataclass(frozen=True)
class Gaps:
    """Skips the gaps of waiting keys, in a transaction of the caller."""

    cursors: Cursors
    progress: Progress

    def skip(self, connection: Connection, key: WaitingKey) -> Message:
        """Let *key* go on with its lowest parked message.

        Returns:
            That message, which the caller has to send again in this transaction. If an awaited one
            arrives later all the same, it becomes a dead letter.

        Raises:
            LostRace: the key does not wait for the same message any more.
        """
        lane = key.lane
        cursor = self.cursors.lock(connection, key.consumer, lane)
        found = self.progress.waiting(
            connection,
            consumer=key.consumer,
            source=lane.source,
            stream=lane.scope,
            key=lane.key,
        )
        if cursor.held is not None or [each.awaited for each in found] != [key.awaited]:
            raise LostRace
        message = self.cursors.skip_to(connection, key.consumer, found[0].skipped)
        if message is None:
            raise LostRace
        return message

    def given_up(self, connection: Connection, limit: int) -> Sequence[WaitingKey]:
        """Keys that wait for a message which their restored producer has given up."""
        return self.progress.waiting(connection, limit, is_held=False, is_given_up=True)
