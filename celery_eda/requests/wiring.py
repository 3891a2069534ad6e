"""Request and reply, as wired for one service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_eda.brokers import Brokers
from celery_eda.core import addresses, compression
from celery_eda.core.limits import Limits
from celery_eda.core.message import Message
from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Chore, Databases
from celery_eda.outbox import Outbox
from celery_eda.requests.client import RequestClient
from celery_eda.requests.durable import DurableReplies, ReplyListener, refuse_other_queue
from celery_eda.requests.mailbox import Mailbox
from celery_eda.requests.outcomes import ReplyReader
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.requests.responder import Responder
from celery_eda.requests.store import RequestStore
from celery_eda.requests.watcher import ReplyWatcher


class Requests:
    """Both sides of request/reply for one service.

    Attributes:
        listeners: receive the replies to durable requests before they are recorded.
    """

    def __init__(
        self, service: Service, databases: Databases, brokers: Brokers, outbox: Outbox
    ) -> None:
        self._service = service
        self._databases = databases
        self._brokers = brokers
        self._outbox = outbox
        self.listeners: list[ReplyListener] = []
        service.add(self)
        outbox.companions.append(self)
        outbox.retained.append(self)

    def record(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Record the durable requests among *messages*."""
        self.store.add(connection, messages)

    def receive_reply(self, session: Session, correlation_id: str, outcome: Any) -> None:
        """Record the reply to a durable request, in the transaction of its message.

        Raises:
            Malformed: the message did not come over the queue of replies to this service.
        """
        refuse_other_queue(addresses.of_service(self._service.name))
        self.durable_replies.receive(session, correlation_id, outcome)

    @cached_once
    def store(self) -> RequestStore:
        """The durable requests of this service."""
        name = self._service.name_or_none
        return RequestStore(
            table=self._databases.tables.requests,
            dialect=self._databases.dialect,
            address=addresses.of_service(name) if name else None,
            serializer=self._service.app.conf.result_serializer,
        )

    @cached_once
    def client(self) -> RequestClient:
        """Makes requests."""
        return RequestClient(
            service=self._service,
            outbox=self._outbox,
            watcher=self.watcher,
            mailbox=self.mailbox,
        )

    @cached_once
    def mailbox(self) -> Mailbox:
        """Receives the replies to this process."""
        return Mailbox(self._brokers, self.reader)

    @cached_once
    def watcher(self) -> ReplyWatcher:
        """Polls for the durable replies that this process awaits."""
        return ReplyWatcher(self._databases.engine, self.store, self.reader)

    @cached_once
    def durable_replies(self) -> DurableReplies:
        """Receives the replies to durable requests."""
        return DurableReplies(self.reader, self.store, self.listeners)

    @cached_once
    def reader(self) -> ReplyReader:
        """Decodes and checks replies."""
        settings, conf = self._service.settings, self._service.app.conf
        compression.limit_decompression(settings.max_decompressed_bytes, settings.max_message_bytes)
        limits = Limits(settings.max_message_bytes, settings.max_nesting, settings.max_items)
        accept = conf.result_accept_content or conf.accept_content
        return ReplyReader.of(limits, accept, self.remote_errors)

    @cached_once
    def responder(self) -> Responder:
        """Replies to requests."""
        return Responder(self._service, self.remote_errors)

    @cached_once
    def remote_errors(self) -> RemoteErrors:
        """The types of errors that travel with replies."""
        return RemoteErrors()

    def retention(self) -> list[Chore]:
        """The rule for durable requests."""
        return [self.store.retention(self._service.settings.request_retention)]
