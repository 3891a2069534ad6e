"""What asking for a reply does and refuses, without a broker: its address leads nowhere."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, chain, group
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_eda import EDA
from celery_eda.core.addresses import REPLY_HEADER
from celery_eda.core.message import Message
from celery_eda.databases import message_rows, upgrade
from celery_eda.errors import (
    ConfigurationError,
    OutsideTransaction,
    RequestError,
    RequestTimeout,
    UnknownRequest,
    UnsentRequest,
)
from celery_eda.requests import mailbox, watcher
from celery_eda.requests.outcomes import ErrorOutcome
from tests.support.waiting import BOUND, eventually

#: A correlation id that nobody has been given.
NOBODYS = "8d9f5c1e-6d0a-4f1e-9c0b-2f6a1d3b7e55"
VOLATILE = ("correlation", "temporary")
ADDRESSES = (*VOLATILE, "durable")


async def _await(reply: Any) -> Any:
    return await reply


def in_a_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """*test*, an ``async def``, run in an event loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


class Shop:
    """An app whose broker is away; replies are given by hand."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.url = f"sqlite:///{folder / 'shop.db'}"
        self.app = Celery("shop", broker="redis://127.0.0.1:1", set_as_current=False)
        self.app.conf.update(
            eda_database_url=self.url,
            eda_send_after_commit=False,
            broker_connection_timeout=0.2,
            **settings,
        )
        self.eda = EDA(self.app)
        upgrade.upgrade(self.eda.databases.engine, self.eda.databases.tables)

        @self.eda.task(name="shop.quote")
        def quote(number: int) -> int:
            return number

        @self.app.task(name="shop.plain")
        def plain() -> None:
            """An ordinary task."""

        self.quote, self.plain = quote, plain

    def sent(self) -> list[Message]:
        with self.eda.databases.engine.connect() as connection:
            rows = connection.execute(select(self.eda.databases.tables.outbox)).all()
        return [message_rows.from_row(row) for row in rows]

    def noted(self) -> int:
        """How many durable requests are noted."""
        with self.eda.databases.engine.connect() as connection:
            query = select(func.count()).select_from(self.eda.databases.tables.requests)
            return connection.execute(query).scalar_one()

    def answer(self, correlation_id: str, outcome: Any) -> None:
        """Let the reply to a durable request come in."""
        with self.eda.databases.engine.begin() as connection:
            self.eda.requests.store.record(connection, UUID(correlation_id), outcome)

    def close(self) -> None:
        self.eda.requests.mailbox.close()
        self.eda.databases.engine.dispose()


@pytest.fixture(autouse=True)
def _no_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no broker to say goodbye to."""
    monkeypatch.setattr(mailbox, "EXIT_TIMEOUT", 0.05)


@pytest.fixture
def make_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    shops = []

    def make(**settings: Any) -> Shop:
        shops.append(Shop(tmp_path, **settings))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    return make_shop()


# ── what is sent ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_request_leaves_with_the_commit_and_touches_no_broker(shop: Shop, address: Any) -> None:
    with shop.eda.transaction():
        reply = shop.eda.request(shop.quote, (7,), address=address, priority=5, expires=60)
        assert shop.sent() == []

    (message,) = shop.sent()
    assert message.headers["id"] == message.properties["correlation_id"] == reply.correlation_id
    assert message.properties["priority"] == 5
    assert message.headers["expires"]
    assert message.headers[REPLY_HEADER].startswith("eda.repl")
    assert [name for name, _ in message.prerequisites] == [
        "declare" if address == "durable" else "reply_queue"
    ]
    assert not reply.done


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_request_that_is_rolled_back_is_never_sent(shop: Shop, address: Any) -> None:
    with shop.eda.transaction() as session:
        shop.eda.request(shop.quote, (7,), address=address)
        session.rollback()

    assert shop.sent() == []
    assert shop.noted() == 0


def test_the_task_itself_can_be_asked_and_still_knows_its_call(shop: Shop) -> None:
    reply = shop.quote.ask(7)

    (message,) = shop.sent()
    assert message.headers["id"] == reply.correlation_id
    assert shop.quote.request.id is None
    assert shop.quote.request.retries == 0


