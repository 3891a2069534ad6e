"""A pooler before PostgreSQL: what is set for us is not set for others, and nothing is prepared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url, text

from celery_eda.databases.registry import dialect_of
from tests.support.servers.pgbouncer import CONNECTIONS

SETTINGS = (
    *("synchronous_commit", "enable_bitmapscan", "plan_cache_mode"),
    "idle_in_transaction_session_timeout",
)


def engine_at(url: str, *, relay: bool) -> Engine:
    """An engine as ``EDA`` makes it."""
    dialect = dialect_of(make_url(url), claim_timeout=60)
    engine = create_engine(url, max_overflow=-1, **dialect.engine_options(60))
    dialect.configure_engine(engine, 60)
    if relay:
        dialect.configure_relay_engine(engine)
    return engine


@pytest.fixture
def engines(pgbouncer_url: str) -> Iterator[tuple[Engine, Engine, Engine]]:
    """A relay's engine, a service's, and one of somebody who has nothing to do with us."""
    made = (
        engine_at(pgbouncer_url, relay=True),
        engine_at(pgbouncer_url, relay=False),
        create_engine(pgbouncer_url, connect_args={"prepare_threshold": None}),
    )
    yield made
    for engine in made:
        engine.dispose()


def said(connection: Connection) -> list[str]:
    return [str(connection.scalar(text(f"SHOW {name}"))) for name in SETTINGS]


def test_what_a_relay_sets_holds_for_it_alone(engines: tuple[Engine, Engine, Engine]) -> None:
    """A relay's commits need not wait for the disk; everybody else's have to."""
    relay, service, stranger = engines
    for _ in range(3 * CONNECTIONS):
        with relay.begin() as connection:
            assert said(connection) == ["off", "off", "force_custom_plan", "1min"]
        with service.begin() as connection:
            assert said(connection) == ["on", "on", "auto", "1min"]
        with stranger.begin() as connection:
            assert said(connection) == ["on", "on", "auto", "0"]


def test_a_statement_may_be_repeated_on_any_connection(
    engines: tuple[Engine, Engine, Engine],
) -> None:
    """Psycopg prepares what it is given for the sixth time, and it would be somebody else's."""
    _, service, _ = engines
    opened = [service.connect() for _ in range(CONNECTIONS)]
    for number in range(50):
        connection = opened[number % CONNECTIONS]
        assert connection.scalar(text("SELECT :number"), {"number": str(number)}) == str(number)
        connection.commit()
    for connection in opened:
        connection.close()


def test_without_a_pooler_it_is_set_once_for_the_session(postgresql_url: str) -> None:
    engine = engine_at(postgresql_url, relay=True)
    with engine.connect() as connection:
        assert said(connection) == ["off", "off", "force_custom_plan", "1min"]
        driver = connection.connection.driver_connection
        connection.rollback()
        assert driver is not None
        cursor = driver.cursor()
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchone()[0] == "off"
    engine.dispose()
