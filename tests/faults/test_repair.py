"""Failed messages come to a good end, by a repairer or a person, and each effect is there once."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from celery_eda.dead_letters.letter import LetterState
from tests.faults.conftest import Process, Road, expect_hits
from tests.faults.programs.tables import effects

ACCOUNTS = 12
TRADES = 4
LETTERS = 50
PLANTED = "hunter2-Zq9"

# What differs from database to database in a repair is tested in `dialects`.
pytestmark = pytest.mark.parametrize(
    "road",
    [
        *("rabbitmq-postgresql", "eda-sqlite"),
        *(
            pytest.param(each, marks=pytest.mark.soak)
            for each in ("redis-mariadb", "eda-postgresql")
        ),
    ],
    indirect=True,
)


@pytest.fixture(autouse=True)
def mending(road: Road) -> None:
    road.app = "tests.faults.programs.repair_system"


def worker(road: Road, name: str = "one", **environment: str) -> Process:
    return road.worker("-Q", "road,eda.repair.road", "-n", f"{name}@%h", **environment)


def dead_letters(road: Road, *arguments: object, **environment: str) -> Process:
    """``celery -A … eda dead-letters`` with *arguments*."""
    command = ["celery", "-A", road.app, "eda", "dead-letters", *map(str, arguments)]
    return road._run(command, None, environment)


def done(process: Process) -> Any:
    """What the command printed as JSON, after it has ended well."""
    assert process.wait() == 0, process.log.read_text()
    return json.loads(process.log.read_text().splitlines()[-1])


def publish(road: Road, code: str) -> None:
    road.run(
        f"from tests.faults.programs.repair_system import *\nwith eda.transaction():\n    {code}"
    )


def in_order(road: Road, account: int) -> list[int]:
    """The numbers of the account's trades, as they took effect."""
    query = select(effects.c.number).where(effects.c.name == f"account {account}")
    return road._all(query.order_by(effects.c.id))


def letters(road: Road, *states: LetterState) -> list[Any]:
    columns = road.tables.dead_letters.c
    query = select(columns.id).order_by(columns.id)
    if states:
        query = query.where(columns.state.in_([each.value for each in states]))
    return road._all(query)


def actions(road: Road) -> Counter[tuple[str, str]]:
    columns = road.tables.audit.c
    with road.engine.connect() as connection:
        rows = connection.execute(select(columns.actor, columns.action)).all()
    return Counter((row.actor, row.action) for row in rows)


TRADE = f"""
    for number in range(1, {TRADES + 1}):
        for account in range({ACCOUNTS}):
            trade.delay(account, "2" if (account, number) == (0, 2) else number)
""".strip()


def test_a_repairer_mends_one_account_while_the_others_go_on(road: Road) -> None:
    for name in ("one", "other"):
        worker(road, name, ROAD_REPAIRER="mends")
    road.relay()
    publish(road, TRADE)

    everything = list(range(1, TRADES + 1))
    road.until(
        lambda: all(in_order(road, each) == everything for each in range(ACCOUNTS)), "all trades"
    )
    road.settle()

    assert [in_order(road, each) for each in range(ACCOUNTS)] == [everything] * ACCOUNTS
    assert road.effects("mended") == Counter({1: 1})
    assert letters(road, LetterState.open) == []
    assert actions(road) == Counter({("road.deal.repair", "repair"): 1})


def test_a_person_mends_one_account_while_the_others_go_on(road: Road) -> None:
    for name in ("one", "other"):
        worker(road, name)
    road.relay()
    publish(road, TRADE)
    everything = list(range(1, TRADES + 1))
    road.until(
        lambda: all(in_order(road, each) == everything for each in range(1, ACCOUNTS)),
        "all trades of the others",
    )
    road.until(lambda: letters(road), "a dead letter")
    (id,) = letters(road)
    assert in_order(road, 0) == [1]

    author = ("--actor", "ada", "--why", "a text", "--json")
    done(dead_letters(road, "edit", id, "--args", "[0, 2]", *author))
    done(dead_letters(road, "redrive", "--key", "0", *author))

    road.until(lambda: len(in_order(road, 0)) == TRADES, "all trades")
    road.settle()
    assert [in_order(road, each) for each in range(ACCOUNTS)] == [everything] * ACCOUNTS
    assert actions(road) == Counter({("ada", "edit"): 1, ("ada", "redrive"): 1})


