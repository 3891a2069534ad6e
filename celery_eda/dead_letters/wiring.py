"""Messages that could not be sent or handled, and their repair."""

from __future__ import annotations

from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Chore, Databases
from celery_eda.dead_letters.audit import Audit
from celery_eda.dead_letters.gap_repair import GapRepair
from celery_eda.dead_letters.repair import Repair
from celery_eda.dead_letters.repairers import Repairers, RepairTasks
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.ordering import Ordering


class DeadLetters:
    """The dead letters of one service, their audit trail, and the ways to repair them."""

    def __init__(self, service: Service, databases: Databases, ordering: Ordering) -> None:
        self._service = service
        self._databases = databases
        self._ordering = ordering
        service.add(self)

    @cached_once
    def store(self) -> DeadLetterStore:
        """The dead letters."""
        return DeadLetterStore(self._databases.tables.dead_letters, self._databases.dialect)

    @cached_once
    def audit(self) -> Audit:
        """The record of each change to a dead letter."""
        return Audit(self._databases.tables.audit, self._databases.dialect)

    @cached_once
    def repair(self) -> Repair:
        """Redrives, edits, skips and discards dead letters."""
        return Repair(self.store, self.audit, self._ordering.cursors)

    @cached_once
    def gap_repair(self) -> GapRepair:
        """Lets keys go on that wait for lost messages."""
        return GapRepair(self._ordering.gaps, self.audit)

    @cached_once
    def repairers(self) -> Repairers:
        """Calls the user's functions that decide about dead letters."""
        return Repairers(self.repair, self._service)

    @cached_once
    def repair_tasks(self) -> RepairTasks:
        """The tasks that repair messages of other tasks."""
        return RepairTasks(self._service)

    def retention(self) -> list[Chore]:
        """The rules for dead letters that are closed, and for the audit trail."""
        tables, settings = self._databases.tables, self._service.settings
        return [
            self.store.retention(tables.audit, settings.dead_letter_retention),
            self.audit.retention(tables.dead_letters, settings.audit_retention),
        ]
