"""Rows made of events, and the same made anew beside them, on every database."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import reduce
from itertools import islice
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import JSON, Column, Integer, MetaData, String, Table, select, update
from sqlalchemy.exc import OperationalError

from celery_eda import EDA, Event
from celery_eda.core.identity import Position
from celery_eda.databases.lost_race import LostRace
from celery_eda.errors import ConfigurationError, InvalidEvent, PublishingForbidden, RebuildError
from celery_eda.events.projections import rebuild
from celery_eda.events.projections.shadows import Shadow
from celery_eda.ordering.cursor import Turn
from tests.support.databases import Database
from tests.support.waiting import BOUND

NAMES = ("order.placed", "order.item.added", "order.noted", "order.cancelled")


class Shop:
    """A service with a copy of its own orders."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(eda_send_after_commit=False, eda_service="shop")
        self.eda = EDA(self.app, engine=database.engine)
        self.copies = Table(
            "copies",
            MetaData(),
            Column("id", Integer, primary_key=True, autoincrement=False),
            Column("state", String(50)),
            Column("items", Integer, nullable=False),
            Column("seen", JSON),
        )
        self.copy = self.eda.projection(
            "order.placed", "order.item.*", "order.cancelled", table=self.copies, name="copy"
        )(apply)

    def emit(
        self, number: int, *, keys: int = 3, seed: int = 0, names: Sequence[str] = NAMES
    ) -> None:
        choose = random.Random(seed)
        for each in range(number):
            with self.eda.transaction():
                name, key = choose.choice(names), choose.randrange(keys)
                self.eda.emit(name, {"number": each}, key=key)
                self.eda.emit("weather.changed", {"number": each}, key=key)

    def log(self) -> list[Event]:
        """Every event, as another service reads it in an export."""
        store = self.eda.events.store
        store.assign_positions(self.eda.databases.engine)
        with self.eda.databases.engine.connect() as connection:
            return [Event.of_cloud(each.to_cloud()) for each in store.read(connection, limit=10**6)]

    def handle(self, event: Event) -> None:
        """What the road does with an event in its turn."""
        cursors, place = self.eda.ordering.cursors, Position.of_event(event)
        assert place is not None
        with self.eda.databases.engine.begin() as connection:
            cursor = cursors.lock(connection, "copy", place.lane)
            assert cursor.turn_of(place) is Turn.now
            self.eda.events.rebuild.apply(connection, self.copy, event)
            cursors.go_to(connection, "copy", place, cursor)

    def handle_all(self) -> None:
        for event in self.log():
            if event.category == "order":
                self.handle(event)

    def rebuild(self, shadow: Shadow = Shadow.following) -> None:
        self.eda.events.rebuild.begin(self.copy, shadow)
        self.feed(self.log())

    def feed(self, events: list[Event], **options: Any) -> None:
        for _ in self.eda.events.rebuild.feed(self.copy, events, **options):
            pass

    def rows(self, table: Table | None = None) -> list[tuple[Any, ...]]:
        table = self.copies if table is None else table
        with self.eda.databases.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(select(table).order_by(table.c.id))]

    def shadow(self) -> list[tuple[Any, ...]]:
        return self.rows(self.copy.shadow)

    def folded(self, at: datetime | None = None) -> list[tuple[Any, ...]]:
        """The same from the log alone."""
        found = []
        for key in range(10):
            with self.eda.databases.engine.connect() as connection:
                events = [
                    each
                    for each in self.eda.events.store.stream(connection, f"order.{key}", at=at)
                    if each.type != "order.noted"
                ]
            row = reduce(self.copy, events, None)
            if row is not None:
                found.append((key, row["state"], row["items"], row["seen"]))
        return found

    def compare(self) -> rebuild.Difference:
        with self.eda.databases.engine.begin() as connection:
            return self.eda.events.rebuild.compare(connection, self.copy)

    def spoil(self) -> None:
        """Make wrong rows: one changed, one lost, one too many."""
        with self.eda.databases.engine.begin() as connection:
            connection.execute(update(self.copies).where(self.copies.c.id == 0).values(items=99))
            connection.execute(self.copies.delete().where(self.copies.c.id == 1))
            connection.execute(self.copies.insert().values(id=77, items=0))


def apply(row: Mapping[str, Any] | None, event: Event) -> Mapping[str, Any] | None:
    """Counts the items of an order, and keeps what it has seen; a cancelled one has no row."""
    if event.type == "order.cancelled":
        return None
    row = row or {"state": "unknown", "items": 0, "seen": []}
    seen = [*row["seen"], event.data["number"]]
    if event.type == "order.placed":
        return {**row, "state": "placed", "seen": seen}
    return {**row, "items": row["items"] + 1, "seen": seen}


@pytest.fixture
def shop(database: Database) -> Iterator[Shop]:
    shop = Shop(database)
    shop.copies.create(database.engine)
    yield shop
    shop.eda.events.rebuild.discard(shop.copy)
    shop.copies.drop(database.engine)


def test_a_row_is_the_fold_of_its_stream(shop: Shop) -> None:
    shop.emit(40)

    shop.handle_all()

    assert shop.rows() == shop.folded()
    assert shop.rows()


