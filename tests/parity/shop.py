"""One shop, twice: as a plain Celery app, and as the same app with celery_eda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from celery import Celery, Task, group
from kombu import Exchange, Queue
from kombu.common import Broadcast
from kombu.transport.native_delayed_delivery import (
    declare_native_delayed_delivery_exchanges_and_queues,
)
from kombu.utils.imports import symbol_by_name
from sqlalchemy import delete, select

from celery_eda import EDA
from celery_eda.brokers.base import CONFIRMED
from celery_eda.brokers.registry import transport_of
from celery_eda.core.message import Message
from celery_eda.databases import upgrade
from celery_eda.databases.message_rows import from_row
from celery_eda.outbox import result_backend

#: A queue that is configured nowhere, and one that hears a broadcast.
STALL = Queue("stall", Exchange("market"), routing_key="left")
LISTENER = Queue("listener", Exchange("everyone", type="fanout"))


class Proud(Task):
    """A user's own task class."""

    abstract = True
    priority = 3


def choose_route(name: str, *arguments: Any, **options: Any) -> dict[str, Any] | None:
    """A user's own router."""
    return {"queue": "kitchen", "priority": 7} if name == "shop.routed" else None


def refresh(number: int) -> int:
    return number


class Shop:
    """The shop as plain Celery runs it."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        app._local.oid = "the-shop"  # else it is made from the app's address in memory
        # Not shared: a shared task is one of every later app of this process, too.
        self.declare_tasks(partial(app.task, shared=False))
        # A reliable task cannot be called by way of a broadcast.
        app.task(name="shop.refresh", shared=False)(refresh)

    def declare_tasks(self, task: Callable[..., Any]) -> None:
        @task(name="shop.add")
        def add(x: int, y: int) -> int:
            return x + y

        @task(name="shop.total")
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        @task(name="shop.note")
        def note(*args: Any, **kwargs: Any) -> None:
            pass

        @task(name="shop.proud", base=Proud)
        def proud(x: int) -> int:
            return x

        @task(name="shop.routed")
        def routed(x: int) -> int:
            return x

        @task(name="shop.quiet", ignore_result=True, serializer="pickle", time_limit=30)
        def quiet(x: int) -> int:
            return x

        @task(name="shop.fail")
        def fail(*args: Any) -> None:
            raise ValueError("burnt")

        @task(name="shop.again", bind=True)
        def again(self: Any, x: int) -> None:
            raise self.retry(countdown=5)

        @task(name="shop.insist", bind=True)
        def insist(self: Any, x: int) -> None:
            raise self.retry(args=(x + 1,), exc=ValueError(), queue="kitchen", headers={"a": "b"})

        @task(name="shop.busy")
        def busy() -> None:
            add.delay(1, 2)
            self.app.send_task("elsewhere.note", ("in a task",), priority=2)
            (add.s(1, 2) | add.s(3)).delay()

        @task(name="shop.swap", bind=True)
        def swap(self: Any, how: str) -> None:
            swapped = {
                "task": add.s(1, 2),
                "chain": add.s(1, 2) | add.s(3),
                "group": group(add.s(1, 1), add.s(2, 2)),
                "chord": group(add.s(1, 1), add.s(2, 2)) | total.s(),
            }
            raise self.replace(swapped[how])

        @task(name="shop.mourn_old")
        def mourn_old(task_id: str) -> None:
            """An errback of the old style, which is published."""

        @task(name="shop.mourn_new")
        def mourn_new(request: Any, error: Exception, traceback: Any) -> None:
            """An errback of the new style: called, not published; it publishes itself."""
            note.delay("alas")

        self.__dict__.update(
            {name: each for name, each in locals().items() if isinstance(each, Task)}
        )

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[f"shop.{name}"]

    def transaction(self) -> AbstractContextManager[Any]:
        """What the shop publishes in."""
        return nullcontext()

    def send(self) -> None:
        """Let leave what was published."""

    def work(self) -> None:
        """Handle one message, as a worker's pool does."""
        with self.app.connection_for_read() as connection:
            message = self._received(connection.default_channel)
            settled = lambda *_, **__: message.ack()  # noqa: E731
            request = symbol_by_name(self.app.tasks[message.headers["task"]].Request)
            request(message, app=self.app, on_ack=settled, on_reject=settled).execute()

    def _received(self, channel: Any) -> Any:
        for queue in self.queues:
            while message := queue.bind(channel).get(accept=self.app.conf.accept_content):
                if message.headers["task"] != "celery.chord_unlock":
                    return message
                message.ack()
        raise LookupError("no message in any queue")

    def open(self, *, delays: bool) -> None:
        """Declare whatever messages are sent to.

        With the connection that publishes: on Redis no other one learns the type of an exchange.
        """
        with self.app.pool.acquire(block=True) as connection:
            for queue in self.queues:
                queue.bind(connection.default_channel).declare()
            if delays:
                declare_native_delayed_delivery_exchanges_and_queues(connection, "classic")

    @property
    def queues(self) -> list[Queue]:
        """The queues that something can be read from."""
        known = self.app.amqp.queues.values()
        return [*(each for each in known if not isinstance(each, Broadcast)), STALL, LISTENER]