def bury_all(road: Road) -> Path:
    """Have every brittle message fail; returns the file that makes them."""
    broken = road.folder / "broken"
    broken.touch()
    worker(road)
    road.relay()
    publish(road, f"for number in range({LETTERS}): brittle.delay(number)")
    road.until(lambda: len(letters(road)) == LETTERS, "all dead letters")
    assert road.effects("brittle") == Counter()
    return broken


def test_a_redrive_killed_half_way_is_given_again_and_each_effect_is_there_once(
    road: Road,
) -> None:
    bury_all(road).unlink()
    redrive = ("redrive", "--task", "road.brittle", "--yes", "--json")

    killed = dead_letters(road, *redrive, "--rate", "20/s")
    road.until(lambda: len(letters(road, LetterState.redriven)) >= 15, "some redriven")
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = len(letters(road, LetterState.redriven))
    report = done(dead_letters(road, *redrive))

    assert 15 <= before < LETTERS
    assert report["done"] == LETTERS - before
    road.until(lambda: len(road.effects("brittle")) == LETTERS, "all effects")
    road.settle()
    assert road.effects("brittle") == Counter(range(LETTERS))
    assert actions(road).total() == LETTERS
    expect_hits(before, "letters redriven before the kill")


def test_two_redrives_at_once_send_each_message_once(road: Road) -> None:
    bury_all(road).unlink()
    redrive = ("redrive", "--task", "road.brittle", "--yes", "--json", "--rate", "25/s")

    reports = [done(each) for each in [dead_letters(road, *redrive) for _ in range(2)]]

    assert sum(each["done"] for each in reports) == LETTERS
    assert sum(each["failed"] for each in reports) == 0
    road.until(lambda: len(road.effects("brittle")) == LETTERS, "all effects")
    road.settle()
    assert road.effects("brittle") == Counter(range(LETTERS))
    expect_hits(sum(each["already"] for each in reports), "letters that the other had redriven")


def test_a_redriven_poison_is_a_dead_letter_again_and_no_more(road: Road) -> None:
    (road.folder / "broken").touch()
    worker(road)
    road.relay()
    publish(road, "brittle.delay(7)")

    for times in range(1, 4):
        road.until(lambda times=times: len(letters(road)) == times, "a dead letter")
        done(dead_letters(road, "redrive", "--all", "--json"))
    road.until(lambda: len(letters(road)) == 4, "a dead letter")
    road.settle()

    assert len(letters(road, LetterState.open)) == 1
    assert len(letters(road, LetterState.redriven)) == 3
    assert road.effects("brittle") == Counter()


def test_a_repairer_that_does_not_help_ends_and_leaves_it_to_a_person(road: Road) -> None:
    (road.folder / "broken").touch()
    worker(road, ROAD_REPAIRER="despairs")
    road.relay()
    publish(road, "brittle.delay(7)")

    road.until(lambda: actions(road)["road.brittle.repair", "leave"], "the end of the repairs")
    road.settle()

    assert actions(road) == Counter(
        {("road.brittle.repair", "repair"): 3, ("road.brittle.repair", "leave"): 1}
    )
    assert len(letters(road, LetterState.open)) == 1


def test_no_planted_secret_is_found_in_logs_or_error_fields(road: Road) -> None:
    worker(road)
    road.relay()
    publish(
        road,
        f'login.delay("ada", "{PLANTED}-1", api_key="{PLANTED}-2", url="amqp://u:{PLANTED}-3@h")',
    )
    road.until(lambda: letters(road), "a dead letter")
    (id,) = letters(road)
    listed = done(dead_letters(road, "list", "--json"))
    road.settle()

    columns = road.tables.dead_letters.c
    with road.engine.connect() as connection:
        row = connection.execute(select(columns.error, columns.traceback, columns.body)).one()
    assert PLANTED.encode() in bytes(row.body), "the message itself is kept whole"
    assert "not accepted at" in row.error
    assert road.logged("not accepted at") > 0
    for text in (row.error, row.traceback, json.dumps(listed)):
        assert PLANTED not in text
    assert road.logged(PLANTED) == 0
    assert listed["letters"][0]["id"] == id
