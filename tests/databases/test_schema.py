from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    false,
    inspect,
    text,
)

from celery_eda.databases import schema, upgrade
from celery_eda.databases.tables import Tables
from celery_eda.errors import SchemaOutdated
from tests.support import PROJECT
from tests.support.databases import Database
from tests.support.waiting import eventually

UPGRADE = """
import sys
from sqlalchemy import create_engine
from celery_eda.databases import Tables, upgrade

engine, tables = create_engine(sys.argv[1]), Tables.on()
print("ready", flush=True)
sys.stdin.read()
upgrade.upgrade(engine, tables)
"""


@pytest.fixture
def database(empty_database: Database) -> Database:
    """A database of our own, with tables that we may change."""
    upgrade.upgrade(empty_database.engine, empty_database.tables)
    return empty_database


def differences(database: Database, metadata: MetaData) -> list[object]:
    """What a project's own ``alembic revision --autogenerate`` would write down."""
    with database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def test_upgraded_tables_pass_the_check(empty_database: Database) -> None:
    upgrade.upgrade(empty_database.engine, empty_database.tables)

    schema.check(empty_database.engine, empty_database.tables)


def test_missing_tables_are_refused_with_the_command_that_makes_them(
    empty_database: Database,
) -> None:
    with pytest.raises(SchemaOutdated, match="celery -A <app> eda db upgrade"):
        schema.check(empty_database.engine, empty_database.tables)


def test_tables_of_an_older_version_are_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = schema.revisions()
    monkeypatch.setattr(schema, "revisions", lambda: [*known, "later"])
    refusal = f"are of version {known[-1]}, but version later is needed"

    with pytest.raises(SchemaOutdated, match=refusal):
        schema.check(database.engine, database.tables)


def test_the_revisions_are_known_by_the_names_of_their_files() -> None:
    history = ScriptDirectory(
        str(PROJECT / "celery_eda" / "databases" / "migrations")
    ).walk_revisions()

    assert schema.revisions() == [script.revision for script in history][::-1]


def test_a_process_that_changes_no_table_does_without_alembic() -> None:
    code = "import celery_eda.ops.cli, celery_eda.app.worker, sys; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT, text=True).split()

    assert "celery_eda.app.eda" in modules
    assert not {"alembic", "redis"} & set(modules)


def test_tables_that_a_newer_version_has_upgraded_are_accepted(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(database.tables.version.update().values(version_num="9999"))

    schema.check(database.engine, database.tables)


@pytest.mark.parametrize("version", ["0001", "0010", "9999"])
def test_tables_of_an_unknown_version_are_not_upgraded(database: Database, version: str) -> None:
    with database.engine.begin() as connection:
        connection.execute(database.tables.version.update().values(version_num=version))

    with pytest.raises(SchemaOutdated, match=rf"of version {version}, .* drop all tables eda_\*"):
        upgrade.upgrade(database.engine, database.tables)


def test_a_missing_column_is_named(empty_database: Database) -> None:
    with empty_database.engine.begin() as connection:
        empty_database.tables.metadata.create_all(connection)
        connection.execute(text("ALTER TABLE eda_inbox DROP COLUMN result"))

    with pytest.raises(SchemaOutdated, match=r"lacks eda_inbox\.result"):
        schema.check(empty_database.engine, empty_database.tables)


def test_upgrading_twice_changes_nothing(database: Database) -> None:
    upgrade.upgrade(database.engine, database.tables)

    assert differences(database, database.tables.metadata) == []


def test_an_upgrade_that_was_killed_half_way_can_be_run_again(database: Database) -> None:
    with database.engine.begin() as connection:
        database.tables.dead_letters.drop(connection)
        connection.execute(database.tables.version.delete())

    upgrade.upgrade(database.engine, database.tables)

    assert differences(database, database.tables.metadata) == []


def test_four_machines_can_upgrade_at_once(empty_database: Database) -> None:
    url = empty_database.engine.url.render_as_string(hide_password=False)
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE, url],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(4)
    ]
    for machine in machines:
        assert machine.stdout.readline() == "ready\n"

    for machine in machines:
        machine.stdin.close()
    printed = [machine.stdout.read() for machine in machines]

    assert [machine.wait() for machine in machines] == [0] * 4, printed
    schema.check(empty_database.engine, empty_database.tables)


def test_a_project_with_the_tables_in_its_own_metadata_sees_no_difference(
    database: Database,
) -> None:
    metadata = MetaData()
    orders = Table("orders", metadata, Column("id", Integer, primary_key=True))
    Tables.on(metadata)
    orders.create(database.engine)

    assert differences(database, metadata) == []


def test_a_project_may_make_the_tables_in_its_own_migrations(empty_database: Database) -> None:
    empty_database.tables.metadata.create_all(empty_database.engine)

    schema.check(empty_database.engine, empty_database.tables)


def test_the_prefix_names_every_table_and_index(empty_database: Database) -> None:
    tables = Tables.on(prefix="shop_")

    upgrade.upgrade(empty_database.engine, tables)

    inspector = inspect(empty_database.engine)
    assert set(inspector.get_table_names()) == {
        table.name for table in tables.metadata.sorted_tables
    }
    assert [index["name"] for index in inspector.get_indexes("shop_outbox")] == [
        "ix_shop_outbox_available"
    ]


def test_two_services_share_a_database_under_two_prefixes(database: Database) -> None:
    other = Tables.on(prefix="other_")

    upgrade.upgrade(database.engine, other)

    schema.check(database.engine, other)
    schema.check(database.engine, database.tables)


