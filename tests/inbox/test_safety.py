"""Options with which a worker would lose messages have no effect, wherever they are from."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from celery_eda.errors import UnsafeSetting
from celery_eda.inbox import ReliableTask, make_safe
from celery_eda.inbox.request import ReliableRequest
from tests.support.worker_slot import Slot

UNSAFE = {
    "acks_late": False,
    "acks_on_failure": False,
    "acks_on_timeout": True,
    "reject_on_worker_lost": False,
    "retry_on_worker_lost": True,
    "Request": "celery.worker.request:Request",
}
each_option = pytest.mark.parametrize(("name", "value"), UNSAFE.items(), ids=UNSAFE)


def handle() -> None:
    """The function of all tasks here."""


class OwnRequest(ReliableRequest):
    """A request of the user's own."""


@each_option
def test_the_decorator_refuses_it(slot: Slot, name: str, value: Any) -> None:
    with pytest.raises(UnsafeSetting, match=name):
        slot.task(**{name: value})(handle)


def by_annotation(slot: Slot, name: str, value: Any) -> Any:
    slot.app.conf.task_annotations = {"annotated": {name: value}}
    task = slot.task(handle, name="annotated")
    slot.app.finalize()
    return slot.app.tasks[task.name]


def by_base(slot: Slot, name: str, value: Any) -> Any:
    base = type("Base", (ReliableTask,), {"abstract": True, name: value})
    return slot.task(handle, name="based", base=base)


def by_assignment(slot: Slot, name: str, value: Any) -> Any:
    task = slot.task(handle, name="assigned")
    setattr(task, name, value)
    return task


@each_option
@pytest.mark.parametrize("made", [by_annotation, by_base, by_assignment])
@pytest.mark.parametrize("shared_database", ["sqlite"], indirect=True)
def test_a_worker_does_without_it_and_says_so(
    slot: Slot, caplog: pytest.LogCaptureFixture, made: Any, name: str, value: Any
) -> None:
    task = made(slot, name, value)
    assert getattr(task, name) == value

    with caplog.at_level(logging.WARNING):
        make_safe(task)
        make_safe(task)

    assert getattr(task, name) == getattr(ReliableTask, name)
    assert caplog.text.count(f"{task.name} has {name}={value!r}") == 1


@pytest.mark.parametrize("shared_database", ["sqlite"], indirect=True)
def test_what_loses_no_message_stays(slot: Slot, caplog: pytest.LogCaptureFixture) -> None:
    options = {"ignore_result": True, "max_retries": 1, "rate_limit": "9/s", "Request": OwnRequest}
    slot.app.conf.task_annotations = {"*": options}
    task = slot.task(handle, name="annotated")
    slot.app.finalize()

    make_safe(slot.app.tasks[task.name])

    assert {name: getattr(task, name) for name in options} == options
    assert caplog.text == ""
