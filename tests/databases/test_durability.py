"""Whose commits are on disk when they return."""

from __future__ import annotations

import pytest
from celery import Celery
from sqlalchemy import Engine

from celery_eda import EDA
from tests.support.databases import Database

#: How a connection is asked, and what it says where a commit waits for the disk, and where not.
ASKED = {
    "postgresql": ("SHOW synchronous_commit", "on", "off"),
    "sqlite": ("PRAGMA synchronous", 2, 1),
}


@pytest.mark.parametrize("empty_database", ASKED, indirect=True)
def test_only_a_relay_commits_without_waiting_for_the_disk(empty_database: Database) -> None:
    question, waits, hurries = ASKED[empty_database.vendor]
    app = Celery("service", set_as_current=False)
    app.conf.eda_database_url = empty_database.engine.url.render_as_string(False)
    eda = EDA(app)

    def answer(engine: Engine) -> object:
        with engine.connect() as connection:
            return connection.exec_driver_sql(question).scalar()

    assert [answer(eda.databases.relay_engine), answer(eda.databases.engine)] == [hurries, waits]
    eda.databases.engine.dispose()
    eda.databases.relay_engine.dispose()
