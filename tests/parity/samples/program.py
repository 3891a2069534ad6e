"""A small shop that uses all of celery_eda once; only names that users know occur here.

It runs in three stages, so that another version can go on where one has stopped:
:meth:`Shop.publish` leaves everything in the outbox, :meth:`Shop.begin` handles some of it and
leaves a parked message, held keys, open dead letters, waiting sagas and requests without a reply,
and :meth:`Shop.finish` brings all to its end.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

from celery import Celery, group
from celery.exceptions import Ignore, Reject
from kombu import Queue
from kombu.utils.imports import symbol_by_name
from sqlalchemy import Column, Integer, MetaData, String, Table

from celery_eda import EDA, Event, RetryPolicy
from tests.parity.samples import reading

user_tables = MetaData()
#: What the shop's projection keeps: the total of each order.
totals = Table(
    "shop_totals",
    user_tables,
    Column("key", String(20), primary_key=True),
    Column("total", Integer, nullable=False),
)
#: Seconds until after every test: 31 years.
FAR = 1_000_000_000
#: The queues that the shop's workers take from, in the order in which they are emptied here.
QUEUES = (
    "shop",
    "eda.replies.shop",
    "eda.repair",
    "eda.on.shop.shop.follow_order",
    "eda.on.shop.shop.on_order",
    "eda.on.shop.shop.totals",
)
EXPENSIVE = 1000
UNWORTHY = -2
ACCEPTED = ["json", "yaml"]


class Refused(Exception):
    """An error of the shop's own, which travels with replies."""


