"""Tests of a broken wire, which a transport of any broker has to pass."""

from __future__ import annotations

import threading
import time
from uuid import UUID

import pytest

from celery_eda.brokers.base import Transport
from tests.support.letters import (
    confirmed,
    empty,
    ids,
    letter,
    letters,
    publish_until_confirmed,
    verdicts,
)
from tests.support.servers.proxy import Proxy

PATIENCE = 3.0  # seconds that a publish may take where the server does not answer
SLACK = 60.0  # seconds for a busy machine; a sender that is held would wait for ever


class BrokenWires:
    """The sender is not held, and nothing that was confirmed is lost.

    A subclass stands in a module with the fixtures ``broker_url``, ``proxy`` and ``wired``, a
    transport by way of the proxy that gives up after ``PATIENCE`` seconds.
    """

    def test_a_connection_cut_in_the_middle_loses_nothing_that_was_confirmed(
        self, broker_url: str, proxy: Proxy, wired: Transport
    ) -> None:
        kept: set[UUID] = set()
        broken = 0
        wired.publish([letter()])
        for number in range(16):
            cut = threading.Timer(0.005 * number, proxy.cut)
            cut.start()
            while cut.is_alive():
                batch = letters(100, body=b"x" * 2_000)
                answers = wired.publish(batch)
                kept |= confirmed(batch, answers)
                broken += "unknown" in verdicts(answers)
                assert not any(each.is_late for each in answers)
            cut.join()

        assert broken
        publish_until_confirmed(wired, [letter()])
        assert kept <= set(ids(empty(broker_url)))

    @pytest.mark.parametrize("fault", ["black hole", "nothing arrives", "no answer arrives"])
    def test_a_silent_wire_makes_everything_unknown_in_time(
        self, fault: str, broker_url: str, proxy: Proxy, wired: Transport
    ) -> None:
        wired.publish([letter()])
        silence = {
            "black hole": proxy.black_hole,
            "nothing arrives": lambda: proxy.one_way("down"),
            "no answer arrives": lambda: proxy.one_way("up"),
        }
        silence[fault]()
        start = time.monotonic()

        on_the_old_connection = wired.publish(letters(20))
        on_a_new_connection = wired.publish(letters(20))
        took = time.monotonic() - start
        proxy.heal()

        assert verdicts(on_the_old_connection) == ["unknown"] * 20
        assert all(each.is_late for each in on_the_old_connection)
        assert verdicts(on_a_new_connection) == ["unknown"] * 20
        assert took < 2 * (PATIENCE + SLACK)
        batch = letters(20)
        publish_until_confirmed(wired, batch)
        assert {message.identity.id for message in batch} <= set(ids(empty(broker_url)))