def test_a_shadow_fed_with_the_log_says_what_the_live_table_says(shop: Shop) -> None:
    shop.emit(40)
    shop.handle_all()

    shop.rebuild()

    assert shop.shadow() == shop.rows() == shop.folded()
    assert shop.compare() == rebuild.Difference(0, 0, 0, (), ())


def test_at_any_time_it_is_the_fold_of_what_was_there_by_then(shop: Shop) -> None:
    shop.emit(20)
    log = shop.log()

    for last in log[::7]:
        shop.eda.events.rebuild.begin(shop.copy, Shadow.frozen)
        shop.feed(log[: log.index(last) + 1])
        assert shop.shadow() == shop.folded(at=last.recorded)


def test_a_swap_mends_what_differs_and_leaves_no_shadow(shop: Shop) -> None:
    shop.emit(40)
    shop.handle_all()
    right = shop.rows()
    shop.spoil()
    shop.rebuild()

    difference = shop.compare()
    assert (difference.missing, difference.extra, difference.changed) == (1, 1, 1)
    assert set(difference.examples) == {0, 1, 77}
    assert shop.eda.events.rebuild.swap(shop.copy) == difference

    assert shop.rows() == right
    with pytest.raises(RebuildError, match="no shadow"):
        shop.compare()
    shop.emit(5, seed=1)
    for event in shop.log()[80:]:
        if event.category == "order":
            shop.handle(event)
    assert shop.rows() == shop.folded(), "the live one goes on"


def test_a_shadow_follows_what_happens_meanwhile_in_whatever_order_the_two_come(
    shop: Shop,
) -> None:
    shop.emit(60, keys=5)
    log = shop.log()
    orders = iter([each for each in log if each.category == "order"])
    for event in islice(orders, 10):
        shop.handle(event)
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)

    for event in islice(orders, 10):  # before the log has come that far: parked
        shop.handle(event)
    shop.feed(log[:60])  # overtakes the live one
    for event in islice(orders, 5):
        shop.handle(event)
    assert shop.compare().behind, "the live one has not handled all that the log says"
    with pytest.raises(RebuildError, match="not handled the same events"):
        shop.eda.events.rebuild.swap(shop.copy)
    shop.feed(log)
    for event in orders:
        shop.handle(event)

    assert shop.shadow() == shop.rows() == shop.folded()
    assert not shop.compare().behind
    shop.eda.events.rebuild.swap(shop.copy)


def test_what_is_not_in_the_log_yet_comes_to_the_shadow_from_the_live_one(shop: Shop) -> None:
    shop.emit(20, names=NAMES[:3])
    log = shop.log()
    for event in log:
        if event.category == "order":
            shop.handle(event)
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)

    shop.emit(20, seed=1, names=NAMES[:3])
    for event in shop.log()[len(log) :]:
        if event.category == "order":
            shop.handle(event)
    with shop.eda.databases.engine.connect() as connection:
        assert shop.eda.ordering.progress.count_parked(connection, shop.copy.follower) == 20, (
            "for what was before"
        )
    shop.feed(log)

    assert shop.shadow() == shop.rows() == shop.folded()
    with shop.eda.databases.engine.connect() as connection:
        assert shop.eda.ordering.progress.count_parked(connection, shop.copy.follower) == 0
    shop.eda.events.rebuild.swap(shop.copy)


def test_a_shadow_is_fed_and_exchanged_while_others_handle_events(shop: Shop) -> None:
    shop.spoil()  # leaves a row that nothing speaks of
    shop.emit(60, keys=6)
    log = [each for each in shop.log() if each.category == "order"]
    errors: list[BaseException] = []

    def handle(keys: set[str]) -> None:
        try:
            for event in log:
                if event.key in keys:
                    in_spite_of_losing(lambda event=event: shop.handle(event))
        except BaseException as error:
            errors.append(error)

    def exchanged() -> bool:
        try:
            return bool(shop.eda.events.rebuild.swap(shop.copy).extra)
        except RebuildError:  # the live one has not come as far as the log
            return False

    threads = [threading.Thread(target=handle, args=({str(n), str(n + 3)},)) for n in range(3)]
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)
    for thread in threads:
        thread.start()
    in_spite_of_losing(lambda: shop.feed(log[:20]))
    deadline = time.monotonic() + BOUND
    while not in_spite_of_losing(exchanged):
        assert time.monotonic() < deadline, errors
    for thread in threads:
        thread.join(BOUND)

    assert not errors
    assert shop.rows() == shop.folded()


def in_spite_of_losing(act: Callable[[], Any]) -> Any:
    """Do it again, as the road does, if the database lets it lose a race."""
    while True:
        try:
            return act()
        except (LostRace, OperationalError):
            continue