def test_the_tables_may_live_in_a_schema_of_their_own(postgresql_url: str) -> None:
    engine, tables = create_engine(postgresql_url), Tables.on(schema="messages")
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA messages"))

    upgrade.upgrade(engine, tables)

    schema.check(engine, tables)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_postgresql_compresses_messages_by_its_faster_method(postgresql_url: str) -> None:
    engine, tables = create_engine(postgresql_url), Tables.on(prefix="it's_", schema="our shop")
    compressed = text(
        "SELECT relname, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid "
        "WHERE attcompression = 'l'"
    )
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "our shop"'))

    upgrade.upgrade(engine, tables)

    with engine.connect() as connection:
        found = {tuple(each) for each in connection.execute(compressed)}
    whole = {"headers", "properties", "body"}
    columns = {"outbox": whole | {"envelope"}, "parked": whole, "dead_letters": whole}
    columns |= {"events": {"data"}, "queue": {"message", "body"}}
    assert found == {(f"it's_{table}", each) for table in columns for each in columns[table]}
    engine.dispose()


def test_the_printed_ddl_makes_tables_that_pass_the_check(empty_database: Database) -> None:
    ddl = upgrade.sql(empty_database.engine, empty_database.tables)

    with empty_database.engine.connect() as connection:
        for statement in ddl.split(";\n"):
            if statement.strip() not in ("", "BEGIN", "COMMIT"):
                connection.exec_driver_sql(statement)
        connection.commit()

    schema.check(empty_database.engine, empty_database.tables)
    assert differences(empty_database, empty_database.tables.metadata) == []


@pytest.mark.parametrize(
    "url",
    ["postgresql+psycopg://nowhere/shop", "mysql+pymysql://nowhere/shop", "sqlite:///nowhere.db"],
)
def test_the_ddl_is_printed_without_a_database(url: str) -> None:
    ddl = upgrade.sql(create_engine(url), Tables.on())

    assert ddl.count("CREATE TABLE") == 21


def test_the_wheel_holds_the_revisions_and_the_types(tmp_path: Path) -> None:
    # From a copy: what an earlier build has left beside the project would be packed again.
    copy = tmp_path / "project"
    shutil.copytree(PROJECT / "celery_eda", copy / "celery_eda")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, copy],
        check=True,
        capture_output=True,
    )

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "celery_eda").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert {name for name in names if not name.partition("/")[0].endswith(".dist-info")} == source


# ── while the service works ─────────────────────────────────────────────────────────────────


def forget_version(database: Database) -> None:
    """Leave tables that were upgraded half-way: some indexes are missing, and the version."""
    with database.engine.begin() as connection:
        connection.execute(database.tables.version.delete())
        for table in (database.tables.outbox, database.tables.inbox):
            for index in table.indexes:
                index.drop(connection)


def note(connection: Connection, table: Table) -> None:
    """Write something, so that the transaction holds *table*."""
    connection.execute(table.delete().where(false()))


def is_waiting_for_lock(engine: Engine) -> bool:
    """True if some transaction waits to change a table that another one uses."""
    query = {
        "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE state LIKE '%lock%'",
    }[engine.dialect.name]
    with engine.connect() as connection:
        return bool(connection.scalar(text(query)))


def lockable(database: Database) -> None:
    if database.vendor == "sqlite":
        pytest.skip("one writer: an upgrade and a producer wait for each other's whole transaction")


def test_an_upgrade_and_a_transaction_of_the_service_do_not_deadlock(database: Database) -> None:
    lockable(database)
    forget_version(database)
    tables = database.tables
    with ThreadPoolExecutor() as threads, database.engine.connect() as producer:
        # In the order opposite to that of the upgrade.
        note(producer, tables.inbox)
        upgrading = threads.submit(upgrade.upgrade, database.engine, tables)
        eventually(lambda: is_waiting_for_lock(database.engine), "an upgrade that waits")
        note(producer, tables.outbox)
        producer.commit()

        upgrading.result()

    schema.check(database.engine, tables)
    assert differences(database, tables.metadata) == []


def test_an_upgrade_that_waits_lets_others_work_meanwhile(database: Database) -> None:
    lockable(database)
    forget_version(database)
    tables = database.tables
    with ThreadPoolExecutor() as threads, database.engine.connect() as slow:
        note(slow, tables.inbox)
        upgrading = threads.submit(upgrade.upgrade, database.engine, tables)
        eventually(lambda: is_waiting_for_lock(database.engine), "an upgrade that waits")

        with database.engine.begin() as another:
            note(another, tables.inbox)  # it would wait for the slow one

        assert not upgrading.done()
        slow.rollback()
        upgrading.result()
    schema.check(database.engine, tables)


def test_an_upgrade_that_waits_for_too_long_says_what_to_do(database: Database) -> None:
    lockable(database)
    forget_version(database)
    with database.engine.connect() as slow:
        note(slow, database.tables.inbox)

        with pytest.raises(SchemaOutdated, match="End the transactions that take so long"):
            upgrade.upgrade(database.engine, database.tables, patience=0)

    upgrade.upgrade(database.engine, database.tables)
    schema.check(database.engine, database.tables)


def test_the_printed_ddl_locks_one_table_in_a_transaction() -> None:
    ddl = upgrade.sql(create_engine("postgresql+psycopg://nowhere/shop"), Tables.on())

    for transaction in ddl.split("COMMIT;"):
        locked = re.findall(r"(?:CREATE (?:UNIQUE )?INDEX .* ON|ALTER TABLE) (\w+)", transaction)
        assert len(set(locked)) <= 1, transaction
        assert not locked or "SET LOCAL lock_timeout" in transaction


def test_the_printed_ddl_of_mariadb_waits_only_briefly() -> None:
    ddl = upgrade.sql(create_engine("mysql+pymysql://nowhere/shop"), Tables.on())

    assert ddl.index("SET SESSION lock_wait_timeout") < ddl.index("eda_outbox")
