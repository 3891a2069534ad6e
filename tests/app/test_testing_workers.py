"""Workers of ``celery.contrib.testing``, in a thread of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import StaticPool

from celery_eda import EDA
from celery_eda.databases import upgrade
from celery_eda.errors import ConfigurationError


def in_one_connection() -> Engine:
    options = {"check_same_thread": False}
    return create_engine("sqlite://", poolclass=StaticPool, connect_args=options)


def make_app(url: str, engine: Engine | None = None) -> tuple[Celery, Any]:
    """An app with its tables, and a task of it."""
    app = Celery("tested", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(eda_database_url=url)
    eda = EDA(app, engine=engine)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)

    @eda.task(name="tested.add")
    def add(x: int, y: int) -> int:
        return x + y

    return app, add


def worker(app: Celery) -> Any:
    return start_worker(app, perform_ping_check=False, shutdown_timeout=60)


def test_a_file_serves_one_worker_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        app, add = make_app(f"sqlite:///{tmp_path / 'tested.db'}")
        with worker(app):
            with app.eda.transaction():
                result = add.delay(1, 2)
            assert result.get(timeout=60) == 3


def test_a_database_in_memory_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="Name a file"):
        make_app("sqlite://")


def test_a_worker_with_one_connection_to_memory_is_refused_with_the_remedy() -> None:
    app, _ = make_app("sqlite://", in_one_connection())

    with pytest.raises(ConfigurationError, match="Name a file"), worker(app):
        pytest.fail("it has started")
