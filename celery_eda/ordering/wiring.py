"""The order of messages that share a key."""

from __future__ import annotations

from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Databases
from celery_eda.ordering.cursors import Cursors
from celery_eda.ordering.gaps import Gaps
from celery_eda.ordering.progress import Progress
from celery_eda.ordering.sequences import Sequences


class Ordering:
    """The sequences of one publishing service, and the cursors of its consumers."""

    def __init__(self, service: Service, databases: Databases) -> None:
        self._databases = databases
        service.add(self)

    @cached_once
    def sequences(self) -> Sequences:
        """Assigns numbers to messages with an ordering key."""
        return Sequences(self._databases.tables.sequences, self._databases.dialect)

    @cached_once
    def cursors(self) -> Cursors:
        """The next number expected for each key, and the messages parked until their turn."""
        tables = self._databases.tables
        return Cursors(tables.cursors, tables.parked, self._databases.dialect)

    @cached_once
    def progress(self) -> Progress:
        """The progress of consumers, and the keys that wait."""
        tables = self._databases.tables
        return Progress(tables.cursors, tables.parked, self._databases.dialect)

    @cached_once
    def gaps(self) -> Gaps:
        """Skips numbers that never come."""
        return Gaps(self.cursors, self.progress)