class OutboxShop(Shop):
    """The same with celery_eda: what it publishes goes through the outbox."""

    def __init__(self, app: Celery) -> None:
        self.eda = EDA(app)
        super().__init__(app)
        upgrade.upgrade(self.eda.databases.engine, self.eda.databases.tables)
        self.transport = transport_of(app, timeout=10)

    def declare_tasks(self, task: Callable[..., Any]) -> None:
        super().declare_tasks(self.eda.task)

    def transaction(self) -> AbstractContextManager[Any]:
        return self.eda.transaction()

    def send(self) -> None:
        """Send all that is in the outbox, whether it is due or not."""
        messages = self.empty_outbox()
        for each in messages:
            result_backend.run_prerequisites(self.app, each.prerequisites, each.identity)
        answers = self.transport.publish(messages)
        assert answers == [CONFIRMED] * len(messages), answers

    def empty_outbox(self) -> list[Message]:
        """What is in the outbox, in the order of publishing."""
        table = self.eda.databases.tables.outbox
        with self.eda.databases.engine.begin() as connection:
            rows = connection.execute(select(table).order_by(table.c.id)).all()
            connection.execute(delete(table))
        return [from_row(row) for row in rows]


def configured(broker: str, results: str, database: str, *, quorum: bool) -> Celery:
    """An app; both shops get one of these."""
    kind = "topic" if quorum else "direct"
    arguments = {"x-queue-type": "quorum"} if quorum else None
    app = Celery("shop", broker=broker, backend=results, set_as_current=False)
    app.conf.update(
        task_queues=[
            Queue("shop", Exchange("shop", type=kind), "shop", queue_arguments=arguments),
            Queue("kitchen", Exchange("kitchen"), "stove"),
            Queue("orders", Exchange("events", type="topic"), "order.#"),
            Queue("all", Exchange("fan", type="fanout"), ""),
            Queue("ranked", Exchange("ranked"), "ranked", max_priority=10),
            Broadcast("everyone"),
        ],
        task_default_queue="shop",
        task_default_exchange="shop",
        task_default_exchange_type=kind,
        task_default_routing_key="shop",
        task_routes=[{"shop.proud": {"queue": "kitchen"}}, choose_route],
        task_inherit_parent_priority=True,
        task_remote_tracebacks=False,
        accept_content=["json", "pickle", "msgpack", "yaml"],
        # Plain Celery too is told when a message is in its queue: only then is it looked for there.
        broker_transport_options={"confirm_publish": True},
        eda_database_url=database,
        eda_send_after_commit=False,
    )
    return app
