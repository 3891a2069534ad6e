"""No delivery is acknowledged before its end is recorded, whatever fails, and wherever."""

from __future__ import annotations

import gc
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from celery import Task
from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy import func, select

import celery_eda
from celery_eda import RetryPolicy
from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.inbox.tracer import guarded
from tests.support.server_errors import codes, few_codes, server_error, statements_of
from tests.support.worker_slot import Slot

NUMBERS = itertools.count(1)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deliveries are repeated without a pause, and without a log, which takes most of the time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@dataclass
class Case:
    """A kind of delivery.

    Attributes:
        publish: sends the message whose effect is the number.
        takes_effect: True if the message takes effect in the end, False if it fails for good.
        redelivered: True if its first delivery is a redelivery.
    """

    publish: Callable[[int], Any]
    takes_effect: bool = True
    redelivered: bool = False

    def message(self, slot: Slot, number: int) -> Message:
        self.publish(number)
        (message,) = slot.sent()
        return message


def success(slot: Slot) -> Case:
    @slot.task
    def note(number: int) -> None:
        """A message of a message."""

    @slot.task
    def succeed(number: int) -> int:
        slot.write(number)
        note.delay(number)
        return number

    return Case(succeed.delay)


def failure(slot: Slot) -> Case:
    @slot.task
    def fail(number: int) -> None:
        slot.write(number)
        raise LookupError(number)

    return Case(fail.delay, takes_effect=False)


def by_policy(slot: Slot) -> Case:
    @slot.task(bind=True, policy=RetryPolicy(attempts=10, first=0))
    def flaky(self: Task, number: int) -> None:
        slot.write(number)
        if not self.request.retries:
            raise LookupError(number)

    return Case(flaky.delay)


def by_retry(slot: Slot) -> Case:
    @slot.task(bind=True)
    def again(self: Task, number: int) -> None:
        slot.write(number)
        if not self.request.retries:
            raise self.retry(countdown=0)

    return Case(again.delay)


def keyed(slot: Slot) -> Case:
    @slot.task(key="number")
    def in_turn(number: int) -> None:
        slot.write(number)

    return Case(in_turn.delay)


def request(slot: Slot) -> Case:
    @slot.task
    def answer(number: int) -> int:
        slot.write(number)
        return number

    return Case(lambda number: slot.eda.request(answer, (number,), address="durable"))


def redelivered(case: Callable[[Slot], Case]) -> Callable[[Slot], Case]:
    def as_redelivery(slot: Slot) -> Case:
        found = case(slot)
        return Case(found.publish, found.takes_effect, redelivered=True)

    as_redelivery.__name__ = f"redelivered_{case.__name__}"
    return as_redelivery


KINDS = [success, failure, by_policy, by_retry, keyed, request]
KINDS += [redelivered(each) for each in (success, failure, by_policy, keyed)]
every_case = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def is_requeued(ending: BaseException | None) -> bool:
    return isinstance(ending, Reject) and ending.requeue


def outcome(slot: Slot, message: Message) -> str | None:
    """The recorded outcome of a delivery of *message*."""
    columns = slot.database.tables.inbox.c
    its = columns.message_id == message.identity.id, columns.revision == message.identity.revision
    with slot.engine.connect() as connection:
        return connection.scalar(select(columns.outcome).where(*its))


def letters(slot: Slot, message: Message) -> int:
    columns = slot.database.tables.dead_letters.c
    its = columns.message_id == message.identity.id
    with slot.engine.connect() as connection:
        return connection.scalar(select(func.count()).where(its)) or 0


def fault_of(slot: Slot, case: Case, number: int, message: Message, ending: Any) -> str | None:
    """Deliver *message*, of which one delivery ended so, to its end; what is wrong with that end.

    None if it is as it has to be.
    """
    first = message
    for _ in range(10):
        if not is_requeued(ending) and outcome(slot, message) is None:
            return f"acknowledged without a record: {ending!r}"
        following = [each for each in slot.sent() if each.identity.id == message.identity.id]
        if following:
            (message,) = following
            ending = slot.deliver(message)
        elif is_requeued(ending):
            ending = slot.deliver(message, redelivered=True)
        else:
            break
    effects, dead = slot.effects().count(number), letters(slot, first)
    if effects + dead != 1 or (effects and not case.takes_effect):
        return f"{effects} effects and {dead} dead letters: {ending!r}"
    return None


