"""``celery -A … eda projections``, as a person and a script use it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from sqlalchemy import Column, MetaData, String, Table, insert, select

from celery_eda import EDA
from celery_eda.core.identity import Identity
from celery_eda.databases import upgrade
from celery_eda.inbox.store import InboxStore
from celery_eda.ops.cli import eda as commands

COPIES = Table(
    "copies", MetaData(), Column("id", String(20), primary_key=True), Column("s", String(50))
)
ROWS = [("7", "placed paid"), ("8", "placed paid")]


@pytest.fixture
def eda(tmp_path: Path) -> EDA:
    """A service that has emitted events of two orders, and has handled none of them."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'service.db'}", eda_send_after_commit=False
    )
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    COPIES.create(eda.databases.engine)

    @eda.projection("order.*", table=COPIES, name="copy")
    def copy(row: Any, event: Any) -> Any:
        if event.data == "broken":
            raise ValueError("broken")
        return {"s": " ".join([*(row["s"].split() if row else ()), event.type[6:]])}

    for key in (7, 8):
        for name in ("order.placed", "order.paid", "stock.taken"):
            eda.emit(name, {"order": key}, key=key)
    return eda


def run(eda: EDA, *arguments: str, log: str | None = None) -> Result:
    context = CLIContext(app=eda.service.app, no_color=True, workdir=None)
    return CliRunner().invoke(commands, arguments, input=log, obj=context, catch_exceptions=False)


def projections(eda: EDA, *arguments: str, log: str | None = None) -> Result:
    return run(eda, "projections", *arguments, log=log)


def rows(eda: EDA, table: Table | None = None) -> list[tuple[Any, ...]]:
    query = select(COPIES if table is None else table)
    with eda.databases.engine.connect() as connection:
        return sorted(tuple(row) for row in connection.execute(query))


def shadow(eda: EDA) -> list[tuple[Any, ...]]:
    return rows(eda, eda.events.projections.known["copy"].shadow)


def test_a_shadow_is_made_of_the_own_store_and_compared(eda: EDA) -> None:
    made = projections(eda, "rebuild", "copy", "--json")
    compared = projections(eda, "compare", "copy", "--json")

    assert made.exit_code == 0
    assert json.loads(made.stdout) == {"events": 4, "shadow": "copies_shadow"}
    assert shadow(eda) == ROWS
    assert compared.exit_code == 1
    assert json.loads(compared.stdout) == {
        "missing": 2,
        "extra": 0,
        "changed": 0,
        "examples": ["7", "8"],
        "behind": ["7", "8"],
    }
    assert "2 missing" in projections(eda, "compare", "copy").stdout


def test_it_is_made_of_what_another_service_exports(eda: EDA) -> None:
    log = run(eda, "events", "export").stdout
    elsewhere = eda.events.store.table
    with eda.databases.engine.begin() as connection:
        connection.execute(elsewhere.delete())

    made = projections(eda, "rebuild", "copy", "--from", "-", log=log)
    again = projections(eda, "rebuild", "copy", "--from", "-", "--json", log=log)

    assert made.exit_code == 0, made.stderr
    assert "copies_shadow is built from 6 events." in made.stdout
    assert json.loads(again.stdout)["events"] == 6, "and passed over"
    assert shadow(eda) == ROWS


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{}", "Line 1 of the log is not an event: this is not an event"),
        ("{", "Line 1 of the log is not an event"),
        ('{"specversion": "1.0"}', "lacks attributes"),
    ],
)
def test_a_log_that_is_none_is_refused(eda: EDA, line: str, why: str) -> None:
    refused = projections(eda, "rebuild", "copy", "--from", "-", log=line)

    assert refused.exit_code == 1
    assert why in refused.stderr


def test_a_log_without_its_beginning_is_refused(eda: EDA) -> None:
    log = run(eda, "events", "export", "--after", "1").stdout

    refused = projections(eda, "rebuild", "copy", "--from", "-", log=log)

    assert refused.exit_code == 1
    assert "Events of order.7 are missing" in refused.stderr


