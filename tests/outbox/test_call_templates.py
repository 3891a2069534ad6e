"""A message filled into a template is the one that Celery would have made, byte for byte."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import wraps
from itertools import count
from json import loads as json_of
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, signals
from celery._state import _task_stack
from celery.app.routes import Router
from celery.utils.saferepr import saferepr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from kombu import Exchange, Queue
from kombu.utils import uuid as make_id
from sqlalchemy import select

from celery_eda import EDA
from celery_eda.core import context
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.core.silence import silenced
from celery_eda.databases.message_rows import to_row
from celery_eda.databases.upgrade import upgrade
from celery_eda.errors import PublishingForbidden
from celery_eda.outbox.capture.call_templates import CallTemplate, _shown

FRESH = Identity(UUID("0191d1d0-7bdc-7000-8000-000000000001"))
BROKERS = {"rabbitmq": "amqp://", "redis": "redis://", "other": "memory://"}


class Publishing:
    """An app, and what it publishes."""

    def __init__(self, broker: str, folder: Path) -> None:
        self.app = Celery("shop", broker=broker, set_as_current=False)
        self.app.conf.update(
            eda_database_url=f"sqlite:///{folder}/shop.db",
            task_routes={"pay": {"queue": "payments"}},
            task_create_missing_queues=True,
            task_queues=[Queue("orders", Exchange("events", "topic"), "order.placed")],
        )
        self.eda = EDA(self.app)

        @self.app.task(name="pay", shared=False)
        def pay(*args: Any, **kwargs: Any) -> None: ...

        @self.eda.task(name="order", key="number", priority=3, time_limit=60)
        def order(number: int, *rest: Any) -> None: ...

        self.pay, self.order = pay, order

    def publish(self, act: Callable[[], Any]) -> list[Message]:
        """What *act* publishes in a transaction."""
        collected = context.Collected()
        with context.scope_of(collected):
            act()
        return collected.messages


@pytest.fixture(scope="module", params=BROKERS.values(), ids=BROKERS.keys())
def publishing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Publishing:
    return Publishing(request.param, tmp_path_factory.mktemp("shop"))


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message has the same ids."""
    number = UUID("0191d1d0-7bdc-4000-8000-000000000002")
    monkeypatch.setattr(make_id, "__defaults__", (lambda: number,))
    monkeypatch.setattr(Identity, "fresh", classmethod(lambda _: FRESH))


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of the messages that Celery makes: of each it looks up the route."""
    names: list[str] = []
    route = Router.route

    def noted(router: Router, options: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return route(router, options, name, *rest)

    monkeypatch.setattr(Router, "route", noted)
    return names


@contextmanager
def all_by_celery() -> Iterator[None]:
    """Let Celery make each message: somebody wants to be told before."""

    def told(**_: Any) -> None: ...

    signals.before_task_publish.connect(told)
    try:
        yield
    finally:
        signals.before_task_publish.disconnect(told)


def filled(publishing: Publishing, routed: list[str], act: Callable[[], Any]) -> list[Message]:
    """What *act* publishes once its templates are known; Celery makes none of it."""
    publishing.publish(act)
    routed.clear()
    messages = publishing.publish(act)
    assert routed == []
    return messages


def rows(publishing: Publishing, messages: list[Message]) -> list[dict[str, Any]]:
    """What the outbox would keep of *messages*."""
    envelope_of = publishing.eda.outbox.store._envelope
    return [{**to_row(each), "envelope": envelope_of(each)} for each in messages]


json = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**63), 2**63) | some.text() | some.floats(),
    lambda some_json: some.lists(some_json) | some.dictionaries(some.text(), some_json),
    max_leaves=8,
)
options = some.fixed_dictionaries(
    {},
    optional={
        "queue": some.sampled_from(["payments", "100%"]),
        "priority": some.sampled_from([0, 9, None, True]),
        "serializer": some.sampled_from(["json", "yaml", None]),
        "shadow": some.sampled_from(["%s", "shown", None]),
        "ignore_result": some.booleans(),
        "delivery_mode": some.sampled_from([1, 2, "persistent"]),
        "time_limit": some.sampled_from([1, 1.5]),
        "key": some.sampled_from(["a", 7, None]),
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.lists(json), some.dictionaries(some.text(), json), options)
def test_a_message_is_the_one_that_celery_would_have_made(
    publishing: Publishing,
    routed: list[str],
    args: list[Any],
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> None:
    def act() -> None:
        publishing.pay.apply_async(args, kwargs, **options)

    with all_by_celery():
        by_celery = publishing.publish(act)
    ours = filled(publishing, routed, act)

    assert ours == by_celery
    assert rows(publishing, ours) == rows(publishing, by_celery)
    assert [list(each.headers) for each in ours] == [list(each.headers) for each in by_celery]


@given(
    some.lists(json).map(tuple) | some.lists(json) | some.dictionaries(some.text(), json),
    some.integers(0, 60) | some.just(1024),
    some.integers(0, 4),
)
def test_arguments_are_shown_as_celery_shows_them(arguments: Any, most: int, levels: int) -> None:
    assert _shown(arguments, most, levels) == saferepr(arguments, most, levels)


CALLS: dict[str, Callable[[Publishing], Any]] = {
    "delay": lambda it: it.pay.delay("ü€'\"%s", [1, None], a={"b": 1.5}),
    "no arguments": lambda it: it.pay.delay(),
    "a key, a priority and a time limit of the task's own": lambda it: it.order.delay(7, "%"),
    "by name": lambda it: it.app.send_task("pay", ("x" * 3000,)),
    "of a task that is not here": lambda it: it.app.send_task("elsewhere", (1,), {"a": 2}),
    "a signature": lambda it: it.order.s(7).apply_async(),
    "to a queue of an exchange": lambda it: it.pay.apply_async((1,), queue="orders"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_second_message_of_a_kind_is_made_without_celery(
    publishing: Publishing, routed: list[str], call: Callable[[Publishing], Any]
) -> None:
    with all_by_celery():
        by_celery = publishing.publish(lambda: call(publishing))
    ours = filled(publishing, routed, lambda: call(publishing))

    assert ours == by_celery
    assert rows(publishing, ours) == rows(publishing, by_celery)


def test_a_message_published_by_a_task_says_so(publishing: Publishing, routed: list[str]) -> None:
    def act() -> None:
        for root in ("first", None):
            publishing.order.push_request(id="its parent", root_id=root, called_directly=False)
            _task_stack.push(publishing.order)
            try:
                publishing.pay.delay(1)
            finally:
                _task_stack.pop()
                publishing.order.pop_request()

    with all_by_celery():
        by_celery = publishing.publish(act)
    ours = filled(publishing, routed, act)

    assert rows(publishing, ours) == rows(publishing, by_celery)
    assert [(each.headers["root_id"], each.headers["parent_id"]) for each in ours] == [
        ("first", "its parent"),
        ("its parent", "its parent"),
    ]


def test_equal_options_of_different_types_are_two_kinds(publishing: Publishing) -> None:
    def act() -> None:
        for priority in (1, 1, True, True):
            publishing.pay.apply_async((1,), priority=priority)

    with all_by_celery():
        by_celery = publishing.publish(act)

    assert rows(publishing, publishing.publish(act)) == rows(publishing, by_celery)


OWN_WAY: dict[str, Callable[[Publishing], Any]] = {
    "a delay": lambda it: it.pay.apply_async((1,), countdown=1),
    "a due time": lambda it: it.pay.apply_async((1,), eta=datetime.now(timezone.utc)),
    "a last moment": lambda it: it.pay.apply_async((1,), expires=60),
    "headers": lambda it: it.pay.apply_async((1,), headers={"mine": 1}),
    "a link": lambda it: it.pay.apply_async((1,), link=it.pay.si()),
    "an id": lambda it: it.pay.apply_async((1,), task_id="mine"),
    "a compression": lambda it: it.pay.apply_async((1,), compression="zlib"),
    "a reply's address": lambda it: it.pay.apply_async((1,), reply_to="somewhere"),
    "what follows": lambda it: (it.pay.si(1) | it.pay.si(2)).apply_async(),
    "a queue of the caller's": lambda it: it.pay.apply_async((1,), queue=Queue("mine")),
    "arguments of another kind": lambda it: it.app.send_task("pay", [], OrderedDict(a=1)),
}


@pytest.mark.parametrize("call", OWN_WAY.values(), ids=OWN_WAY.keys())
def test_what_is_not_like_another_one_is_celerys_own(
    publishing: Publishing, routed: list[str], call: Callable[[Publishing], Any]
) -> None:
    for times in (1, 2):
        (message,) = publishing.publish(lambda: call(publishing))

        assert routed == [message.task] * times


# ── what changes ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def known(tmp_path: Path, routed: list[str]) -> Publishing:
    """An app that has published a call of ``pay``."""
    it = Publishing("amqp://", tmp_path)
    for _ in range(2):
        it.publish(lambda: it.pay.delay(1))
    routed.clear()
    it.publish(lambda: it.pay.delay(1))
    assert routed == [], "its template is known"
    return it


def templates_of(publishing: Publishing) -> list[CallTemplate]:
    """What it knows of earlier calls."""
    templates = inspect.getclosurevars(publishing.app.send_task).nonlocals["templates"]
    return list(templates._templates.values())


def test_a_setting_that_changes_counts_at_once(known: Publishing, routed: list[str]) -> None:
    known.app.conf.task_repr_maxlevels = 1

    (message,) = known.publish(lambda: known.pay.delay([[1]]))

    assert message.headers["argsrepr"] == "([...],)"
    assert routed == ["pay"]


def test_what_is_learned_while_a_setting_changes_is_not_kept(
    known: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = Router.route

    def change_and_route(router: Router, *rest: Any) -> Any:
        known.app.conf.task_repr_maxlevels = 1
        return route(router, *rest)

    monkeypatch.setattr(Router, "route", change_and_route)

    known.publish(lambda: known.pay.apply_async((1,), priority=5))

    assert not templates_of(known)


def test_a_queue_that_is_declared_anew_counts_at_once(known: Publishing, routed: list[str]) -> None:
    known.app.amqp.queues.add(Queue("payments", routing_key="new"))

    known.publish(lambda: known.pay.delay(1))

    assert routed == ["pay"]


def test_another_router_counts_at_once(known: Publishing) -> None:
    class Elsewhere(Router):
        def route(self, options: Any, *args: Any, **kwargs: Any) -> Any:
            return {**super().route(options, *args, **kwargs), "priority": 8}

    known.app.amqp.router = Elsewhere(queues=known.app.amqp.queues, app=known.app)

    priorities = [
        known.publish(lambda: known.pay.delay(1))[0].properties["priority"] for _ in range(2)
    ]

    assert priorities == [8, 8]


def test_a_router_that_looks_at_arguments_is_asked_each_time(tmp_path: Path) -> None:
    it = Publishing("amqp://", tmp_path)
    it.app.conf.task_routes = lambda name, args, *_, **__: {"queue": args[0]}

    queues = [it.publish(lambda: it.pay.delay(to))[0].queue for to in ("a", "b", "a", "c")]  # noqa: B023

    assert queues == ["a", "b", "a", "c"]


def test_a_child_says_that_it_is_another_process(
    known: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = known.publish(lambda: known.pay.delay(1))
    child = os.getpid() + 1

    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: child)
        (after,) = known.publish(lambda: known.pay.delay(1))

    assert before.headers["origin"].startswith(f"gen{os.getpid()}@")
    assert after.headers["origin"].startswith(f"gen{child}@")


def test_another_thread_has_an_address_of_its_own(known: Publishing, routed: list[str]) -> None:
    found: list[Message] = known.publish(lambda: known.pay.delay(1))
    thread = Thread(target=lambda: found.extend(known.publish(lambda: known.pay.delay(1))))
    thread.start()
    thread.join()

    assert len({each.properties["reply_to"] for each in found}) == 2
    assert routed == []


def test_who_wants_to_be_told_of_each_message_is_told(known: Publishing) -> None:
    told: list[str] = []

    def tell(sender: str, headers: dict[str, Any], **_: Any) -> None:
        told.append(sender)
        headers["theirs"] = len(told)

    signals.before_task_publish.connect(tell)
    try:
        found = [known.publish(lambda: known.pay.delay(1))[0].headers["theirs"] for _ in range(2)]
    finally:
        signals.before_task_publish.disconnect(tell)

    assert (told, found) == (["pay", "pay"], [1, 2])


def test_nothing_is_published_where_nothing_may_be(known: Publishing) -> None:
    with silenced("A replay"), pytest.raises(PublishingForbidden):
        known.publish(lambda: known.pay.delay(1))


def test_a_task_that_is_called_wrongly_says_so(known: Publishing) -> None:
    known.publish(lambda: known.order.delay(1))

    with pytest.raises(TypeError, match="number"):
        known.publish(known.order.delay)


spans = count(1)


def traced(send_task: Any) -> Any:
    """What instrumentation makes of Celery's own function."""

    @wraps(send_task)
    def send_traced(*args: Any, **options: Any) -> Any:
        return send_task(*args, **{**options, "headers": {"span": next(spans)}})

    return send_traced


