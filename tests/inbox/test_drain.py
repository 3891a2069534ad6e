"""A message that has taken effect hands its parked successor on, to be handled at once."""

from __future__ import annotations

import pickle
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.request import create_request_cls
from sqlalchemy import insert, select

from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.inbox.drain import LONGEST, Drain, longest_drain
from celery_eda.inbox.request import ReliableRequest
from celery_eda.inbox.transient import Transient
from celery_eda.inbox.unit_of_work import UnitOfWork
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot


@pytest.fixture
def lane(slot: Slot) -> Any:
    """A task whose calls are in order per account."""

    @slot.task(name="stand", key="account", bind=True, max_retries=3)
    def stand(self: Any, session: Any, account: str, number: int, how: str = "") -> int:
        session.execute(insert(effects).values(name=account, number=number))
        if how == "retry" and self.request.retries == 0:
            raise self.retry(countdown=0)
        if how == "ignore":
            raise Ignore
        if how == "fail":
            raise ValueError(f"no {number}")
        return number

    return stand


def begun(**fields: Any) -> Drain:
    """A drain whose first message starts now."""
    drain = Drain(**fields)
    drain.start()
    return drain


def in_a_row(slot: Slot, lane: Any, *ways: str) -> list[Message]:
    """A message for each of *ways*, of which all but the first are parked."""
    for number, how in enumerate(ways, 1):
        lane.delay("a", number, how)
    messages = slot.sent()
    for each in messages[1:]:
        assert isinstance(slot.deliver(each), Ignore)
    return messages


def next_of(drain: Drain) -> Identity:
    assert drain.successor is not None
    return drain.successor.message.identity


def parked(slot: Slot) -> int:
    with slot.engine.connect() as connection:
        return len(connection.execute(select(slot.database.tables.parked)).all())


def test_the_next_message_is_handed_on_and_is_not_sent(slot: Slot, lane: Any) -> None:
    first, second, third = in_a_row(slot, lane, "", "", "")
    drain = begun()

    assert slot.deliver(first, drain=drain) is None

    assert next_of(drain) == second.identity
    assert drain.successor
    assert not drain.successor.redelivered
    assert slot.waiting() == []
    assert parked(slot) == 2
    following = drain.successor.drain
    assert slot.deliver(second, drain=following) is None
    assert next_of(following) == third.identity
    assert parked(slot) == 1


def test_without_a_drain_the_next_message_is_sent_again(slot: Slot, lane: Any) -> None:
    first, second = in_a_row(slot, lane, "", "")

    slot.deliver(first)

    assert [each.identity for each in slot.sent()] == [second.identity]


def test_what_is_handed_on_travels_to_the_main_process(slot: Slot, lane: Any) -> None:
    first, _ = in_a_row(slot, lane, "", "")
    drain = begun()
    slot.deliver(first, drain=drain)

    assert pickle.loads(pickle.dumps(drain.successor)) == drain.successor


@pytest.mark.parametrize(
    "drain", [Drain(left=0, until=monotonic() + 60), Drain(left=9, until=monotonic() - 1)]
)
def test_a_drain_that_has_gone_on_for_long_sends_the_next_message_again(
    slot: Slot, lane: Any, drain: Drain
) -> None:
    first, second = in_a_row(slot, lane, "", "")

    slot.deliver(first, drain=drain)

    assert drain.successor is None
    assert [each.identity for each in slot.sent()] == [second.identity]


def test_every_message_that_follows_shortens_the_drain() -> None:
    drain = begun(left=2)
    drain.pass_on(None, redelivered=False)  # type: ignore[arg-type]
    assert drain.successor
    rest = drain.successor.drain

    assert (rest.left, rest.until) == (1, drain.until)
    assert rest.may_go_on
    assert not Drain(left=0, until=drain.until).may_go_on


def test_a_drain_ends_long_before_the_broker_redelivers_its_first_message() -> None:
    assert longest_drain(None) == longest_drain(3600) == LONGEST
    assert longest_drain(20) == 5


def test_a_redelivered_message_sends_the_next_one_again(slot: Slot, lane: Any) -> None:
    """The broker counts deliveries: they must not add up over the messages of a drain."""
    first, second = in_a_row(slot, lane, "", "")
    drain = begun()

    slot.deliver(first, drain=drain, redelivered=True)

    assert drain.successor is None
    assert [each.identity for each in slot.sent()] == [second.identity]


