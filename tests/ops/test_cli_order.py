"""``celery -A … eda order``, as a person and a script use it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from sqlalchemy import select, update

from celery_eda.ops.cli import eda
from tests.support.databases import Database
from tests.support.service import made, some_of
from tests.support.worker_slot import Slot


def run(slot: Slot, *arguments: object, input: str | None = None) -> Result:
    """What ``celery -A … eda order`` does with *arguments*."""
    obj = CLIContext(app=slot.app, no_color=True, workdir=None)
    words = ["order", *(str(each) for each in arguments)]
    return CliRunner().invoke(eda, words, obj=obj, input=input)


@pytest.fixture(scope="module", params=some_of("sqlite"))
def shared_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """One database for the tests of the commands, which say the same on each."""
    with made(request.param, request) as database:
        yield database


@pytest.fixture
def charge(slot: Slot) -> Any:
    @slot.task(name="charge", key="account")
    def charge(account: str, number: int) -> None:
        if number < 0:
            raise ValueError("negative")
        slot.write(number)

    return charge


def wait_for_lost(slot: Slot, charge: Any, *accounts: str) -> None:
    """Publish messages 1 to 3 of each account, and lose the first."""
    for account in accounts:
        for number in (1, 2, 3):
            charge.delay(account, number)
        for message in slot.sent()[1:]:
            slot.deliver(message)


def test_keys_that_wait_are_listed(slot: Slot, charge: Any) -> None:
    assert run(slot, "list").exit_code == 1
    wait_for_lost(slot, charge, "a", "b")

    lines = run(slot, "list").stdout.splitlines()
    (found,) = json.loads(run(slot, "list", "--key", "b", "--json").stdout)["keys"]

    assert f"charge, key 'a' of charge from {slot.app.main}: 2 wait for number 1 since" in lines[0]
    assert len(lines) == 2
    assert (found["consumer"], found["source"]) == ("charge", slot.app.main)
    assert (found["stream"], found["key"], found["awaited"]) == ("charge", "b", 1)
    assert (found["parked"], found["blocked"], found["next"]["number"]) == (2, False, 2)
    assert run(slot, "list", "--longer-than", 60).exit_code == 1


def test_a_key_that_a_dead_letter_blocks_says_so(slot: Slot, charge: Any) -> None:
    charge.delay("a", -1)
    charge.delay("a", 2)
    slot.work()

    assert "blocked by a dead letter" in run(slot, "list").stdout
    assert run(slot, "skip-gap", "--all", "--yes").exit_code == 1
    assert slot.effects() == []


def test_a_gap_is_skipped_when_confirmed_and_audited(slot: Slot, charge: Any) -> None:
    wait_for_lost(slot, charge, "a", "b")

    assert run(slot, "skip-gap").exit_code == 2
    assert run(slot, "skip-gap", "--key", "a", "--dry-run").stdout.count("wait for number 1") == 1
    assert run(slot, "skip-gap", "--key", "a", input="n\n").exit_code == 1
    assert slot.waiting() == []
    result = run(
        slot, "skip-gap", "--key", "a", "--yes", "--json", "--why", "lost", "--actor", "me"
    )

    assert (result.exit_code, json.loads(result.stdout)) == (
        0,
        {"done": 1, "failed": 0, "errors": []},
    )
    slot.work()
    assert slot.effects() == [2, 3]
    with slot.engine.connect() as connection:
        (entry,) = connection.execute(select(slot.database.tables.audit)).all()
    assert (entry.actor, entry.action, entry.why, entry.consumer) == (
        *("me", "skip-gap", "lost", "charge"),
    )
    assert json.loads(entry.detail)["key"] == "a"
    assert entry.dead_letter is None
    assert run(slot, "skip-gap", "--key", "a", "--yes").exit_code == 1


def test_a_new_epoch_waits_for_lost_messages_only_if_told_so(slot: Slot, charge: Any) -> None:
    def previous() -> list[int]:
        charge.delay("a", 1)
        (message,) = slot.sent()
        return list(message.headers["eda_order"][5:])

    previous()

    assert run(slot, "new-epoch", "--awaited", "--yes").exit_code == 0
    assert previous()[1] == 1
    assert run(slot, "new-epoch", "--yes").exit_code == 0
    assert previous() == [0, 0]


def test_the_log_warns_once_of_keys_that_wait_for_long(
    slot: Slot, charge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_lost(slot, charge, "a")
    housekeeping = slot.eda.outbox.housekeeping
    with caplog.at_level(logging.WARNING):
        housekeeping.finish()
        assert "keys have waited" not in caplog.text

        parked = slot.database.tables.parked
        with slot.engine.begin() as connection:
            long_ago = slot.database.dialect.later(-601)
            connection.execute(update(parked).values(created_at=long_ago))
        housekeeping.finish()
        housekeeping.finish()

    assert (
        caplog.text.count("have waited for more than 600 s for missing messages (1 keys, e.g. ")
        == 1
    )
    assert f"charge, key 'a' of charge from {slot.app.main} for number 1" in caplog.text
    assert "eda order skip-gap" in caplog.text