def test_a_task_can_ask_by_itself_within_its_own_call(shop: Shop) -> None:
    seen = []

    @shop.eda.task(name="shop.recursive", bind=True)
    def recursive(self: Any, number: int) -> int:
        seen.append((self.request.id, self.request.args))
        return number

    recursive.apply((7,), task_id="its own")

    assert seen == [("its own", (7,))]


def test_a_task_of_another_service_is_asked_by_its_name(shop: Shop) -> None:
    shop.eda.request("stock.quote", (7,), queue="stock")

    (message,) = shop.sent()
    assert (message.task, message.routing_key) == ("stock.quote", "stock")


def test_a_signature_brings_its_own_options(shop: Shop) -> None:
    shop.eda.request(shop.quote.s(7).set(queue="fast", headers={"tenant": "a"}))

    (message,) = shop.sent()
    assert message.routing_key == "fast"
    assert message.headers["tenant"] == "a"
    assert REPLY_HEADER in message.headers


def test_many_are_asked_in_one_transaction(shop: Shop) -> None:
    replies = shop.eda.scatter([shop.quote.s(number) for number in range(5)], need=2)

    assert len(shop.sent()) == 5
    assert len({each.correlation_id for each in replies.each}) == 5


def test_where_publishing_outside_is_forbidden_asking_is_too(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(eda_outside="raise")

    with pytest.raises(OutsideTransaction, match=r"shop\.quote"):
        shop.quote.ask(7)
    with shop.eda.transaction():
        shop.quote.ask(7)


# ── what is refused ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("option", ["task_id", "correlation_id", "reply_to"])
def test_nobody_chooses_a_correlation_id(shop: Shop, option: str) -> None:
    with pytest.raises(RequestError, match=option):
        shop.eda.request(shop.quote, (7,), **{option: "124"})

    assert shop.sent() == []


@pytest.mark.parametrize("option", ["task_id", "correlation_id", "reply_to"])
def test_nor_does_a_signature_choose_a_correlation_id(shop: Shop, option: str) -> None:
    with pytest.raises(RequestError, match=option):
        shop.eda.request(shop.quote.s(7).set(**{option: "124"}))

    assert shop.sent() == []


def test_an_ordinary_task_is_not_asked(shop: Shop) -> None:
    with pytest.raises(RequestError, match=r"@eda\.task"):
        shop.eda.request(shop.plain)


@pytest.mark.parametrize("make", [chain, group])
def test_more_than_one_task_is_not_asked_for_one_reply(shop: Shop, make: Any) -> None:
    with pytest.raises(RequestError, match="one task"):
        shop.eda.request(make(shop.quote.s(1), shop.quote.s(2)))


@pytest.mark.parametrize(("calls", "need"), [(0, None), (2, 0), (2, 3), (2, -1)])
def test_more_replies_than_calls_cannot_be_needed(shop: Shop, calls: int, need: Any) -> None:
    with pytest.raises(RequestError, match="need"):
        shop.eda.scatter([shop.quote.s(number) for number in range(calls)], need=need)


def test_an_unknown_kind_of_address_is_refused(shop: Shop) -> None:
    with pytest.raises(RequestError, match="durable"):
        shop.eda.request(shop.quote, (7,), address="somewhere")  # type: ignore[arg-type]


def test_a_broker_without_such_queues_is_refused_with_the_remedy(tmp_path: Path) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'shop.db'}"
    eda = EDA(app)

    with pytest.raises(ConfigurationError, match="durable"):
        eda.request("stock.quote")


@pytest.mark.parametrize("address", ADDRESSES)
def test_waiting_inside_the_transaction_is_refused(shop: Shop, address: Any) -> None:
    with shop.eda.transaction():
        reply = shop.eda.request(shop.quote, (7,), address=address)
        with pytest.raises(UnsentRequest, match="commits"):
            reply.get(timeout=60)

    with pytest.raises(RequestTimeout):
        reply.get(timeout=0.05)


def test_waiting_for_several_inside_the_transaction_is_refused(shop: Shop) -> None:
    with shop.eda.transaction():
        replies = shop.eda.scatter([shop.quote.s(1), shop.quote.s(2)], address="durable")
        with pytest.raises(UnsentRequest, match="commits"):
            replies.get(timeout=60)