class Own(Celery):
    """Sends in a way of its own."""

    def send_task(self, *args: Any, **options: Any) -> Any:
        return super().send_task(*args, **options, headers={"span": next(spans)})


@pytest.mark.parametrize("kind", [Own, Celery])
def test_an_app_that_sends_in_its_own_way_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Celery]
) -> None:
    if kind is Celery:
        monkeypatch.setattr(Celery, "send_task", traced(Celery.send_task))
    app = kind(broker="amqp://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path}/shop.db"
    EDA(app)
    collected = context.Collected()
    with context.scope_of(collected):
        for _ in range(3):
            app.send_task("pay")

    assert len({each.headers["span"] for each in collected.messages}) == 3


def test_what_is_stored_outside_any_transaction_is_made_so_too(
    tmp_path: Path, routed: list[str]
) -> None:
    it = Publishing("amqp://", tmp_path)
    upgrade(it.eda.databases.engine, it.eda.databases.tables)
    it.app.conf.eda_send_after_commit = False

    for number in range(3):
        it.order.delay(number)

    assert routed == ["order", "order"], "the first one has Celery set itself up"
    with it.eda.databases.engine.connect() as connection:
        rows = connection.execute(select(it.eda.databases.tables.outbox).order_by("id")).all()
        assert [json_of(row.body)[0] for row in rows] == [[0], [1], [2]]


def test_a_form_does_not_keep_the_body_of_the_message_that_it_was_learned_from(
    known: Publishing,
) -> None:
    known.publish(lambda: known.pay.delay("x" * 10**6))

    assert [template.first.body for template in templates_of(known)] == [b""]
