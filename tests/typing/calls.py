"""Calls as a type checker sees them: each ``type: ignore`` is an error that must be found.

Checked by ``test_calls.py``; never run.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from sqlalchemy.orm import Session

from celery_eda import EDA, RetryPolicy

eda = EDA(Celery("shop"))


@eda.task
def plain(number: int, note: str = "") -> str:
    return note * number


@eda.task
def with_session(session: Session, number: int) -> int:
    return number


@eda.task(name="shop.named", max_retries=3)
def named(session: Session, number: int) -> int:
    return number


@eda.task(policy=RetryPolicy(attempts=3, on=(ConnectionError,)))
def patient(number: int) -> int:
    return number


@eda.task(bind=True, policy=lambda attempts, error: 1.5 * attempts if attempts < 3 else None)
def bound_and_patient(self: Task, number: int) -> int:
    return number


@eda.task(bind=True)
def bound(self: Task, number: int) -> int:
    return number


@eda.task(bind=True, name="shop.both")
def both(self: Task, session: Session, number: int) -> int:
    return number


@eda.task
async def asynchronous(session: Session, number: int) -> int:
    return number


@eda.task
def untyped(number):  # type: ignore[no-untyped-def]
    return number


eda.task(policy=3)  # type: ignore[call-overload]
patient.delay(7)
patient.delay("x")  # type: ignore[arg-type]
plain.delay(7)
plain.delay(7, note="x")
plain.delay("x")  # type: ignore[arg-type]
plain.delay()  # type: ignore[call-arg]
plain.delay(7, nota="x")  # type: ignore[call-arg]
plain(7).upper()
plain(7).bit_length()  # type: ignore[attr-defined]

plain.ask(7).get(timeout=2).upper()
plain.ask(7).get().bit_length()  # type: ignore[attr-defined]
plain.ask("x")  # type: ignore[arg-type]
with_session.ask(7).get().bit_length()

with_session.delay(7)
with_session.delay(number=7)
with_session.delay("x")  # type: ignore[arg-type]
with_session.delay(Session(), 7)  # type: ignore[call-arg, arg-type]

named.delay(7)
named.delay("x")  # type: ignore[arg-type]
named.si(7)
named.si("x")  # type: ignore[arg-type]

bound.delay(7)
bound.delay("x")  # type: ignore[arg-type]

both.delay(7)
both.delay("x")  # not found: Celery is untyped, so its Task is Any

asynchronous.delay(7)
asynchronous.delay("x")  # type: ignore[arg-type]


async def caller() -> int:
    return await asynchronous(7) + await with_session.ask(7)


untyped.delay(7)
untyped.delay("x")

options: dict[str, Any] = {"countdown": 60}
plain.apply_async((7,), **options)
plain.s(7) | with_session.s()
