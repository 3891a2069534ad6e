"""Dead letters: messages that could not be sent or handled, their audit trail and their repair."""

from __future__ import annotations

from celery_eda.dead_letters.audit import AuditEntry, Author
from celery_eda.dead_letters.failure import Failure, RepairDecision
from celery_eda.dead_letters.letter import Letter, LetterFilter, LetterState, Reason
from celery_eda.dead_letters.repair import RepairResult, edited, in_order
from celery_eda.dead_letters.repairers import RepairTasks
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.dead_letters.wiring import DeadLetters

__all__ = [
    "AuditEntry",
    "Author",
    "DeadLetterStore",
    "DeadLetters",
    "Failure",
    "Letter",
    "LetterFilter",
    "LetterState",
    "Reason",
    "RepairDecision",
    "RepairResult",
    "RepairTasks",
    "edited",
    "in_order",
]
