"""``celery -A … eda events``, as a person and a script use it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from sqlalchemy import select

from celery_eda import EDA
from celery_eda.databases import upgrade
from celery_eda.errors import ArchivedEvents
from celery_eda.ops.cli import eda as commands

TOMORROW = (datetime.now() + timedelta(days=1)).strftime("%Y-%m-%d")  # local time


@pytest.fixture
def eda(tmp_path: Path) -> EDA:
    """A service that has emitted six events."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'service.db'}", eda_send_after_commit=False
    )
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    for key in (7, 8):
        for name in ("order.placed", "order.paid", "stock.taken"):
            eda.emit(name, {"order": key}, key=key)
    return eda


def run(eda: EDA, *arguments: str) -> Result:
    context = CLIContext(app=eda.service.app, no_color=True, workdir=None)
    words = ["events", *arguments]
    return CliRunner().invoke(commands, words, obj=context, catch_exceptions=False)


def listed(eda: EDA, *arguments: str) -> list[Any]:
    return list(json.loads(run(eda, "list", "--json", *arguments).stdout))


@pytest.mark.parametrize(
    ("filters", "positions"),
    [
        ((), [1, 2, 3, 4, 5, 6]),
        (("--limit", "2"), [1, 2]),
        (("--after", "4"), [5, 6]),
        (("--stream", "order.8"), [4, 5]),
        (("--category", "stock"), [3, 6]),
        (("--type", "order.paid", "--type", "stock.taken", "--until", TOMORROW), [2, 3, 5, 6]),
    ],
)
def test_events_are_listed_by_their_positions(
    eda: EDA, filters: tuple[str, ...], positions: list[int]
) -> None:
    assert [each["position"] for each in listed(eda, *filters)] == positions
    assert run(eda, "list", *filters).stdout.count("\n") == len(positions)


def test_one_event_is_shown_and_all_are_exported_as_cloud_events(eda: EDA) -> None:
    every = listed(eda)

    assert json.loads(run(eda, "show", every[1]["id"]).stdout) == every[1]
    assert [json.loads(line) for line in run(eda, "export").stdout.splitlines()] == every
    assert every[1]["specversion"] == "1.0"
    assert (every[1]["type"], every[1]["subject"]) == ("order.paid", "7")


def test_replaying_puts_events_into_the_outbox_for_one_queue_at_the_places_they_had(
    eda: EDA,
) -> None:
    sent = outbox(eda)
    one_queue = ("replay", "--to", "eda.on.loyalty.count", "--stream", "order.7", "--json")

    dry = run(eda, *one_queue, "--dry-run")
    assert json.loads(dry.stdout) == {"events": 2}
    assert outbox(eda) == sent

    done = run(eda, *one_queue, "--yes")
    assert json.loads(done.stdout) == {"events": 2, "position": 2}
    again = [row for row in outbox(eda) if row.routing_key == "eda.on.loyalty.count"]
    first = [row for row in sent if row.routing_key.startswith("order") and '"7"' in row.headers]
    assert [row.exchange for row in again] == ["", ""]
    assert [row.message_id for row in again] == [row.message_id for row in first]
    assert [order(row) for row in again] == [order(row) for row in first]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "--category", "nothing"), "No event matches"),
        (("list", "--stream", "nothing"), "no stream"),
        (("show", str(uuid4())), "has emitted no event"),
        (("replay", "--to", "celery", "--yes"), "not the queue of a subscription"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_1(
    eda: EDA, arguments: tuple[str, ...], words: str
) -> None:
    result = run(eda, *arguments)

    assert result.exit_code == 1
    assert words in result.output


def outbox(eda: EDA) -> list[Any]:
    table = eda.databases.tables.outbox
    with eda.databases.engine.connect() as connection:
        return list(connection.execute(select(table).order_by(table.c.id)).all())


def order(row: Any) -> list[Any]:
    return list(json.loads(row.headers)["eda_order"])


# ── archives ────────────────────────────────────────────────────────────────────────────────


def test_an_archive_has_what_the_store_has_no_more(eda: EDA, tmp_path: Path) -> None:
    everything = run(eda, "export").stdout
    file = tmp_path / "archive.jsonl"

    done = run(eda, "archive", str(file), "--until", TOMORROW, "--yes", "--json")

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"events": 6, "deleted": 5}
    assert file.read_text() == everything
    assert [each["position"] for each in listed(eda)] == [6], "the newest stays"
    eda.emit("order.placed", key=9)
    assert [each["position"] for each in listed(eda)] == [6, 7]
    with pytest.raises(ArchivedEvents, match=r"Event 1 of order\.7 has left"):
        eda.fold("order.7", 0, lambda number, _: number + 1)


def test_only_what_is_chosen_is_archived(eda: EDA, tmp_path: Path) -> None:
    options = ("--until", TOMORROW, "--category", "stock", "--yes", "--json")
    done = run(eda, "archive", str(tmp_path / "stock"), *options)
    assert json.loads(done.stdout) == {"events": 2, "deleted": 1}

    nothing = run(eda, "archive", str(tmp_path / "no"), "--until", "2020-01-01", "--yes", "--json")
    assert (nothing.exit_code, json.loads(nothing.stdout)["events"]) == (1, 0)

    assert [each["position"] for each in listed(eda)] == [1, 2, 4, 5, 6]


def test_a_file_that_is_there_is_not_written_over(eda: EDA, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("precious")

    refused = run(eda, "archive", str(tmp_path / "old"), "--until", TOMORROW, "--yes")

    assert refused.exit_code == 1
    assert "exists. Give the name of a new file." in refused.stderr
    assert (tmp_path / "old").read_text() == "precious"


def test_what_dies_before_the_file_is_whole_deletes_nothing(
    eda: EDA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        run(eda, "archive", str(tmp_path / "archive"), "--until", TOMORROW, "--yes")
    monkeypatch.undo()

    assert not (tmp_path / "archive").exists()
    assert len(listed(eda)) == 6
