"""``celery -A … eda dead-letters`` and ``eda order``, as a person and a script use them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from sqlalchemy import select, update

from celery_eda.ops.cli import eda
from tests.support.databases import Database
from tests.support.service import made, some_of
from tests.support.worker_slot import Slot

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eevil\r\nline\ud800\0 <b>"


def run(slot: Slot, *arguments: object, input: str | None = None) -> Result:
    """What ``celery -A … eda`` does with *arguments*."""
    obj = CLIContext(app=slot.app, no_color=True, workdir=None)
    return CliRunner().invoke(eda, [str(each) for each in arguments], obj=obj, input=input)


def letters(slot: Slot, *arguments: object, input: str | None = None) -> Result:
    return run(slot, "dead-letters", *arguments, input=input)


@pytest.fixture(scope="module", params=some_of("sqlite"))
def shared_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """One database for the tests of the commands, which say the same on each."""
    with made(request.param, request) as database:
        yield database


@pytest.fixture
def charge(slot: Slot) -> Any:
    """A task whose calls fail unless their number is whole."""

    @slot.task(name="charge", key="account")
    def charge(account: str | None, number: Any, note: str = "") -> None:
        if not isinstance(number, int):
            raise ValueError(f"no number: {number}")
        slot.write(number)

    return charge


@pytest.fixture
def ship(slot: Slot) -> Any:
    @slot.task(name="ship")
    def ship(number: int) -> None:
        raise KeyError(number)

    return ship


def buried(slot: Slot, task: Any, *calls: Sequence[Any], **options: Any) -> list[int]:
    """Have *calls* of *task* fail; returns the ids of their letters."""
    before = {row.id for row in slot.dead()}
    for call in calls:
        task.apply_async(call, **options)
    slot.work()
    return sorted({row.id for row in slot.dead()} - before)


def states(slot: Slot) -> dict[int, str]:
    return {row.id: row.state for row in slot.dead()}


def audited(slot: Slot) -> list[tuple[str, str, str, int]]:
    columns = slot.database.tables.audit.c
    query = select(columns.actor, columns.action, columns.why, columns.dead_letter)
    with slot.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(columns.id))]


# ── list and show ───────────────────────────────────────────────────────────────────────────


def test_nothing_to_list_is_exit_code_1(slot: Slot) -> None:
    assert letters(slot, "list").exit_code == 1
    result = letters(slot, "list", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"total": 0, "letters": []})


def test_a_list_shows_each_letter_on_a_line(slot: Slot, charge: Any, ship: Any) -> None:
    one, other = *buried(slot, charge, ("a", "x")), *buried(slot, ship, (7,))

    result = letters(slot, "list")

    first, second = result.stdout.splitlines()
    assert result.exit_code == 0
    for part in (str(one), "open", "failed", "charge", "key=a", "ValueError no number: x"):
        assert part in first
    assert f"{other}" in second
    assert "KeyError 7" in second


@pytest.mark.parametrize(
    "filter",
    [
        ("--task", "ship"),
        ("--queue", "docks"),
        ("--error", "KeyError"),
        ("--reason", "failed", "--task", "ship"),
        ("--state", "all", "--task", "ship"),
        ("--since", "2020-01-01", "--error", "KeyError"),
    ],
)
def test_filters_narrow_the_list(slot: Slot, charge: Any, ship: Any, filter: tuple[str]) -> None:
    buried(slot, charge, ("a", "x"))
    (id,) = buried(slot, ship, (7,), queue="docks")

    result = letters(slot, "list", "--json", *filter)

    found = json.loads(result.stdout)
    assert (found["total"], [each["id"] for each in found["letters"]]) == (1, [id])


def test_the_key_and_the_time_are_filters_too(slot: Slot, charge: Any) -> None:
    one, other = buried(slot, charge, ("a", "x"), ("b", "y"))
    table = slot.database.tables.dead_letters
    with slot.engine.begin() as connection:
        then = datetime(2020, 1, 1, 12, tzinfo=timezone.utc)
        connection.execute(update(table).where(table.c.id == other).values(at=then))

    def found(*filter: str) -> list[int]:
        result = json.loads(letters(slot, "list", "--json", *filter).stdout)
        return [each["id"] for each in result["letters"]]

    assert found("--key", "a") == [one]
    assert found("--until", "2021-01-01") == [other]
    assert found("--since", "2020-01-01T12:00:00+0000", "--until", "2020-01-01T12:00:01+0000") == [
        other
    ]
    assert found("--since", "2021-01-01") == [one]


def test_a_list_is_read_page_by_page(slot: Slot, ship: Any) -> None:
    ids = buried(slot, ship, *[(n,) for n in range(5)])

    page = json.loads(letters(slot, "list", "--json", "--limit", 2, "--after", ids[1]).stdout)

    assert page["total"] == 5
    assert [each["id"] for each in page["letters"]] == ids[2:4]


def test_show_prints_the_whole_letter_and_its_history(slot: Slot, charge: Any) -> None:
    (first,) = buried(slot, charge, ("a", "x"))
    letters(slot, "redrive", first, "--why", "again", "--actor", "ada")
    slot.work()
    (second,) = [id for id, state in states(slot).items() if state == "open"]

    result = letters(slot, "show", second)
    data = json.loads(letters(slot, "show", second, "--json").stdout)

    for part in (
        "ValueError: no number: x",
        "in charge",
        "['a', 'x']",
        "again",
        "ada",
        "header id",
    ):
        assert part in result.stdout
    assert (data["args"], data["kwargs"], data["revision"]) == (["a", "x"], {}, 1)
    assert data["headers"]["eda_order"][2] == "a"
    assert [each.get("action") for each in data["history"]] == [None, "redrive"]


def test_show_of_no_letter_is_exit_code_1(slot: Slot) -> None:
    assert letters(slot, "show", 7).exit_code == 1
    assert letters(slot, "show", 0).exit_code == 2
    assert letters(slot, "show", 2**80).exit_code == 2


def test_nothing_that_a_letter_holds_reaches_the_terminal_as_a_command(slot: Slot) -> None:
    @slot.task(name="evil")
    def evil(text: str, **more: str) -> None:
        raise ValueError(text)

    evil.delay(HOSTILE, more=HOSTILE)
    (message,) = slot.sent()
    slot.deliver(message)
    (row,) = slot.dead()

    for command in (("list",), ("show", row.id), ("list", "--json"), ("show", row.id, "--json")):
        result = letters(slot, *command)
        assert result.exit_code == 0, result.output
        assert all(each.isprintable() or each == "\n" for each in result.output)
    assert "\\x1b[31mred" in letters(slot, "show", row.id).stdout


def test_a_body_that_cannot_be_read_is_shown_as_it_is(slot: Slot, ship: Any) -> None:
    (id,) = buried(slot, ship, (7,))
    table = slot.database.tables.dead_letters
    with slot.engine.begin() as connection:
        connection.execute(update(table).values(body=b"\xff\x00[["))

    assert "\\xff\\x00[[" in letters(slot, "show", id).stdout
    assert json.loads(letters(slot, "show", id, "--json").stdout)["body"] == "\xff\x00[["


# ── edit ────────────────────────────────────────────────────────────────────────────────────


def test_a_person_mends_a_message_and_its_key_goes_on_in_order(slot: Slot, charge: Any) -> None:
    (id,) = buried(slot, charge, ("a", 1), ("a", "2"), ("a", 3), ("a", 4), ("b", 5))
    assert slot.effects() == [1, 5]

    edited = letters(slot, "edit", id, "--args", '["a", 2]', "--why", "typo", "--actor", "ada")
    redriven = letters(slot, "redrive", "--key", "a", "--actor", "ada")
    slot.work()

    assert (edited.exit_code, redriven.exit_code) == (0, 0), edited.output + redriven.output
    assert slot.effects() == [1, 2, 3, 4, 5]
    assert audited(slot) == [("ada", "edit", "typo", id), ("ada", "redrive", "", id)]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--args", "[7"),
        ("--args", "{}"),
        ("--kwargs", "[]"),
        ("--args", "[" * 100_000),
        ("--kwargs", '"x"'),
    ],
    ids=["none", "no JSON", "no array", "no object", "deep", "text"],
)
def test_wrong_arguments_are_exit_code_2(slot: Slot, ship: Any, arguments: Any) -> None:
    (id,) = buried(slot, ship, (7,))

    assert letters(slot, "edit", id, *arguments).exit_code == 2


def test_an_edit_on_trial_changes_nothing(slot: Slot, ship: Any) -> None:
    (id,) = buried(slot, ship, (7,))
    before = slot.dead()

    result = letters(slot, "edit", id, "--args", "[8]", "--dry-run")

    assert result.exit_code == 0
    assert result.stdout.startswith("[[8], {}, ")
    assert slot.dead() == before


def test_an_edit_of_what_is_closed_or_not_there_is_exit_code_1(slot: Slot, ship: Any) -> None:
    (id,) = buried(slot, ship, (7,))
    letters(slot, "discard", id)

    for number, trial in ((id, []), (10**9, []), (id, ["--dry-run"]), (10**9, ["--dry-run"])):
        assert letters(slot, "edit", number, "--args", "[8]", *trial).exit_code == 1


# ── redrive, skip, discard ──────────────────────────────────────────────────────────────────


def test_a_redrive_twice_is_harmless_and_says_so(slot: Slot, ship: Any) -> None:
    (id,) = buried(slot, ship, (7,))

    first = letters(slot, "redrive", id, "--json")
    second = letters(slot, "redrive", id, "--json")

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert json.loads(first.stdout)["done"] == 1
    assert {name: json.loads(second.stdout)[name] for name in ("done", "already", "failed")} == {
        "done": 0,
        "already": 1,
        "failed": 0,
    }
    assert slot.waiting() == ["ship"]


@pytest.mark.parametrize("verb", ["redrive", "skip", "discard"])
def test_nothing_is_done_to_letters_that_nobody_asked_for(slot: Slot, ship: Any, verb: str) -> None:
    (id,) = buried(slot, ship, (7,))

    assert letters(slot, verb).exit_code == 2
    assert letters(slot, verb, "--task", "other").exit_code == 1
    assert letters(slot, verb, id, "--task", "other").exit_code == 1
    assert letters(slot, verb, 10**9).exit_code == 1
    assert states(slot) == {id: "open"}


@pytest.mark.parametrize(("verb", "state"), [("redrive", "redriven"), ("discard", "discarded")])
def test_more_than_one_is_confirmed(slot: Slot, ship: Any, verb: str, state: str) -> None:
    ids = buried(slot, ship, (1,), (2,), (3,))

    assert letters(slot, verb, "--all", input="n\n").exit_code == 1
    assert letters(slot, verb, "--all", input="").exit_code == 1
    assert set(states(slot).values()) == {"open"}
    assert letters(slot, verb, *ids[:2], input="y\n").exit_code == 0
    assert letters(slot, verb, "--all", "--yes").exit_code == 0
    assert set(states(slot).values()) == {state}


def test_a_trial_shows_what_would_be_done_and_does_nothing(slot: Slot, ship: Any) -> None:
    ids = buried(slot, ship, (1,), (2,), (3,))

    result = letters(slot, "redrive", "--all", "--limit", 2, "--dry-run", "--json")

    assert result.exit_code == 0
    assert [each["id"] for each in json.loads(result.stdout)["letters"]] == ids[:2]
    assert set(states(slot).values()) == {"open"}
    assert slot.waiting() == []


def test_a_limit_leaves_the_rest(slot: Slot, ship: Any) -> None:
    ids = buried(slot, ship, (1,), (2,), (3,))
    letters(slot, "redrive", "--all", "--limit", 2, "--yes")

    assert [states(slot)[id] for id in ids] == ["redriven", "redriven", "open"]


@pytest.mark.parametrize(("rate", "least"), [("10/s", 0.2), ("600/m", 0.2), ("5", 0.4)])
def test_a_rate_is_kept(slot: Slot, ship: Any, rate: str, least: float) -> None:
    buried(slot, ship, (1,), (2,), (3,))
    begun = time.monotonic()
    letters(slot, "redrive", "--all", "--yes", "--rate", rate)

    assert time.monotonic() - begun >= least
    assert set(states(slot).values()) == {"redriven"}


@pytest.mark.parametrize("rate", ["0/s", "-1", "fast", "1/y", "", "nan", "1e9"])
def test_a_rate_that_is_none_is_exit_code_2(slot: Slot, rate: str) -> None:
    assert letters(slot, "redrive", "--all", "--rate", rate).exit_code == 2


def test_a_refusal_is_exit_code_1_and_the_others_are_treated(
    slot: Slot, charge: Any, ship: Any
) -> None:
    (held,), (free,) = buried(slot, charge, ("a", "x")), buried(slot, ship, (7,))

    result = letters(slot, "discard", held, free, "--yes", "--why", "old", "--actor", "ada")

    assert result.exit_code == 1
    assert "Skip it instead" in result.stderr
    assert states(slot) == {held: "open", free: "discarded"}
    assert audited(slot) == [("ada", "discard", "old", free)]


def test_a_skip_lets_the_key_go_on(slot: Slot, charge: Any) -> None:
    (id,) = buried(slot, charge, ("a", "x"), ("a", 2))

    assert letters(slot, "skip", id).exit_code == 0
    slot.work()

    assert slot.effects() == [2]
    assert states(slot) == {id: "skipped"}


def test_letters_that_were_let_past_go_out_of_order_when_asked(slot: Slot) -> None:
    @slot.task(name="trade", key="account", when_dead="skip")
    def trade(account: str, number: int) -> None:
        raise ValueError(number)

    (id,) = buried(slot, trade, ("a", 1))

    assert letters(slot, "redrive", id).exit_code == 1
    assert letters(slot, "redrive", id, "--out-of-order").exit_code == 0
    assert slot.waiting() == ["trade"]


def test_the_author_is_the_user_of_the_system(
    slot: Slot, ship: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "grace")
    (id,) = buried(slot, ship, (7,))
    letters(slot, "discard", id)

    assert audited(slot) == [("grace", "discard", "", id)]


def test_a_database_that_fails_is_exit_code_1_and_no_secret_is_printed(
    slot: Slot, ship: Any
) -> None:
    (id,) = buried(slot, ship, (7,))
    audit = slot.database.tables.audit
    audit.drop(slot.engine)
    try:
        result = letters(slot, "redrive", id, "--why", "hunter2-Zq9")
    finally:
        audit.create(slot.engine)

    assert result.exit_code == 1
    assert "hunter2-Zq9" not in result.output
    assert states(slot) == {id: "open"}
    assert slot.waiting() == []


# ── order ───────────────────────────────────────────────────────────────────────────────────


def test_a_new_epoch_is_begun_when_confirmed(slot: Slot, charge: Any) -> None:
    buried(slot, charge, ("a", 1), ("b", 1))

    assert run(slot, "order", "new-epoch", input="n\n").exit_code == 1
    assert run(slot, "order", "new-epoch", "--stream", "other", "--yes").exit_code == 1
    result = run(slot, "order", "new-epoch", "--stream", "charge", "--yes", "--json")

    assert (result.exit_code, json.loads(result.stdout)) == (0, {"begun": 2})
    charge.delay("a", 2)
    (message,) = slot.sent()
    assert message.headers["eda_order"][4] == 1


def test_an_app_that_is_not_extended_is_told_so(slot: Slot) -> None:
    obj = CLIContext(app=Celery("plain"), no_color=True, workdir=None)

    result = CliRunner().invoke(eda, ["dead-letters", "list"], obj=obj)

    assert result.exit_code == 1
    assert "EDA(app)" in result.output


def test_a_time_without_zone_is_local(slot: Slot, ship: Any) -> None:
    buried(slot, ship, (7,))
    soon = (datetime.now() + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%S")

    assert letters(slot, "list", "--since", soon).exit_code == 1
    assert letters(slot, "list", "--until", soon).exit_code == 0
