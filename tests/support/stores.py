from __future__ import annotations

import pytest

from celery_eda.dead_letters.audit import Audit
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.store import InboxStore
from celery_eda.ordering.cursors import Cursors
from celery_eda.outbox.store import OutboxStore
from tests.support.databases import Database


@pytest.fixture
def outbox(database: Database) -> OutboxStore:
    return OutboxStore(database.tables.outbox, database.dialect)


@pytest.fixture
def inbox(database: Database) -> InboxStore:
    return InboxStore(database.tables.inbox, database.dialect)


@pytest.fixture
def attempts(database: Database) -> Attempts:
    return Attempts(database.tables.attempts, database.dialect)


@pytest.fixture
def dead_letters(database: Database) -> DeadLetterStore:
    return DeadLetterStore(database.tables.dead_letters, database.dialect)


@pytest.fixture
def audit(database: Database) -> Audit:
    return Audit(database.tables.audit, database.dialect)


@pytest.fixture
def cursors(database: Database) -> Cursors:
    return Cursors(database.tables.cursors, database.tables.parked, database.dialect)
