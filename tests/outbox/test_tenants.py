"""Tenants with schemas of their own in one database: the outbox stays where the service's is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session, sessionmaker

from tests.support.databases import Database
from tests.support.worker_slot import Slot


@pytest.fixture
def tenant(shared_database: Database) -> Iterator[str]:
    """A schema that has none of our tables."""
    if shared_database.vendor != "postgresql":
        pytest.skip("only PostgreSQL has a search_path")
    with shared_database.engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    yield "tenant"
    with shared_database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA tenant CASCADE"))


@pytest.fixture
def service(slot: Slot) -> Slot:
    """A service that says where its tables are."""
    slot.app.conf.eda_schema = "public"
    return slot


@pytest.fixture
def mail(service: Slot) -> Any:
    """A reliable task."""

    @service.task
    def mail(number: int) -> None:
        pass

    return mail


def test_a_session_on_the_path_of_a_tenant_uses_the_outbox_of_the_service(
    service: Slot, mail: Any, tenant: str
) -> None:
    with Session(service.engine) as session, service.eda.transaction(session):
        session.execute(text(f"SET LOCAL search_path TO {tenant}"))
        mail.delay(1)
        session.commit()

    assert service.waiting() == ["mail"]


@pytest.mark.parametrize("attached", [True, False])
def test_a_session_that_translates_schemas_uses_the_outbox_of_the_service(
    service: Slot, mail: Any, tenant: str, attached: bool
) -> None:
    engine = service.engine.execution_options(schema_translate_map={None: tenant})
    sessions = sessionmaker(engine)
    if attached:
        service.eda.attach(sessions)
    with sessions() as session, service.eda.transaction(session):
        mail.delay(1)
        session.commit()

    assert service.waiting() == ["mail"]


def test_without_a_schema_the_commit_on_the_path_of_a_tenant_fails(slot: Slot, tenant: str) -> None:
    @event.listens_for(slot.engine, "begin")
    def choose(connection: Any) -> None:
        connection.exec_driver_sql(f"SET LOCAL search_path TO {tenant}")

    try:
        with pytest.raises(ProgrammingError, match="eda_outbox"):
            _publish(slot, slot.engine)
    finally:
        event.remove(slot.engine, "begin", choose)

    assert slot.waiting() == []


def _publish(slot: Slot, engine: Engine) -> None:
    with Session(engine) as session, slot.eda.transaction(session):
        slot.app.send_task("elsewhere.work")
        session.commit()
