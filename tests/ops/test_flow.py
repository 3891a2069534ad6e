"""What the code says of events: read, drawn, and described for others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from pydantic import BaseModel
from sqlalchemy import Column, MetaData, String, Table

from celery_eda import EDA, Event
from celery_eda.ops.asyncapi import schema
from celery_eda.ops.cli import eda as commands
from celery_eda.ops.diagrams.flow import Flow, graph
from celery_eda.ops.diagrams.graph import Edge, Graph, Node

app = Celery("shop", broker="memory://", set_as_current=False)
app.conf.update(eda_database_url="sqlite://")
eda = EDA(app)


@dataclass
class Placed:
    """Data of an event."""

    total: int
    lines: list[dict[str, float]]
    at: datetime | None = None
    kind: Literal["new", "old"] = "new"
    tags: set[str] = field(default_factory=set)
    anything: Any = None


class Paid(BaseModel):
    """Data of another one."""

    amount: int


eda.event("order.placed")(Placed)
eda.event("order.paid")(Paid)


@eda.task(name="shop.charge")
def charge(total: int, *, late: bool = False) -> None:
    eda.emit("order.late" if late else "order.paid", {"amount": total})


@eda.on("order.*", name="shop.take")
def take(event: Event) -> None:
    charge.delay(event.data.total)
    app.send_task("elsewhere.do")
    eda.emit(f"stock.{event.key}")


@eda.on("weather.#", name="shop.cache", every_worker=True)
def forget(event: Event) -> None: ...


@eda.projection(
    "order.placed",
    name="shop.copy",
    table=Table("copies", MetaData(), Column("id", String(9), primary_key=True)),
)
def copy(row: Any, event: Event) -> Any:
    return row


def place() -> None:
    def inner() -> None:
        eda.emit("order.counted")

    eda.emit("order.placed", Placed(1, []))
    inner()


def run(*arguments: str) -> Result:
    context = CLIContext(app=app, no_color=True, workdir=None)
    return CliRunner().invoke(commands, arguments, obj=context, catch_exceptions=False)


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Other modules of the tests share tasks with every app, in whatever order they come."""
    app.finalize()
    for name in set(app.tasks):
        if not name.startswith(("shop.", "celery")):
            del app.tasks[name]


def test_the_flow_is_read_from_the_code() -> None:
    assert json.loads(run("flow", "--format", "json").stdout) == {
        "service": "shop",
        "emits": [
            ["inner", "order.counted"],
            ["place", "order.placed"],
            ["shop.charge", "order.late"],
            ["shop.charge", "order.paid"],
            ["shop.take", "?"],
        ],
        "calls": [["shop.take", "elsewhere.do"], ["shop.take", "shop.charge"]],
        "listens": [
            ["shop.cache", "weather.#"],
            ["shop.copy", "order.placed"],
            ["shop.take", "order.*"],
        ],
    }


def test_the_parts_of_several_services_make_one_picture(tmp_path: Path) -> None:
    file = tmp_path / "weather.json"
    other = {"service": "weather", "emits": [["look", "weather.changed"]]}
    file.write_text(json.dumps({**other, "calls": [], "listens": [["look", "order.paid"]]}))

    alone, together = run("flow").stdout, run("flow", "--with", str(file)).stdout

    assert '(["weather.#"])' in alone, "nobody here emits it"
    assert '(["weather.changed"])' in together
    assert "weather.#" not in together
    assert 'subgraph g1["shop"]' in together
    assert 'subgraph g2["weather"]' in together
    file.write_text("{}")
    refused = run("flow", "--with", str(file))
    assert refused.exit_code == 1
    assert "not a flow" in refused.stderr


def test_the_picture_shows_every_box_and_arrow() -> None:
    flow = Flow.of(app, "shop", eda.events.subscriptions.known.values())

    mermaid = graph([flow]).to_mermaid()

    for box in ('["shop.take"]', '(["order.placed"])', '["shop.charge"]', '["place"]'):
        assert box in mermaid
    # Five emissions, two calls; the copy receives one event, the other task all four.
    assert mermaid.count("-->") == 5 + 2 + 1 + 4


def test_a_picture_has_circles_and_odd_names_and_is_none_without_boxes() -> None:
    a, b, c = Node('a "<&>', "g"), Node("b", kind="event"), Node("c")
    picture = Graph((a, b, c), (Edge(a, b, "x"), Edge(b, a), Edge(b, c), Edge(a, c), Edge(c, c)))

    mermaid = picture.to_mermaid()

    assert 'n0["a &quot;&lt;&amp;>"]' in mermaid
    assert 'n0 -->|"x"| n1' in mermaid
    assert "n2 --> n2" in mermaid
    assert Graph((), ()).to_mermaid() == "flowchart LR"


def references(plain: Any) -> Iterator[str]:
    if isinstance(plain, dict):
        if "$ref" in plain:
            yield plain["$ref"]
        for each in plain.values():
            yield from references(each)
    elif isinstance(plain, list):
        for each in plain:
            yield from references(each)


def test_the_asyncapi_document_tells_what_is_sent_and_received() -> None:
    document = json.loads(run("asyncapi", "--version", "7").stdout)

    assert document["asyncapi"] == "3.0.0"
    assert document["info"] == {"title": "shop", "version": "7"}
    operations = {name: each["action"] for name, each in document["operations"].items()}
    assert operations == {
        **dict.fromkeys(("receive.shop.copy", "receive.shop.take"), "receive"),
        **dict.fromkeys(
            (f"send.order.{each}" for each in ("counted", "late", "paid", "placed")), "send"
        ),
    }
    messages = document["channels"]["eda.on.shop.shop.copy"]["messages"]
    assert messages == {"order.placed": {"$ref": "#/components/messages/order.placed"}}
    for reference in references(document):
        if not reference.startswith("#/$defs"):
            found = document
            for step in reference.removeprefix("#/").split("/"):
                found = found[step.replace("~1", "/").replace("~0", "~")]
    payload = document["components"]["messages"]["order.paid"]["payload"]
    event = payload["items"][0]["items"][0]["properties"]
    assert event["type"] == {"const": "order.paid"}
    assert event["data"]["properties"]["amount"]["type"] == "integer"


def test_the_schema_of_a_dataclass_has_its_types_and_what_is_required() -> None:
    assert schema(Placed) == {
        "type": "object",
        "properties": {
            "total": {"type": "integer"},
            "lines": {
                "type": "array",
                "items": {"type": "object", "additionalProperties": {"type": "number"}},
            },
            "at": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
            "kind": {"enum": ["new", "old"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "anything": {},
        },
        "required": ["total", "lines"],
    }


@pytest.mark.parametrize("command", ["flow", "asyncapi"])
def test_neither_asks_a_broker_or_a_database(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "eda_database_url", "postgresql://127.0.0.1:1/nothing")
    monkeypatch.setitem(app.conf, "broker_url", "amqp://127.0.0.1:1//")

    assert run(command).exit_code == 0
