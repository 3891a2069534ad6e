"""A relay waits as long as there is nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from celery import Celery

from celery_eda import EDA, upgrading
from celery_eda.relay import Relay, Round

ROUNDS = 1100  # a delay that is doubled more often than that is no float any more


class Counting(Relay):
    """A relay that ends after so many rounds."""

    rounds = 0

    def send(self, ids: Sequence[int] = ()) -> Round:
        self.rounds += 1
        if self.rounds == ROUNDS:
            self.stop()
        return super().send(ids)


class Stumbling(Counting):
    """A relay with a mistake that shows once."""

    def send(self, ids: Sequence[int] = ()) -> Round:
        self.rounds += 1
        if self.rounds == 1:
            raise AttributeError("a mistake of ours")
        self.stop()
        return Round()


@pytest.fixture
def relay(tmp_path: Path) -> Relay:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'service.db'}"
    app.conf.eda_relay_poll = 0.001
    eda = EDA(app)
    upgrading.upgrade(eda.engine, eda.tables)
    return eda.relay()


def test_a_relay_outlives_whatever_goes_wrong_in_a_round(relay: Relay) -> None:
    relay.__class__ = Stumbling

    relay.run()

    assert relay.rounds == 2  # type: ignore[attr-defined]


def test_a_relay_with_nothing_to_send_goes_on_looking(relay: Relay) -> None:
    relay.__class__ = Counting

    relay.run()

    assert relay.rounds == ROUNDS