def test_waiting_in_an_attached_session_is_refused(shop: Shop) -> None:
    sessions = sessionmaker(create_engine(shop.url))
    shop.eda.attach(sessions)
    with sessions() as session:
        reply = shop.eda.request(shop.quote, (7,), address="durable")
        with pytest.raises(UnsentRequest):
            reply.get(timeout=60)
        session.commit()

    assert len(shop.sent()) == 1


def test_waiting_within_the_handler_that_asks_is_refused(shop: Shop) -> None:
    refused = []
    with shop.eda.transaction() as outer:
        with shop.eda.transaction(Session(outer.connection())) as inner:
            reply = shop.eda.request(shop.quote, (7,), address="durable")
            inner.commit()
        try:
            reply.get(timeout=60)
        except UnsentRequest:
            refused.append(True)

    assert len(shop.sent()) == 1
    assert refused == [True]


@in_a_loop
async def test_awaiting_inside_the_transaction_is_refused(shop: Shop) -> None:
    engine = create_async_engine(shop.url.replace("sqlite:", "sqlite+aiosqlite:"))
    async with AsyncSession(engine) as session, shop.eda.transaction(session):
        reply = shop.eda.request(shop.quote, (7,), address="durable")
        with pytest.raises(UnsentRequest):
            await reply
        await session.commit()
    await engine.dispose()

    assert len(shop.sent()) == 1


# ── waiting ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("address", ADDRESSES)
def test_waiting_ends_in_time(make_shop: Callable[..., Shop], address: Any) -> None:
    shop = make_shop(eda_request_timeout=0.1)
    reply = shop.eda.request(shop.quote, (7,), address=address)

    with pytest.raises(RequestTimeout, match=r"within 0\.1 s"):
        reply.get()
    with pytest.raises(TimeoutError):
        asyncio.run(_await(shop.eda.request(shop.quote, (7,), address=address)))
    with pytest.raises(RequestTimeout):
        reply.get(timeout=0.01)


def test_an_outcome_finds_whoever_waits_for_it(shop: Shop) -> None:
    replies = [shop.quote.ask(number) for number in range(3)]
    for number, reply in reversed([*enumerate(replies)]):
        assert shop.eda.requests.mailbox.settle(reply.correlation_id, number)

    assert [reply.done for reply in replies] == [True] * 3
    assert [reply.get(timeout=0) for reply in replies] == [0, 1, 2]
    assert [reply.get(timeout=0) for reply in replies] == [0, 1, 2]
    assert asyncio.run(_await(replies[1])) == 1


@pytest.mark.parametrize("ask", ["request", "scatter"])
def test_the_time_out_of_a_responder_is_no_lack_of_a_reply(shop: Shop, ask: str) -> None:
    if ask == "request":
        waiting: Any = shop.quote.ask(7)
        correlation_id = waiting.correlation_id
    else:
        waiting = shop.eda.scatter([shop.quote.s(7), shop.quote.s(8)])
        correlation_id = waiting.each[0].correlation_id
    shop.eda.requests.mailbox.settle(correlation_id, ErrorOutcome(TimeoutError("the bank is slow")))

    with pytest.raises(TimeoutError, match="bank"):
        waiting.get(timeout=1)
    with pytest.raises(TimeoutError, match="bank"):
        asyncio.run(_await(waiting))


def by_cancel(reply: Any) -> None:
    reply.cancel()


def by_time_out(reply: Any) -> None:
    with pytest.raises(RequestTimeout, match="within"):
        reply.get(timeout=0.01)


def by_wait_for(reply: Any) -> None:
    async def wait_briefly() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_await(reply), 0.01)

    asyncio.run(wait_briefly())


@pytest.mark.parametrize("give_up", [by_cancel, by_time_out, by_wait_for])
@pytest.mark.parametrize("ask", [*VOLATILE, "scatter"])
def test_what_was_given_up_is_not_waited_for_again(
    make_shop: Callable[..., Shop], ask: Any, give_up: Callable[[Any], None]
) -> None:
    shop = make_shop(eda_request_timeout=10 * BOUND)
    call = shop.quote.s(7)
    waiting: Any = (
        shop.eda.scatter([call]) if ask == "scatter" else shop.eda.request(call, address=ask)
    )
    give_up(waiting)
    started = time.monotonic()

    with pytest.raises(RequestTimeout, match="given up"):
        waiting.get(timeout=10 * BOUND)
    with pytest.raises(RequestTimeout, match="given up"):
        asyncio.run(_await(waiting))
    assert not waiting.done
    assert time.monotonic() - started < BOUND


