"""A plugin of pytest for Celery's own suite: its apps publish through the outbox, and every task
is reliable.

``SUITE_DATABASE`` is the URL of a database with the tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.contrib import pytest as fixtures

from celery_eda import EDA

create = fixtures._create_app


@contextmanager
def create_reliable(*arguments: Any, **config: Any) -> Iterator[Celery]:
    settings = {
        "eda_database_url": os.environ["SUITE_DATABASE"],
        "eda_tasks": ("*",),
        "eda_outside": "store",
    }
    with create(*arguments, **config, **settings) as app:
        eda = EDA(app)
        yield app
        # The suite makes an app for each test, and the server has room for some 200 connections.
        eda.databases.engine.dispose()
        eda.databases.relay_engine.dispose()


fixtures._create_app = create_reliable
