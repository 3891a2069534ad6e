"""Requests and replies between processes: each finds its own, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from kombu import Connection
from redis import Redis as Client

from celery_eda import EDA
from celery_eda.core import addresses
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.errors import RequestTimeout
from celery_eda.outbox.embedded import RelayThread
from tests.faults.conftest import PATIENCE, Process, Road, first_of
from tests.faults.programs import asking_service as asking
from tests.faults.programs.asking_service import ask
from tests.faults.test_killed_at_every_step import RELAY_COPIES, WORKER
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy

VOLATILE = ("correlation", "temporary")
#: Seconds after which a reply queue that nobody uses is gone: its time, and RabbitMQ's look at it.
GONE = 20.0
both_brokers = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)


@pytest.fixture
def eda(road: Road) -> Iterator[EDA]:
    """Whoever asks: this process, as a service of its own."""
    eda = make(road)
    yield eda
    leave(eda)


def make(road: Road, broker: str = "", **settings: Any) -> EDA:
    """A service that asks, with a relay in this process for what it cannot send at once."""
    # A busy machine must not keep it from saying in time that it is still there, nor make of late
    # replies lost ones.
    settings = {"eda_reply_expires": 60.0, "eda_request_timeout": PATIENCE, **settings}
    eda = asking.make(broker or road.broker, road.folder, **settings)
    _relays[eda] = RelayThread(eda.outbox)
    _relays[eda].start()
    return eda


_relays: dict[EDA, RelayThread] = {}


def leave(eda: EDA) -> None:
    _relays.pop(eda).stop()
    eda.requests.mailbox.close()
    eda.databases.engine.dispose()
    eda.databases.relay_engine.dispose()


def reply_queues(road: Road, broker: Server) -> list[str]:
    """The volatile reply queues that the broker has."""
    if road.broker.startswith("redis"):
        return [key.decode() for key in Client.from_url(road.broker).keys("eda.reply.*")]
    vhost = road.broker.rpartition("/")[2]
    listed = broker.ctl("list_queues", "-q", "-p", vhost, "name")  # type: ignore[attr-defined]
    return [name for name in listed.split() if name.startswith("eda.reply.")]


def responders(road: Road, **environment: str) -> None:
    road.worker(ROAD_SEND_AFTER_COMMIT="1", **environment)
    road.relay()


# ── each finds its own ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("address", VOLATILE)
def test_a_request_gets_its_reply(road: Road, eda: EDA, address: str) -> None:
    responders(road)

    with eda.transaction():
        replies = [ask(eda, number, address=address) for number in range(20)]

    assert [reply.get() for reply in replies] == [2 * number for number in range(20)]
    assert road.effects("quote") == Counter(range(20))


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_a_thousand_requests_of_many_threads_get_their_own_replies(
    road: Road, eda: EDA, broker: Server
) -> None:
    responders(road)

    def converse(first: int) -> list[int]:
        replies = [ask(eda, number) for number in range(first, first + 50)]
        return [reply.get() for reply in replies]

    with ThreadPoolExecutor(20) as threads:
        results = list(threads.map(converse, range(0, 1000, 50)))

    assert [each for part in results for each in part] == [2 * n for n in range(1000)]
    assert not eda.requests.mailbox.dropped
    eda.requests.mailbox.close()
    assert reply_queues(road, broker) == []


@first_of("redis-mariadb", "rabbitmq-postgresql")
def test_a_thousand_requests_of_one_event_loop_get_their_own_replies(
    road: Road, eda: EDA, broker: Server
) -> None:
    responders(road)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.01)
            longest = max(longest, loop.time() - before)

    async def converse() -> list[int]:
        watching = asyncio.create_task(watch())
        replies = [ask(eda, number) for number in range(1000)]
        results = await asyncio.gather(*replies)
        watching.cancel()
        return results

    assert asyncio.run(converse()) == [2 * n for n in range(1000)]
    assert not eda.requests.mailbox.dropped
    print(f"the loop was held up for {longest:.3f} s at the most")  # noqa: T201
    eda.requests.mailbox.close()
    assert reply_queues(road, broker) == []


@both_brokers
def test_temporary_queues_are_gone_when_their_replies_have_come(
    road: Road, eda: EDA, broker: Server
) -> None:
    responders(road)

    replies = [ask(eda, number, address="temporary") for number in range(50)]
    assert [reply.get() for reply in replies] == [2 * number for number in range(50)]

    own = {eda.requests.mailbox.address, eda.requests.mailbox.address + ".open"}
    road.until(lambda: set(reply_queues(road, broker)) <= own, "the temporary queues gone", GONE)


@first_of("redis-mariadb", "rabbitmq-postgresql")
def test_a_forked_child_asks_for_itself(road: Road) -> None:
    responders(road)

    road.run(
        """
