"""RabbitMQ refuses, closes, blocks, freezes and dies: no message is taken for delivered wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from celery_eda.brokers.base import Pipelined, Transport
from tests.brokers.wires import PATIENCE, SLACK, BrokenWires
from tests.support.letters import (
    begin_two_at,
    confirmed,
    connection_to,
    empty,
    ids,
    letter,
    letters,
    publish_until_confirmed,
    verdicts,
)
from tests.support.servers.proxy import Proxy
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.waiting import eventually


@pytest.fixture
def broker_url(rabbitmq_url: str) -> str:
    return rabbitmq_url


@pytest.fixture
def transport(rabbitmq_url: str, transport_to: Callable[..., Transport]) -> Transport:
    return transport_to(rabbitmq_url)


@pytest.fixture
def pipelined(transport: Transport) -> Pipelined:
    assert isinstance(transport, Pipelined)
    return transport


@pytest.fixture
def impatient(rabbitmq_url: str, transport_to: Callable[..., Pipelined]) -> Pipelined:
    """A transport that gives up soon."""
    return transport_to(rabbitmq_url, timeout=PATIENCE)


@pytest.fixture
def proxy(rabbitmq: RabbitMQ) -> Iterator[Proxy]:
    with Proxy(rabbitmq.port) as wire:
        yield wire


@pytest.fixture
def wired(rabbitmq_url: str, proxy: Proxy, transport_to: Callable[..., Transport]) -> Transport:
    """A transport that gives up soon, by way of the proxy."""
    return transport_to(proxy.through(rabbitmq_url), timeout=PATIENCE)


class TestTwoBatches:
    """One batch is sent while the other is not answered yet; each gets its own answers."""

    def test_each_is_answered_in_its_turn(self, rabbitmq_url: str, pipelined: Pipelined) -> None:
        batches = [letters(700), [letter(None, routing_key="nowhere"), *letters(600)], letters(3)]
        pipelined.begin(batches[0])
        answers = []
        for following in batches[1:]:
            pipelined.begin(following)
            answers.append(pipelined.finish())
        answers.append(pipelined.finish())

        assert [verdicts(each) for each in answers] == [
            ["confirmed"] * 700,
            ["refused"] + ["confirmed"] * 600,
            ["confirmed"] * 3,
        ]
        sent = {each.identity.id for batch in batches for each in batch}
        assert sent - set(ids(empty(rabbitmq_url))) == {batches[1][0].identity.id}

    def test_beginning_returns_when_all_is_on_its_way(
        self, rabbitmq_url: str, pipelined: Pipelined
    ) -> None:
        batch = letters(300)
        pipelined.begin(batch)
        found: list[UUID] = []

        eventually(
            lambda: found.extend(ids(empty(rabbitmq_url))) or len(found) == len(batch),
            "all in the queue, though nobody has asked for the answers",
        )

        assert set(found) == confirmed(batch, pipelined.finish())

    def test_what_was_answered_in_time_counts_though_it_is_asked_for_late(
        self, impatient: Pipelined
    ) -> None:
        impatient.begin(letters(600))
        time.sleep(PATIENCE + 0.5)

        assert verdicts(impatient.finish()) == ["confirmed"] * 600

    def test_a_batch_has_all_of_its_time_however_late_it_is_begun(
        self, rabbitmq_url: str, impatient: Pipelined
    ) -> None:
        impatient.begin(letters(3))
        time.sleep(PATIENCE + 0.5)
        impatient.begin(letters(600))
        time.sleep(PATIENCE + 0.5)
        impatient.begin(letters(3))
        answers = [impatient.finish() for _ in range(3)]

        assert [set(verdicts(each)) for each in answers] == [{"confirmed"}] * 3
        assert len(empty(rabbitmq_url)) == 606

    def test_a_message_that_makes_the_broker_close_is_refused_alone_whichever_it_is_in(
        self, rabbitmq_url: str, pipelined: Pipelined
    ) -> None:
        for bad in (letter(immediate=True), letter(None, exchange="missing", routing_key="x")):
            for place in (0, 1):
                batches = [letters(40), letters(40)]
                batches[place][20] = bad
                pipelined.begin(batches[0])
                pipelined.begin(batches[1])
                answers = [pipelined.finish(), pipelined.finish()]

                expected = [["confirmed"] * 40, ["confirmed"] * 40]
                expected[place][20] = "refused"
                assert [verdicts(each) for each in answers] == expected
                taken = ids(empty(rabbitmq_url))
                assert set(taken) == {
                    each
                    for batch, answered in zip(batches, answers, strict=True)
                    for each in confirmed(batch, answered)
                }
                assert len(taken) <= 2 * 80, "each is sent again once at the most"

    def test_an_outage_makes_both_unknown_and_the_next_one_is_sent_anew(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Pipelined
    ) -> None:
        start = time.monotonic()
        answers = begin_two_at(rabbitmq, impatient)
        took = time.monotonic() - start

        assert answers == [["unknown"] * 20] * 2
        assert took < PATIENCE + SLACK
        batch = letters(20)
        publish_until_confirmed(impatient, batch)
        assert {each.identity.id for each in batch} <= set(ids(empty(rabbitmq_url)))

    def test_when_the_broker_has_said_that_it_is_out_of_memory_no_more_is_sent(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Pipelined
    ) -> None:
        impatient.publish([letter()])
        rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        try:
            first, second = [letter()], letters(300)
            impatient.begin(first)
            time.sleep(1.5)  # for the broker to say so
            impatient.begin(second)
            answers = [impatient.finish(), impatient.finish()]
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")

        assert {each for batch in answers for each in verdicts(batch)} == {"unknown"}
        publish_until_confirmed(impatient, [letter()])
        assert not {each.identity.id for each in second} & set(ids(empty(rabbitmq_url)))

    def test_what_is_closed_forgets_what_was_under_way(
        self, rabbitmq_url: str, pipelined: Pipelined
    ) -> None:
        pipelined.begin(letters(300))
        pipelined.begin([letter(None, routing_key="nowhere")])
        pipelined.close()

        batch = [letter(), letter(None, routing_key="nowhere"), letter()]
        assert verdicts(pipelined.publish(batch)) == ["confirmed", "refused", "confirmed"]


class TestRefusals:
    """A refusal concerns the message that it was meant for."""

    def test_a_message_without_a_queue_to_go_to_is_refused_with_the_words_of_the_broker(
        self, transport: Transport
    ) -> None:
        answers = transport.publish([letter(), letter(None, routing_key="nowhere"), letter()])

        assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
        assert answers[1].why == "312 NO_ROUTE: exchange='' routing_key='nowhere'"

    def test_every_second_of_many_is_returned_and_the_others_arrive(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        batch = [letter() if n % 2 else letter(None, routing_key="nowhere") for n in range(1200)]

        answers = transport.publish(batch)

        assert verdicts(answers) == ["refused", "confirmed"] * 600
        assert set(ids(empty(rabbitmq_url))) == confirmed(batch, answers)

    def test_a_full_queue_refuses_what_it_does_not_keep(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        batch = [letter("limited") if n % 2 else letter() for n in range(40)]

        answers = transport.publish(batch)

        kept = ids(empty(rabbitmq_url, "limited"))
        assert set(kept + ids(empty(rabbitmq_url))) == confirmed(batch, answers)
        assert verdicts(answers).count("refused") == 20 - len(kept) > 10
        assert all("full" in answer.why for answer in answers if answer.why)

    def test_a_missing_exchange_is_the_fault_of_its_own_messages(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        batch = letters(300)
        for position in (20, 150, 299):
            batch[position] = letter(None, exchange="missing", routing_key="x")

        answers = transport.publish(batch)

        assert [n for n, answer in enumerate(answers) if answer.why] == [20, 150, 299]
        assert "404" in answers[150].why
        assert "no exchange 'missing'" in answers[150].why
        assert set(ids(empty(rabbitmq_url))) == confirmed(batch, answers)

    def test_a_queue_that_exists_with_other_arguments_is_the_fault_of_its_own_messages(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        with connection_to(rabbitmq_url) as connection:
            connection.channel().queue_declare("others", durable=False, auto_delete=False)

        answers = transport.publish([letter(), letter("others"), letter("new"), letter("others")])

        assert verdicts(answers) == ["confirmed", "refused", "confirmed", "refused"]
        assert "406" in answers[1].why
        assert "inequivalent arg 'durable'" in answers[1].why

    def test_a_message_that_makes_the_broker_close_the_connection_is_refused_alone(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        batch = [*letters(20), letter(immediate=True), *letters(20)]

        answers = transport.publish(batch)

        assert verdicts(answers) == ["confirmed"] * 20 + ["refused"] + ["confirmed"] * 20
        assert "540" in answers[20].why
        assert set(ids(empty(rabbitmq_url))) == confirmed(batch, answers)

    def test_headers_too_long_for_a_frame_are_refused_before_they_are_sent(
        self, transport: Transport
    ) -> None:
        answers = transport.publish([letter(), letter(headers={"long": "x" * 200_000}), letter()])

        assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
        assert "one frame" in answers[1].why

    def test_what_is_refused_before_it_is_sent_does_not_hold_up_what_follows(
        self, transport: Transport
    ) -> None:
        answers = [
            verdicts(transport.publish([letter(headers={"long": "x" * 200_000})])),
            verdicts(transport.publish(letters(3))),
        ]

        assert answers == [["refused"], ["confirmed"] * 3]

    def test_a_message_whose_user_is_somebody_else_is_refused_alone(
        self, transport: Transport
    ) -> None:
        answers = transport.publish([letter(), letter(user_id="somebody"), letter()])

        assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
        assert "406" in answers[1].why

    def test_a_queue_deleted_behind_our_back_is_declared_again_after_the_refusal(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        transport.publish([letter()])
        with connection_to(rabbitmq_url) as connection:
            connection.channel().queue_delete("letters")

        answers = [verdicts(transport.publish([letter(), letter("others")])) for _ in range(2)]

        assert answers == [["refused", "confirmed"], ["confirmed", "confirmed"]]

    def test_an_exchange_deleted_behind_our_back_is_declared_again_after_the_refusal(
        self, rabbitmq_url: str, transport: Transport
    ) -> None:
        sent = letter("orders", exchange="events", routing_key="order.placed")
        transport.publish([sent])
        with connection_to(rabbitmq_url) as connection:
            connection.channel().exchange_delete("events")

        answers = [verdicts(transport.publish([sent, letter()])) for _ in range(2)]

        assert answers == [["refused", "confirmed"], ["confirmed", "confirmed"]]

    def test_a_quorum_queue_confirms_too(self, rabbitmq_url: str, transport: Transport) -> None:
        batch = letters(50, "quorum")

        answers = transport.publish(batch)

        assert verdicts(answers) == ["confirmed"] * 50
        assert set(ids(empty(rabbitmq_url, "quorum"))) == confirmed(batch, answers)


class TestOutages:
    """An outage is nobody's fault, ends in time, and is over when the broker is back."""

    def test_what_was_confirmed_survives_the_death_of_the_broker(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Transport
    ) -> None:
        kept: set[UUID] = set()
        unknown = 0
        impatient.publish([letter()])
        for round_ in range(3):
            killer = threading.Timer(0.05 + 0.1 * round_, rabbitmq.kill)
            killer.start()
            while killer.is_alive():
                batch = letters(200, body=b"x" * 500)
                answers = impatient.publish(batch)
                kept |= confirmed(batch, answers)
                unknown += verdicts(answers).count("unknown")
                assert "refused" not in verdicts(answers)
            killer.join()
            unknown += verdicts(impatient.publish(letters(3))).count("unknown")
            rabbitmq.start()

        assert unknown
        assert kept
        publish_until_confirmed(impatient, [letter()])
        assert kept <= set(ids(empty(rabbitmq_url)))

    def test_a_frozen_broker_does_not_hold_the_sender_and_nothing_is_taken_for_delivered(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Transport
    ) -> None:
        impatient.publish([letter()])
        rabbitmq.freeze()
        start = time.monotonic()

        first = impatient.publish(letters(50))
        second = impatient.publish(letters(50))
        took = time.monotonic() - start
        rabbitmq.thaw()

        assert verdicts(first) == verdicts(second) == ["unknown"] * 50
        assert took < 2 * (PATIENCE + SLACK)
        publish_until_confirmed(impatient, letters(50))

    def test_a_connection_is_not_used_again_after_a_batch_without_all_answers(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Transport
    ) -> None:
        impatient.publish([letter()])
        rabbitmq.freeze()
        stuck = [letter(body=b"x" * 100_000) for _ in range(400)]  # more than the sockets hold
        lost = impatient.publish(stuck)
        rabbitmq.thaw()
        batch = [letter(), letter(None, routing_key="nowhere"), letter()]

        answers = impatient.publish(batch)

        assert set(verdicts(lost)) == {"unknown"}
        assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
        assert confirmed(batch, answers) <= set(ids(empty(rabbitmq_url)))

    def test_a_broker_without_memory_is_an_outage_that_ends(
        self, rabbitmq: RabbitMQ, rabbitmq_url: str, impatient: Transport
    ) -> None:
        impatient.publish([letter()])
        batches = [letters(300) for _ in range(3)]
        rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        try:
            start = time.monotonic()
            during = [impatient.publish(batch) for batch in batches]
            took = time.monotonic() - start
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
        after = letters(300)
        publish_until_confirmed(impatient, after)

        assert [set(verdicts(answers)) for answers in during] == [{"unknown"}] * 3
        assert all("alarm" in answers[0].why for answers in during)
        assert took < 3 * (PATIENCE + SLACK)
        received = set(ids(empty(rabbitmq_url)))
        assert {message.identity.id for message in after} <= received
        # On a new connection no more than the first message is sent before an answer has come.
        copies = {message.identity.id for batch in batches[1:] for message in batch} & received
        assert len(copies) <= 2

    def test_an_alarm_that_ends_in_time_only_delays(
        self, rabbitmq: RabbitMQ, transport: Transport
    ) -> None:
        transport.publish([letter()])
        rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        end = threading.Timer(1, rabbitmq.ctl, ("set_vm_memory_high_watermark", "0.4"))
        end.start()
        try:
            answers = transport.publish(letters(100))
        finally:
            end.join()

        assert verdicts(answers) == ["confirmed"] * 100

    def test_a_connection_closed_by_the_operator_is_not_the_fault_of_the_message_under_way(
        self, rabbitmq: RabbitMQ, transport: Transport
    ) -> None:
        transport.publish([letter()])
        rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        close = threading.Timer(
            1, rabbitmq.ctl, ("close_all_connections", "--global", "maintenance")
        )
        close.start()
        try:
            answers = transport.publish([letter()])
        finally:
            close.join()
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")

        assert verdicts(answers) == ["unknown"]
        assert "maintenance" in answers[0].why

    def test_connections_closed_by_the_operator_between_batches_go_unnoticed(
        self, rabbitmq: RabbitMQ, transport: Transport
    ) -> None:
        transport.publish([letter()])
        rabbitmq.ctl("close_all_connections", "--global", "maintenance")

        answers = transport.publish(letters(10))

        assert verdicts(answers) == ["confirmed"] * 10

    def test_a_restart_between_batches_goes_unnoticed(
        self, rabbitmq: RabbitMQ, transport: Transport
    ) -> None:
        transport.publish([letter()])
        rabbitmq.kill()
        rabbitmq.start()

        answers = transport.publish(letters(10))

        assert verdicts(answers) == ["confirmed"] * 10

    def test_a_wrong_password_is_an_outage_and_not_the_fault_of_a_message(
        self, rabbitmq_url: str, transport_to: Callable[..., Transport]
    ) -> None:
        stranger = transport_to(rabbitmq_url.replace("guest:guest", "guest:wrong"))

        answers = stranger.publish(letters(3))

        assert verdicts(answers) == ["unknown"] * 3
        assert "403" in answers[0].why

    def test_the_first_host_that_answers_is_used(
        self, rabbitmq_url: str, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(f"amqp://127.0.0.1:9//;{rabbitmq_url}")

        answers = transport.publish(letters(10))

        assert verdicts(answers) == ["confirmed"] * 10


class TestWires(BrokenWires):
    """Those of every broker, and this broker's own."""

    def test_a_slow_wire_is_only_slow(
        self, rabbitmq_url: str, proxy: Proxy, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(proxy.through(rabbitmq_url))
        proxy.delay(0.15)

        answers = transport.publish(letters(1200))

        assert verdicts(answers) == ["confirmed"] * 1200

    def test_answers_that_still_come_do_not_lengthen_the_wait(
        self, proxy: Proxy, rabbitmq_url: str, transport_to: Callable[..., Transport]
    ) -> None:
        """Counted from the last answer the wait would be nearly twice as long.

        So the difference is what a busy machine may take.
        """
        timeout = 6.0
        wired = transport_to(proxy.through(rabbitmq_url), timeout=timeout)
        wired.publish([letter()])
        proxy.delay(0.15)
        batch = letters(20_000)
        silence = threading.Timer(0.95 * timeout, proxy.black_hole)
        silence.start()
        start = time.monotonic()

        answers = wired.publish(batch)
        took = time.monotonic() - start
        silence.join()

        assert set(verdicts(answers)) == {"confirmed", "unknown"}
        assert took < 1.9 * timeout
