"""A database that is restored from a backup: keys lose their order in no silence, and go on.

The broker is not restored: what was acknowledged does not come again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, insert, make_url, select, text

from celery_eda.core.message import Message
from celery_eda.databases import upgrade
from celery_eda.dead_letters import Author
from celery_eda.ordering import WaitingKey
from celery_eda.outbox import join
from tests.faults.programs.tables import effects
from tests.support.databases import Database, connect
from tests.support.servers.postgresql import PostgreSQL
from tests.support.worker_slot import Slot


@dataclass
class Place:
    """A database of its own, which can be backed up and restored."""

    database: Database
    backed_up: Callable[[], Path]
    restored: Callable[[Path], None]

    def back_up(self) -> Path:
        self.database.engine.dispose()  # the server stops
        return self.backed_up()

    def restore(self, backup: Path) -> None:
        self.database.engine.dispose()
        self.restored(backup)


class Trade:
    """A shop that publishes trades, and a bank that handles them, each with a database."""

    def __init__(self, shop: Place, bank: Place) -> None:
        self.shop, self.bank = shop, bank
        for place in {id(each): each for each in (shop, bank)}.values():
            upgrade.upgrade(place.database.engine, place.database.tables)
            effects.create(place.database.engine, checkfirst=True)
        self.producer, self.consumer = Slot(shop.database), Slot(bank.database)
        if shop is bank:
            self.consumer = self.producer

        @self.consumer.task(name="trade", key="account")
        def trade(session: Any, account: str, number: int) -> None:
            session.execute(insert(effects).values(name=account, number=number))

    def publish(self, *numbers: int) -> list[Message]:
        """Publish trades of one account; returns the messages that the relay sends."""
        for number in numbers:
            with self.producer.eda.transaction():
                self.producer.app.send_task("trade", ("a", number), key="a")
        return self.producer.sent()

    def trade(self, *numbers: int) -> None:
        """Publish trades, and bring them to the bank."""
        for message in self.publish(*numbers):
            self.consumer.deliver(message)
        self.consumer.work()

    def keep_house(self) -> None:
        """Housekeeping, and the delivery of what it sends again."""
        self.consumer.eda.outbox.housekeeping.finish()
        self.consumer.work()

    def begin_anew(self) -> None:
        """What ``eda order new-epoch`` does at the shop."""
        with self.shop.database.engine.begin() as connection:
            self.producer.eda.ordering.sequences.begin_epoch(connection)

    def skip_gaps(self) -> None:
        """What ``eda order skip-gap --all`` does at the bank."""
        eda = self.consumer.eda
        for key in self.waiting():
            with self.bank.database.engine.begin() as connection:
                eda.dead_letters.gap_repair.skip(join(connection, eda.outbox), key, Author("me"))
        self.consumer.work()

    def waiting(self) -> list[WaitingKey]:
        with self.bank.database.engine.connect() as connection:
            return list(self.consumer.eda.ordering.progress.waiting(connection))

    def taken_effect(self) -> list[int]:
        query = select(effects.c.number).order_by(effects.c.id)
        with self.bank.database.engine.connect() as connection:
            return list(connection.scalars(query))

    def dead(self) -> list[str]:
        return [letter.reason for letter in self.consumer.dead()]


@pytest.fixture(scope="module")
def servers(servers_folder: Path) -> Iterator[tuple[PostgreSQL, PostgreSQL]]:
    """Two servers that belong to this module: a restore affects all databases of a server."""
    for name in ("shop", "bank"):
        (servers_folder / name).mkdir()
        (servers_folder / name).chmod(0o755)
    shop, bank = (PostgreSQL.find(servers_folder / name) for name in ("shop", "bank"))
    with shop, bank:
        yield shop, bank


@pytest.fixture(params=["postgresql", "sqlite"])
def vendor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def places(vendor: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Place]]:
    """Two places on each database."""
    made = []
    for number, name in enumerate(("shop", "bank")):
        if vendor == "sqlite":
            made.append(_file(tmp_path, name))
        else:
            server = request.getfixturevalue("servers")[number]
            database = connect(vendor, server.database(name))
            made.append(Place(database, server.back_up, server.restore))
    yield made
    for place in made:
        place.database.engine.dispose()


def _file(folder: Path, name: str) -> Place:
    file = folder / f"{name}.db"
    database = connect("sqlite", f"sqlite:///{file}")

    def back_up() -> Path:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(shutil.copy(file, folder / f"{name}.backup"))

    def restore(backup: Path) -> None:
        for end in ("-wal", "-shm"):
            file.with_name(file.name + end).unlink(missing_ok=True)
        shutil.copy(backup, file)

    return Place(database, back_up, restore)


@pytest.fixture
def trade(places: list[Place]) -> Trade:
    return Trade(*places)


def recover(trade: Trade, vendor: str) -> None:
    """The action of a person at the producer, needed where the database does not tell."""
    if vendor != "postgresql":
        trade.begin_anew()


# ── the producer ────────────────────────────────────────────────────────────────────────────


def test_a_restored_producer_goes_on_at_a_consumer_that_is_ahead(trade: Trade, vendor: str) -> None:
    trade.trade(1, 2, 3)
    backup = trade.shop.back_up()
    trade.trade(4, 5, 6)
    trade.shop.restore(backup)
    recover(trade, vendor)

    trade.trade(7, 8, 9, 10)

    assert trade.taken_effect() == list(range(1, 11))
    assert trade.dead() == []
    assert trade.waiting() == []


def test_a_restored_producer_goes_on_where_messages_are_on_their_way(
    trade: Trade, vendor: str
) -> None:
    trade.trade(1, 2)
    on_the_way = trade.publish(3, 4)
    backup = trade.shop.back_up()
    trade.shop.restore(backup)
    recover(trade, vendor)
    new = trade.publish(5, 6)

    if vendor == "postgresql":  # recognized by itself, a new epoch awaits the one before
        for message in (*reversed(new), *reversed(on_the_way)):
            trade.consumer.deliver(message)
    else:
        for message in (*on_the_way, *new):
            trade.consumer.deliver(message)
    trade.consumer.work()

    assert trade.taken_effect() == [1, 2, 3, 4, 5, 6]
    assert trade.dead() == []


def test_a_message_of_a_lost_transaction_becomes_a_dead_letter(trade: Trade, vendor: str) -> None:
    trade.trade(1)
    backup = trade.shop.back_up()
    lost, undone = trade.publish(2, 3)
    assert lost.position is not None
    trade.consumer.deliver(undone)
    trade.shop.restore(backup)
    if vendor != "postgresql":
        with trade.shop.database.engine.begin() as connection:
            trade.producer.eda.ordering.sequences.begin_epoch(connection, awaited=True)

    trade.trade(4, 5)
    trade.keep_house()

    assert trade.taken_effect() == [1, 4, 5]
    assert trade.dead() == ["out of sequence"]
    assert trade.waiting() == []


def test_without_a_new_epoch_numbers_are_given_twice(trade: Trade, vendor: str) -> None:
    """What the new epoch is for."""
    if vendor == "postgresql":
        trade.producer.eda.databases.dialect.tells_history = False
    trade.trade(1)
    backup = trade.shop.back_up()
    trade.trade(2, 3)
    trade.shop.restore(backup)

    trade.trade(4, 5)

    assert trade.taken_effect() == [1, 2, 3]
    assert trade.dead() == ["out of sequence"] * 2


# ── the consumer ────────────────────────────────────────────────────────────────────────────


def test_a_restored_consumer_goes_on_when_the_gap_is_skipped(trade: Trade) -> None:
    trade.trade(1, 2)
    backup = trade.bank.back_up()
    trade.trade(3, 4)
    trade.bank.restore(backup)

    trade.trade(5, 6)

    (key,) = trade.waiting()
    assert (key.awaited, key.parked, key.held) == (3, 2, None)
    assert key.gap == "numbers 3 to 4"
    trade.skip_gaps()
    trade.trade(7)
    assert trade.taken_effect() == [1, 2, 5, 6, 7]
    assert trade.waiting() == []
    assert trade.dead() == []


def test_a_restored_consumer_goes_on_when_its_producer_begins_anew(trade: Trade) -> None:
    trade.trade(1, 2)
    backup = trade.bank.back_up()
    trade.trade(3, 4)
    trade.bank.restore(backup)
    trade.trade(5)
    lost, six = trade.publish(6, 7)
    trade.consumer.deliver(six)
    trade.begin_anew()

    trade.trade(8, 9)
    for _ in range(3):  # one gap each: 3 to 4, then 6
        trade.keep_house()

    assert trade.taken_effect() == [1, 2, 5, 7, 8, 9]
    assert trade.waiting() == []
    assert trade.dead() == []
    trade.consumer.deliver(lost)
    assert trade.dead() == ["out of sequence"]


def test_a_restored_consumer_goes_on_at_once_when_nothing_is_parked(trade: Trade) -> None:
    trade.trade(1, 2)
    backup = trade.bank.back_up()
    trade.trade(3, 4)
    trade.bank.restore(backup)
    trade.begin_anew()

    trade.trade(5, 6)

    assert trade.taken_effect() == [1, 2, 5, 6]


# ── both ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", ["shop", "bank"])
def test_both_restored_from_backups_of_different_times_go_on(
    trade: Trade, vendor: str, ahead: str
) -> None:
    trade.trade(1, 2)
    backups = {"shop": trade.shop.back_up(), "bank": trade.bank.back_up()}
    trade.trade(3, 4)
    backups[ahead] = getattr(trade, ahead).back_up()
    trade.trade(5, 6)
    for name, backup in backups.items():
        getattr(trade, name).restore(backup)
    recover(trade, vendor)

    trade.trade(7, 8)

    if vendor == "postgresql" and ahead == "shop":  # the bank waits for 3 and 4, which are lost
        assert [key.awaited for key in trade.waiting()] == [3]
        trade.skip_gaps()
    reached = 4 if ahead == "bank" else 2
    assert trade.taken_effect() == [*range(1, reached + 1), 7, 8]
    assert trade.dead() == []
    assert trade.waiting() == []


def test_a_service_that_publishes_to_itself_goes_on(places: list[Place], vendor: str) -> None:
    trade = Trade(places[0], places[0])
    trade.trade(1, 2)
    (on_the_way,) = trade.publish(3)
    backup = trade.shop.back_up()
    trade.consumer.deliver(on_the_way)  # and is acknowledged: it will not come again
    trade.trade(4)
    trade.shop.restore(backup)
    recover(trade, vendor)

    trade.trade(5, 6)

    if vendor == "postgresql":
        assert [key.gap for key in trade.waiting()] != []
        trade.skip_gaps()
    assert trade.taken_effect() == [1, 2, 5, 6]
    assert trade.waiting() == []


# ── recognized by itself ────────────────────────────────────────────────────────────────────


@pytest.fixture
def copied(postgresql: PostgreSQL, postgresql_url: str) -> Iterator[tuple[Engine, Engine]]:
    """A database with the tables of a service, and the engine for its copy."""
    postgresql.start()
    name = make_url(postgresql_url).database
    engine = create_engine(postgresql_url)
    copy = create_engine(make_url(postgresql_url).set(database=f"{name}_copy"))
    yield engine, copy
    for each in (engine, copy):
        each.dispose()
    with create_engine(postgresql.url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f'DROP DATABASE IF EXISTS "{name}_copy" WITH (FORCE)')


def test_a_dump_restored_into_another_database_is_recognized(
    copied: tuple[Engine, Engine], postgresql: PostgreSQL
) -> None:
    engine, copy = copied
    slot = Slot(connect("postgresql", engine.url.render_as_string(False)))
    upgrade.upgrade(engine, slot.database.tables)
    first = published(slot)
    slot.engine.dispose()
    engine.dispose()
    with create_engine(postgresql.url, isolation_level="AUTOCOMMIT").connect() as connection:
        names = (copy.url.database, engine.url.database)
        connection.exec_driver_sql('CREATE DATABASE "{}" TEMPLATE "{}"'.format(*names))

    restored = Slot(connect("postgresql", copy.url.render_as_string(False)))
    again = published(restored)

    assert again.position.epoch > first.position.epoch
    assert again.position.previous == (first.position.epoch, 1)
    restored.engine.dispose()


def test_tables_that_were_made_anew_are_recognized(postgresql_url: str) -> None:
    slot = Slot(connect("postgresql", postgresql_url))
    upgrade.upgrade(slot.engine, slot.database.tables)
    first = published(slot)
    with slot.engine.begin() as connection:
        connection.execute(text("CREATE TABLE copy AS TABLE eda_sequences"))
        slot.database.tables.sequences.drop(connection)
        slot.database.tables.sequences.create(connection)
        connection.execute(text("INSERT INTO eda_sequences SELECT * FROM copy"))

    again = published(slot)

    assert again.position.previous == (first.position.epoch, 1)
    slot.engine.dispose()


def test_a_restart_is_no_restore(servers: tuple[PostgreSQL, PostgreSQL]) -> None:
    slot = Slot(connect("postgresql", servers[0].database("restarted")))
    upgrade.upgrade(slot.engine, slot.database.tables)
    first = published(slot)
    slot.engine.dispose()
    servers[0].kill()
    servers[0].start()

    again = published(slot)

    assert (again.position.epoch, again.position.number) == (first.position.epoch, 2)
    slot.engine.dispose()


@pytest.mark.parametrize("allowed", [True, False])
def test_a_role_without_special_rights_numbers_its_messages(
    postgresql_url: str, allowed: bool
) -> None:
    engine = create_engine(postgresql_url)
    slot = Slot(connect("postgresql", postgresql_url))
    upgrade.upgrade(engine, slot.database.tables)
    with engine.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS modest"))
        connection.execute(text("CREATE ROLE modest LOGIN"))
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA public TO modest"))
        connection.execute(text("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO modest"))
        if not allowed:
            revoke = "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
            connection.execute(text(revoke))
    url = make_url(postgresql_url).set(username="modest")
    modest = Slot(connect("postgresql", url.render_as_string(False)))

    messages = [published(modest), published(modest)]

    assert [each.position.number for each in messages] == [1, 2]
    with engine.begin() as connection:
        stored = connection.execute(select(slot.database.tables.sequences.c.history)).scalar()
        assert (stored is not None) == allowed
        connection.execute(delete(slot.database.tables.sequences))
        connection.execute(text("DROP OWNED BY modest"))
        connection.execute(text("DROP ROLE modest"))
    for each in (engine, slot.engine, modest.engine):
        each.dispose()


def published(slot: Slot) -> Any:
    """One message with a key, published in a transaction of its own."""
    with slot.eda.transaction():
        slot.app.send_task("trade", ("a", 1), key="a")
    (message,) = slot.sent()
    assert message.position is not None
    return message
