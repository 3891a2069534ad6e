"""Durable requests in every database: noted with the asking, answered once."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from kombu.exceptions import ContentDisallowed
from sqlalchemy import select

from celery_eda.core.addresses import REPLY_HEADER
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.errors import UnknownRequest
from celery_eda.requests.store import RequestStore
from tests.support.databases import Database

ADDRESS = "eda.replies.shop"
OUTCOME = {"result": {"text": "a\u2028\U0001f600", "none": None, "at": datetime.now(timezone.utc)}}


@pytest.fixture
def requests(database: Database) -> RequestStore:
    return RequestStore(database.tables.requests, database.dialect, ADDRESS, "json")


def request(correlation_id: UUID, address: str = ADDRESS) -> Message:
    return Message(
        identity=Identity.fresh(),
        task="stock.quote",
        body=b"[[], {}, {}]",
        content_type="application/json",
        content_encoding="utf-8",
        headers={"id": str(correlation_id), REPLY_HEADER: address},
        properties={},
        exchange="",
        routing_key="stock",
    )


def noted(database: Database) -> list[UUID]:
    with database.engine.connect() as connection:
        return list(connection.scalars(select(database.tables.requests.c.correlation_id)))


def record(database: Database, requests: RequestStore, correlation_id: UUID, outcome: Any) -> bool:
    with database.engine.begin() as connection:
        return requests.record(connection, correlation_id, outcome)


def outcome(database: Database, requests: RequestStore, correlation_id: UUID) -> Any:
    with database.engine.connect() as connection:
        return requests.outcome(connection, correlation_id)


@pytest.mark.parametrize("serializer", ["json", "msgpack", "pickle", "yaml"])
def test_an_outcome_is_read_with_whatever_it_was_written(
    database: Database, requests: RequestStore, serializer: str
) -> None:
    asked, said = uuid4(), {"result": [7, None, "a\u2028\U0001f600"]}
    requests = replace(requests, serializer=serializer)
    with database.engine.begin() as connection:
        requests.add(connection, [request(asked)])
    record(database, requests, asked, said)

    assert outcome(database, requests, asked) == said


def test_a_row_cannot_choose_how_it_is_decoded(database: Database, requests: RequestStore) -> None:
    asked = uuid4()
    with database.engine.begin() as connection:
        requests.add(connection, [request(asked)])
    record(database, replace(requests, serializer="pickle"), asked, {"result": 1})

    with pytest.raises(ContentDisallowed):
        outcome(database, requests, asked)


def test_a_request_is_noted_once_and_only_if_it_is_ours(
    database: Database, requests: RequestStore
) -> None:
    ours, others, theirs = uuid4(), uuid4(), uuid4()
    messages = [
        request(ours),
        request(ours),  # whatever takes its place asks under the same id
        request(others, "eda.reply." + "0" * 32),
        request(theirs, "eda.replies.stock"),
    ]
    with database.engine.begin() as connection:
        requests.add(connection, messages)

    assert noted(database) == [ours]


def test_the_first_outcome_stays(database: Database, requests: RequestStore) -> None:
    asked = uuid4()
    with database.engine.begin() as connection:
        requests.add(connection, [request(asked)])
    assert outcome(database, requests, asked) is None

    assert record(database, requests, asked, OUTCOME)
    assert not record(database, requests, asked, {"result": "another"})
    assert outcome(database, requests, asked) == OUTCOME


def test_what_nobody_asked_for_is_unknown(database: Database, requests: RequestStore) -> None:
    with pytest.raises(UnknownRequest, match="eda_request_retention"):
        record(database, requests, uuid4(), OUTCOME)
    with pytest.raises(UnknownRequest):
        outcome(database, requests, uuid4())


def test_a_service_without_a_name_notes_nothing(database: Database) -> None:
    nameless = RequestStore(database.tables.requests, database.dialect, None, "json")
    with database.engine.begin() as connection:
        nameless.add(connection, [request(uuid4())])

    assert noted(database) == []