import multiprocessing
from tests.faults.programs import asking_service as asking
asker = asking.make(os.environ["ROAD_BROKER"], os.environ["ROAD_FOLDER"])
assert asking.ask(asker, 1).get() == 2
waiting = asking.ask(asker, 2)
def child():
    assert asking.ask(asker, 3).get() == 6
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
assert waiting.get() == 4
"""
    )


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_several_answer_one(road: Road, eda: EDA) -> None:
    responders(road)
    quote = eda.service.app.signature
    calls = [quote("road.quote", (number, number / 2)) for number in range(3)]

    assert eda.scatter(calls, need=1).get(timeout=PATIENCE) == [0]
    assert eda.scatter(calls).get(timeout=PATIENCE) == [0, 2, 4]


# ── whoever dies ────────────────────────────────────────────────────────────────────────────


@first_of("rabbitmq-postgresql", "redis-mariadb")
@pytest.mark.parametrize("step", [step for step in WORKER if step != "delivery.started"])
def test_whatever_step_its_responder_dies_at_a_request_gets_one_reply(
    road: Road, eda: EDA, step: str
) -> None:
    worker = road.worker(fault=road.fault(step))
    road.relay()
    with eda.transaction():
        replies = [ask(eda, number) for number in range(10)]

    road.until(road.struck(step).exists, f"a worker at {step}")
    if worker.wait_briefly() is not None:
        worker.start()

    assert [reply.get() for reply in replies] == [2 * number for number in range(10)]
    assert road.effects("quote") == Counter(range(10))
    assert set(eda.requests.mailbox.dropped) <= {"copy"}


@first_of("rabbitmq-postgresql", "redis-mariadb")
@pytest.mark.parametrize("step", RELAY_COPIES)
def test_whatever_step_its_relay_dies_at_a_request_gets_one_reply(
    road: Road, eda: EDA, step: str
) -> None:
    road.worker()
    relay = road.relay(fault=road.fault(step))
    with eda.transaction():
        replies = [ask(eda, number) for number in range(10)]

    road.until(road.struck(step).exists, f"a relay at {step}")
    relay.wait()
    road.relay()

    assert [reply.get() for reply in replies] == [2 * number for number in range(10)]
    assert road.effects("quote") == Counter(range(10))
    assert set(eda.requests.mailbox.dropped) <= {"copy"}


def asked(road: Road, address: str, first: int, last: int) -> tuple[Process, list[str]]:
    """A process that asks, and the correlation ids of its requests."""
    process = road._run(
        ["tests.faults.programs.asking_service", address, str(first), str(last)], None
    )

    def ids() -> list[str]:
        words = process.log.read_text(errors="replace").split()
        return [word for word in words if len(word) == 36 and word.count("-") == 4]

    road.until(lambda: len(ids()) == last - first + 1, "all asked")
    return process, ids()


@both_brokers
@pytest.mark.parametrize("address", VOLATILE)
def test_of_a_killed_requester_nothing_is_left_behind(
    road: Road, broker: Server, address: str
) -> None:
    process, _ = asked(road, address, 1, 20)
    road.until(lambda: len(reply_queues(road, broker)) > 0, "its reply queues")
    process.kill()
    road.until(lambda: not reply_queues(road, broker), "its reply queues gone", GONE)
    responders(road)

    road.until(lambda: road.effects("quote").total() >= 20, "the work done all the same")
    road.until(lambda: road.waiting() == 0, "no reply left in the outbox")
    road.settle(1.0)

    assert road.effects("quote") == Counter(range(1, 21))
    assert road.logged("replies are dropped") > 0
    assert reply_queues(road, broker) == []
    assert road.dead() == []


@both_brokers
def test_a_durable_reply_outlives_whoever_asked(road: Road) -> None:
    process, ids = asked(road, "durable", 1, 20)
    process.kill()
    responders(road)

    app = make(road, eda_database_url=road.database)
    results = [app.reply(each).get() for each in ids]
    leave(app)

    assert results == [2 * number for number in range(1, 21)]
    assert road.effects("quote") == Counter(range(1, 21))
    assert road.dead() == []


@both_brokers
def test_replies_that_come_while_the_requester_has_no_broker_are_not_lost(
    road: Road, broker: Server
) -> None:
    with Proxy(broker.port) as wire:
        eda = make(road, wire.through(road.broker))
        responders(road)
        assert ask(eda, 0).get() == 0
        replies = [ask(eda, number, seconds=1.0) for number in range(1, 4)]
        road.until(lambda: road.logged("received") >= 4, "the requests with the responder")
        wire.refuse()
        wire.cut()
        road.until(lambda: road.effects("quote").total() >= 4, "the work done")
        road.until(lambda: road.waiting() == 0, "the replies sent")
        wire.heal()

        assert [reply.get() for reply in replies] == [2, 4, 6]
        leave(eda)


@first_of("redis-mariadb", "rabbitmq-postgresql")
def test_replies_outlive_the_broker(road: Road, broker: Server) -> None:
    eda = make(road)
    responders(road)
    assert ask(eda, 0).get() == 0
    replies = [ask(eda, number, seconds=0.5) for number in range(1, 9)]
    road.until(lambda: road.effects("quote").total() >= 2, "some of the work done")

    broker.kill()
    road.pause(1.0, "the broker is away")
    broker.start()

    assert [reply.get() for reply in replies] == [2 * number for number in range(1, 9)]
    assert road.effects("quote") == Counter(range(9))
    leave(eda)


# ── whoever comes late, or should not come ──────────────────────────────────────────────────


def put(road: Road, queue: str, correlation_id: Any, outcome: Any, **headers: Any) -> None:
    """Put something like a reply into *queue*."""
    fields = {"task": REPLY_TASK, "id": str(uuid4()), "lang": "py", **headers}
    body = json.dumps([[correlation_id, outcome], {}, None])
    with Connection(road.broker) as connection:
        connection.Producer().publish(
            body,
            routing_key=queue,
            headers=fields,
            content_type="application/json",
            content_encoding="utf-8",
        )


@both_brokers
def test_a_reply_that_nobody_waits_for_is_counted_and_dropped(
    road: Road, eda: EDA, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "celery_eda")
    responders(road)
    late = ask(eda, 1, seconds=1.0)
    with pytest.raises(RequestTimeout):
        late.get(timeout=0.3)
    waiting = ask(eda, 2, seconds=2.0)
    done = ask(eda, 3)
    assert done.get() == 6

    put(road, eda.requests.mailbox.address, done.correlation_id, {"result": "another"})
    put(road, eda.requests.mailbox.address, str(uuid4()), {"result": "forged"})
    put(road, eda.requests.mailbox.address, "124", {"result": "no id"})
    put(road, eda.requests.mailbox.address, waiting.correlation_id, {"neither": 1})
    put(
        road,
        eda.requests.mailbox.address,
        waiting.correlation_id,
        {"result": 1},
        task="another.task",
    )
    put(road, eda.requests.mailbox.address, waiting.correlation_id, {"error": {"type": 7}})
    with Connection(road.broker) as connection:
        connection.Producer().publish(
            b"\xff\x00",
            routing_key=eda.requests.mailbox.address,
            content_type="application/x-python",
        )

    assert waiting.get() == 4
    assert done.get() == 6
    dropped = {"late": 1, "copy": 1, "unknown": 1, "malformed": 5}
    road.until(
        lambda: eda.requests.mailbox.dropped == dropped,
        f"counts: {eda.requests.mailbox.dropped}",
        10.0,
    )
    lines = [each for each in caplog.records if "a reply is dropped" in each.getMessage()]
    assert len(lines) == sum(dropped.values())
    assert all(len(each.getMessage()) < 300 and each.getMessage().isprintable() for each in lines)


@both_brokers
def test_a_reply_to_an_address_that_nobody_has_is_dropped_and_its_work_done_once(
    road: Road, eda: EDA
) -> None:
    responders(road)
    nowhere = {"eda_reply_to": addresses.of_process()}
    with eda.transaction():
        eda.service.app.send_task("road.quote", (1,), headers=nowhere)

    road.until(lambda: road.logged("replies are dropped"), "the reply dropped")
    road.settle(1.0)

    assert road.effects("quote") == Counter([1])
    assert road.dead() == []


@both_brokers
def test_a_request_whose_time_is_over_is_not_begun(road: Road, eda: EDA) -> None:
    reply = ask(eda, 1, expires=0.5)
    with pytest.raises(RequestTimeout):
        reply.get(timeout=1.0)

    responders(road)
    road.until(road.dead, "the request put aside")

    assert road.dead() == [("road.quote", "expired")]
    assert road.effects("quote") == Counter()


@both_brokers
def test_with_everything_down_asking_costs_a_commit_and_the_reply_comes_later(
    road: Road, broker: Server
) -> None:
    broker.kill()
    eda = make(road)
    with eda.transaction():
        replies = [ask(eda, number) for number in range(10)]
    broker.start()
    responders(road)

    assert [reply.get() for reply in replies] == [2 * number for number in range(10)]
    leave(eda)


# ── what the guards are for ─────────────────────────────────────────────────────────────────

on_rabbitmq = pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)


@on_rabbitmq
def test_sent_beside_the_transaction_a_reply_tells_of_work_that_was_never_done(
    road: Road, eda: EDA
) -> None:
    road.worker(fault=road.fault("delivery.handled", "freeze"), ROAD_MUTATION=EARLY)
    road.relay()

    assert ask(eda, 1).get() == 2
    assert road.effects("quote") == Counter()


EARLY = "reply_sent_before_the_commit"


@on_rabbitmq
def test_unless_it_may_be_dropped_a_reply_to_nobody_stays_in_the_outbox(
    road: Road, eda: EDA
) -> None:
    road.worker()
    road.relay(ROAD_MUTATION="replies_need_no_queue")
    with eda.transaction():
        nowhere = {"eda_reply_to": addresses.of_process()}
        eda.service.app.send_task("road.quote", (1,), headers=nowhere)

    road.until(lambda: "NO_ROUTE" in (road.last_error() or ""), "the broker's words on the row")

    assert road.waiting() == 1
