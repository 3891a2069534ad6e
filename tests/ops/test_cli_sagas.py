"""``celery -A … eda sagas``, as a person and a script use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from sqlalchemy import select

from celery_eda import EDA
from celery_eda.databases import upgrade
from celery_eda.ops.cli import eda as commands
from celery_eda.sagas.steps import Steps


@pytest.fixture
def eda(tmp_path: Path) -> EDA:
    """A service with two sagas that have begun."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'service.db'}", eda_send_after_commit=False
    )
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)

    @eda.saga("order")
    def order(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.wait_for("approved")
        steps.pivot()
        steps.step("deliver", "delivery.deliver")

    for name in ("one", "two"):
        order.start({"n": 1}, id=name)
        order.start({"n": 2}, id=name)
    return eda


def run(eda: EDA, *arguments: str) -> Result:
    context = CLIContext(app=eda.service.app, no_color=True, workdir=None)
    words = ["sagas", *arguments]
    return CliRunner().invoke(commands, words, obj=context, catch_exceptions=False)


def answer(eda: EDA, saga: str, outcome: dict[str, Any]) -> None:
    """What the reply to the last command of a saga does."""
    steps = eda.databases.tables.saga_steps
    query = select(steps.c.request).where(steps.c.saga == saga, steps.c.request.is_not(None))
    with eda.transaction() as session:
        request: UUID = session.scalars(query.order_by(steps.c.id.desc()).limit(1)).one()
        assert eda.sagas.coordinator.receive_reply(session.connection(), request, outcome)


def state(eda: EDA, saga: str) -> str:
    return str(json.loads(run(eda, "show", saga, "--json").stdout)["state"])


def test_they_are_listed_and_shown(eda: EDA) -> None:
    listed = json.loads(run(eda, "list", "--json", "--state", "running").stdout)
    answer(eda, "one", {"result": 5})
    shown = json.loads(run(eda, "show", "one", "--json").stdout)

    assert sorted(each["id"] for each in listed) == ["one", "two"]
    assert (shown["data"], shown["state"]) == ({"n": 1, "pay": 5}, "running")
    assert [(each["place"], each["status"]) for each in shown["history"]] == [
        *(("pay", "done"), ("approved", "open")),
    ]
    assert "step pay #1: done  5" in run(eda, "show", "one").stdout
    assert "two: order v1, running" in run(eda, "list", "--name", "order").stdout
    assert run(eda, "list", "--state", "parked").exit_code == 1
    assert run(eda, "show", "three").exit_code == 1


def test_a_person_decides_and_helps_on_what_is_parked(eda: EDA) -> None:
    answer(eda, "one", {"result": 5})
    assert run(eda, "signal", "one", "approved", "--value", '"yes"').exit_code == 0
    again = run(eda, "signal", "one", "approved")
    assert again.exit_code == 1
    assert "does not wait for 'approved' any more" in again.stderr
    answer(eda, "one", {"error": eda.requests.remote_errors.to_wire(ValueError("no road"))})
    assert state(eda, "one") == "parked"
    assert run(eda, "cancel", "one", "--yes").exit_code == 1, "it has passed its pivot"

    assert run(eda, "retry-step", "one", "pay").exit_code == 1, "nothing failed there"
    assert run(eda, "retry-step", "one", "deliver").exit_code == 0
    answer(eda, "one", {"error": eda.requests.remote_errors.to_wire(ValueError("no road"))})
    assert run(eda, "resume", "one").exit_code == 0
    answer(eda, "one", {"error": eda.requests.remote_errors.to_wire(ValueError("no road"))})
    assert run(eda, "skip-step", "one", "deliver", "--yes").exit_code == 0

    assert state(eda, "one") == "completed"
    history = json.loads(run(eda, "show", "one", "--json").stdout)["history"]
    assert next(each for each in history if each["place"] == "approved")["who"]
    assert run(eda, "resume", "one").exit_code == 1


def test_a_cancelled_one_is_undone(eda: EDA) -> None:
    answer(eda, "two", {"result": 5})
    assert run(eda, "cancel", "two", "--yes").exit_code == 0
    assert state(eda, "two") == "compensating"
    answer(eda, "two", {"result": None})

    assert state(eda, "two") == "cancelled"
    assert run(eda, "signal", "two", "approved").exit_code == 1
    assert run(eda, "signal", "two", "approved", "--value", "{").exit_code == 2


def test_an_error_is_shown_without_its_secrets(eda: EDA) -> None:
    answer(
        eda, "one", {"error": eda.requests.remote_errors.to_wire(ValueError("password=hunter2"))}
    )

    shown = run(eda, "show", "one").stdout

    assert "step pay #1: failed  ValueError: password=" in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("words", "begin"),
    [
        (["order"], "flowchart LR"),
        (["order", "--version", "1"], "flowchart LR"),
    ],
)
def test_a_definition_is_drawn(eda: EDA, words: list[str], begin: str) -> None:
    assert run(eda, "draw", *words).stdout.startswith(begin)


@pytest.mark.parametrize("words", [["unknown"], ["order", "--version", "2"]])
def test_what_is_not_defined_cannot_be_drawn(eda: EDA, words: list[str]) -> None:
    told = run(eda, "draw", *words)

    assert told.exit_code == 1
    assert "its versions: " in told.stderr