@every_case
@pytest.mark.parametrize(
    ("tried", "lasting"),
    [
        pytest.param(few_codes, False, id="once"),
        pytest.param(few_codes, True, id="from_then_on", marks=pytest.mark.soak),
        pytest.param(codes, False, id="every_code", marks=pytest.mark.soak),
    ],
)
def test_no_refused_statement_loses_a_message(
    slot: Slot,
    kind: Callable[[Slot], Case],
    tried: Callable[[str], list[Any]],
    lasting: bool,
) -> None:
    vendor, case, faults = slot.database.vendor, kind(slot), []
    with statements_of(slot.engine) as statements:
        message = case.message(slot, next(NUMBERS))
        statements.seen.clear()
        slot.deliver(message, redelivered=case.redelivered)
        road = list(statements.seen)
        slot.sent()
        for code, refused in itertools.product(tried(vendor), range(len(road))):
            number = next(NUMBERS)
            message = case.message(slot, number)
            error = server_error(vendor, code)
            with statements.refused(error, refused, lasting=lasting):
                ending = slot.deliver(message, redelivered=case.redelivered)
            if fault := fault_of(slot, case, number, message, ending):
                faults.append((code, road[refused][:60], fault))

    assert len(road) > 3
    assert not faults


# ── an exception at any line ─────────────────────────────────────────────────────────────────────

PACKAGE = str(Path(celery_eda.__file__).parent)
# A worker gets and calls the tracer of a task among lines of its own: nothing of ours is around the
# attribute `__trace__`, and around the first lines of the tracer, up to its `try`.
_TRACE = guarded(Task(), lambda *_: None).__code__
_SOURCE, _START = inspect.getsourcelines(_TRACE)
UNGUARDED = range(_START, _START + [line.strip() for line in _SOURCE].index("try:") + 1)


class Lines:
    """Raises an error at one of the lines of the package that run inside the block.

    Attributes:
        seen: the lines that ran, each once, in their order.
    """

    def __init__(self, error: BaseException | None = None, at: tuple[str, int] | None = None):
        self.error, self.at = error, at
        self.seen: dict[tuple[str, int], None] = {}

    def __enter__(self) -> Lines:
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE) and code.co_name != "__trace__"
        return self._on_line if ours else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            if frame.f_code is _TRACE and line[1] in UNGUARDED:
                return self._on_line
            self.seen[line] = None
            if self.error and line == self.at:
                raise self.error  # Python traces no more then
        return self._on_line


def ending_of(slot: Slot, message: Message, **delivery_info: Any) -> Any:
    """How a delivery of *message* ended; one that ends its worker is redelivered by the broker.

    A Reject that leaves Celery's own lines, from the result backend, is the pool's answer to
    ``Request.on_failure``, which has the broker redeliver the message.
    """
    try:
        return slot.deliver(message, **delivery_info)
    except Reject as reject:
        return reject
    except (SystemExit, MemoryError) as error:
        return Reject(error, requeue=True)


@every_case
@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, MemoryError, SystemExit])
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("shared_database", ["sqlite"], indirect=True)
def test_no_exception_at_any_line_loses_a_message(
    slot: Slot, kind: Callable[[Slot], Case], error: type[BaseException], step: int
) -> None:
    case = kind(slot)
    slot.deliver(case.message(slot, next(NUMBERS)), redelivered=case.redelivered)
    slot.sent()
    message = case.message(slot, next(NUMBERS))
    with Lines() as road:
        slot.deliver(message, redelivered=case.redelivered)
    slot.sent()
    faults = []
    start = KINDS.index(kind) % step
    for line in list(road.seen)[start::step]:
        number = next(NUMBERS)
        message = case.message(slot, number)
        with Lines(error(), line):
            ending = ending_of(slot, message, redelivered=case.redelivered)
        assert context.current_transaction() is None
        if fault := fault_of(slot, case, number, message, ending):
            faults.append((line, fault))
        del ending
        gc.collect()  # tracebacks hold connections that were interrupted on their way to the pool

    assert len(road.seen) > 100
    assert not faults
