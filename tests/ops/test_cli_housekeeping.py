"""``celery -A … eda housekeeping``, as a person and a script use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from sqlalchemy import update

from celery_eda import EDA
from celery_eda.core.identity import Identity
from celery_eda.core.settings import DAY
from celery_eda.databases import upgrade
from celery_eda.inbox.store import InboxStore, Outcome
from celery_eda.ops.cli import eda as commands


@pytest.fixture
def eda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EDA:
    """A service with its tables, and one message in the inbox that was handled a month ago."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'service.db'}"
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    inbox = InboxStore(eda.databases.tables.inbox, eda.databases.dialect)
    with eda.databases.engine.begin() as connection:
        inbox.record_failure(connection, "shop.charge", Identity.fresh(), Outcome.done)
        connection.execute(update(inbox.table).values(at=eda.databases.dialect.later(-30 * DAY)))
    return eda


def run(eda: EDA, *arguments: str) -> str:
    """What ``celery -A shop eda …`` prints."""
    context = CLIContext(app=eda.service.app, no_color=True, workdir=None)
    return CliRunner().invoke(commands, arguments, obj=context, catch_exceptions=False).output


def test_housekeeping_by_hand_says_what_it_did(eda: EDA) -> None:
    first, second = run(eda, "housekeeping"), run(eda, "housekeeping")

    assert "1 of inbox" in first
    assert "0 of inbox" in second


def test_housekeeping_by_hand_says_it_in_json(eda: EDA) -> None:
    assert json.loads(run(eda, "housekeeping", "--json")) == {
        "released": 0,
        "skipped": 0,
        "deleted": {
            "dead_letters": 0,
            "inbox": 1,
            "attempts": 0,
            "requests": 0,
            "audit": 0,
            "sagas": 0,
        },
    }


def test_housekeeping_without_tables_says_what_to_do(tmp_path: Path) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'empty.db'}"

    assert "eda db upgrade" in run(EDA(app), "housekeeping")
