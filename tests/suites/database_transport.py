"""The database as broker under kombu's own suite, into whose folder this file is copied.

``SUITE_BROKER`` is the URL of the broker, ``SUITE_NOBODY`` one that nobody answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import kombu
import pytest
from t.integration import common

import celery_eda  # noqa: F401  # registers the transport


@pytest.fixture
def connection() -> Iterator[kombu.Connection]:
    with kombu.Connection(os.environ["SUITE_BROKER"]) as connection:
        yield connection


@pytest.fixture
def invalid_connection() -> kombu.Connection:
    return kombu.Connection(os.environ["SUITE_NOBODY"])


class TestBasicFunctionality(common.BasicFunctionality):
    pass


class TestExchangeTypes(common.BaseExchangeTypes):
    pass


class TestTimeToLive(common.BaseTimeToLive):
    pass


class TestPriority(common.BasePriority):
    pass


class TestMessage(common.BaseMessage):
    pass


class TestEventLoop(common.BaseEventLoop):
    pass