def test_nobody_handles_an_event_while_a_projection_is_exchanged(shop: Shop) -> None:
    shop.emit(6, keys=1)
    first, second, *_ = [each for each in shop.log() if each.category == "order"]
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)
    shop.handle(first)
    handling = threading.Thread(target=shop.handle, args=(second,))

    with shop.eda.databases.engine.begin() as connection:
        shop.eda.events.shadows.lock(connection, "copy")
        handling.start()
        handling.join(0.5)
        assert handling.is_alive(), "it waits for the lock"
    handling.join(60)

    assert not shop.compare().behind
    assert shop.shadow() == shop.rows()


def test_what_was_fed_already_is_passed_over(shop: Shop) -> None:
    shop.emit(40, names=NAMES[:3])  # of which none begins a row anew
    log = shop.log()
    shop.handle_all()
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)
    feeding = shop.eda.events.rebuild.feed(shop.copy, log[:30])
    assert next(feeding) == 30
    feeding.close()  # killed

    shop.feed(log)
    shop.feed(log)

    assert shop.shadow() == shop.folded()


def test_a_log_with_a_hole_is_refused(shop: Shop) -> None:
    shop.emit(10, keys=1)
    orders = [each for each in shop.log() if each.category == "order"]
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)

    with pytest.raises(RebuildError, match=r"order\.0 are missing before"):
        shop.feed([*orders[:4], *orders[5:]])
    assert shop.shadow() == []
    with pytest.raises(InvalidEvent, match="no position in the order"):
        shop.feed([replace(each, order=None) for each in orders])


def test_an_event_that_it_fails_with_stops_it_and_can_be_left_out(shop: Shop) -> None:
    shop.eda.emit("order.placed", {"number": 1}, key=1)
    broken = shop.eda.emit("order.placed", {"no number": 2}, key=1)
    shop.eda.emit("order.item.added", {"number": 3}, key=1)
    shop.eda.events.rebuild.begin(shop.copy, Shadow.following)

    with pytest.raises(RebuildError, match=f"copy fails with order.placed {broken.id} .*KeyError"):
        shop.feed(shop.log())
    shop.feed(shop.log(), skip={broken.id})

    assert [row[3] for row in shop.shadow()] == [[1, 3]]


def test_a_frozen_shadow_does_not_follow_and_is_not_exchanged(shop: Shop) -> None:
    shop.emit(10)
    shop.rebuild(Shadow.frozen)
    then = shop.shadow()

    shop.handle_all()

    assert shop.shadow() == then
    with pytest.raises(RebuildError, match="in the past"):
        shop.eda.events.rebuild.swap(shop.copy)


def test_a_shadow_is_begun_anew_in_place_of_one_that_was_left(shop: Shop) -> None:
    shop.emit(10)
    shop.rebuild(Shadow.frozen)

    shop.rebuild()
    shop.handle_all()

    assert shop.shadow() == shop.rows() == shop.folded()


def test_a_key_that_is_none_of_the_table_is_refused(shop: Shop) -> None:
    event = shop.eda.emit("order.placed", {"number": 1}, key="seven")
    (stored,) = shop.log()
    assert stored.id == event.id

    with pytest.raises(InvalidEvent, match="is not a valid int"):
        shop.handle(stored)
    with pytest.raises(InvalidEvent, match="has no key"):
        shop.copy.row_key(replace(stored, key=None))


def test_what_is_no_row_is_refused(shop: Shop) -> None:
    other = shop.eda.projection("order.#", table=copies("others"), name="other")(
        lambda row, event: "a row"  # type: ignore[arg-type, return-value]
    )
    with (
        shop.eda.databases.engine.begin() as connection,
        pytest.raises(InvalidEvent, match="gave a str"),
    ):
        other.write(connection, shop.copies, 7, None, "a row")


def test_nothing_can_be_published_from_a_projection(shop: Shop) -> None:
    charge = shop.app.signature("charge")

    def publish(row: Any, event: Event) -> Any:
        charge.delay() if event.data["number"] else shop.eda.emit("order.seen")
        return row

    loud = shop.eda.projection("order.#", table=shop.copy.shadow, name="loud")(publish)
    loud.table.create(shop.eda.databases.engine, checkfirst=True)
    for number in (0, 1):
        event = Event.of_cloud(shop.eda.emit("order.placed", {"number": number}).to_cloud())
        with (
            pytest.raises(PublishingForbidden, match="The projection loud publishes"),
            shop.eda.databases.engine.begin() as connection,
        ):
            shop.eda.events.rebuild.apply(connection, loud, replace(event, key="7"))
    assert [each.type for each in shop.log()] == ["order.placed"] * 2


def copies(name: str, *keys: str) -> Table:
    return Table(name, MetaData(), *(Column(key, Integer, primary_key=True) for key in keys or "i"))


def test_what_is_no_projection_is_refused(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="primary key of one column"):
        shop.eda.projection("order.#", table=copies("pairs", "a", "b"), name="pair")(apply)
    with pytest.raises(ConfigurationError, match="the same table"):
        shop.eda.projection("order.#", table=copies("copies"), name="second")(apply)
    with pytest.raises(ConfigurationError, match="in order"):
        shop.eda.projection("#", table=copies("all"), name="all")(apply)
    with pytest.raises(ConfigurationError, match="too long for a projection"):
        shop.eda.projection("order.#", table=copies("long"), name="n" * 250)(apply)
