"""The thread that sends right after the commit goes on, whatever happens to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from celery_eda.core.settings import Settings
from celery_eda.outbox import sender
from celery_eda.outbox.sender import CommitSender
from celery_eda.outbox.settlement import RelayResult
from tests.support.waiting import BOUND, eventually


class Stumbling:
    """Stands for a relay, with a mistake that shows once."""

    settings = Settings()

    def __init__(self) -> None:
        self.asked: list[int] = []

    def send(self, ids: Sequence[int]) -> RelayResult:
        self.asked += ids
        if len(self.asked) == 1:
            raise AttributeError("a mistake of ours")
        return RelayResult(confirmed=len(ids))

    def another(self) -> Any:
        """The same one: there are no connections."""
        return self

    def close(self) -> None:
        """Nothing is connected."""


def test_what_is_committed_after_a_mistake_is_sent_all_the_same() -> None:
    relay: Any = Stumbling()
    sender = CommitSender(relay)

    sender.send([1])
    eventually(lambda: relay.asked)
    sender.send([2])
    eventually(lambda: len(relay.asked) >= 2)

    assert relay.asked == [1, 2]


class Slow:
    """Stands for a relay that takes its time."""

    settings = Settings()

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.done = threading.Event()

    def send(self, ids: Sequence[int]) -> RelayResult:
        self.asked.append(list(ids))
        time.sleep(0.5)
        self.done.set()
        return RelayResult(confirmed=len(ids))

    def another(self) -> Any:
        """The same one: there are no connections."""
        return self

    def close(self) -> None:
        """Nothing is connected."""


def test_what_is_committed_while_the_sender_rests_leaves_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It rests for half a second, in which a thread that did not would take them one by one."""
    monkeypatch.setattr("celery_eda.outbox.sender.LONGEST_PAUSE", 10.0)
    relay: Any = Slow()
    sender = CommitSender(relay)

    sender.send([1])
    assert relay.done.wait(BOUND)
    for row_id in (2, 3, 4):
        sender.send([row_id])
        time.sleep(0.01)
    sender.finish()

    assert relay.asked == [[1], [2, 3, 4]]


@pytest.mark.parametrize(
    ("took", "rest"), [(0.001, 0.001), (0.004, 0.004), (0.008, 0.016), (0.012, 0.036), (0.5, 0.05)]
)
def test_the_rest_is_as_long_as_the_sending_and_longer_where_others_want_the_cores(
    took: float, rest: float
) -> None:
    assert sender.pause_after(took) == pytest.approx(rest)
