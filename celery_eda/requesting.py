"""The requester's side: a request leaves with the commit, and its reply finds the one who asked.

A request is an ordinary message that carries an address. It is always stored first: the queue of
its reply has to be there before it leaves.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from celery import Celery, Signature, Task

from celery_eda import addresses, context, results
from celery_eda.addresses import REPLY_HEADER, Kind
from celery_eda.errors import RequestError, UnknownRequest, UnsentRequest
from celery_eda.identity import Identity
from celery_eda.mailbox import Mailbox
from celery_eda.message import Message
from celery_eda.publishing import Publisher
from celery_eda.reading import Failed
from celery_eda.reply import Awaited, Outcome, Recorded, Replies, Reply
from celery_eda.reply_watcher import ReplyWatcher
from celery_eda.settings import Settings

#: Options that would make a correlation id or an address that others can guess or choose.
OURS = ("task_id", "correlation_id", "reply_to")


@dataclass(frozen=True)
class Requesting:
    """Asks for replies on behalf of one app.

    Attributes:
        service: asks for the name of this service, of which durable requests have need.
    """

    app: Celery
    watcher: ReplyWatcher
    mailbox: Callable[[], Mailbox]
    publisher: Publisher
    service: Callable[[], str]
    settings: Settings

    def ask(
        self,
        call: str | Task | Signature,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        address: str | None = None,
        **options: Any,
    ) -> Reply[Any]:
        """Ask for a reply to one call; see :meth:`celery_eda.EDA.request`."""
        kind = self._kind(address)
        with self.publisher.stored(f"A request of {_name_of(call)}", self._store_of(kind)):
            return self._ask(call, args, kwargs, kind, options)

    def scatter(
        self,
        calls: Iterable[Signature],
        *,
        need: int | None = None,
        address: str | None = None,
        **options: Any,
    ) -> Replies[Any]:
        """Ask for replies to many calls; see :meth:`celery_eda.EDA.scatter`."""
        several = list(calls)
        if not several or (need is not None and not 0 < need <= len(several)):
            raise RequestError(
                f"{len(several)} calls cannot give {need or 'any'} replies: give at least one "
                "call, and a `need` between 1 and their number."
            )
        kind = self._kind(address)
        with self.publisher.stored("A request to many", self._store_of(kind)):
            each = [self._ask(call, (), None, kind, options) for call in several]
        return Replies(each, need, self.settings.request_timeout)

    def find(self, correlation_id: str) -> Reply[Any]:
        """The reply to a durable request; see :meth:`celery_eda.EDA.reply`."""
        try:
            request = UUID(correlation_id)
        except ValueError as error:
            raise UnknownRequest(f"{correlation_id!r} is no correlation id.") from error
        return self._reply(str(request), Recorded(request, self.watcher), None)

    def _ask(
        self,
        call: str | Task | Signature,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        kind: Kind,
        options: dict[str, Any],
    ) -> Reply[Any]:
        self._refuse(call, options)
        if self.app.conf.task_always_eager and not isinstance(call, str):
            return self._ask_here(call, args, kwargs)
        correlation_id = uuid4()
        where, outcome = self._expect(correlation_id, kind)
        identity = Identity.fresh()
        headers = options.get("headers") or _options_of(call).get("headers") or {}
        options = {
            "ignore_result": True,
            **options,
            "task_id": str(correlation_id),
            "headers": {**headers, REPLY_HEADER: where},
            "eda_identity": identity,
        }
        try:
            if isinstance(call, str):
                self.app.send_task(call, tuple(args), kwargs or {}, **options)
            else:
                call.apply_async(tuple(args), kwargs or {}, **options)
        except BaseException:
            results.take_preparation()
            outcome.give_up()
            raise
        return self._reply(str(correlation_id), outcome, identity)

    def _ask_here(
        self, call: Task | Signature, args: Sequence[Any], kwargs: dict[str, Any] | None
    ) -> Reply[Any]:
        """The reply where ``task_always_eager`` has every task run where it is called."""
        end, future = call.apply(tuple(args), kwargs or {}), Future[Any]()
        future.set_result(end.result if end.successful() else Failed(end.result))
        return self._reply(end.id, Awaited(future, lambda: None), None)

    def _kind(self, address: str | None) -> Kind:
        try:
            return Kind(address or self.settings.reply_address)
        except ValueError as error:
            kinds = ", ".join(repr(each.value) for each in Kind)
            raise RequestError(f"address must be one of {kinds}, not {address!r}.") from error

    def _expect(self, correlation_id: UUID, kind: Kind) -> tuple[str, Outcome]:
        """Where the reply is to go, and where its outcome will be.

        The queue of the address is made by whoever sends the request, just before; here no broker
        is touched.
        """
        if kind is Kind.durable:
            where = addresses.of_service(self.service())
            results.precede(*results.declaration_of(self.app.amqp.queues[where]))
            return where, Recorded(correlation_id, self.watcher)
        mailbox = self.mailbox()
        future = mailbox.expect(str(correlation_id))
        forget = partial(mailbox.give_up, str(correlation_id))
        if kind is Kind.correlation:
            where = mailbox.address
        else:
            where = addresses.of_request(mailbox.address)
            mailbox.open(where)
            weakref.finalize(future, mailbox.shut, where)
            future.add_done_callback(lambda _: mailbox.shut(where))
        if not mailbox.is_open(where):
            results.precede("reply_queue", [where, self.settings.reply_expires])
        return where, Awaited(future, forget)

    def _refuse(self, call: str | Task | Signature, options: dict[str, Any]) -> None:
        """Refuse what nobody could reply to, or what would not be safe.

        Raises:
            RequestError: it cannot be asked for.
        """
        if isinstance(call, Signature) and call.subtask_type:
            raise RequestError(
                f"{call.task} is more than one task. Ask one task for a reply, or `eda.scatter` "
                "several; a task may let a chain or a chord answer for it by `self.replace`."
            )
        if given := [each for each in OURS if each in {**_options_of(call), **options}]:
            raise RequestError(
                f"A request cannot be given {', '.join(given)}: nobody must be able to guess its "
                "correlation id, or choose where its reply goes. Leave the option out."
            )
        name = _name_of(call)
        if name in self.app.tasks and not self.publisher.is_reliable(name):
            raise RequestError(
                f"{name} is an ordinary task, which sends no reply. Make it one of `@eda.task`, "
                "or name it in eda_tasks."
            )

    def _reply(
        self, correlation_id: str, outcome: Outcome, identity: Identity | None
    ) -> Reply[Any]:
        transaction = context.current_transaction() if identity else None

        def refuse_unsent() -> None:
            if identity is not None and context.holds(identity, transaction):
                raise UnsentRequest(
                    f"The request {correlation_id} leaves when its transaction commits, so its "
                    "reply cannot be waited for in that transaction. Wait after the `with` block, "
                    "or in a following task."
                )

        return Reply(correlation_id, outcome, refuse_unsent, self.settings.request_timeout)

    def _store_of(self, kind: Kind) -> Callable[[Sequence[Message]], None]:
        """What stores requests made outside any transaction."""
        return self.publisher.store if kind is Kind.durable else self._store_in_background

    def _store_in_background(self, messages: Sequence[Message]) -> None:
        """Store *messages*, without blocking the event loop if one runs here.

        Should that fail then, the ones who wait get to know.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.publisher.store(messages)
            return
        mailbox = self.mailbox()

        def store_or_tell() -> None:
            try:
                self.publisher.store(messages)
            except Exception as error:
                for each in messages:
                    mailbox.settle(each.headers["id"], Failed(error))

        loop.run_in_executor(None, store_or_tell)


def _options_of(call: str | Task | Signature) -> Mapping[str, Any]:
    return call.options if isinstance(call, Signature) else {}


def _name_of(call: str | Task | Signature) -> str:
    if isinstance(call, Signature):
        return str(call.task)
    return call if isinstance(call, str) else str(call.name)
