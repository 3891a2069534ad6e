"""The state of a shop in plain values: rows as the driver has them, and messages that wait."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import amqp
import redis
from kombu import Connection
from kombu.transport import memory
from sqlalchemy import Engine, Table, text

from tests.parity.samples import reading
from tests.parity.samples.program import QUEUES, Shop, totals

FOLDER = Path(__file__).parent
#: Columns that the samples have and no table has any more: in the first one there was only 0.
GONE = {"eda_cursors": ("base",)}
#: Columns that the samples do not have yet; they may be empty.
NEW = {"eda_sequences": ("history",)}
#: Queues without a worker, which have messages all the same.
OTHERS = ("away",)


def create(shop: Shop) -> None:
    """Make the tables of the shop."""
    reading.create_tables(shop.eda)
    totals.create(shop.eda.databases.engine)


def all_tables(shop: Shop) -> tuple[Table, ...]:
    """Those that have rows, in which ids that are given in order come first."""
    tables = (*reading.tables_of(shop.eda), totals)
    return tuple(sorted(tables, key=lambda table: "id" not in table.c))


# ── rows ────────────────────────────────────────────────────────────────────────────────────


def rows(shop: Shop, *names: str) -> dict[str, list[Any]]:
    """The rows of all tables, or of those with these *names*."""
    tables = [each for each in all_tables(shop) if not names or each.name in names]
    found = {table.name: _dumped(shop.eda.databases.engine, table) for table in tables}
    for table, columns in NEW.items():
        for row in found.get(table, ()):
            for column in columns:
                del row[column]
    return found


def _dumped(engine: Engine, table: Table) -> list[Any]:
    order = ", ".join(column.name for column in table.primary_key.columns)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            query = text(f"SELECT row_to_json(t)::text FROM {table.name} t ORDER BY {order}")
            return [json.loads(row) for row in connection.scalars(query)]
        query = text(f"SELECT * FROM {table.name} ORDER BY {order}")
        found = connection.execute(query).mappings().all()
        return [{name: _from_driver(value) for name, value in row.items()} for row in found]


def insert(shop: Shop, dumped: dict[str, list[Any]]) -> None:
    """Insert *dumped* rows into empty tables."""
    engine = shop.eda.databases.engine
    with engine.begin() as connection:
        for name, each_row in _flat(dumped):
            if engine.dialect.name == "postgresql":
                row = f"json_populate_record(NULL::{name}, :row)"
                connection.execute(
                    text(f"INSERT INTO {name} SELECT * FROM {row}"), {"row": json.dumps(each_row)}
                )
            else:
                columns = ", ".join(f'"{column}"' for column in each_row)
                places = ", ".join(f":{column}" for column in each_row)
                values = {column: _to_driver(value) for column, value in each_row.items()}
                connection.execute(
                    text(f"INSERT INTO {name} ({columns}) VALUES ({places})"), values
                )
        if engine.dialect.name == "postgresql":
            for table in all_tables(shop):
                if "id" in table.c and table.c.id.autoincrement is True:
                    last = f"(SELECT coalesce(max(id), 0) + 1 FROM {table.name})"
                    sequence = f"pg_get_serial_sequence('{table.name}', 'id')"
                    connection.execute(text(f"SELECT setval({sequence}, {last}, false)"))


def _flat(dumped: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    for name, found in dumped.items():
        yield from ((name, row) for row in found)


def _from_driver(value: Any) -> Any:
    return {"bytes": value.decode("latin-1")} if isinstance(value, bytes) else value


def _to_driver(value: Any) -> Any:
    return value["bytes"].encode("latin-1") if isinstance(value, dict) else value


# ── messages that wait in the memory of this process ────────────────────────────────────────


def messages() -> dict[str, list[Any]]:
    """The messages in all queues; they stay there."""
    queues = memory.Channel.queues
    return {name: list(queues[name].queue) for name in (*QUEUES, *OTHERS) if name in queues}


def put(shop: Shop, waiting: dict[str, list[Any]]) -> None:
    """Put messages into their queues."""
    for queue, payloads in waiting.items():
        shop.channel.queue_declare(queue)
        for payload in payloads:
            shop.channel._put(queue, payload)


# ── both, as the samples have them ──────────────────────────────────────────────────────────


def of(shop: Shop) -> dict[str, Any]:
    """All of it, and what the rows say."""
    found = {"rows": rows(shop), "messages": messages(), "values": reading.values(shop.eda)}
    return dict(plain(found))


def plain(value: Any) -> Any:
    """A *value* as JSON knows it."""
    return json.loads(json.dumps(value))


def restore(shop: Shop, sample: dict[str, Any]) -> None:
    """Let the shop be where the *sample* was taken."""
    insert(shop, sample["rows"])
    put(shop, sample["messages"])


def load(name: str) -> Any:
    """The sample of that name."""
    sample = json.loads((FOLDER / f"{name}.json").read_text())
    for table, columns in GONE.items():
        for row in sample.get("rows", {}).get(table, ()):
            assert [row.pop(column) for column in columns] == [0] * len(columns)
    return sample


def save(name: str, sample: Any) -> None:
    """Write down a sample, a row on each line."""
    (FOLDER / f"{name}.json").write_text(_lines(sample) + "\n")


def _lines(value: Any, depth: int = 0) -> str:
    blank = " " * depth
    match value:
        case dict() if depth < 2:
            inner = (f"{json.dumps(k)}: {_lines(v, depth + 1)}" for k, v in value.items())
            return "{\n" + ",\n".join(f"{blank} {each}" for each in inner) + f"\n{blank}}}"
        case [_, *_] if depth < 3:
            return "[\n" + ",\n".join(f"{blank} {json.dumps(v)}" for v in value) + f"\n{blank}]"
    return json.dumps(value)


# ── comparing two runs ──────────────────────────────────────────────────────────────────────

_ID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:?\d\d|Z)?")
_MILLISECONDS = re.compile(r"\b0*1[6-9]\d{11}\b")
_ORIGIN = re.compile(r"gen\d+@[\w.-]+")


class Alike:
    """Makes two runs of one program alike that differ in ids, times and this machine's names.

    Ids are counted in the order in which they occur, so that they still say what belongs together.
    """

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def of(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """All *rows* so."""
        found = {}
        for name, unsorted in rows.items():
            is_in_order = not unsorted or "id" in unsorted[0]
            ordered = unsorted if is_in_order else sorted(unsorted, key=self._place_of)
            found[name] = [self._plain(_without_our_words(name, row)) for row in ordered]
        if takers := found.get("eda_takers"):  # those of both runs may have been there
            found["eda_takers"] = [{**each, "id": "<id>"} for each in takers]
        return found

    def _place_of(self, row: Any) -> str:
        """Where a *row* without such an id comes, by what is known of both runs."""
        return json.dumps(self._plain(row, known=True))

    def _plain(self, value: Any, *, known: bool = False) -> Any:
        match value:
            case dict():
                # A traceback has lines of our own code.
                return {
                    name: "<code>"
                    if name == "traceback" and each
                    else self._plain(each, known=known)
                    for name, each in value.items()
                }
            case list():
                return [self._plain(each, known=known) for each in value]
            case str():
                return self._text(value, known=known)
            case int() if _MILLISECONDS.fullmatch(str(value)):
                return "<milliseconds>"
        return value

    def _text(self, value: str, *, known: bool) -> Any:
        if value.startswith("\\x"):  # bytes of PostgreSQL
            value = bytes.fromhex(value[2:]).decode("latin-1")
        if value[:1] in ("{", "["):
            try:
                return self._plain(json.loads(value), known=known)
            except ValueError:
                pass
        value = _TIME.sub("<time>", _ORIGIN.sub("<origin>", value))
        value = _MILLISECONDS.sub("<milliseconds>", value)
        return _ID.sub(lambda found: self._counted(found[0].replace("-", ""), known), value)

    def _counted(self, id_: str, known: bool) -> str:
        if known:
            return self._ids.get(id_, "<id>")
        return self._ids.setdefault(id_, f"<id {len(self._ids)}>")


def _without_our_words(table: str, row: dict[str, Any]) -> dict[str, Any]:
    """A *row* without an error that is in words of our own, which may be put better."""
    ours = table.endswith("sagas") or row.get("reason") == "malformed"
    return {**row, "error": "<our words>"} if ours and row["error"] else row


def waiting(url: str) -> dict[str, list[Any]]:
    """Take all messages out of the queues of RabbitMQ or Redis, byte for byte."""
    return _in_redis(url) if url.startswith("redis") else _in_rabbitmq(url)


def _in_rabbitmq(url: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    with Connection(url) as connection:
        for queue in (*QUEUES, *OTHERS):
            get = partial(amqp.Channel.basic_get, connection.default_channel, queue, no_ack=True)
            found[queue] = [_sent(message) for message in iter(get, None)]
    return found


def _sent(message: amqp.Message) -> dict[str, Any]:
    body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
    info = message.delivery_info
    return {
        "route": [info["exchange"], info["routing_key"]],
        "envelope": message._serialize_properties().decode("latin-1"),
        "body": body.decode("latin-1"),
    }


def _in_redis(url: str) -> dict[str, list[Any]]:
    with redis.Redis.from_url(url) as client:
        keys = sorted(client.scan_iter(_type="list"))
        return {
            key.decode(): [_without_tag(each) for each in reversed(client.lrange(key, 0, -1))]
            for key in keys
        }


def _without_tag(payload: bytes) -> Any:
    """What kombu has written, without what each delivery has of its own."""
    message = json.loads(payload)
    assert message["properties"].pop("delivery_tag"), "acknowledged by this"
    return message
