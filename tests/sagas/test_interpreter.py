"""Sagas in memory: what follows what, what is undone, and how each one ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, select

from celery_eda import EDA, RetryPolicy, Saga
from celery_eda.errors import ConfigurationError, SagaError, SagaTimeout
from celery_eda.sagas.steps import Steps
from celery_eda.sagas.testing import End, SagaTest


@pytest.fixture
def eda() -> EDA:
    return EDA(Celery("shop", set_as_current=False), engine=create_engine("sqlite://"))


@pytest.fixture(params=[False, True], ids=["calm", "crashing"])
def run(request: pytest.FixtureRequest, eda: EDA) -> Callable[..., SagaTest]:
    """Makes a test of a saga; once with every transition repeated, and every message twice."""

    def make(describe: Callable[[Steps], Any]) -> SagaTest:
        return SagaTest(eda.saga("saga")(describe), crashing=request.param)

    return make


def shop(steps: Steps) -> None:
    steps.step("pay", "payment.charge", undo="payment.refund", give=lambda data: {"n": data["n"]})
    with steps.parallel():
        with steps.branch():
            steps.step("make", "kitchen.make", undo="kitchen.throw_away")
        with steps.branch():
            steps.step("tell", "notification.tell")
    steps.step("deliver", "delivery.deliver", undo="delivery.fetch")


def test_steps_follow_each_other_and_what_they_give_is_kept(run: Any) -> None:
    test = run(shop)
    test.returns("pay", lambda given: given["n"] * 10)

    end = test.run({"n": 7})

    assert end.state == "completed"
    assert end.calls == ["pay", "make", "tell", "deliver"]
    assert end.data == {"n": 7, "pay": 70, "make": None, "tell": None, "deliver": None}
    assert end.given[0] == {"n": 7}
    assert end.given[1] == {"n": 7, "pay": 70}, "without a `give` it is all that is known"


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("pay", []),
        ("make", ["undo pay"]),
        ("tell", ["undo make", "undo pay"]),
        ("deliver", ["undo make", "undo pay"]),
    ],
)
def test_what_was_done_before_a_failure_is_undone_the_latest_first(
    run: Any, failing: str, undone: list[str]
) -> None:
    test = run(shop)
    test.fails(failing, ValueError("no"))

    end = test.run({"n": 7})

    assert end.state == "compensated"
    assert [call for call in end.calls if call.startswith("undo")] == undone
    assert end.error == f"{failing}: ValueError: no"


def test_a_policy_has_a_step_tried_again(run: Any) -> None:
    def describe(steps: Steps) -> None:
        policy = RetryPolicy(attempts=3, first=10, on=(ValueError,))
        steps.step("pay", "payment.charge", retry=policy)

    test = run(describe)
    test.fails("pay", ValueError(), times=2)
    assert test.run({}).state == "completed"
    other = run(describe)
    other.fails("pay", ValueError(), times=3)

    end = other.run({})

    assert (end.state, end.calls) == ("compensated", ["pay"] * 3)
    assert end.seconds >= 10


def test_what_is_late_is_undone_when_it_comes(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.step("make", "kitchen.make", undo="kitchen.throw_away", timeout=60)

    test = run(describe)
    test.is_late("make")

    end = test.run({})

    assert end.state == "compensated"
    assert end.calls == ["pay", "make", "undo pay", "undo make"]
    assert "SagaTimeout" in (end.error or "")


def test_until_what_is_late_has_come_nothing_is_said_to_be_over(eda: EDA) -> None:
    def describe(steps: Steps) -> None:
        steps.step("make", "kitchen.make", undo="kitchen.throw_away", timeout=60)

    test = SagaTest(eda.saga("saga")(describe))
    test._call = lambda *_: None  # type: ignore[method-assign]  # a worker that never answers

    end = test.run({})

    assert (end.state, end.seconds) == ("compensating", 60)


def test_a_late_failure_leaves_nothing_to_undo(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("make", "kitchen.make", undo="kitchen.throw_away", timeout=60)

    test = run(describe)
    test.is_late("make")
    test.fails("make")

    assert (end := test.run({})).state == "compensated"
    assert end.calls == ["make"]


def test_what_may_still_take_effect_is_not_tried_again(run: Any) -> None:
    def describe(steps: Steps) -> None:
        policy = RetryPolicy(attempts=3, first=1)
        steps.step("make", "kitchen.make", undo="kitchen.throw_away", timeout=60, retry=policy)

    test = run(describe)
    test.is_late("make")

    assert (end := test.run({})).state == "compensated"
    assert end.calls == ["make", "undo make"]


def told_again(test: SagaTest, place: str, outcome: Any) -> End:
    """Tell a saga once more what has come of a step, and let it go on."""
    entry = next(each for each in test.run().history if each.record.path == place)
    assert entry.request is not None
    request = entry.request
    test._do(lambda connection: test._sagas.receive_reply(connection, request, outcome))
    return test.run()


def test_a_failed_step_that_is_redriven_after_the_end_is_undone(run: Any) -> None:
    test = run(shop)
    test.fails("make")
    assert test.run({"n": 7}).state == "compensated"

    end = told_again(test, "make", {"result": None})

    assert (end.state, end.calls[-1]) == ("compensated", "undo make")


def test_an_outcome_that_comes_again_later_changes_nothing(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.step("make", "kitchen.make", undo="kitchen.throw_away")
        steps.wait_for("approved")

    test = run(describe)
    test.returns("pay", 5)
    test.run({})

    assert told_again(test, "pay", {"result": 6}).data["pay"] == 5
    test.cancels()
    assert test.run().calls[2:] == ["undo make", "undo pay"]


def test_what_cannot_be_undone_parks_the_saga_until_somebody_resumes_or_skips_it(
    run: Any,
) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.step("make", "kitchen.make", undo="kitchen.throw_away")
        steps.step("deliver", "delivery.deliver")

    test = run(describe)
    test.fails("deliver")
    test.fails("undo make", ValueError("gone"), times=2)

    end = test.run({})
    assert (end.state, end.calls[-1]) == ("parked", "undo make")
    assert end.error == "make cannot be undone: make: ValueError: gone"
    test.resumes()
    assert test.run().state == "parked"
    test.skips("make")

    assert (end := test.run()).state == "compensated"
    assert end.calls[3:] == ["undo make", "undo make", "undo pay"]


def test_after_the_pivot_there_is_no_way_back(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.pivot()
        steps.step("deliver", "delivery.deliver")
        steps.step("tell", "notification.tell")

    test = run(describe)
    test.fails("deliver", times=2)

    assert (end := test.run({})).state == "parked"
    assert "after the pivot" in (end.error or "")
    with pytest.raises(SagaError, match="has passed its pivot"):
        test._sagas.cancel(test._engine.connect(), "test", "test")
    test.resumes()
    assert test.run().state == "parked"
    test.skips("deliver")

    assert (end := test.run()).state == "completed"
    assert end.calls == ["pay", "deliver", "deliver", "tell"]


def decision(steps: Steps) -> None:
    steps.step("pay", "payment.charge", undo="payment.refund")
    steps.wait_for("approved", timeout=3600, default=False)
    with steps.when(lambda data: data["approved"]):
        steps.step("make", "kitchen.make")
    with steps.otherwise(lambda data: data.get("cheap")):
        steps.step("give", "kitchen.give")
    with steps.otherwise():
        steps.step("regret", "notification.regret")


@pytest.mark.parametrize(
    ("after", "data", "calls", "seconds"),
    [
        (600, {}, ["pay", "make"], 3600),
        (7200, {}, ["pay", "regret"], 7200),
        (7200, {"cheap": 1}, ["pay", "give"], 7200),
    ],
)
def test_a_person_decides_or_the_time_does(
    run: Any, after: float, data: Any, calls: list[str], seconds: float
) -> None:
    test = run(decision)
    if after < 3600:
        test.signals("approved", True, after=after)

    end = test.run(data)

    assert (end.state, end.calls) == ("completed", calls)


def test_a_signal_that_comes_early_is_found(run: Any) -> None:
    test = run(decision)
    test.is_late("pay")
    test.signals("approved", True)

    assert test.run({}).calls == ["pay", "make"]


def test_a_wait_without_a_default_fails_when_its_time_is_over(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.wait_for("approved", timeout=60)

    assert (end := run(describe).run({})).state == "compensated"
    assert end.calls == ["pay", "undo pay"]


def test_sleeping_takes_its_time(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.sleep("ripen", 86400)
        steps.step("serve", "kitchen.serve")

    assert (end := run(describe).run({})).state == "completed"
    assert (end.calls, end.seconds) == (["serve"], 86400)


def test_a_loop_goes_round_as_long_as_it_is_to(run: Any) -> None:
    def describe(steps: Steps) -> None:
        with steps.repeat(lambda data: data["left"] > 0, limit=5):
            steps.step("one", "kitchen.one", undo="kitchen.none", keep="left")
        steps.step("last", "kitchen.last")

    test = run(describe)
    test.returns("one", lambda given: given["left"] - 1)
    test.fails("last")
    assert (end := test.run({"left": 3})).state == "compensated"
    assert end.calls == ["one"] * 3 + ["last"] + ["undo one"] * 3
    long = run(describe)
    long.returns("one", lambda given: given["left"])

    assert (end := long.run({"left": 1})).state == "compensated"
    assert end.calls == ["one"] * 5 + ["undo one"] * 5
    assert end.error == "loop1: more than 5 rounds"


def test_a_saga_may_say_that_it_goes_no_further(run: Any) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        with steps.when(lambda data: data["n"] > 5):
            steps.fail("large", "we do not sell so much")
        steps.step("make", "kitchen.make")

    end = run(describe).run({"n": 7})

    assert (end.state, end.calls) == ("compensated", ["pay", "undo pay"])
    assert end.error == "large: we do not sell so much"
    assert run(describe).run({"n": 5}).state == "completed"


def test_a_branch_that_was_not_needed_is_not_the_reason_of_a_later_failure(run: Any) -> None:
    def describe(steps: Steps) -> None:
        with steps.parallel(need=1):
            with steps.branch():
                steps.fail("north", "closed")
            with steps.branch():
                steps.step("south", "south.book", undo="south.release")
        steps.step("go", "traveller.go")

    test = run(describe)
    test.fails("go", ValueError("late"))

    end = test.run({})

    assert (end.state, end.error) == ("compensated", "go: ValueError: late")


def quotes(steps: Steps) -> None:
    with steps.parallel(need=1):
        for who in ("north", "south"):
            with steps.branch():
                steps.step(who, f"{who}.book", undo=f"{who}.release")
                steps.step(f"{who}_sure", f"{who}.confirm")
    steps.step("go", "traveller.go")


def test_the_reason_of_a_failure_survives_a_sibling_that_needs_only_one_branch(run: Any) -> None:
    def describe(steps: Steps) -> None:
        with steps.parallel("outer"):
            with steps.branch():
                steps.fail("refused", "out of stock")
            with steps.branch(), steps.parallel("inner", need=1):
                with steps.branch(), steps.when(lambda _: False):
                    steps.step("one", "kitchen.one")
                with steps.branch():
                    steps.step("other", "kitchen.other")

    end = run(describe).run({})

    assert (end.state, end.error, end.calls) == ("compensated", "refused: out of stock", [])


def test_the_first_branch_is_enough_and_what_the_others_did_is_undone(run: Any) -> None:
    test = run(quotes)
    test.is_late("south")

    end = test.run({})

    assert end.state == "completed"
    assert end.calls == ["north", "south", "north_sure", "go", "undo south"]


def test_a_branch_that_is_done_when_another_was_taken_is_undone_too(run: Any) -> None:
    def describe(steps: Steps) -> None:
        with steps.parallel(need=1):
            for who in ("north", "south"):
                with steps.branch():
                    steps.step(who, f"{who}.book", undo=f"{who}.release")
        steps.step("go", "traveller.go")

    end = run(describe).run({})

    assert end.state == "completed"
    assert end.calls == ["north", "south", "go", "undo south"]


def test_a_branch_may_fail_if_another_is_enough(run: Any) -> None:
    test = run(quotes)
    test.fails("north_sure")

    end = test.run({})

    assert end.state == "completed"
    assert sorted(end.calls) == sorted(
        ["north", "south", "north_sure", "south_sure", "undo north", "go"]
    )


def test_a_branch_given_up_that_cannot_be_undone_parks_the_saga_until_it_can(run: Any) -> None:
    test = run(quotes)
    test.fails("north_sure")
    test.fails("undo north", ValueError("gone"))

    end = test.run({})
    assert (end.state, end.error) == ("parked", "north cannot be undone: north: ValueError: gone")
    test.resumes()

    assert (end := test.run()).state == "completed"
    assert end.calls.count("undo north") == 2
    assert end.calls.count("north_sure") == 1, "a branch that was given up is not begun anew"


def test_if_none_is_enough_all_of_it_is_undone(run: Any) -> None:
    test = run(quotes)
    test.fails("north_sure")
    test.fails("south_sure")

    end = test.run({})

    assert end.state == "compensated"
    assert sorted(end.calls)[-2:] == ["undo north", "undo south"]


@pytest.mark.parametrize("after", [0, 100])
def test_a_cancelled_saga_is_undone(run: Any, after: float) -> None:
    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.wait_for("approved")

    test = run(describe)
    test.cancels(after=after)

    end = test.run({})

    assert (end.state, end.calls) == ("cancelled", ["pay", "undo pay"])
    assert end.error == "cancelled by test"


def test_a_definition_that_fails_parks_the_saga(run: Any) -> None:
    def describe(steps: Steps) -> None:
        with steps.when(lambda data: data["missing"]):
            steps.step("never", "kitchen.never")

    end = run(describe).run({})

    assert end.state == "parked"
    assert end.error == "its definition fails: KeyError: 'missing'"


def test_the_same_id_begins_one_saga(eda: EDA) -> None:
    test = SagaTest(eda.saga("saga")(shop))
    test.run({"n": 1})

    assert test.run({"n": 2}).calls == ["pay", "make", "tell", "deliver"]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("crashing", [False, True])
def test_whatever_fails_the_end_is_honest(eda: EDA, seed: int, crashing: bool) -> None:
    """All done, or all undone, or parked with something that failed; never in between."""
    chance = random.Random(seed)

    def describe(steps: Steps) -> None:
        steps.step("a", "t.a", undo="t.a_", retry=RetryPolicy(attempts=2, first=1))
        with steps.parallel(need=chance.choice([1, 2])):
            with steps.branch():
                steps.step("b", "t.b", undo="t.b_", timeout=50)
                steps.step("c", "t.c", undo="t.c_")
            with steps.branch():
                steps.step("d", "t.d", undo="t.d_")
        with steps.repeat(lambda data: data["e"] < 2):
            steps.step("e", "t.e", undo="t.e_")
        steps.step("f", "t.f", undo="t.f_")

    test = SagaTest(eda.saga("saga")(describe), crashing=crashing)
    test.returns("e", lambda given: given["e"] + 1)
    for step in "abcdef":
        if chance.random() < 0.25:
            test.fails(step, times=chance.choice([1, 2]))
        if chance.random() < 0.1:
            test.fails(f"undo {step}")
        if chance.random() < 0.2:
            test.is_late(step)
    if chance.random() < 0.2:
        test.cancels(after=chance.choice([0, 20, 70]))

    end = test.run({"e": 0})

    while end.state == "parked":
        test.resumes()
        end = test.run()
    assert end.state in ("completed", "compensated", "cancelled")
    done = effects(end)
    undone = {place for place, count in done.items() if count == 0}
    if end.state == "completed":
        assert {"a", "e[1]", "e[2]", "f"} <= set(done) - undone
        assert "d" not in undone or "c" not in undone
    else:
        assert undone == set(done), "nothing is left"


def effects(end: End) -> dict[str, int]:
    """How often each place took effect, less how often that was undone."""
    found: dict[str, int] = {}
    for entry in end.history:
        if entry.record.status.value == "done" and entry.record.kind.value in ("step", "undo"):
            change = 1 if entry.record.kind.value == "step" else -1
            found[entry.record.path] = found.get(entry.record.path, 0) + change
    return found


def refused(eda: EDA) -> Iterator[tuple[str, Callable[[Steps], Any]]]:
    def twice(steps: Steps) -> None:
        steps.step("a", "t.a")
        steps.step("a", "t.b")

    def odd(steps: Steps) -> None:
        steps.step("a[1]", "t.a")

    def pivot(steps: Steps) -> None:
        with steps.when(lambda data: True):
            steps.pivot()

    def outside(steps: Steps) -> None:
        with steps.branch():
            steps.step("a", "t.a")

    def no_branch(steps: Steps) -> None:
        with steps.parallel():
            steps.step("a", "t.a")

    def too_many(steps: Steps) -> None:
        with steps.parallel(need=2), steps.branch():
            steps.step("a", "t.a")

    def alone(steps: Steps) -> None:
        with steps.otherwise():
            steps.step("a", "t.a")

    yield from (
        ("two parts 'a'", twice),
        ("not a valid name", odd),
        ("pivot of saga is inside", pivot),
        ("branch outside", outside),
        ("needs branches", no_branch),
        ("needs branches", too_many),
        ("without a `when`", alone),
    )


def test_a_description_that_makes_no_sense_is_refused(eda: EDA) -> None:
    for words, describe in refused(eda):
        with pytest.raises(ConfigurationError, match=words):
            eda.saga("saga")(describe)


def test_two_steps_of_one_task_cannot_be_told_apart_in_a_test(eda: EDA) -> None:
    def describe(steps: Steps) -> None:
        steps.step("north", "book")
        steps.step("south", "book")

    with pytest.raises(SagaError, match="north and south are both calls of book"):
        SagaTest(eda.saga("saga")(describe))


def test_another_saga_of_the_same_name_needs_the_next_version(eda: EDA) -> None:
    first = eda.saga("saga")(shop)
    with pytest.raises(SagaError, match="next number"):
        eda.saga("saga")(decision)

    second = eda.saga("saga", version=2)(decision)

    assert isinstance(first, Saga)
    assert sorted(eda.sagas.definitions.known["saga"]) == [1, 2]
    assert second.definition.version == 2


def test_a_timeout_is_python_s_own_too() -> None:
    assert issubclass(SagaTimeout, TimeoutError)


# ── sub-sagas ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nested(run: Any, eda: EDA) -> SagaTest:
    @eda.saga("shipping")
    def shipping(steps: Steps) -> None:
        steps.step("pack", "depot.pack", undo="depot.unpack")
        steps.step("send", "depot.send", undo="depot.call_back")

    def describe(steps: Steps) -> None:
        steps.step("pay", "payment.charge", undo="payment.refund")
        steps.saga("ship", shipping, give=lambda data: {"n": data["n"]}, timeout=600)
        steps.step("tell", "notification.tell")

    return run(describe)  # type: ignore[no-any-return]


def test_a_sub_saga_is_begun_and_waited_for(nested: SagaTest) -> None:
    nested.returns("ship/send", "parcel")

    end = nested.run({"n": 7})

    assert end.state == "completed"
    assert end.calls == ["pay", "ship/pack", "ship/send", "tell"]
    assert end.data["ship"] == {"n": 7, "pack": None, "send": "parcel"}


def test_a_sub_saga_that_fails_undoes_itself_and_then_the_rest_is_undone(nested: SagaTest) -> None:
    nested.fails("ship/send", ValueError("no van"))

    end = nested.run({"n": 7})

    assert end.state == "compensated"
    assert end.calls == ["pay", "ship/pack", "ship/send", "undo ship/pack", "undo pay"]
    assert "test/ship is compensated: send: ValueError: no van" in (end.error or "")


def test_a_sub_saga_that_was_completed_is_undone_as_a_whole(nested: SagaTest) -> None:
    nested.fails("tell")

    end = nested.run({"n": 7})

    assert end.state == "compensated"
    assert end.calls[4:] == ["undo ship/send", "undo ship/pack", "undo pay"]


def test_who_cancels_a_saga_cancels_its_sub_sagas(nested: SagaTest) -> None:
    nested.is_late("ship/send")
    nested.cancels(after=1)

    end = nested.run({"n": 7})

    assert end.state == "cancelled"
    assert end.calls[3:] == ["undo ship/pack", "undo pay", "undo ship/send"]


def test_a_sub_saga_that_takes_too_long_is_cancelled(nested: SagaTest) -> None:
    nested.is_late("ship/pack")

    end = nested.run({"n": 7})

    assert end.state == "compensated"
    assert end.calls == ["pay", "ship/pack", "undo pay", "undo ship/pack"]
    assert "SagaTimeout" in (end.error or "")


def test_a_sub_saga_behind_its_pivot_cannot_be_undone(run: Any, eda: EDA) -> None:
    @eda.saga("shipping")
    def shipping(steps: Steps) -> None:
        steps.step("send", "depot.send", undo="depot.call_back")
        steps.pivot()

    def describe(steps: Steps) -> None:
        steps.saga("ship", shipping)
        steps.step("tell", "notification.tell")

    test = run(describe)
    test.fails("tell")

    end = test.run({})

    assert end.state == "parked"
    assert end.error == "ship cannot be undone: ship: SagaError: test/ship is completed: None"
    test.skips("ship")
    assert test.run().state == "compensated"


def test_a_sub_saga_that_failed_after_the_pivot_can_be_begun_anew(run: Any, eda: EDA) -> None:
    @eda.saga("shipping")
    def shipping(steps: Steps) -> None:
        steps.step("send", "depot.send")

    def describe(steps: Steps) -> None:
        steps.pivot()
        steps.saga("ship", shipping)

    test = run(describe)
    test.fails("ship/send")
    assert test.run({}).state == "parked"

    test.resumes()

    assert test.run().state == "completed"


# ── semantic locks ──────────────────────────────────────────────────────────────────────────


def seat(steps: Steps) -> None:
    steps.lock("seat", lambda data: f"seat {data['seat']}", timeout=60)
    steps.step("book", "airline.book", undo="airline.release")


def test_a_saga_waits_for_what_another_one_has_locked(run: Any) -> None:
    test = run(seat)
    test.finds_locked("seat 7", seconds=30)

    end = test.run({"seat": 7})

    assert (end.state, end.calls, end.seconds) == ("completed", ["book"], 60)
    assert [each.record.status.value for each in end.history] == ["done", "done"]


def test_a_saga_may_fail_instead_of_waiting_on(run: Any) -> None:
    test = run(seat)
    test.finds_locked("seat 7", seconds=90)

    end = test.run({"seat": 7})

    assert (end.state, end.calls) == ("compensated", [])
    assert end.error == "seat: SagaTimeout: no outcome of seat in time"


def test_another_key_is_free(run: Any) -> None:
    test = run(seat)
    test.finds_locked("seat 8", seconds=90)

    assert test.run({"seat": 7}).state == "completed"


def test_a_saga_that_is_cancelled_while_it_waits_for_a_lock_leaves_the_line(run: Any) -> None:
    test = run(seat)
    test.finds_locked("seat 7", seconds=30)
    test.cancels(after=10)

    end = test.run({"seat": 7})

    assert (end.state, end.calls) == ("cancelled", [])
    with test._engine.connect() as connection:
        assert connection.execute(select(test._sagas.engine.locks.table)).all() == []


def test_the_parts_of_a_saga_share_its_locks(run: Any, eda: EDA) -> None:
    inner = eda.saga("inner")(seat)

    def describe(steps: Steps) -> None:
        steps.lock("mine", lambda data: f"seat {data['seat']}")
        steps.saga("inner", inner)

    assert run(describe).run({"seat": 7}).state == "completed"


def test_a_key_that_is_too_long_parks_the_saga(run: Any) -> None:
    end = run(seat).run({"seat": "x" * 300})

    assert end.state == "parked"
    assert "the key of seat is longer than 255 bytes" in (end.error or "")


def test_an_id_that_is_too_long_is_refused(eda: EDA) -> None:
    test = SagaTest(eda.saga("saga")(seat))

    with test._engine.begin() as connection, pytest.raises(SagaError, match="longer than 255"):
        test._sagas.begin(connection, test.saga.definition, "x" * 256, {})