def test_at_a_time_it_is_as_it_was_then(eda: EDA) -> None:
    tomorrow = (datetime.now() + timedelta(days=1)).strftime("%Y-%m-%d")
    log = run(eda, "events", "export").stdout

    early = projections(eda, "rebuild", "copy", "--at", "2020-01-01", "--from", "-", log=log)
    assert early.exit_code == 0
    assert shadow(eda) == []
    late = projections(eda, "rebuild", "copy", "--at", tomorrow)
    assert late.exit_code == 0
    assert shadow(eda) == ROWS
    swap = projections(eda, "swap", "copy", "--yes")
    assert swap.exit_code == 1
    assert "in the past" in swap.stderr
    follow = projections(eda, "rebuild", "copy")
    assert follow.exit_code == 1
    assert "Its shadow is frozen. Add --anew" in follow.stderr
    assert projections(eda, "rebuild", "copy", "--anew").exit_code == 0
    untimed = json.dumps({**json.loads(log.splitlines()[0]), "recordedtime": None})
    options = ("--at", tomorrow, "--anew", "--from", "-")
    refused = projections(eda, "rebuild", "copy", *options, log=untimed)
    assert "does not say when it was recorded" in refused.stderr


def test_an_event_that_it_fails_with_is_named_and_can_be_skipped(eda: EDA) -> None:
    broken = eda.emit("order.paid", "broken", key=7)

    failed = projections(eda, "rebuild", "copy")
    assert failed.exit_code == 1
    assert f"copy fails with order.paid {broken.id} of order.7" in failed.stderr
    skipped = projections(eda, "rebuild", "copy", "--skip", str(broken.id))

    assert skipped.exit_code == 0
    assert shadow(eda) == ROWS


def test_a_swap_lets_the_live_table_say_what_the_shadow_says(eda: EDA) -> None:
    with eda.databases.engine.begin() as connection:  # as if the live one had handled all, wrongly
        connection.execute(insert(COPIES).values(id="7", s="wrong"))
    assert projections(eda, "rebuild", "copy").exit_code == 0
    cursors = eda.databases.tables.cursors
    with eda.databases.engine.begin() as connection:
        known = connection.execute(select(cursors)).mappings().all()
        connection.execute(insert(cursors), [{**row, "consumer": "copy"} for row in known])

    swapped = projections(eda, "swap", "copy", "--yes", "--json")

    assert swapped.exit_code == 0, swapped.stderr
    assert json.loads(swapped.stdout)["changed"] == 1
    assert rows(eda) == ROWS
    assert projections(eda, "compare", "copy").exit_code == 1
    assert "no shadow" in projections(eda, "swap", "copy", "--yes").stderr


def test_a_swap_before_the_live_one_has_come_so_far_is_refused(eda: EDA) -> None:
    projections(eda, "rebuild", "copy")

    refused = projections(eda, "swap", "copy", "--yes")

    assert refused.exit_code == 1
    assert "not handled the same events, e.g. of 7, 8" in refused.stderr
    assert rows(eda) == []


def test_a_shadow_is_dropped(eda: EDA) -> None:
    projections(eda, "rebuild", "copy")

    assert "copies_shadow is dropped." in projections(eda, "discard", "copy", "--yes").stdout
    assert projections(eda, "compare", "copy").exit_code == 1


def test_the_list_tells_how_far_each_is_behind(eda: EDA) -> None:
    (fresh,) = json.loads(projections(eda, "list", "--json").stdout)
    assert (fresh["newest"], fresh["lag_seconds"]) == (None, 0.0)
    with eda.databases.engine.begin() as connection:
        inbox = InboxStore(eda.databases.tables.inbox, eda.databases.dialect)
        inbox.admit(connection, "copy", identity := Identity.fresh())
        inbox.record(connection, "copy", identity)
    projections(eda, "rebuild", "copy")

    (found,) = json.loads(projections(eda, "list", "--json").stdout)

    assert datetime.now(timezone.utc) - datetime.fromisoformat(found["newest"]) < timedelta(hours=1)
    assert found["queue"] == "eda.on.shop.copy"
    assert (found["waiting"], found["parked"], found["shadow"]) == (0, 0, "following")
    assert "0 waiting, 0 parked, 0.0 s behind, its shadow is following" in (
        projections(eda, "list").stdout
    )


def test_what_is_no_projection_is_refused(eda: EDA) -> None:
    refused = projections(eda, "rebuild", "nothing")

    assert refused.exit_code == 1
    assert "no projection nothing; there are: copy." in refused.stderr
