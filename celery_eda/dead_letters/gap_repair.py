"""Skipping of lost messages that others of their key wait for, with an entry in the audit trail."""

from __future__ import annotations

from dataclasses import dataclass

from celery_eda.core.context import Capture
from celery_eda.databases import LostRace
from celery_eda.dead_letters.audit import Audit, Author
from celery_eda.errors import NotItsTurn
from celery_eda.ordering import Gaps, WaitingKey


@dataclass(frozen=True)
class GapRepair:
    """Lets keys go on without lost messages, in a transaction of the caller."""

    gaps: Gaps
    audit: Audit

    def skip(self, transaction: Capture, key: WaitingKey, author: Author) -> None:
        """Have *key* go on with its lowest parked message; repeating it is harmless.

        After an error the caller has to roll the *transaction* back.

        Raises:
            NotItsTurn: the key does not wait for the same message any more, or a dead letter
                blocks it.
        """
        try:
            message = self.gaps.skip(transaction.connection, key)
        except LostRace as error:
            raise NotItsTurn(
                f"{key.name}: it does not wait for {key.gap} any more, or a dead letter blocks it. "
                "List the keys and decide again."
            ) from error
        self.audit.add_skipped_gap(transaction.connection, author, key, message.identity)
        transaction.capture(message)
