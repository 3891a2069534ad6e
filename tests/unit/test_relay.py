"""A relay waits as long as there is nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def test_a_relay_with_nothing_to_send_goes_on_looking(tmp_path: Path) -> None:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'service.db'}"
    app.conf.eda_relay_poll = 0.001
    eda = EDA(app)
    upgrading.upgrade(eda.engine, eda.tables)
    relay = eda.relay()
    relay.__class__ = Counting

    relay.run()

    assert relay.rounds == ROUNDS