def test_a_durable_reply_that_was_given_up_can_be_waited_for_again(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    by_time_out(reply)
    by_wait_for(reply)
    shop.answer(reply.correlation_id, {"result": 7})

    assert reply.get(timeout=BOUND) == 7


def test_where_every_task_is_eager_the_reply_is_there_at_once(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(task_always_eager=True)

    @shop.eda.task(name="shop.fail")
    def fail() -> None:
        raise LookupError("no")

    assert shop.quote.ask(7).get(timeout=BOUND) == 7
    assert shop.eda.scatter([shop.quote.s(1), shop.quote.s(2)]).get(timeout=BOUND) == [1, 2]
    with pytest.raises(LookupError, match="no"):
        fail.ask().get(timeout=1)
    assert shop.sent() == []


def test_an_error_is_raised_where_it_is_waited_for(shop: Shop) -> None:
    reply = shop.quote.ask(7)
    shop.eda.requests.mailbox.settle(reply.correlation_id, ErrorOutcome(LookupError("no")))

    with pytest.raises(LookupError, match="no"):
        reply.get()


def test_all_threads_of_a_process_have_one_mailbox(shop: Shop) -> None:
    ready = threading.Barrier(20)

    def mailbox(_: int) -> Any:
        ready.wait()
        return shop.eda.requests.mailbox

    with ThreadPoolExecutor(20) as threads:
        assert len(set(threads.map(mailbox, range(20)))) == 1


def test_a_handle_that_is_dropped_leaves_nothing_behind(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="temporary")
    correlation_id = reply.correlation_id
    assert len(shop.eda.requests.mailbox._wanted) == 2
    del reply
    gc.collect()

    assert not shop.eda.requests.mailbox.settle(correlation_id, 7)
    assert len(shop.eda.requests.mailbox._wanted) == 1


def test_a_handle_may_be_collected_wherever_garbage_is(shop: Shop) -> None:
    ended = threading.Event()

    def drop() -> None:
        reply = shop.eda.request(shop.quote, (7,), address="temporary")
        knot: list[Any] = [reply]
        knot.append(knot)
        with shop.eda.requests.mailbox._lock:
            del reply, knot
            gc.collect()
        ended.set()

    threading.Thread(target=drop, daemon=True).start()

    assert ended.wait(60.0)


def test_whatever_fails_replies_are_tried_again(shop: Shop) -> None:
    tried = threading.Semaphore(0)

    def make_queues() -> Any:
        tried.release()
        raise OSError("too many open files")

    shop.eda.requests.mailbox._brokers.consume_replies = make_queues
    shop.quote.ask(7)

    assert tried.acquire(timeout=BOUND)
    assert tried.acquire(timeout=BOUND)


@pytest.mark.parametrize("address", VOLATILE)
@in_a_loop
async def test_cancellation_leaves_nothing_behind(shop: Shop, address: Any) -> None:
    reply = shop.eda.request(shop.quote, (7,), address=address)
    task = asyncio.ensure_future(_await(reply))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not shop.eda.requests.mailbox.settle(reply.correlation_id, 7)
    assert len(shop.eda.requests.mailbox._wanted) == 1


@in_a_loop
async def test_a_wait_that_times_out_leaves_nothing_behind(shop: Shop) -> None:
    reply = shop.quote.ask(7)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(_await(reply), 0.05)

    assert not shop.eda.requests.mailbox.settle(reply.correlation_id, 7)


@in_a_loop
async def test_what_cannot_be_stored_is_told_to_who_awaits_it(shop: Shop) -> None:
    shop.eda.databases.tables.outbox.drop(shop.eda.databases.engine)

    with pytest.raises(Exception, match="no such table"):
        await shop.quote.ask(7)


# ── several ─────────────────────────────────────────────────────────────────────────────────


def scatter(shop: Shop, need: int | None) -> Any:
    return shop.eda.scatter([shop.quote.s(number) for number in range(3)], need=need)


def settle(shop: Shop, replies: Any, *outcomes: Any) -> None:
    """Settle the replies, the last one first; None for one that does not come."""
    for each, outcome in reversed([*zip(replies.each, outcomes, strict=True)]):
        if outcome is not None:
            shop.eda.requests.mailbox.settle(each.correlation_id, outcome)


FAILED = ErrorOutcome(LookupError("no"))


def both_ways(replies: Any, shop: Shop, way: str) -> Any:
    return replies.get(timeout=0.2) if way == "get" else asyncio.run(_await(replies))


@pytest.mark.parametrize("way", ["get", "await"])
@pytest.mark.parametrize(
    ("need", "outcomes", "expected"),
    [
        (None, (1, 2, 3), [1, 2, 3]),
        (1, (None, None, 3), [3]),
        (2, (1, None, 3), [1, 3]),
        (2, (1, FAILED, 3), [1, 3]),
        (1, (FAILED, FAILED, 3), [3]),
    ],
)
def test_enough_replies_are_enough(
    make_shop: Callable[..., Shop], way: str, need: Any, outcomes: Any, expected: Any
) -> None:
    shop = make_shop(eda_request_timeout=0.2)
    replies = scatter(shop, need)
    settle(shop, replies, *outcomes)

    assert replies.done
    assert both_ways(replies, shop, way) == expected
    assert not any(
        shop.eda.requests.mailbox.settle(each.correlation_id, 9) for each in replies.each
    )


@pytest.mark.parametrize("way", ["get", "await"])
@pytest.mark.parametrize(
    ("need", "outcomes", "error"),
    [
        (None, (1, 2, FAILED), LookupError),
        (2, (FAILED, FAILED, 3), LookupError),
        (None, (1, 2, None), RequestTimeout),
        (1, (None, None, None), RequestTimeout),
    ],
)
def test_too_few_replies_are_an_error(
    make_shop: Callable[..., Shop], way: str, need: Any, outcomes: Any, error: type[Exception]
) -> None:
    shop = make_shop(eda_request_timeout=0.2)
    replies = scatter(shop, need)
    settle(shop, replies, *outcomes)

    with pytest.raises(error):
        both_ways(replies, shop, way)
    assert not any(
        shop.eda.requests.mailbox.settle(each.correlation_id, 9) for each in replies.each
    )


# ── durable ─────────────────────────────────────────────────────────────────────────────────


def test_a_durable_reply_is_found_by_its_correlation_id_again_and_again(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    again = shop.eda.reply(reply.correlation_id)
    assert not again.done
    shop.answer(reply.correlation_id, {"result": [7]})

    assert again.done
    assert reply.get(timeout=BOUND) == again.get(timeout=BOUND) == [7]
    assert asyncio.run(_await(shop.eda.reply(reply.correlation_id))) == [7]


def test_a_durable_error_is_raised_each_time(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    described = shop.eda.requests.remote_errors.to_wire(LookupError("no"))
    shop.answer(reply.correlation_id, {"error": described})

    for _ in range(2):
        with pytest.raises(LookupError, match="no"):
            shop.eda.reply(reply.correlation_id).get(timeout=1)


@in_a_loop
async def test_a_thousand_durable_replies_are_awaited_by_one_thread(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(eda_request_timeout=60)
    with shop.eda.transaction():
        replies = shop.eda.scatter(
            [shop.quote.s(number) for number in range(1000)], address="durable"
        ).each
    before = set(threading.enumerate())
    awaiting = [asyncio.ensure_future(_await(each)) for each in replies]
    while not set(threading.enumerate()) - before:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # more than one would have come by now
    threads = set(threading.enumerate()) - before
    with shop.eda.databases.engine.begin() as connection:
        for number, each in enumerate(replies):
            shop.eda.requests.store.record(
                connection, UUID(each.correlation_id), {"result": number}
            )

    assert await asyncio.gather(*awaiting) == list(range(1000))
    assert [each.name for each in threads] == ["celery_eda durable replies"]


def test_the_thread_that_looks_for_durable_replies_ends_once_nobody_waits(shop: Shop) -> None:
    before = threading.active_count()
    replies = shop.eda.scatter([shop.quote.s(number) for number in range(3)], address="durable")
    shop.answer(replies.each[0].correlation_id, {"result": 0})
    assert replies.each[0].get(timeout=BOUND) == 0
    with pytest.raises(RequestTimeout):
        replies.each[1].get(timeout=0.05)
    with pytest.raises(RequestTimeout):
        replies.get(timeout=0.05)

    eventually(lambda: threading.active_count() <= before, "the thread is gone")


def test_one_durable_reply_is_awaited_more_than_once(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(reply.get, BOUND) for _ in range(2)]
        waiting.append(threads.submit(shop.eda.reply(reply.correlation_id).get, 30))
        shop.answer(reply.correlation_id, {"result": 7})

        assert [each.result() for each in waiting] == [7, 7, 7]


def test_a_durable_reply_that_cannot_be_read_fails_nobody_else(shop: Shop) -> None:
    replies = shop.eda.scatter([shop.quote.s(1), shop.quote.s(2)], address="durable")
    broken, fine = replies.each
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(each.get, 30) for each in (broken, fine)]
        with shop.eda.databases.engine.begin() as connection:
            for each, outcome in ((broken, {"neither": 1}), (fine, {"result": 2})):
                shop.eda.requests.store.record(connection, UUID(each.correlation_id), outcome)

        with pytest.raises(ValueError, match="neither"):
            waiting[0].result()
        assert waiting[1].result() == 2


def test_waiting_for_a_durable_reply_survives_an_outage_of_the_database(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    tried = threading.Semaphore(0)
    away = [True]

    def refuse(*_: Any) -> None:
        if away:
            tried.release()
            raise OperationalError("SELECT 1", {}, OSError(), connection_invalidated=True)

    event.listen(shop.eda.databases.engine, "before_cursor_execute", refuse)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(reply.get, BOUND)
        for _ in range(2):
            assert tried.acquire(timeout=BOUND)
        away.clear()
        shop.answer(reply.correlation_id, {"result": 7})

        assert waiting.result() == 7


def test_what_is_wrong_with_the_database_is_told_to_who_waits(shop: Shop) -> None:
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    shop.eda.databases.tables.requests.drop(shop.eda.databases.engine)

    with pytest.raises(Exception, match="no such table"):
        reply.get(timeout=BOUND)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_forked_child_looks_for_durable_replies_by_a_thread_of_its_own(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "POLL", (2.0, 2.0))
    reply = shop.eda.request(shop.quote, (7,), address="durable")
    looked = threading.Event()
    event.listen(shop.eda.databases.engine, "checkin", lambda *_: looked.set())
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(reply.get, BOUND)
        assert looked.wait(BOUND)
        shop.answer(reply.correlation_id, {"result": 7})
        shop.eda.databases.engine.dispose()
        if not (child := os.fork()):  # while the thread rests: SQLite must not be in use
            try:
                os._exit(shop.eda.reply(reply.correlation_id).get(timeout=BOUND))
            finally:
                os._exit(1)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert waiting.result() == 7


@pytest.mark.parametrize("correlation_id", [NOBODYS, "124", ""])
def test_a_request_that_was_never_made_has_no_reply(shop: Shop, correlation_id: str) -> None:
    with pytest.raises(UnknownRequest):
        shop.eda.reply(correlation_id).get(timeout=1)


def test_a_service_without_a_name_has_no_durable_requests(tmp_path: Path) -> None:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'shop.db'}"

    with pytest.raises(ConfigurationError, match="eda_service"):
        EDA(app).request("stock.quote", address="durable")


@pytest.mark.parametrize(
    "arguments",
    [
        (NOBODYS, {"result": 7}),
        ("124", {"result": 7}),
        (7, {"result": 7}),
        (NOBODYS, {"result": 7, "error": {}}),
        (NOBODYS, {"error": {"type": 7}}),
        (NOBODYS, None),
    ],
)
def test_a_durable_reply_that_nobody_asked_for_is_dropped(
    shop: Shop, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "celery_eda"), shop.eda.transaction() as session:
        shop.eda.requests.receive_reply(session, *arguments)

    assert shop.noted() == 0
    assert len([each for each in caplog.records if "is dropped" in each.message]) == 1


def test_what_a_task_knows_of_its_call_can_be_pickled(shop: Shop) -> None:
    shop.quote.request.id = "its own"

    assert pickle.loads(pickle.dumps(shop.quote.request)).id == "its own"