@pytest.mark.parametrize("redelivered", [True, False])
def test_a_copy_hands_on_the_message_that_was_lost_with_its_worker(
    slot: Slot, lane: Any, redelivered: bool
) -> None:
    first, second, third = in_a_row(slot, lane, "", "", "")
    slot.deliver(first, drain=begun())
    slot.deliver(second, drain=begun())
    drain = begun()

    assert slot.deliver(first, drain=drain, redelivered=redelivered) is None

    assert next_of(drain) == third.identity
    assert drain.successor
    assert drain.successor.redelivered is redelivered
    assert slot.effects() == [1, 2]


def test_a_message_whose_commit_was_not_answered_hands_on_the_next_one(
    slot: Slot, lane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = in_a_row(slot, lane, "", "")
    commit = UnitOfWork.commit

    def commit_and_break(unit: UnitOfWork) -> None:
        commit(unit)
        raise Transient from ConnectionError("no answer")

    with monkeypatch.context() as broken:
        broken.setattr(UnitOfWork, "commit", commit_and_break)
        assert isinstance(slot.deliver(first, drain=begun()), Reject)
    drain = begun()
    slot.deliver(first, drain=drain)

    assert next_of(drain) == second.identity


def test_a_message_that_its_handler_gives_up_hands_on_the_next_one(slot: Slot, lane: Any) -> None:
    first, second = in_a_row(slot, lane, "ignore", "")
    drain = begun()

    assert isinstance(slot.deliver(first, drain=drain), Ignore)

    assert next_of(drain) == second.identity


def test_a_message_that_fails_hands_on_none_and_a_copy_of_it_neither(slot: Slot, lane: Any) -> None:
    first, second, _ = in_a_row(slot, lane, "", "fail", "")
    slot.deliver(first, drain=begun())
    drains = begun(), begun(), begun()

    assert isinstance(slot.deliver(second, drain=drains[0]), ValueError)
    slot.deliver(second, drain=drains[1])
    slot.deliver(first, drain=drains[2])

    assert [drain.successor for drain in drains] == [None, None, None]
    assert slot.effects() == [1]


def test_a_message_that_is_retried_hands_on_the_next_one_in_the_end(slot: Slot, lane: Any) -> None:
    first, second, third = in_a_row(slot, lane, "", "retry", "")
    slot.deliver(first, drain=begun())
    drains = begun(), begun(), begun()

    assert isinstance(slot.deliver(second, drain=drains[0]), Retry)
    (again,) = slot.sent()
    assert isinstance(slot.deliver(second, drain=drains[1]), Ignore)
    slot.deliver(again, drain=drains[2])

    assert [drain.successor for drain in drains[:2]] == [None, None]
    assert next_of(drains[2]) == third.identity
    assert parked(slot) == 1


def test_a_failed_message_that_is_skipped_sends_the_next_one_again(slot: Slot) -> None:
    @slot.task(name="skipping", key="account", when_dead="skip")
    def skipping(session: Any, account: str, number: int, how: str) -> None:
        if how == "fail":
            raise ValueError(f"no {number}")

    first, second = in_a_row(slot, skipping, "fail", "")
    drain = begun()

    assert isinstance(slot.deliver(first, drain=drain), ValueError)

    assert drain.successor is None
    assert [each.identity for each in slot.sent()] == [second.identity]


def test_what_is_handed_on_is_not_swept_up_meanwhile(slot: Slot, lane: Any) -> None:
    first, _ = in_a_row(slot, lane, "", "")
    slot.deliver(first, drain=begun())

    with slot.engine.begin() as connection:
        assert slot.eda.ordering.cursors.sweep(connection, seconds=60, limit=10) == []


def test_the_class_of_requests_that_celery_derives_for_a_task_has_our_methods(
    slot: Slot, lane: Any
) -> None:
    pool = SimpleNamespace(apply_async=None)

    derived = create_request_cls(ReliableRequest, lane, pool, "here", None, app=slot.app)

    assert derived.execute_using_pool is ReliableRequest.execute_using_pool
    assert derived.on_success is ReliableRequest.on_success
