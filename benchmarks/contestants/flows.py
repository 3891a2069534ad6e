"""Flows of five steps, each of which inserts a row: by a chain, by events, by a saga."""

from __future__ import annotations

from typing import Any

from celery import chain
from sqlalchemy import insert
from sqlalchemy.orm import Session

from benchmarks.contestants.ours import app, eda
from benchmarks.contestants.serving import serve
from celery_eda import Event
from celery_eda.sagas.steps import Steps
from tests.faults.programs.tables import effects

__all__ = ["app"]

STEPS = 5


def number_of(data: Any) -> dict[str, int]:
    return {"number": data["number"]}


def note(session: Session, number: int) -> None:
    session.execute(insert(effects).values(name="step", number=number))


@eda.task(name="flows.step")
def step(session: Session, number: int) -> None:
    """Insert a row, as an independent step."""
    note(session, number)


def listen(place: int) -> None:
    """Subscribe the step at *place* of the flow by events, which emits the next event."""

    @eda.on(f"flow.step{place}", name=f"flows.hear{place}")
    def hear(session: Session, event: Event) -> None:
        number = event.data["number"]
        note(session, number)
        if place < STEPS:
            eda.emit(f"flow.step{place + 1}", {"number": number}, key=number)


for place in range(1, STEPS + 1):
    listen(place)


@eda.saga("flow")
def flow(steps: Steps) -> None:
    for place in range(1, STEPS + 1):
        steps.step(f"step{place}", step, undo=step, give=number_of, keep=None)


def chains(count: int, first: int) -> None:
    """Begin *count* flows as chains, each in a transaction."""
    for number in range(first, first + count):
        with eda.transaction():
            chain([step.si(number) for _ in range(STEPS)]).delay()


def events(count: int, first: int) -> None:
    """Begin *count* flows by emitting their first events."""
    for number in range(first, first + count):
        with eda.transaction():
            eda.emit("flow.step1", {"number": number}, key=number)


def sagas(count: int, first: int) -> None:
    """Begin *count* flows as sagas."""
    for number in range(first, first + count):
        flow.start({"number": number})


def subscribe() -> None:
    """Declare the queues of the subscriptions."""
    with app.connection_for_write() as connection:
        eda.events.subscriptions.declare(connection.default_channel)


VERBS: dict[str, Any] = {each.__name__: each for each in (chains, events, sagas, subscribe)}

if __name__ == "__main__":
    serve(VERBS)
