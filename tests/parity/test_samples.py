"""What an older version has stored or sent is read to the same values, and goes on from there.

The samples are of commit 9d3097c, before the modules and many names changed; see
``samples/make_samples.py``. So a service can be upgraded with a full outbox, messages in the
broker, parked messages, open requests and sagas half done, and two versions can run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parity.samples import reading, state
from tests.parity.samples.program import Shop

MOMENTS = ("publish", "begin", "finish")
#: Where the shop has its tables; and, by the second word, whether its messages are there too.
STREETS = ("sqlite", "postgresql", "database-sqlite", "database-postgresql")

Open = Callable[..., Shop]


@pytest.fixture
def open_shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the shop of a street; its tables are new and empty."""
    shops: list[Shop] = []

    def open_shop(street: str, broker: str = "memory://") -> Shop:
        database = f"sqlite:///{tmp_path / 'shop.db'}"
        if street.endswith("postgresql"):
            database = request.getfixturevalue("postgresql_url")
        if street.startswith("database"):
            broker = f"eda+{database}"
        shops.append(Shop(broker, database))
        state.create(shops[-1])
        return shops[-1]

    yield open_shop
    for shop in shops:
        shop.close()


def assert_alike(shop: Shop, sample: Any) -> None:
    """The rows of *shop* are those of *sample*, but for ids and times."""
    now, then = (state.Alike().of(each["rows"]) for each in (state.of(shop), sample))
    for table in then:
        assert now[table] == then[table], table
    assert [table for table in now.keys() ^ then.keys() if now[table]] == []  # a new table


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("street", STREETS)
def test_stored_rows_are_read_to_the_same_values(open_shop: Open, street: str, moment: str) -> None:
    shop, sample = open_shop(street), state.load(f"{street}-{moment}")
    state.restore(shop, sample)

    read = reading.values(shop.eda)

    for kind, values in sample["values"].items():
        assert read[kind] == values, kind
    assert read.keys() == sample["values"].keys()


@pytest.mark.parametrize(
    ("street", "moment"),
    [
        ("sqlite", "publish"),
        ("sqlite", "begin"),
        ("postgresql", "publish"),
        ("database-sqlite", "begin"),
        ("database-postgresql", "begin"),
    ],
)
def test_what_was_begun_comes_to_the_same_end(open_shop: Open, street: str, moment: str) -> None:
    """Rows are sent, messages that wait are handled, sagas go on."""
    shop = open_shop(street)
    state.restore(shop, state.load(f"{street}-{moment}"))

    if moment == "publish":
        shop.begin()
        assert_alike(shop, state.load(f"{street}-begin"))
    shop.finish()

    assert_alike(shop, state.load(f"{street}-finish"))


@pytest.mark.parametrize("street", STREETS)
def test_the_same_rows_are_written_as_before(open_shop: Open, street: str) -> None:
    shop = open_shop(street)
    for moment in MOMENTS:
        getattr(shop, moment)()
        assert_alike(shop, state.load(f"{street}-{moment}"))


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_an_outbox_with_envelopes_is_sent_byte_for_byte_as_before(
    open_shop: Open, request: pytest.FixtureRequest, broker: str
) -> None:
    """Calls, retries, parts of chords, events, requests, replies, commands and wake-ups."""
    url, sample = request.getfixturevalue(f"{broker}_url"), state.load(f"{broker}-wire")
    shop = open_shop("sqlite", url)
    state.insert(shop, sample["rows"])

    shop.send()

    sent = state.waiting(url)
    for queue, messages in sample["sent"].items():
        assert sent[queue] == messages, queue
    assert sent.keys() == sample["sent"].keys()


def test_names_that_are_stored_or_travel_are_the_same(open_shop: Open) -> None:
    names, before = reading.names(open_shop("sqlite").eda), state.load("names")
    for table, columns in state.GONE.items():
        before["tables"][table] = [x for x in before["tables"][table] if x not in columns]
    for table, columns in state.NEW.items():
        names["tables"][table] = [x for x in names["tables"][table] if x not in columns]

    # Errors may be added: an older version takes one that it does not know for a RemoteError.
    assert set(before.pop("errors")) <= set(names["errors"])
    # So may steps: no other version knows of them.
    assert set(before.pop("steps")) <= set(names["steps"])
    for kind, known in before.items():
        assert state.plain(names[kind]) == known, kind
