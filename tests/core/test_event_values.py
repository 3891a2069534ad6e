"""Events as values: their names and patterns, their attributes, and the shape of their data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from celery_eda.core.event import Event
from celery_eda.core.topics import checked_name, checked_pattern, matches
from celery_eda.errors import ConfigurationError, InvalidEvent
from celery_eda.events import dataclass_values
from celery_eda.events.registry import EventRegistry

EVENT = Event(
    UUID("0197e1a0-0000-7000-8000-000000000007"),
    "order.placed",
    "shop",
    datetime(2026, 5, 17, 12, 30, tzinfo=timezone.utc),
    {"total": 5},
    key="7",
    correlation_id="c",
)


@dataclass
class Placed:
    """Data of an event."""

    total: int
    currency: str


class Size(Enum):
    """A size."""

    small = "s"


class Color(str, Enum):
    """A colour."""

    red = "red"


class Stock(BaseModel):
    """A pydantic model in a dataclass."""

    count: int


@dataclass(frozen=True)
class Address:
    """A dataclass in a dataclass."""

    city: str
    country: Country | None = None


@dataclass(frozen=True)
class Country:
    """A dataclass that is defined after its use."""

    code: str


@dataclass
class Nested:
    """Data of an event with all kinds of values."""

    address: Address
    lines: list[Address] = field(default_factory=list)
    pair: tuple[Address, int] = (Address("Rome"), 1)
    many: tuple[Address, ...] = ()
    bare: tuple = ()  # type: ignore[type-arg]
    by_name: dict[str, Address] = field(default_factory=dict)
    either: Country | Address | None = None
    color: Color = Color.red
    colors: Sequence[Color] = field(default_factory=list)
    plain: dict[str, Any] = field(default_factory=dict)
    children: list[Nested] = field(default_factory=list)
    at: datetime | None = None
    price: Decimal | None = None
    count: int = field(init=False, default=7)


@dataclass
class Unresolved:
    """A dataclass with a type hint that nothing resolves."""

    id: Missing  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("pattern", "chosen", "left"),
    [
        ("order.placed", ["order.placed"], ["order.paid", "order", "order.placed.late"]),
        ("order.*", ["order.placed"], ["order", "order.placed.late", "orders.placed"]),
        ("order.#", ["order", "order.placed", "order.placed.late"], ["orders.placed"]),
        ("#.failed", ["failed", "a.failed", "a.b.failed"], ["failed.a"]),
        ("*.#.*", ["a.b", "a.b.c"], ["a"]),
        ("#", ["a", "a.b"], []),
    ],
)
def test_a_pattern_chooses_as_in_amqp(pattern: str, chosen: list[str], left: list[str]) -> None:
    assert [each for each in chosen + left if matches(pattern, each)] == chosen


@pytest.mark.parametrize("name", ["", ".", "a.", "a..b", "a b", "order.*", "ä", "a" * 256, None, 7])
def test_what_no_event_can_be_called_is_refused(name: Any) -> None:
    with pytest.raises(InvalidEvent, match="no name of an event"):
        checked_name(name)


@pytest.mark.parametrize("pattern", ["", "order.", "order.pl*", "##", "a b", None])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(InvalidEvent, match="no pattern of events"):
        checked_pattern(pattern)


def test_an_event_has_the_attributes_of_cloudevents_and_is_made_of_them_again() -> None:
    attributes = EVENT.to_cloud()

    assert attributes == {
        "specversion": "1.0",
        "id": "0197e1a0-0000-7000-8000-000000000007",
        "source": "shop",
        "type": "order.placed",
        "subject": "7",
        "time": "2026-05-17T12:30:00+00:00",
        "datacontenttype": "application/json",
        "dataversion": 1,
        "correlationid": "c",
        "data": {"total": 5},
    }
    assert Event.of_cloud(attributes) == EVENT


@pytest.mark.parametrize(
    "change",
    [{"specversion": "2.0"}, {"id": "x"}, {"type": None}, {"time": "noon"}, {"subject": 7}],
)
def test_what_is_no_event_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of whatever reads the attribute
        Event.of_cloud({**EVENT.to_cloud(), **change})


@pytest.mark.parametrize("name", ["type", "source", "subject", "correlationid", "causationid"])
@pytest.mark.parametrize("value", ["x" * 256, "a\0b"])
def test_names_of_events_that_no_column_holds_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"event"):
        Event.of_cloud({**EVENT.to_cloud(), name: value})


def test_old_data_are_brought_to_the_latest_version_step_by_step() -> None:
    types = EventRegistry()
    types.register("order.placed", Placed, version=3)
    types.upcast("order.placed", 1, lambda data: {"amount": data["total"]})
    types.upcast("order.placed", 2, lambda data: {"total": data["amount"], "currency": "EUR"})

    restored = types.restored(EVENT)

    assert (restored.data, restored.data_version) == (Placed(5, "EUR"), 3)
    assert types.to_plain("order.placed", restored.data) == {"total": 5, "currency": "EUR"}


ROME = Address("Rome", Country("it"))


@pytest.mark.parametrize(
    "data",
    [
        Nested(ROME),
        Nested(ROME, lines=[ROME, Address("Oslo")]),
        Nested(ROME, pair=(ROME, 3), many=(ROME, ROME), bare=(1, "a")),
        Nested(ROME, by_name={"home": ROME}),
        Nested(ROME, either=ROME),
        Nested(ROME, either=Country("it")),
        Nested(ROME, color=Color.red, colors=[Color.red]),
        Nested(ROME, plain={"city": "Rome"}),
        Nested(ROME, children=[Nested(ROME, children=[Nested(ROME)])]),
        Nested(ROME, at=datetime(2026, 5, 17, tzinfo=timezone.utc), price=Decimal("1.10")),
    ],
)
def test_a_dataclass_comes_back_as_it_was_with_all_that_is_in_it(data: Nested) -> None:
    types = EventRegistry()
    types.register("order.placed", Nested)

    event = replace(EVENT, data=types.to_plain("order.placed", data))

    assert types.restored(event).data == data


def test_enumerations_sets_and_models_in_a_dataclass_are_rebuilt() -> None:
    @dataclass
    class Parcel:
        size: Size
        cities: frozenset
        stock: Stock
        stocks: list

    Parcel.__annotations__ |= {"cities": frozenset[str], "stock": Stock, "stocks": list[Stock]}
    plain = {"size": "s", "cities": ["Rome"], "stock": {"count": 1}, "stocks": [{"count": 2}]}

    parcel = dataclass_values.made(Parcel, plain)

    assert parcel == Parcel(Size.small, frozenset(["Rome"]), Stock(count=1), [Stock(count=2)])


@pytest.mark.parametrize("nested", [{"a": 1}, [{"a": 1}]])
def test_nested_data_whose_type_cannot_be_found_are_refused(nested: Any) -> None:
    types = EventRegistry()
    types.register("order.placed", Unresolved)

    assert types.to_plain("order.placed", {"id": 7}) == {"id": 7}
    with pytest.raises(InvalidEvent, match=r"type hints of Unresolved .* outside `if TYPE_CHECK"):
        types.restored(replace(EVENT, data={"id": nested}))


def test_data_of_a_later_version_than_this_service_knows_are_refused() -> None:
    types = EventRegistry()
    types.register("order.placed", Placed)

    with pytest.raises(InvalidEvent, match="of version 2, but this service knows only version 1"):
        types.restored(replace(EVENT, data_version=2))


@pytest.mark.parametrize("data", [{"total": 5}, [5], "5"])
def test_data_that_make_no_registered_class_are_refused(data: Any) -> None:
    types = EventRegistry()
    types.register("order.placed", Placed)

    with pytest.raises(InvalidEvent, match="Placed"):
        types.to_plain("order.placed", data)


def test_data_of_an_event_that_is_not_registered_are_left_alone() -> None:
    types = EventRegistry()

    assert types.to_plain("order.placed", {"total": 5}) == {"total": 5}
    assert types.restored(replace(EVENT, data_version=4)) == replace(EVENT, data_version=4)


def test_an_event_has_one_class_only() -> None:
    types = EventRegistry()
    types.register("order.placed", Placed)

    with pytest.raises(ConfigurationError, match="registered already, as Placed"):
        types.register("order.placed", Placed, version=2)
    with pytest.raises(ConfigurationError, match="neither a dataclass nor a pydantic model"):
        types.register("order.paid", dict)
