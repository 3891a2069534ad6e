"""The thinnest whole road: committed orders take effect once, undone ones never."""

from __future__ import annotations

from collections import Counter

from tests.faults.conftest import Road


def test_committed_messages_take_effect_once_and_undone_ones_never(road: Road) -> None:
    road.worker()
    road.relay()

    road.place(1, 30)
    road.until(lambda: len(road.effects()) >= 20, "20 effects")
    road.settle()

    assert road.committed() == Counter(n for n in range(1, 31) if n % 3)
    assert road.effects() == road.committed()
