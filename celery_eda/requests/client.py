"""Requests: messages that carry a reply address and are sent when their transaction commits.

A request always passes through the outbox, because the queue of its reply must exist before the
request is sent.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from celery import Signature, Task

from celery_eda.core import addresses, context
from celery_eda.core.addresses import REPLY_HEADER, ReplyAddressKind
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.core.service import Service
from celery_eda.errors import RequestError, UnknownRequest
from celery_eda.outbox import Outbox, result_backend, stored
from celery_eda.requests.mailbox import Mailbox
from celery_eda.requests.outcomes import ErrorOutcome
from celery_eda.requests.reply import (
    CommitGuard,
    EagerReply,
    MailboxReply,
    PendingReply,
    Replies,
    Reply,
    StoredReply,
)
from celery_eda.requests.watcher import ReplyWatcher

#: Options that are refused: a caller could choose, or guess, a correlation id or an address.
_RESERVED = ("task_id", "correlation_id", "reply_to")


@dataclass(frozen=True)
class RequestClient:
    """Requester of replies on behalf of one service."""

    service: Service
    outbox: Outbox
    watcher: ReplyWatcher
    mailbox: Mailbox

    def ask(
        self,
        call: str | Task | Signature,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        address: str | None = None,
        **options: Any,
    ) -> Reply[Any]:
        """Request a reply to one call; see :meth:`celery_eda.EDA.request`."""
        kind = self._kind(address)
        with stored(self.outbox, f"A request of {_name_of(call)}", self._store_of(kind)):
            return self._ask(call, args, kwargs, kind, options)

    def scatter(
        self,
        calls: Iterable[Signature],
        *,
        need: int | None = None,
        address: str | None = None,
        **options: Any,
    ) -> Replies[Any]:
        """Request replies to several calls; see :meth:`celery_eda.EDA.scatter`."""
        several = list(calls)
        if not several or (need is not None and not 0 < need <= len(several)):
            raise RequestError(
                f"{len(several)} calls cannot give {need or 'any'} replies: give at least one "
                "call, and a `need` between 1 and their number."
            )
        kind = self._kind(address)
        with stored(self.outbox, "A request to many", self._store_of(kind)):
            each = [self._ask(call, (), None, kind, options) for call in several]
        return Replies(each, need, self.service.settings.request_timeout)

    def find(self, correlation_id: str) -> Reply[Any]:
        """The reply to a durable request; see :meth:`celery_eda.EDA.reply`."""
        try:
            request = UUID(correlation_id)
        except ValueError as error:
            raise UnknownRequest(
                f"{correlation_id!r} is no correlation id. Give the `correlation_id` of a Reply."
            ) from error
        return self._reply(str(request), StoredReply(request, self.watcher), None)

    def _ask(
        self,
        call: str | Task | Signature,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        kind: ReplyAddressKind,
        options: dict[str, Any],
    ) -> Reply[Any]:
        self._check(call, options)
        if self.service.app.conf.task_always_eager and not isinstance(call, str):
            return self._ask_here(call, args, kwargs)
        correlation_id = uuid4()
        where, pending = self._expect(correlation_id, kind)
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
                self.service.app.send_task(call, tuple(args), kwargs or {}, **options)
            else:
                call.apply_async(tuple(args), kwargs or {}, **options)
        except BaseException:
            result_backend.take_prerequisites()
            pending.cancel()
            raise
        return self._reply(str(correlation_id), pending, identity)

    def _ask_here(
        self, call: Task | Signature, args: Sequence[Any], kwargs: dict[str, Any] | None
    ) -> Reply[Any]:
        """Run the task in this process, as ``task_always_eager`` demands."""
        ended = call.apply(tuple(args), kwargs or {})
        outcome = ended.result if ended.successful() else ErrorOutcome(ended.result)
        return self._reply(ended.id, EagerReply(outcome), None)

    def _kind(self, address: str | None) -> ReplyAddressKind:
        try:
            return ReplyAddressKind(address or self.service.settings.reply_address)
        except ValueError as error:
            kinds = ", ".join(repr(each.value) for each in ReplyAddressKind)
            raise RequestError(f"address must be one of {kinds}, not {address!r}.") from error

    def _expect(self, correlation_id: UUID, kind: ReplyAddressKind) -> tuple[str, PendingReply]:
        """The address of the reply, and the reply.

        No broker is contacted here: the sender of the request declares the queue of the address
        just before it sends the request.
        """
        if kind is ReplyAddressKind.durable:
            where = addresses.of_service(self.service.name)
            result_backend.require_first(
                *result_backend.declaration_of(self.service.app.amqp.queues[where])
            )
            return where, StoredReply(correlation_id, self.watcher)
        mailbox = self.mailbox
        future = mailbox.expect(str(correlation_id))
        if kind is ReplyAddressKind.correlation:
            where = mailbox.address
        else:
            where = addresses.of_request(mailbox.address)
            mailbox.open(where)
            weakref.finalize(future, mailbox.discard, where)
            future.add_done_callback(lambda _: mailbox.discard(where))
        if not mailbox.is_open(where):
            result_backend.require_first(
                "reply_queue", [where, self.service.settings.reply_expires]
            )
        return where, MailboxReply(str(correlation_id), mailbox, future)

    def _check(self, call: str | Task | Signature, options: dict[str, Any]) -> None:
        """Raise if *call* cannot be answered, or *options* would make the request unsafe.

        Raises:
            RequestError: says which, and what to do instead.
        """
        if isinstance(call, Signature) and call.subtask_type:
            raise RequestError(
                f"{call.task} is more than one task. Request one task, or several with "
                "`eda.scatter`; a task may let a chain or a chord answer for it by `self.replace`."
            )
        if given := [each for each in _RESERVED if each in {**_options_of(call), **options}]:
            raise RequestError(
                f"A request takes no {', '.join(given)}: nobody must be able to guess its "
                "correlation id, or choose where its reply goes. Leave the option out."
            )
        name = _name_of(call)
        if name in self.service.app.tasks and not self.service.is_reliable(name):
            raise RequestError(
                f"{name} is an ordinary task, which sends no reply. Decorate it with `@eda.task`, "
                "or name it in eda_tasks."
            )

    def _reply(
        self, correlation_id: str, pending: PendingReply, identity: Identity | None
    ) -> Reply[Any]:
        """The reply; *identity* is that of a request made right now, None otherwise."""
        guard = None
        if identity is not None:
            guard = CommitGuard(correlation_id, identity, context.current_transaction())
        return Reply(correlation_id, pending, guard, self.service.settings.request_timeout)

    def _store_of(self, kind: ReplyAddressKind) -> Callable[[Sequence[Message]], None]:
        """The function that stores requests made outside any transaction."""
        return (
            self.outbox.writer.write_now
            if kind is ReplyAddressKind.durable
            else self._store_in_background
        )

    def _store_in_background(self, messages: Sequence[Message]) -> None:
        """Store *messages* without blocking an event loop that runs in this thread.

        If storing fails in the background, the error is raised where the reply is awaited.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.outbox.writer.write_now(messages)
            return
        mailbox = self.mailbox

        def store_or_fail() -> None:
            try:
                self.outbox.writer.write_now(messages)
            except Exception as error:
                for each in messages:
                    mailbox.settle(each.headers["id"], ErrorOutcome(error))

        loop.run_in_executor(None, store_or_fail)


def _options_of(call: str | Task | Signature) -> Mapping[str, Any]:
    return call.options if isinstance(call, Signature) else {}


def _name_of(call: str | Task | Signature) -> str:
    if isinstance(call, Signature):
        return str(call.task)
    return call if isinstance(call, str) else str(call.name)