class Shop:
    """One service named ``shop``, which also does the work of the others that it calls."""

    def __init__(self, broker: str, database: str) -> None:
        self.app = Celery("shop", broker=broker, backend="cache+memory://", set_as_current=False)
        self.app.conf.update(
            eda_database_url=database,
            eda_send_after_commit=False,
            task_default_queue="shop",
            # The name by default when the samples were stored.
            eda_repair_queue="eda.repair",
            accept_content=ACCEPTED,
        )
        self.app._local.oid = "0f9c1d52-0000-4000-8000-000000000000"
        self.eda = EDA(self.app)
        self.eda.register_error(Refused, "shop.Refused")
        self.define_tasks()
        self.define_subscriptions()
        self.define_sagas()
        self.app.finalize()

    # ── what it consists of ─────────────────────────────────────────────────────────────────

    def define_tasks(self) -> None:
        task = self.eda.task

        @task(name="shop.add")
        def add(x: int, y: int) -> int:
            return x + y

        @task(name="shop.total")
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        @task(name="shop.move", key="account")
        def move(account: str, number: int) -> int:
            if number < 0:
                raise Refused(f"{number} cannot be moved")
            return number

        @task(name="shop.later", policy=RetryPolicy(attempts=3, first=FAR, longest=FAR))
        def later(x: int) -> None:
            raise ValueError(f"{x} is not ready")

        @task(name="shop.insist", policy=RetryPolicy(attempts=2, first=0))
        def insist(x: int) -> None:
            raise ValueError(f"{x} is never ready")

        @task(name="shop.refuse")
        def refuse(how: str) -> None:
            raise Refused(how)

        @task(name="shop.reject")
        def reject() -> None:
            raise Reject("not wanted", requeue=False)

        @task(name="shop.ignore")
        def ignore() -> None:
            raise Ignore("not needed")

        @task(name="shop.give_back")
        def give_back() -> None:
            raise Reject("not now", requeue=True)

        @self.eda.repairs("shop.refuse", on=Refused)
        def repair(failure: Any) -> Any:
            match failure.args:
                case ["for a repair"]:
                    return failure.resubmit("for nothing")
                case ["for a person"]:
                    return failure.leave("a person is needed")
            return None

        @self.eda.repairs("shop.move", on=Refused)
        def skip(failure: Any) -> Any:
            return failure.skip("not worth it") if failure.args[1] == UNWORTHY else None

        del repair, skip
        self.add, self.total, self.move, self.later = add, total, move, later
        self.insist, self.refuse, self.reject = insist, refuse, reject
        self.ignore, self.give_back = ignore, give_back

    def define_subscriptions(self) -> None:
        @self.eda.on("order.*", name="shop.on_order")
        def on_order(event: Event) -> None:
            self.eda.emit("stock.taken", {"because_of": event.type}, key="spoon")

        @self.eda.on("order.#", name="shop.follow_order", ordered=True)
        def follow_order(event: Event) -> str:
            return f"{event.type} {event.key}"

        @self.eda.projection("order.#", table=totals, name="shop.totals")
        def keep_total(row: Any, event: Event) -> Any:
            return {"total": (row["total"] if row else 0) + event.data["amount"]}

    def define_sagas(self) -> None:
        @self.eda.task(name="shop.pay")
        def pay(number: int) -> dict[str, int]:
            if number >= EXPENSIVE:
                raise Refused("too expensive")
            return {"paid": number}

        @self.eda.task(name="shop.pay_back")
        def pay_back(number: int) -> str:
            return f"{number} paid back"

        @self.eda.task(name="shop.pack")
        def pack(number: int) -> str:
            return f"{number} packed"

        @self.eda.task(name="shop.unpack")
        def unpack(number: int) -> str:
            return f"{number} unpacked"

        def number(data: Any) -> dict[str, int]:
            return {"number": data["number"]}

        @self.eda.saga("wrapping")
        def wrapping(steps: Any) -> None:
            steps.step("wrap", "shop.pack", undo="shop.unpack", give=number)
            steps.sleep("dry", 0)

        @self.eda.saga("order", version=3)
        def order(steps: Any) -> None:
            steps.lock("shelf", lambda data: f"shelf {data['shelf']}")
            with steps.parallel("both"):
                with steps.branch():
                    steps.step("pack", "shop.pack", undo="shop.unpack", give=number)
                with steps.branch():
                    steps.saga("gift", wrapping, give=number)
            steps.wait_for("confirmed", timeout=FAR)
            with steps.when(lambda data: data["number"] > 1, "is_many"):
                steps.step("pay", "shop.pay", undo="shop.pay_back", give=number, timeout=FAR)
            steps.pivot()
            with steps.repeat(lambda data: False, name="never"):
                steps.step("nothing", "shop.add")

        self.wrapping, self.order = wrapping, order

    # ── what it does ────────────────────────────────────────────────────────────────────────

    def publish(self) -> None:
        """Publish one of everything."""
        eda, is_database = self.eda, self.app.conf.broker_url.startswith("eda+")
        with eda.transaction():
            self.add.delay(1, 2)
            self.add.apply_async((3, 4), priority=5, headers={"extra": "header"}, expires=FAR)
            self.add.apply_async((5, 6), countdown=FAR)
            self.add.apply_async((7, 8), compression="zlib")
            self.app.send_task("shop.add", (9, 10), queue="shop", serializer="yaml")
            for number in (1, 2, 3):
                self.move.delay("mine", number)
            self.move.delay("yours", -1)
            self.move.delay("yours", 2)
            self.move.delay("theirs", UNWORTHY)
            self.move.delay("theirs", 2)
            if not is_database:
                self.later.delay(1)
            self.insist.delay(2)
            for how in ("for a repair", "for a person", "for nothing"):
                self.refuse.delay(how)
            self.reject.delay()
            self.ignore.delay()
            self.give_back.delay()
            (group(self.add.s(1, 1), self.add.s(2, 2)) | self.total.s()).delay()
            (self.add.s(20, 1) | self.add.s(2)).delay()
        with eda.transaction():
            self.request = eda.request("shop.add", (11, 12), address="durable").correlation_id
            eda.request("shop.refuse", ("a request",), address="durable")
            eda.request("elsewhere.unknown", ("nobody answers",), address="durable", queue="away")
        with eda.transaction():
            for amount in (1, 2):
                eda.emit("order.placed", {"id": 7, "amount": amount}, key=7)
            eda.emit("order.closed", {"amount": 0}, key="8", correlation_id="all that")
            eda.emit("shop.opened", None)
        self.order.start({"number": 1, "shelf": "A"}, id="first")
        self.order.start({"number": 2, "shelf": "A"}, id="second")
        self.order.start({"number": EXPENSIVE, "shelf": "B"}, id="expensive")

    def begin(self) -> None:
        """Handle some of it. The first message of one key is left in its queue."""
        reading.note_subscriptions(self.eda)
        self.send()
        messages = self.take("shop")
        (left,) = [each for each in messages if each.headers["argsrepr"] == "('mine', 1)"]
        for message in messages:
            if message is not left:
                self.handle(message, "shop")
        self.work(8)
        left.reject(requeue=True)
        reading.keep_unreadable(self.eda, b"\xffno message")
        reading.give_positions(self.eda)
        reading.add_snapshot(self.eda, "order.7", "total", 2, 3)

    def finish(self) -> None:
        """Bring everything to its end."""
        self.order.signal("first", "confirmed", {"by": "a person"}, who="a person")
        self.order.signal("expensive", "confirmed")
        self.work(20)
        self.order.cancel("second", who="a person")
        self.work(20)
        reading.give_positions(self.eda)

    def close(self) -> None:
        """Drop its connections."""
        self.connection.release()
        self.eda.databases.engine.dispose()
        self.eda.databases.relay_engine.dispose()

    # ── as relays and workers do ────────────────────────────────────────────────────────────

    def send(self) -> None:
        """Send all that is due."""
        reading.send_due(self.eda)

    def work(self, rounds: int) -> None:
        """So many times, send what is due and handle what waits."""
        for _ in range(rounds):
            self.send()
            for queue in QUEUES:
                for message in self.take(queue):
                    self.handle(message, queue)

    def take(self, queue: str) -> list[Any]:
        """All messages of a *queue*, unacknowledged."""
        get = partial(Queue(queue, no_declare=True)(self.channel).get, accept=ACCEPTED)
        return list(iter(get, None))

    def handle(self, message: Any, queue: str) -> None:
        """Handle one message, as a worker's pool does."""
        # In memory the queues of several subscriptions share what a broker would have copied.
        message.headers = dict(message.headers)
        reading.address_event(self.eda, message, queue)
        if message.headers["task"] == "shop.give_back":
            message.delivery_info["redelivered"] = True

        def settle(*_: Any, **__: Any) -> None:
            message.ack()

        request = symbol_by_name(self.app.tasks[message.headers["task"]].Request)
        request(message, app=self.app, on_ack=settle, on_reject=settle).execute()

    @cached_property
    def connection(self) -> Any:
        return self.app.connection_for_read()

    @cached_property
    def channel(self) -> Any:
        return self.connection.channel()
