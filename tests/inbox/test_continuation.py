"""How a failed attempt goes on: one value for each kind of error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from celery.app.task import Context
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from celery_eda.core.delivery import Delivery
from celery_eda.core.identity import Identity
from celery_eda.databases.dialect import Dialect
from celery_eda.databases.lost_race import LostRace
from celery_eda.dead_letters.letter import Reason
from celery_eda.errors import NoNextAttempt, OutOfSequence, PublishingForbidden, Unwanted
from celery_eda.inbox.attempts import TIME_LIMIT
from celery_eda.inbox.continuation import (
    Dead,
    Done,
    NextAttempt,
    Refuse,
    Requeue,
    RunAgain,
    TryAgain,
    classify,
    lost,
)
from celery_eda.inbox.transient import Transient, TransientErrors
from tests.support.service import message


class Busy(Exception):
    """An error of a database that another transaction blocks."""


class Away(Exception):
    """An error of a database that is down."""


DATABASE = SimpleNamespace(
    is_transient=lambda error: isinstance(error, Busy),
    is_outage=lambda error: isinstance(error, Away),
)
TRANSIENT = TransientErrors(cast(Dialect, DATABASE), seconds=0)
RETRY = message("retry")


def delivery(retries: int = 0) -> Delivery:
    request = Context({"id": "its own", "retries": retries})
    return Delivery(SimpleNamespace(name="shop.pay"), request, Identity(uuid4()))


def caused_by(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [Ignore(), Reject("no", requeue=True), Transient()], ids=repr)
def test_an_exception_that_celery_understands_is_all_there_is_to_do(error: Exception) -> None:
    assert classify(delivery(), error, TRANSIENT, policy=lambda *_: 1.0) == Done()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Busy(), Busy),
        (Away(), Away),
        (caused_by(Busy(), ValueError()), ValueError),
        (Retry(exc=Busy()), Busy),
        (Reject(Away(), requeue=False), Away),
        (LostRace(), LostRace),
    ],
    ids=repr,
)
def test_a_transient_error_runs_the_delivery_again_whatever_the_policy(
    error: Exception, cause: type[Exception]
) -> None:
    continuation = classify(
        delivery(),
        error,
        TRANSIENT,
        policy=lambda *_: 1.0,
        next_attempt=RETRY,
    )

    assert isinstance(continuation, RunAgain)
    assert isinstance(continuation.cause, cause)


def test_a_retry_of_the_handlers_own_goes_before_the_policy() -> None:
    continuation = classify(
        delivery(),
        Retry(),
        TRANSIENT,
        policy=lambda *_: 1.0,
        next_attempt=RETRY,
    )

    assert continuation == NextAttempt(RETRY)


def test_a_retry_without_a_next_attempt_is_dead_and_no_policy_is_asked() -> None:
    continuation = classify(delivery(), Retry(), TRANSIENT, policy=lambda *_: 1.0)

    assert isinstance(continuation, Dead)
    assert isinstance(continuation.error, NoNextAttempt)


def test_a_policy_is_given_the_number_of_the_attempt_and_the_error() -> None:
    asked: list[Any] = []
    error = ValueError()

    continuation = classify(
        delivery(retries=2), error, TRANSIENT, policy=lambda *given: asked.append(given) or 1.0
    )

    assert isinstance(continuation, TryAgain)
    assert asked == [(3, error)]


@pytest.mark.parametrize(("retries", "reason"), [(0, Reason.failed), (1, Reason.exhausted)])
def test_an_error_without_another_attempt_is_dead(retries: int, reason: Reason) -> None:
    error = ValueError()

    assert classify(delivery(retries), error, TRANSIENT) == Dead(reason, error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Reject("no", requeue=False), Reason.rejected),
        (OutOfSequence(), Reason.out_of_sequence),
        (MaxRetriesExceededError(), Reason.failed),
        (PublishingForbidden(), Reason.failed),
    ],
    ids=repr,
)
def test_these_errors_are_dead_whatever_the_policy(error: Exception, reason: Reason) -> None:
    assert classify(delivery(), error, TRANSIENT, policy=lambda *_: 1.0) == Dead(reason, error)


def test_a_handler_out_of_memory_gets_its_message_again() -> None:
    assert classify(delivery(), MemoryError(), TRANSIENT, policy=lambda *_: 1.0) == Requeue()


def test_an_expired_message_is_refused() -> None:
    assert classify(delivery(), Unwanted("expired"), TRANSIENT) == Refuse("expired")


@pytest.mark.parametrize(
    ("cause", "reason"), [(None, Reason.lost_worker), (TIME_LIMIT, Reason.time_limit)]
)
def test_a_message_that_loses_its_workers_is_dead(cause: str | None, reason: Reason) -> None:
    assert lost(3, cause, 600.0).reason is reason
